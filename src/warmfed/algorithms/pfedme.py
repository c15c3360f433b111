"""pFedMe: personal models by Moreau envelopes.

T. Dinh, Tran, Nguyen, "Personalized Federated Learning with Moreau Envelopes", NeurIPS 2020, arXiv:2006.08848, Algorithm 1.

On each batch, a site solves θ̃ ≈ argmin f(θ) + λ/2·||θ - w||² by K steps and moves w towards θ̃. λ = 15 and K = 5 are the
paper's. η is 0.05; the paper has 0.005. A run here has five rounds instead of hundreds.

Departures: local rounds are passes over the data. The mean is weighted by the sites' numbers of images.
"""

from dataclasses import dataclass, replace
from typing import final

from ..core import ClientContext, Metrics, Replies, Reply, ServerContext
from ..core.tensors import Tensors, mix
from ..core.training import Training
from ..fit import fit, minibatches, proximal
from ..utils.errors import InputError
from .shared.base import Averaging, Model, upload


@final
@dataclass(frozen=True)
class PFedMe(Averaging[Model, Model]):
    """Average the sites' w; the personal model is θ̃, held near w."""

    local: Training = Training(lr=0.05, momentum=0.0, steps=5)
    """Training that finds θ̃ on one batch: `batch_size` is the batch, `steps` is K."""
    passes: int = 5
    """Passes over a site's images in one round; at least 1. Each batch is one step of w."""
    lam: float = 15.0
    """Weight λ of the proximal term."""
    eta: float = 0.05
    """Learning rate η of w; w moves the share η·λ of the way to θ̃."""
    beta: float = 1.0
    """Share β of the way to the sites' mean that the server moves; the paper also uses values above 1."""

    def __post_init__(self) -> None:
        if self.passes < 1:
            raise InputError(f"passes must be at least 1; got {self.passes}")

    def init_client_state(self, received: Model, ctx: ClientContext) -> Model:
        return Model(received.model)  # θ̃_i

    def train(self, received: Model, state: Model, ctx: ClientContext) -> Reply[Model]:
        w, theta, losses = received.model, received.model, []
        outer = replace(self.local, steps=0, epochs=self.passes)
        for inner, batch in minibatches(ctx, outer, ctx.data["train"]):
            theta, info = fit(inner, theta, self.local, batch, penalty=proximal(w, self.lam))
            w = mix(w, theta, self.eta * self.lam)  # w - ηλ(w - θ̃)
            losses.append(info["loss"])
        return upload(w, Model(theta), ctx, {"loss": sum(losses) / len(losses), "steps": float(len(losses))})

    def aggregate(self, server: Model, replies: Replies[Model], ctx: ServerContext) -> tuple[Model, Metrics]:
        return Model(mix(server.model, self.robust.combine(server.model, replies), self.beta)), {}

    def client_model(self, received: Model, state: Model) -> Tensors | None:
        return state.model
