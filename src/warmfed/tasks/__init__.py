"""How to build a model, its loss and its metrics."""

from .classify import Classify

__all__ = ["Classify"]
