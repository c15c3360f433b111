"""Networks: classifiers by name, and feature extractors for FID-style metrics."""

from .classifiers import (
    DATASTORE,
    MODELS,
    Remembering,
    Split,
    build,
    cnn,
    holding,
    initial,
    linear,
    named_by,
    parameters,
    pfllib_cnn,
    resnet18,
)
from .feature_extractors import FEATURE_EXTRACTORS

__all__ = [
    "DATASTORE",
    "FEATURE_EXTRACTORS",
    "MODELS",
    "Remembering",
    "Split",
    "build",
    "cnn",
    "holding",
    "initial",
    "linear",
    "named_by",
    "parameters",
    "pfllib_cnn",
    "resnet18",
]
