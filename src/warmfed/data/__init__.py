"""Federations: named sites with train, validation and test images, one tuple of class names, and a fingerprint."""

from .assembly import deal, save_partition
from .digits4 import digits4
from .federation import SPLITS, Federation, Roster, Site, told
from .folders import camelyon17, csv, folder
from .hub import hub, parquet
from .plain import arrays, idx, npz
from .pool import DataError
from .sources import load

__all__ = [
    "SPLITS", "DataError", "Federation", "Roster", "Site", "arrays", "camelyon17", "csv", "deal", "digits4", "folder", "hub",
    "idx", "load", "npz", "parquet", "save_partition", "told",
]  # fmt: skip
