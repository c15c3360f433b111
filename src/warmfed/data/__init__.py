"""Federations: named sites with train, validation and test images, one tuple of class names, and a fingerprint."""

from .build import deal, save_partition
from .examples import DataError
from .federation import SPLITS, Federation, Roster, Site, told
from .load import load
from .readers.arrays import arrays, idx, npz
from .readers.digits4 import digits4
from .readers.huggingface import hub, parquet
from .readers.image_folder import camelyon17, csv, folder

__all__ = [
    "SPLITS", "DataError", "Federation", "Roster", "Site", "arrays", "camelyon17", "csv", "deal", "digits4", "folder", "hub",
    "idx", "load", "npz", "parquet", "save_partition", "told",
]  # fmt: skip
