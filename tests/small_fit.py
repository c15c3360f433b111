"""A small training problem of rows of four numbers."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from warmfed.core import ServerContext
from warmfed.core.rng import stream
from warmfed.core.tensors import Table, Tensors
from warmfed.core.training import Training
from warmfed.fit import fit


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(x)))


@dataclass(frozen=True)
class Rows:
    """Classification of rows of four numbers."""

    make: Callable[[], nn.Module] = Net

    def build(self) -> nn.Module:
        return self.make()

    def loss(self, model: nn.Module, batch: Table) -> Tensor:
        return F.cross_entropy(model(batch["x"]), batch["y"])


DATA = {"x": torch.randn(10, 4, generator=stream("x")), "y": torch.arange(10) % 3}


START = {
    name: torch.randn(shape, generator=stream(name)) / 2
    for name, shape in {"body.weight": (5, 4), "body.bias": (5,), "head.weight": (3, 5), "head.bias": (3,)}.items()
}


SGD = Training(lr=0.1, momentum=0.9, weight_decay=0.01, epochs=2, batch_size=4)


def ctx(task: Rows = Rows()) -> ServerContext:
    return ServerContext(task, stream("fit"))


def same(a: Tensors, b: Tensors) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def close(a: Tensors, b: Tensors, atol: float = 1e-6) -> bool:
    return a.keys() == b.keys() and all(torch.allclose(a[name], b[name], atol=atol) for name in a)


def rates(training: Training) -> list[float]:
    """The learning rate of each step, read from what one step of plain SGD moves under a gradient of one."""
    marks = [START["head.bias"]]
    fit(
        ctx(),
        START,
        replace(training, momentum=0.0, lr=1.0),
        DATA,
        correct=lambda name, gradient: torch.ones_like(gradient),
        watch=lambda step, steps, tensors: marks.append(tensors()["head.bias"]),
    )
    return [(before - after)[0].item() for before, after in pairwise(marks)]
