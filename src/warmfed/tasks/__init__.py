"""Tasks: the model, the loss and the metrics of a problem."""

from .classification import Classify

__all__ = ["Classify"]
