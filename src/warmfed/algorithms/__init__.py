"""The algorithms: one module per paper, the registry, and shared building blocks in `shared`."""

from .registry import ALGORITHMS, entry
from .shared.ema import Smoothed
from .shared.entry import Entry
from .warmfed import WarmFed

__all__ = ["ALGORITHMS", "Entry", "Smoothed", "WarmFed", "entry"]
