"""FedAvg: the weighted average of local models.

McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data", AISTATS 2017,
arXiv:1602.05629, Algorithm 1.

Departures: none. The personal model is the global model.
"""

from dataclasses import dataclass
from typing import final

from ..core import ClientContext, Reply
from ..fit import fit
from .shared.base import Averaging, Model, upload


@final
@dataclass(frozen=True)
class FedAvg(Averaging[None, Model]):
    """Train locally from the global model and average the models, weighted by the sites' numbers of images."""

    def train(self, received: Model, state: None, ctx: ClientContext) -> Reply[Model]:
        model, metrics = fit(ctx, received.model, self.local, ctx.data["train"])
        return upload(model, state, ctx, metrics)
