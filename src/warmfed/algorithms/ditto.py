"""Ditto. Li et al., ICML 2021, arXiv:2012.04221, Algorithm 1.

Departures: local steps are counted in epochs; the personal model gets as many (`personal`).
"""

from dataclasses import dataclass
from typing import final

from ..core import ClientContext, Reply
from ..core.tensors import Tensors
from ..fit import Training, fit, proximal
from .shared.base import Averaging, Model, upload


@final
@dataclass(frozen=True)
class Ditto(Averaging[Model]):
    """FedAvg, and beside it a personal model that is held near the global one: + lam/2·||v - w^t||²."""

    lam: float = 0.1
    """Weight of the proximal term."""
    personal: Training = Training(lr=0.02, epochs=5, max_grad_norm=1.0)
    """The personal model's training in one round."""

    def init_client_state(self, received: Model, ctx: ClientContext) -> Model:
        return Model(received.model)  # v_k

    def train(self, received: Model, state: Model, ctx: ClientContext) -> Reply[Model]:
        model, metrics = fit(ctx, received.model, self.local, ctx.data["train"])
        personal, info = fit(ctx, state.model, self.personal, ctx.data["train"], penalty=proximal(received.model, self.lam))
        return upload(model, Model(personal), ctx, {**metrics, "personal_loss": info["loss"]})

    def client_model(self, received: Model, state: Model) -> Tensors | None:
        return state.model
