"""Federations: named sites with train, validation and test images, one tuple of class names, and a fingerprint."""

from .federation import SPLITS, Federation, Site
from .sources import arrays, digits4, folder, load, npz

__all__ = ["SPLITS", "Federation", "Site", "arrays", "digits4", "folder", "load", "npz"]
