"""FedAvg with fine-tuning: each site fine-tunes the last global model.

K. Wang et al., "Federated Evaluation of On-device Personalization", 2019, arXiv:1910.10252. Matsuda et al., 2022,
arXiv:2206.02471, show that this baseline is hard to beat.

Departures: none.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

from ..algorithms.shared.base import at_sites
from ..core import ClientContext, Metrics, Reply, Workload
from ..core.tensors import Tensors
from ..core.training import Training
from ..fit import fit
from .shared.base import Model, Personalized, upload


@final
@dataclass(frozen=True)
class FedAvgFineTune(Personalized[Model]):
    """Run FedAvg; then each site fine-tunes the last global model."""

    personal: Training = Training(lr=0.005, epochs=5, max_grad_norm=1.0)
    """Fine-tuning after the last round."""

    def further_work(self, rows: Mapping[str, int], pairs: int) -> tuple[Workload, ...]:
        return (at_sites("personal models", self.personal, rows, 1),)

    def train(self, received: Model, state: Model | None, ctx: ClientContext) -> Reply[Model]:
        model, metrics = fit(ctx, received.model, self.local, ctx.data["train"])
        return upload(model, state, ctx, metrics)

    def own(self, model: Tensors, ctx: ClientContext) -> tuple[Tensors, Metrics]:
        tuned, info = fit(ctx, model, self.personal, ctx.data["train"])
        return tuned, {"personal_loss": info["loss"]}
