"""FedAvg + local fine-tuning: the usual strong baseline of personalised federated learning.

K. Wang et al., 2019, arXiv:1910.10252; shown to be hard to beat by Matsuda et al., 2022, arXiv:2206.02471.
Departures: none.
"""

from dataclasses import dataclass
from typing import final

from ..core import ClientContext, Metrics, Reply
from ..core.tensors import Tensors
from ..fit import Training, fit
from .shared.base import Model, Personalized, upload


@final
@dataclass(frozen=True)
class FedAvgFineTune(Personalized[Model]):
    """FedAvg; then each site trains the last global model once more for itself."""

    personal: Training = Training(lr=0.005, epochs=5, max_grad_norm=1.0)
    """That last training."""

    def train(self, received: Model, state: Model | None, ctx: ClientContext) -> Reply[Model]:
        model, metrics = fit(ctx, received.model, self.local, ctx.data["train"])
        return upload(model, state, ctx, metrics)

    def own(self, model: Tensors, ctx: ClientContext) -> tuple[Tensors, Metrics]:
        tuned, info = fit(ctx, model, self.personal, ctx.data["train"])
        return tuned, {"personal_loss": info["loss"]}
