"""FedALA, adaptive local aggregation. Zhang et al., AAAI 2023, arXiv:2212.01197, Algorithm 1.

Before its training a site learns, element by element, how much of the global model's last layers it takes.
η = 1 and s = 80 % are the paper's.
Departures: the first learning ends when the loss has not fallen for `patience` passes (the paper: when it has converged).
"""

from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor, nn

from ..core import ClientContext, Reply
from ..core.messages import message
from ..core.rng import fork
from ..core.tensors import Table, Tensors, add_prefix, only, rows, select, strip_prefix, to
from ..fit import Training, at, fit, minibatches, solving
from ..utils.errors import InputError
from .shared.base import Averaging, Model, upload


@message("fedala.Site")
class Site:
    """A site's last model and its weights of aggregation; none before they have been learned."""

    model: Tensors  # Θ_i^{t-1}
    weights: Tensors | None  # W_i


@dataclass(frozen=True)
class _Mixing:
    """The task of W: the loss of Θ_i + (Θ - Θ_i) ⊙ W, as a function of W."""

    task: Any
    mine: Tensors
    theirs: Tensors

    def build(self) -> nn.Module:
        # the second network is a place for W: a weight of aggregation has its parameter's name
        return nn.ModuleDict({"net": self.task.build(), "weight": self.task.build()})

    def loss(self, model: Any, batch: Table) -> Tensor:
        weights = {name: w for name, w in model["weight"].named_parameters() if w.requires_grad}
        found: Tensor = self.task.loss(at(model["net"], mixed(self.mine, self.theirs, weights)), batch)
        return found


def mixed(mine: Tensors, theirs: Tensors, weights: Tensors) -> dict[str, Tensor]:
    """Θ_i + (Θ - Θ_i) ⊙ W where there are weights, and Θ elsewhere."""
    return {**theirs, **{name: torch.lerp(mine[name], theirs[name], w) for name, w in weights.items()}}


@final
@dataclass(frozen=True)
class FedALA(Averaging[Site]):
    """FedAvg whose sites start from their own mixture of the global model and their last one."""

    adaptive: str = "head."
    """How the names of the tensors begin that are mixed; of all others the global model's are taken."""
    share: float = 0.8
    """s, share of a site's images that the weights are learned on."""
    eta: float = 1.0
    """η, learning rate of the weights."""
    patience: int = 3
    """Passes without a lower loss that end the first learning of the weights; later there is one pass a round."""

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1 or self.patience < 1:
            raise InputError("share must be above 0 and at most 1, patience at least 1; check [algorithm]")

    def init_client_state(self, received: Model, ctx: ClientContext) -> Site:
        return Site(received.model, None)

    def train(self, received: Model, state: Site, ctx: ClientContext) -> Reply[Model]:
        start, weights = dict(received.model), state.weights
        if any(not torch.equal(state.model[name], received.model[name]) for name in state.model):
            weights = self.learn(received.model, state, ctx)
            start = mixed(state.model, received.model, weights)
        model, metrics = fit(ctx, start, self.local, ctx.data["train"])
        if weights:
            metrics["global_share"] = torch.cat([w.flatten() for w in weights.values()]).double().mean().item()
        return upload(model, Site(model, weights), ctx, metrics)

    def learn(self, model: Tensors, state: Site, ctx: ClientContext) -> dict[str, Tensor]:
        """W by projected gradient descent, on a part of the site's images drawn anew each round."""
        data = ctx.data["train"]
        task = _Mixing(ctx.task, to(state.model, ctx.device), to(model, ctx.device))
        inner = replace(solving(ctx, task), rng=fork(ctx.rng, "weights"))
        chosen = torch.randperm(rows(data), generator=inner.rng)[: max(1, round(self.share * rows(data)))]
        one = Training(lr=self.eta, momentum=0.0, batch_size=self.local.batch_size)
        mixes = only(model, lambda name: name.startswith(self.adaptive))
        weights = dict(state.weights) if state.weights else {name: torch.ones_like(value) for name, value in mixes.items()}
        best, waited = float("inf"), 0
        while weights and waited < self.patience:
            losses = []
            for solve, batch in minibatches(inner, one, select(data, chosen)):
                found, info = fit(solve, add_prefix(weights, "weight."), one, batch)
                weights = {name: w.clamp(0, 1) for name, w in strip_prefix(found, "weight.").items()}
                losses.append(info["loss"])
            loss = sum(losses) / len(losses)
            best, waited = (loss, 0) if loss < best else (best, waited + 1)
            if state.weights:
                break
        return weights

    def client_model(self, received: Model, state: Site) -> Tensors | None:
        return state.model
