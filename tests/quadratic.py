"""A problem with a closed-form training: f_i(w) = ½·(w - x̄_i)ᵀA_i(w - x̄_i), A_i diagonal, for all batches."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from warmfed.core.tensors import Table, Tensors


class Point(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(size, dtype=torch.float64))

    def forward(self) -> Tensor:
        return self.w


@dataclass(frozen=True)
class Quadratic:
    """The `Task`: a site's table holds copies of its centre and of its curvature, so every batch is the whole problem."""

    start: tuple[float, ...]
    measure = "loss"

    def tables(self, splits: Mapping[str, Table]) -> Mapping[str, Table]:
        return splits

    def build(self) -> nn.Module:
        return Point(len(self.start))

    def init(self, rng: torch.Generator) -> Tensors:
        return {"w": torch.tensor(self.start, dtype=torch.float64)}

    def loss(self, model: Any, batch: Table) -> Tensor:
        return (batch["curvature"] * (model() - batch["centre"]).square()).sum(-1).mean() / 2

    def metrics(self, model: Tensors, data: Table, device: str = "cpu") -> dict[str, float]:
        return {"count": float(len(data["centre"]))}


def site(centre: Sequence[float], curvature: Sequence[float], rows: int) -> Mapping[str, Table]:
    table = {
        "centre": torch.tensor(centre, dtype=torch.float64).expand(rows, -1).clone(),
        "curvature": torch.tensor(curvature, dtype=torch.float64).expand(rows, -1).clone(),
    }
    return {"train": table, "validation": table, "test": table}
