"""The algorithms: one module per paper, the registry, and shared building blocks in `shared`."""

from .registry import ALGORITHMS, Entry, entry
from .shared.ema import Smoothed
from .warmfed import WarmFed

__all__ = ["ALGORITHMS", "Entry", "Smoothed", "WarmFed", "entry"]
