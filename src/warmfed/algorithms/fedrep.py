"""FedRep: a shared body and a private head; the head is trained first.

Collins et al., "Exploiting Shared Representations for Personalized Federated Learning", ICML 2021, arXiv:2102.07078,
Algorithm 1.

Departures: steps are counted in epochs.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

from ..algorithms.shared.base import at_sites
from ..core import ClientContext, Reply, Workload
from ..core.training import Training
from ..fit import fit
from .shared.base import Model, SplitByName


@final
@dataclass(frozen=True)
class FedRep(SplitByName):
    """Train the private head on the shared body, then the body under that head; average the body."""

    head: Training = Training(lr=0.02, epochs=5, max_grad_norm=1.0)
    """Training of the head in one round."""
    local: Training = Training(lr=0.02, epochs=5, max_grad_norm=1.0)
    """Training of the body in one round, after the head's."""

    def further_work(self, rows: Mapping[str, int], pairs: int) -> tuple[Workload, ...]:
        return (at_sites("heads", self.head, rows, self.rounds),)

    def train(self, received: Model, state: Model, ctx: ClientContext) -> Reply[Model]:
        mine, shared, data = self.mine(ctx.task), self.shared(ctx.task), ctx.data["train"]
        model, info = fit(ctx, self.whole(received, state), self.head, data, trainable=mine)
        model, metrics = fit(ctx, model, self.local, data, trainable=shared)
        return self.split(model, ctx, {**metrics, "head_loss": info["loss"]})
