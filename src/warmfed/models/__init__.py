"""The networks: classifiers by name, and feature extractors for scores of images."""

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
from .feature_extractors import EYES

__all__ = [
    "DATASTORE", "EYES", "MODELS", "Remembering", "Split", "build", "cnn", "holding", "initial", "linear", "named_by",
    "parameters", "pfllib_cnn", "resnet18",
]  # fmt: skip
