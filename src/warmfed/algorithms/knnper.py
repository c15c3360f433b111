"""kNN-Per: FedAvg, mixed with a k-nearest-neighbour classifier at each site.

Marfoq, Neglia, Kameni, Vidal, "Personalized Federated Learning through Local Memorization", ICML 2022, arXiv:2111.09360,
Algorithm 1.

After FedAvg, each site stores the last global model's features of its training images. Its prediction mixes the model's
probabilities with those of the k nearest stored features. k = 10, σ = 1 and the kernel exp(-d/σ) are the paper's.

Departures: a site selects λ from `shares` by validation accuracy; the paper tunes it on a finer grid.
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
    """Run FedAvg; then give each site's model a datastore of the features of its images."""

    neighbours: int = 10
    """Number k of nearest neighbours; at least 1."""
    scale: float = 1.0
    """Kernel width σ: a neighbour at distance d has the weight exp(-d/σ); above 0."""
    shares: tuple[float, ...] = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
    """Candidates for λ, the weight of the datastore, from 0 to 1; each site selects one by validation accuracy."""

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
        # The lower loss breaks ties.
        best = max(range(len(found)), key=lambda i: (found[i]["accuracy"], -found[i]["loss"]))
        return candidates[best], {"memory_share": self.shares[best]}

    def datastore(self, features: torch.Tensor, label: torch.Tensor, share: float) -> Tensors:
        """Return the datastore's tensors, as `warmfed.models.Remembering` reads them."""
        numbers = {"scale": torch.tensor(self.scale), "share": torch.tensor(share), "neighbours": torch.tensor(self.neighbours)}
        return {"features": features, "labels": label, **numbers}
