"""The algorithms: one file for each paper, their registry, and in `shared` what several have in common."""

from .registry import ALGORITHMS, Entry, entry
from .shared.ema import Smoothed
from .warmfed import WarmFed

__all__ = ["ALGORITHMS", "Entry", "Smoothed", "WarmFed", "entry"]
