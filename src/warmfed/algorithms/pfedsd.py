"""pFedSD: self-distillation from the site's last personal model.

Jin et al., "Personalized Edge Intelligence via Federated Self-Knowledge Distillation", IEEE TPDS 2023.

The last personal model is the teacher of the next one; the next one is also the model that is averaged.

Departures: none known. λ and T are `distillation.weight` and `distillation.temperature`.
"""

from dataclasses import dataclass
from typing import final

from ..core import ClientContext, Reply
from ..core.tensors import Tensors
from ..core.training import Training
from .shared.base import Averaging, Model, Personal, upload
from .shared.distillation import Distillation, distilled


@final
@dataclass(frozen=True)
class PFedSD(Averaging[Personal, Model]):
    """Run FedAvg with local training distilled from the site's model of the previous round."""

    local: Training = Training(lr=0.02, epochs=5, max_grad_norm=1.0)
    """Local training in one round."""
    distillation: Distillation = Distillation()
    """Self-distillation."""

    def init_client_state(self, received: Model, ctx: ClientContext) -> Personal:
        return Personal(None)

    def train(self, received: Model, state: Personal, ctx: ClientContext) -> Reply[Model]:
        model, metrics = distilled(ctx, received.model, self.local, state.model, self.distillation)
        return upload(model, Personal(model), ctx, metrics)

    def client_model(self, received: Model, state: Personal) -> Tensors | None:
        return received.model if state.model is None else state.model
