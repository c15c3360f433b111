"""Networks: classifiers by name, and feature extractors for FID-style metrics."""

from .classifiers import (
    DATASTORE,
    MODELS,
    Remembering,
    Split,
    build,
    cnn,
    frozen_names,
    holding,
    initial,
    linear,
    named_by,
    parameters,
    pfllib_cnn,
    pixels,
    resnet18,
)
from .feature_extractors import FEATURE_EXTRACTORS
from .network import PYTHON, Partial, check_trainable, copied, network, outside, part_trained
from .pretrained import BACKBONE

__all__ = [
    "BACKBONE",
    "DATASTORE",
    "FEATURE_EXTRACTORS",
    "MODELS",
    "PYTHON",
    "Partial",
    "Remembering",
    "Split",
    "build",
    "check_trainable",
    "cnn",
    "copied",
    "frozen_names",
    "holding",
    "initial",
    "linear",
    "named_by",
    "network",
    "outside",
    "parameters",
    "part_trained",
    "pfllib_cnn",
    "pixels",
    "resnet18",
]
