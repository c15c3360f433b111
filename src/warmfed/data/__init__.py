"""Federations: named sites with train, validation and test images, one tuple of class names, and a fingerprint."""

from ..core import SPLITS
from .build import partition, save_partition
from .class_skew import hold_classes
from .examples import DataError
from .federation import Federation, FederationInfo, Site, describe_names
from .load import load
from .readers.arrays import arrays, idx, npz
from .readers.digits4 import digits4
from .readers.huggingface import hub, parquet
from .readers.image_folder import folder
from .readers.image_table import camelyon17, csv

__all__ = [
    "SPLITS",
    "DataError",
    "Federation",
    "FederationInfo",
    "Site",
    "arrays",
    "camelyon17",
    "csv",
    "describe_names",
    "digits4",
    "folder",
    "hold_classes",
    "hub",
    "idx",
    "load",
    "npz",
    "parquet",
    "partition",
    "save_partition",
]
