"""Ditto: a personal model at each site, held near the global model by a proximal term.

Li et al., "Ditto: Fair and Robust Federated Learning Through Personalization", ICML 2021, arXiv:2012.04221, Algorithm 1.

Departures: local steps are counted in epochs. The personal model is trained for as many epochs (`personal`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

from ..algorithms.shared.base import at_sites
from ..core import ClientContext, Reply, Workload
from ..core.tensors import Tensors
from ..core.training import Training
from ..fit import fit, proximal
from .shared.base import Averaging, Model, upload


@final
@dataclass(frozen=True)
class Ditto(Averaging[Model, Model]):
    """Train the global model by FedAvg, and a personal model with the penalty lam/2·||v - w^t||²."""

    lam: float = 0.1
    """Weight λ of the proximal term; at least 0."""
    personal: Training = Training(lr=0.02, epochs=5, max_grad_norm=1.0)
    """Training of the personal model in one round."""

    def further_work(self, rows: Mapping[str, int], pairs: int) -> tuple[Workload, ...]:
        return (at_sites("personal models", self.personal, rows, self.rounds),)

    def init_client_state(self, received: Model, ctx: ClientContext) -> Model:
        return Model(received.model)  # v_k

    def train(self, received: Model, state: Model, ctx: ClientContext) -> Reply[Model]:
        model, metrics = fit(ctx, received.model, self.local, ctx.data["train"])
        personal, info = fit(ctx, state.model, self.personal, ctx.data["train"], penalty=proximal(received.model, self.lam))
        return upload(model, Model(personal), ctx, {**metrics, "personal_loss": info["loss"]})

    def client_model(self, received: Model, state: Model) -> Tensors | None:
        return state.model
