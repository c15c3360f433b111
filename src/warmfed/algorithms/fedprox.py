"""FedProx. Li et al., MLSys 2020, arXiv:1812.06127, Algorithm 2.

Departures: the local problem is solved by a fixed number of epochs, not to a given inexactness γ. mu = 0 is FedAvg.
"""

from dataclasses import dataclass
from typing import final

from ..core import ClientContext, Reply
from ..fit import fit, proximal
from .shared.base import Averaging, Model, upload


@final
@dataclass(frozen=True)
class FedProx(Averaging[None]):
    """FedAvg whose local loss holds the site near the global model: + mu/2·||w - w^t||²."""

    mu: float = 0.01
    """Weight of the proximal term."""

    def train(self, received: Model, state: None, ctx: ClientContext) -> Reply[Model]:
        penalty = proximal(received.model, self.mu) if self.mu else None
        model, metrics = fit(ctx, received.model, self.local, ctx.data["train"], penalty=penalty)
        return upload(model, state, ctx, metrics)
