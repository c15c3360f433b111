"""FedDyn. Acar et al., ICLR 2021, arXiv:2111.04263, Algorithm 1.

Departures: the local problem is solved by a fixed number of epochs, not to its minimum.
"""

from dataclasses import dataclass
from typing import final

from ..core import Central, Local, Metrics, Replies, Reply, ServerState, State
from ..core.messages import Message, message
from ..core.tensors import Tensors, mean, scale, sub, to, zeros
from ..fit import fit, proximal
from ..utils.errors import InputError
from .shared.base import Model, Rounds, upload


@message("feddyn.Server")
class Server:
    """The model, and the running sum of how far the sites' models went."""

    model: Tensors  # θ
    drift: Tensors  # h


@message("feddyn.Gradient")
class Gradient:
    """The gradient of a site's loss at its last model, as the proximal problem's solution tells it."""

    gradient: Tensors  # ∇L_k(θ_k)


@final
@dataclass(frozen=True)
class FedDyn(Rounds):
    """Local losses regularised anew each round, so that their minima move towards the minimum of the sum."""

    alpha: float = 0.01
    """α (the authors' code for CIFAR-10: 0.01)."""

    def __post_init__(self) -> None:
        if self.alpha <= 0:
            raise InputError(f"alpha must be above 0; got {self.alpha}")

    def init(self, ctx: Central) -> ServerState:
        model = ctx.task.init(ctx.rng)
        return Server(model, zeros(model))

    def down(self, server: ServerState, site: str) -> Message:
        return Model(server.model)

    def enter(self, down: Message, ctx: Local) -> State:
        return Gradient(zeros(down.model))

    def train(self, down: Message, state: State, ctx: Local) -> Reply:
        # L_k(θ) - ⟨∇L_k(θ_k), θ⟩ + α/2·||θ - θ^{t-1}||²
        penalty = proximal(down.model, self.alpha)
        data, linear = ctx.data["train"], to(state.gradient, ctx.device)
        model, metrics = fit(ctx, down.model, self.local, data, penalty=penalty, correct=lambda name, g: g - linear[name])
        gradient = sub(state.gradient, scale(sub(model, down.model), self.alpha))
        return upload(model, Gradient(gradient), ctx, metrics)

    def merge(self, server: ServerState, replies: Replies, ctx: Central) -> tuple[ServerState, Metrics]:
        average = mean((reply.message.model, 1.0) for reply in replies.values())
        step = scale(sub(average, server.model), self.alpha * len(replies) / len(ctx.sites))
        drift = sub(server.drift, step)  # h^t = h^{t-1} - α/m·Σ_{k∈P} (θ_k - θ^{t-1})
        return Server(sub(average, scale(drift, 1 / self.alpha)), drift), {}  # θ^t = 1/|P|·Σ θ_k - h^t/α
