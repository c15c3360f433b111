"""One reader for each way in which images are stored, and their registry: `data.source` names one of them."""

from collections.abc import Callable

from ..federation import Federation
from .arrays import idx, npz
from .digits4 import digits4
from .huggingface import hub, parquet
from .image_folder import folder
from .image_table import camelyon17, csv

READERS: dict[str, Callable[..., Federation]] = {
    "digits4": digits4, "folder": folder, "npz": npz, "idx": idx, "csv": csv, "camelyon17": camelyon17,
    "parquet": parquet, "hub": hub,
}  # fmt: skip
