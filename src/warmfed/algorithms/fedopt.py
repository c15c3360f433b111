"""FedAvgM, FedAdam and FedYogi: an optimizer at the server.

Hsu et al., "Measuring the Effects of Non-Identical Data Distribution for Federated Visual Classification", 2019,
arXiv:1909.06335 (FedAvgM); Reddi et al., "Adaptive Federated Optimization", ICLR 2021, arXiv:2003.00295, Algorithm 2 (FedAdam,
FedYogi).

The mean change Δ of the sites' models is the server's gradient. As in the paper, the moments have no bias correction.

Departures: the paper tunes the server's learning rate for each data set; the defaults here were chosen on `digits4`.
"""

from dataclasses import dataclass
from typing import Literal, final

import torch

from ..core import ClientContext, Metrics, Replies, Reply, ServerContext
from ..core.messages import message
from ..core.tensors import Tensors, add, learned, mix, scale, statistics, sub, zeros
from ..fit import fit
from ..utils.settings import check_choices
from .shared.base import Combined, Model, upload


@message("server_optimizer.Server")
class Server:
    """The global model and the optimizer's moments."""

    model: Tensors  # x
    first: Tensors  # m
    second: Tensors  # v


@dataclass(frozen=True)
class ServerOptimizer:
    """The server's update along Δ, the mean change of the sites' models."""

    name: Literal["momentum", "adam", "yogi"] = "momentum"
    """Optimizer: momentum (FedAvgM), adam or yogi."""
    lr: float = 1.0
    """Learning rate η of the server."""
    beta1: float = 0.9
    """Decay β₁ of the first moment; β of momentum."""
    beta2: float = 0.99
    """Decay β₂ of the second moment; used by adam and yogi."""
    tau: float = 0.001
    """Term τ added to the root of the second moment, which starts at τ²; used by adam and yogi."""

    def __post_init__(self) -> None:
        check_choices(self)

    def begin(self, model: Tensors) -> Server:
        weights = learned(model)
        second = {} if self.name == "momentum" else {name: torch.full_like(x, self.tau**2) for name, x in weights.items()}
        return Server(model, zeros(weights), second)

    def step(self, server: Server, change: Tensors) -> Server:
        """Return the server's state after a step along `change`, Δ; running statistics are averaged."""
        mean = statistics(add(server.model, change))
        weights, change = learned(server.model), learned(change)
        if self.name == "momentum":
            first = add(scale(server.first, self.beta1), change)
            return Server({**add(weights, scale(first, self.lr)), **mean}, first, {})
        first = mix(change, server.first, self.beta1)
        square = {name: delta**2 for name, delta in change.items()}
        if self.name == "adam":
            second = mix(square, server.second, self.beta2)
        else:
            second = {n: v - (1 - self.beta2) * square[n] * torch.sign(v - square[n]) for n, v in server.second.items()}
        step = {name: m / (second[name].sqrt() + self.tau) for name, m in first.items()}
        return Server({**add(weights, scale(step, self.lr)), **mean}, first, second)


@final
@dataclass(frozen=True)
class FedOpt(Combined[Server, Model, None, Model]):
    """Run FedAvg with a server optimizer: the mean change of the sites' models is its gradient."""

    server: ServerOptimizer = ServerOptimizer()
    """Server optimizer."""

    def init(self, ctx: ServerContext) -> Server:
        return self.server.begin(ctx.task.init(ctx.rng))

    def broadcast(self, server: Server, site: str) -> Model:
        return Model(server.model)

    def train(self, received: Model, state: None, ctx: ClientContext) -> Reply[Model]:
        model, metrics = fit(ctx, received.model, self.local, ctx.data["train"])
        return upload(model, state, ctx, metrics)

    def aggregate(self, server: Server, replies: Replies[Model], ctx: ServerContext) -> tuple[Server, Metrics]:
        return self.server.step(server, sub(self.robust.combine(server.model, replies), server.model)), {}
