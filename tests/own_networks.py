"""Networks of a user's own, by their import path: `python:own_networks:batch_norm`."""

import torch
from torch import Tensor, nn


def batch_norm(shape: tuple[int, int, int], classes: int) -> nn.Module:
    """Return a network whose normalisation has running statistics and a counter."""
    return nn.Sequential(
        nn.Conv2d(shape[0], 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(256, classes)
    )


def layer_norm(shape: tuple[int, int, int], classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, classes))


class Named(nn.Module):
    """A network with a frozen stem, and a head under a name of its own, inside."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1).requires_grad_(False)
        self.norm = nn.BatchNorm2d(4)
        self.top = nn.Sequential(nn.Dropout(0.5), nn.Linear(256, classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.top(self.norm(self.stem(x)).relu().flatten(1))


def without_bias(shape: tuple[int, int, int], classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.Tanh(), nn.Linear(8, classes, bias=False))


def named(shape: tuple[int, int, int], classes: int) -> nn.Module:
    return Named(classes)


def without_head(shape: tuple[int, int, int], classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 7))


def after_head(shape: tuple[int, int, int], classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(192, classes), nn.Softmax(-1))


def of_another_size(shape: tuple[int, int, int], classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(5, classes))


def failing(shape: tuple[int, int, int], classes: int) -> nn.Module:
    raise RuntimeError("out of ideas")


def number(shape: tuple[int, int, int], classes: int) -> int:
    return 3


def pretrained(shape: tuple[int, int, int], classes: int) -> nn.Module:
    """Return a network whose body always has the same weights, as from a file."""
    state = torch.get_rng_state()
    torch.manual_seed(7)
    body = [nn.Conv2d(shape[0], 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(256, 12), nn.ReLU()]
    torch.set_rng_state(state)
    return nn.Sequential(*body, nn.Linear(12, classes))
