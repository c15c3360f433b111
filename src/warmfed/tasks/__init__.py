"""How to build a model, its loss and its metrics."""

from .classification import Classify

__all__ = ["Classify"]
