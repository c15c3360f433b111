"""pFedMe. T. Dinh, Tran, Nguyen, NeurIPS 2020, arXiv:2006.08848, Algorithm 1.

On each batch a site solves θ̃ ≈ argmin f(θ) + λ/2·||θ - w||², a Moreau envelope, by K steps and moves w towards it.
λ and K are the paper's; η is larger (0.05 for 0.005), since there are five rounds and not hundreds.
Departures: local rounds are counted in passes over the data; the mean is weighted by the sites' numbers of images.
"""

from dataclasses import dataclass, replace
from typing import final

from ..core import ClientContext, Metrics, Replies, Reply, ServerContext
from ..core.tensors import Tensors, mix
from ..fit import Training, fit, minibatches, proximal
from ..utils.errors import InputError
from .shared.base import Averaging, Model, upload


@final
@dataclass(frozen=True)
class PFedMe(Averaging[Model]):
    """The mean of the sites' w; the personal model is θ̃, held near w."""

    local: Training = Training(lr=0.05, momentum=0.0, steps=5)
    """How θ̃ is found on one batch of this size: K is `steps`."""
    passes: int = 5
    """Passes over a site's images in one round; w takes a step for each batch."""
    lam: float = 15.0
    """λ, weight of the proximal term."""
    eta: float = 0.05
    """η, learning rate of w; η·λ is the share of the way to θ̃ that w goes."""
    beta: float = 1.0
    """β, share of the way to the sites' mean that the server goes; the paper also has more than 1."""

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
