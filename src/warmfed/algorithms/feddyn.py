"""FedDyn: local losses with a dynamic regulariser.

Acar et al., "Federated Learning Based on Dynamic Regularization", ICLR 2021, arXiv:2111.04263, Algorithm 1.

Departures: a fixed number of epochs solves the local problem, not a search for its minimum.
"""

from dataclasses import dataclass
from typing import final

from ..core import ClientContext, Metrics, Replies, Reply, ServerContext
from ..core.messages import message
from ..core.tensors import Tensors, learned, mean, scale, sub, to, zeros
from ..fit import fit, proximal
from ..utils.errors import InputError
from .shared.base import Model, Rounds, upload


@message("feddyn.Server")
class Server:
    """The global model, and the running sum h of the sites' drifts."""

    model: Tensors  # θ
    drift: Tensors  # h


@message("feddyn.Gradient")
class Gradient:
    """The gradient of a site's loss at its last model, implied by the solution of the proximal problem."""

    gradient: Tensors  # ∇L_k(θ_k)


@final
@dataclass(frozen=True)
class FedDyn(Rounds[Server, Model, Gradient, Model]):
    """Regularise the local losses each round, so that their minima move towards the minimum of their sum."""

    alpha: float = 0.01
    """Weight α of the regulariser; above 0 (the authors' code for CIFAR-10: 0.01)."""

    def __post_init__(self) -> None:
        if self.alpha <= 0:
            raise InputError(f"alpha must be above 0; got {self.alpha}")

    def init(self, ctx: ServerContext) -> Server:
        model = ctx.task.init(ctx.rng)
        return Server(model, zeros(learned(model)))

    def broadcast(self, server: Server, site: str) -> Model:
        return Model(server.model)

    def init_client_state(self, received: Model, ctx: ClientContext) -> Gradient:
        return Gradient(zeros(learned(received.model)))

    def train(self, received: Model, state: Gradient, ctx: ClientContext) -> Reply[Model]:
        # L_k(θ) - ⟨∇L_k(θ_k), θ⟩ + α/2·||θ - θ^{t-1}||²
        penalty = proximal(received.model, self.alpha)
        data, linear = ctx.data["train"], to(state.gradient, ctx.device)
        model, metrics = fit(ctx, received.model, self.local, data, penalty=penalty, correct=lambda name, g: g - linear[name])
        gradient = sub(state.gradient, scale(learned(sub(model, received.model)), self.alpha))
        return upload(model, Gradient(gradient), ctx, metrics)

    def aggregate(self, server: Server, replies: Replies[Model], ctx: ServerContext) -> tuple[Server, Metrics]:
        average = mean((reply.message.model, 1.0) for reply in replies.values())
        step = scale(learned(sub(average, server.model)), self.alpha * len(replies) / len(ctx.sites))
        drift = sub(server.drift, step)  # h^t = h^{t-1} - α/m·Σ_{k∈P} (θ_k - θ^{t-1})
        model = {**average, **sub(learned(average), scale(drift, 1 / self.alpha))}  # θ^t = 1/|P|·Σ θ_k - h^t/α
        return Server(model, drift), {}
