"""FedProx: FedAvg with a proximal term.

Li et al., "Federated Optimization in Heterogeneous Networks", MLSys 2020, arXiv:1812.06127, Algorithm 2.

Departures: a fixed number of epochs solves the local problem, not a given inexactness γ.
"""

from dataclasses import dataclass
from typing import final

from ..core import ClientContext, Reply
from ..fit import fit, proximal
from .shared.base import Averaging, Model, upload


@final
@dataclass(frozen=True)
class FedProx(Averaging[None, Model]):
    """Run FedAvg with the penalty mu/2·||w - w^t||² in the local loss."""

    mu: float = 0.01
    """Weight μ of the proximal term; at least 0, 0: FedAvg."""

    def train(self, received: Model, state: None, ctx: ClientContext) -> Reply[Model]:
        penalty = proximal(received.model, self.mu) if self.mu else None
        model, metrics = fit(ctx, received.model, self.local, ctx.data["train"], penalty=penalty)
        return upload(model, state, ctx, metrics)
