"""Classifiers by name.

They use GroupNorm: its statistics do not depend on the batch, and it has no buffers to average.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.tensors import Tensors, strip_prefix
from ..utils.errors import InputError, suggest


def pixels(image: Tensor) -> Tensor:
    """Return uint8 images [n, c, h, w] as float [n, c, h, w] in [-1, 1].

    The result is contiguous, since the memory layout changes the last bits of a convolution.
    """
    return image.contiguous().float().div_(127.5).sub_(1)


class Split(nn.Module):
    """A backbone `body` and a linear `head`; personalised methods select tensors by these two names."""

    def __init__(self, body: nn.Module, width: int, classes: int) -> None:
        super().__init__()
        self.body = body
        self.head = nn.Linear(width, classes)

    def features(self, x: Tensor) -> Tensor:
        """Return features, float [n, width], of images float [n, c, h, w] in [-1, 1]; features are returned as they are."""
        return x if x.dim() == 2 else self.body(x)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits, float [n, classes]."""
        return self.head(self.features(x))


def _block(inside: int, outside: int) -> list[nn.Module]:
    return [nn.Conv2d(inside, outside, 3, padding=1), nn.GroupNorm(8, outside), nn.ReLU(), nn.MaxPool2d(2)]


def cnn(shape: tuple[int, int, int], classes: int, width: int = 16) -> Split:
    """Return three convolutions with GroupNorm and pooling, and a hidden layer of 128 units: 0.16 M parameters at 32×32."""
    channels, height, w = shape
    body = nn.Sequential(
        *_block(channels, width),
        *_block(width, 2 * width),
        *_block(2 * width, 4 * width),
        nn.Flatten(),
        nn.Linear(4 * width * (height // 8) * (w // 8), 128),
        nn.ReLU(),
    )
    return Split(body, 128, classes)


def linear(shape: tuple[int, int, int], classes: int) -> Split:
    """Return logistic regression on the pixels."""
    return Split(nn.Flatten(), shape[0] * shape[1] * shape[2], classes)


def pfllib_cnn(shape: tuple[int, int, int], classes: int) -> Split:
    """Return PFLlib's four-layer CNN of McMahan et al. for MNIST: 582,026 parameters at 1×28×28."""
    channels, height, width = shape
    body = nn.Sequential(
        nn.Conv2d(channels, 32, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * ((height - 4) // 2 - 4) // 2 * (((width - 4) // 2 - 4) // 2), 512),
        nn.ReLU(),
    )
    return Split(body, 512, classes)


def _convolution(inside: int, outside: int, size: int, stride: int) -> list[nn.Module]:
    return [nn.Conv2d(inside, outside, size, stride, size // 2, bias=False), nn.GroupNorm(32, outside)]


class _Residual(nn.Module):
    """Two convolutions and a shortcut; the shortcut is a 1×1 convolution if the shape changes."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*_convolution(inside, outside, 3, stride), nn.ReLU(), *_convolution(outside, outside, 3, 1))
        changes = stride > 1 or inside != outside
        self.shortcut = nn.Sequential(*_convolution(inside, outside, 1, stride)) if changes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.layers(x) + self.shortcut(x))


def resnet18(shape: tuple[int, int, int], classes: int) -> Split:
    """Return ResNet-18 (He et al., CVPR 2016) with GroupNorm: 11.2 M parameters, for images of 64 pixels or more."""
    levels = ((64, 64, 1), (64, 128, 2), (128, 256, 2), (256, 512, 2))
    blocks = [block for i, o, stride in levels for block in (_Residual(i, o, stride), _Residual(o, o, 1))]
    first = [*_convolution(shape[0], 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    return Split(nn.Sequential(*first, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten()), 512, classes)


DATASTORE = "datastore."
"""Prefix of the names of a model's datastore tensors."""


class Remembering(nn.Module):
    """A `Split` network with a datastore: the k nearest rows of the datastore vote on its prediction (kNN-Per).

    Shapes:
        Its tensors, after "datastore.": features, float [n, width]; labels, int64 [n]; and the scalars neighbours (k),
        scale (σ) and share (λ).
    """

    def __init__(self, net: Split, datastore: Tensors) -> None:
        super().__init__()
        self.net, self.datastore = net, nn.Module()
        for name, tensor in datastore.items():
            self.datastore.register_buffer(name, tensor)

    def features(self, x: Tensor) -> Tensor:
        """Return the network's features, float [n, width]."""
        return self.net.features(x)

    def forward(self, x: Tensor) -> Tensor:
        """Return log(λ·p_knn + (1 - λ)·p_net), float [n, classes]; p_knn weights a neighbour at distance d by exp(-d/σ)."""
        store, features = dict(self.datastore.named_buffers()), self.net.features(x)
        probability = self.net.head(features).softmax(-1)
        count = min(int(store["neighbours"]), len(store["labels"]))
        near = torch.cdist(features, store["features"], compute_mode="donot_use_mm_for_euclid_dist").topk(count, largest=False)
        weight = (-near.values / store["scale"]).softmax(-1)
        named = F.one_hot(store["labels"][near.indices], probability.shape[1])
        votes = (weight.unsqueeze(-1) * named).sum(1)  # on a GPU, the last bits of a scatter_add differ between runs
        return torch.lerp(probability, votes, store["share"]).log().clamp_min(-80)


MODELS: dict[str, Callable[[tuple[int, int, int], int], nn.Module]] = {
    "cnn": cnn, "linear": linear, "pfllib-cnn": pfllib_cnn, "resnet18": resnet18
}  # fmt: skip


def build(name: str, shape: tuple[int, int, int], classes: int) -> nn.Module:
    """Return a network by name; its weights come from torch's global random stream.

    Args:
        name: a key of `MODELS`.
        shape: (channels, height, width) of an image.
        classes: number of classes.

    Raises:
        InputError: if `name` is not in `MODELS`.
    """
    if name not in MODELS:
        raise InputError(f"there is no model {name!r}{suggest(name, list(MODELS))}")
    return MODELS[name](shape, classes)


def named_by(tensors: Tensors) -> str | None:
    """Return the name of the network with these tensor names, or None if it is not in `MODELS`."""
    with torch.device("meta"):
        return next((name for name in MODELS if initial(build(name, (3, 64, 64), 2)).keys() == tensors.keys()), None)


def holding(net: nn.Module, tensors: Tensors) -> nn.Module:
    """Return the network in evaluation mode with these tensors, as a `Remembering` one if they include a datastore.

    Tensors that are not part of the model (`frozen_names`) stay as they are.
    """
    given = {name: value for name, value in tensors.items() if not name.startswith(DATASTORE)}
    left = frozen_names(net)
    net.load_state_dict({**given, **{name: value for name, value in net.state_dict().items() if name in left}})
    store = strip_prefix(tensors, DATASTORE)
    return (Remembering(net, store) if store else net).eval()  # type: ignore[arg-type]


def parameters(model: nn.Module) -> int:
    """Return the number of parameters."""
    return sum(p.numel() for p in model.parameters())


def frozen_names(net: nn.Module) -> frozenset[str]:
    """Return the names of the tensors that are not part of the model that is trained and sent.

    They are those of a frozen part, and all whole numbers, which count steps.
    """
    whole = {name for name, value in net.state_dict().items() if not value.is_floating_point()}
    return frozenset(getattr(net, "frozen", frozenset()) | whole)


def initial(model: nn.Module) -> dict[str, Tensor]:
    """Return a copy of the tensors that are trained and sent, by name."""
    left = frozen_names(model)
    return {name: value.detach().clone() for name, value in model.state_dict().items() if name not in left}
