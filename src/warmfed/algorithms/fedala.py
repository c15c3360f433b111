"""FedALA: weights, learned at each site, that mix the global model into the site's own.

Zhang et al., "FedALA: Adaptive Local Aggregation for Personalized Federated Learning", AAAI 2023, arXiv:2212.01197,
Algorithm 1.

Before its local training, a site learns for each element of the last layers how much of the global model it takes. η = 1 and
s = 80 % are the paper's.

Departures: the first learning of the weights ends after `patience` passes without a lower loss, or after `passes` passes; in
the paper, it ends when the loss's spread is small.
"""

from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor, nn

from ..core import ClientContext, Reply
from ..core.messages import message
from ..core.rng import fork
from ..core.tensors import Table, Tensors, add_prefix, only, rows, select, strip_prefix, to
from ..core.training import Training
from ..fit import at, fit, minibatches, solving
from ..utils.errors import InputError
from .shared.base import Averaging, Model, upload


@message("fedala.Site")
class Site:
    """A site's last model and its mixing weights; the weights are None until they are learned."""

    model: Tensors  # Θ_i^{t-1}
    weights: Tensors | None  # W_i


@dataclass(frozen=True)
class _Mixing:
    """Task of W: the loss of Θ_i + (Θ - Θ_i) ⊙ W as a function of W."""

    task: Any
    mine: Tensors
    theirs: Tensors

    def build(self) -> nn.Module:
        # The second network stores W: each weight has the name of its parameter.
        return nn.ModuleDict({"net": self.task.build(), "weight": self.task.build()})

    def loss(self, model: Any, batch: Table) -> Tensor:
        weights = {name: w for name, w in model["weight"].named_parameters() if w.requires_grad}
        found: Tensor = self.task.loss(at(model["net"], mixed(self.mine, self.theirs, weights)), batch)
        return found


def mixed(mine: Tensors, theirs: Tensors, weights: Tensors) -> dict[str, Tensor]:
    """Return Θ_i + (Θ - Θ_i) ⊙ W for the tensors that have weights, and Θ for all others."""
    return {**theirs, **{name: torch.lerp(mine[name], theirs[name], w) for name, w in weights.items()}}


@final
@dataclass(frozen=True)
class FedALA(Averaging[Site, Model]):
    """Run FedAvg; each site starts from a learned mixture of the global model and its last model."""

    adaptive: str = "head."
    """Prefix of the names of the tensors that are mixed; the others are the global model's."""
    share: float = 0.8
    """Share s of a site's images on which the weights are learned, above 0 and at most 1."""
    eta: float = 1.0
    """Learning rate η of the weights."""
    patience: int = 3
    """Passes without a lower loss that end the first learning of the weights; at least 1. Later rounds have one pass."""
    passes: int = 100
    """Most passes of the first learning of the weights, at least 1: a loss that falls by ever less would not end it."""

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1 or min(self.patience, self.passes) < 1:
            raise InputError("share must be above 0 and at most 1, patience and passes at least 1; check [algorithm]")

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
        """Return W, learned by projected gradient descent on a new random part of the site's images each round."""
        data = ctx.data["train"]
        task = _Mixing(ctx.task, to(state.model, ctx.device), to(model, ctx.device))
        inner = replace(solving(ctx, task), rng=fork(ctx.rng, "weights"))
        chosen = torch.randperm(rows(data), generator=inner.rng)[: max(1, round(self.share * rows(data)))]
        one = Training(lr=self.eta, momentum=0.0, batch_size=self.local.batch_size)
        mixes = only(model, lambda name: name.startswith(self.adaptive))
        weights = dict(state.weights) if state.weights else {name: torch.ones_like(value) for name, value in mixes.items()}
        best, waited = float("inf"), 0
        for _ in range(1 if state.weights else self.passes):
            if not weights or waited >= self.patience:
                break
            losses = []
            for solve, batch in minibatches(inner, one, select(data, chosen)):
                found, info = fit(solve, add_prefix(weights, "weight."), one, batch)
                weights = {name: w.clamp(0, 1) for name, w in strip_prefix(found, "weight.").items()}
                losses.append(info["loss"])
            loss = sum(losses) / len(losses)
            best, waited = (loss, 0) if loss < best else (best, waited + 1)
        return weights

    def client_model(self, received: Model, state: Site) -> Tensors | None:
        return state.model
