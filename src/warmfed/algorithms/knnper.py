"""kNN-Per. Marfoq, Neglia, Kameni, Vidal, ICML 2022, arXiv:2111.09360, Algorithm 1.

FedAvg; then each site remembers the features that the last global model gives its images, and mixes the model's answer with
that of the k nearest of them. k = 10, σ = 1 and the kernel exp(-d/σ) are the paper's.
Departures: the personal λ is chosen by the site's validation images among `shares` (the paper tunes it on a finer grid).
"""

from dataclasses import dataclass
from typing import final

import torch

from ..core import ClientContext, Metrics, Reply, classifier
from ..core.tensors import Tensors, add_prefix
from ..fit import fit
from ..utils.errors import InputError
from .shared.base import Model, Personalized, upload


@final
@dataclass(frozen=True)
class KNNPer(Personalized[Model]):
    """FedAvg; a site's own model is the global one with a memory of the site's images."""

    neighbours: int = 10
    """k, how many of the remembered images answer."""
    scale: float = 1.0
    """σ: a neighbour at distance d weighs exp(-d/σ)."""
    shares: tuple[float, ...] = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
    """λ, what the memory weighs beside the model: each site takes the one with the best validation accuracy."""

    def __post_init__(self) -> None:
        if self.neighbours < 1 or not self.scale > 0:
            raise InputError("neighbours must be at least 1 and scale above 0; check [algorithm]")
        if not self.shares or not all(0 <= share <= 1 for share in self.shares):
            raise InputError(f"shares must be numbers from 0 to 1, at least one; got {self.shares}")

    def train(self, received: Model, state: Model | None, ctx: ClientContext) -> Reply[Model]:
        model, metrics = fit(ctx, received.model, self.local, ctx.data["train"])
        return upload(model, state, ctx, metrics)

    def own(self, model: Tensors, ctx: ClientContext) -> tuple[Tensors, Metrics]:
        features = classifier(ctx).features(model, ctx.data["train"], device=ctx.device)
        candidates = [
            {**model, **add_prefix(self.datastore(features, ctx.data["train"]["label"], share), "datastore.")}
            for share in self.shares
        ]
        found = [ctx.task.metrics(candidate, ctx.data["validation"], ctx.device) for candidate in candidates]
        # of equal ones the lower loss
        best = max(range(len(found)), key=lambda i: (found[i]["accuracy"], -found[i]["loss"]))
        return candidates[best], {"memory_share": self.shares[best]}

    def datastore(self, features: torch.Tensor, label: torch.Tensor, share: float) -> Tensors:
        """What a model remembers, as `warmfed.models.Remembering` reads it."""
        numbers = {"scale": torch.tensor(self.scale), "share": torch.tensor(share), "neighbours": torch.tensor(self.neighbours)}
        return {"features": features, "labels": label, **numbers}
