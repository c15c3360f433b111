"""Feature extractors for FID-style metrics; their public weights are .npz files.

Each network takes uint8 images [n, 3, h, w], normalises them for its weights, and returns the features before its head,
float [n, width].
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LeNet(nn.Module):
    """LeNet-5 with ReLU and max pooling, on grey 32×32 images in [0, 1]; returns the 84 units before the head."""

    def __init__(self) -> None:
        super().__init__()
        self.convnet = nn.ModuleDict({"c1": nn.Conv2d(1, 6, 5), "c3": nn.Conv2d(6, 16, 5), "c5": nn.Conv2d(16, 120, 5)})
        self.fc = nn.ModuleDict({"f6": nn.Linear(120, 84), "f7": nn.Linear(84, 10)})

    def forward(self, image: Tensor) -> Tensor:
        x = F.interpolate(image.float().mean(1, keepdim=True) / 255, size=(32, 32), mode="bilinear", antialias=False)
        x = F.max_pool2d(F.relu(self.convnet["c1"](x)), 2)
        x = F.max_pool2d(F.relu(self.convnet["c3"](x)), 2)
        return F.relu(self.fc["f6"](F.relu(self.convnet["c5"](x)).flatten(1)))


class _Block(nn.Module):
    """Two convolutions and a shortcut without parameters (option A of He et al.)."""

    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        self.stride, self.more = 1 if inside == outside else 2, outside - inside
        self.conv1 = nn.Conv2d(inside, outside, 3, self.stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outside)

    def forward(self, x: Tensor) -> Tensor:
        short = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.more // 2, self.more // 2))
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + short)


def _blocks(inside: int, outside: int) -> nn.Sequential:
    return nn.Sequential(_Block(inside, outside), _Block(outside, outside), _Block(outside, outside))


class ResNet20(nn.Module):
    """ResNet-20 for CIFAR-10 (He et al., CVPR 2016), on images with ImageNet's normalisation; returns 64 pooled channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1, self.layer2, self.layer3 = _blocks(16, 16), _blocks(16, 32), _blocks(32, 64)
        self.linear = nn.Linear(64, 10)

    def forward(self, image: Tensor) -> Tensor:
        mean, spread = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        x = (image.float() / 255 - mean[:, None, None]) / spread[:, None, None]
        x = F.relu(self.bn1(self.conv1(x)))
        deep: Tensor = self.layer3(self.layer2(self.layer1(x)))
        return deep.mean((2, 3))


FEATURE_EXTRACTORS: dict[str, Callable[[], nn.Module]] = {"lenet": LeNet, "resnet20": ResNet20}
"""Feature extractors by name; the names of the weights in a file identify the network."""
