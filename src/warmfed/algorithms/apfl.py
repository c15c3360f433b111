"""APFL. Deng, Kamani, Mahdavi, "Adaptive Personalized Federated Learning", 2020, arXiv:2003.13461, Algorithm 1.

α = 0.25 is one of the paper's. In five rounds a learned α falls to 0, where APFL is FedAvg: w is ahead of v all the time.

Departures: the global branch w, the personal branch v and α are steps of one optimizer (`local`), so its momentum holds for
all three and its `max_grad_norm` bounds their gradients together; α is clipped to [0, 1] where it is used and after
a round. The personal model mixes v with the last global model, not with the site's own branch of it.
"""

from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from ..core import ClientContext, Reply, Task
from ..core.messages import message
from ..core.tensors import Table, Tensors, add_prefix, mix, strip_prefix
from ..fit import at, fit, solving
from ..utils.errors import InputError
from .shared.base import Averaging, Model, upload


@message("apfl.Site")
class Site:
    """A site's personal branch and how much of it there is in its model."""

    model: Tensors  # v_i
    alpha: float  # α_i


class _Branches(nn.Module):
    """Both branches and α as one model, so that one training loop serves them."""

    def __init__(self, task: Any, alpha: float) -> None:
        super().__init__()
        self.shared, self.personal = task.build(), task.build()
        self.alpha = nn.Parameter(torch.tensor(alpha))


@dataclass(frozen=True)
class _Joint:
    """The task of both branches: f(w) + f(αv + (1 - α)w), where the second term moves v and α only."""

    task: Task
    alpha: float

    def build(self) -> nn.Module:
        return _Branches(self.task, self.alpha)

    def loss(self, model: Any, batch: Table) -> Tensor:
        # the value is clipped, the gradient is not: an α that has gone beyond its end finds back
        alpha = model.alpha + (model.alpha.clamp(0, 1) - model.alpha).detach()
        shared = dict(model.shared.named_parameters())
        mixed = {name: torch.lerp(shared[name].detach(), v, alpha) for name, v in model.personal.named_parameters()}  # v̄_i
        return self.task.loss(model.shared, batch) + self.task.loss(at(model.personal, mixed), batch)


@final
@dataclass(frozen=True)
class APFL(Averaging[Site]):
    """FedAvg, and beside it a personal branch whose mixture with the global model is what is trained."""

    alpha: float = 0.25
    """α, the share of the personal branch in the personal model; with `adaptive`, its start."""
    adaptive: bool = False
    """Whether each site learns its α by gradient descent."""

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise InputError(f"alpha must be at least 0 and at most 1; got {self.alpha}")

    def init_client_state(self, received: Model, ctx: ClientContext) -> Site:
        return Site(received.model, self.alpha)

    def train(self, received: Model, state: Site, ctx: ClientContext) -> Reply[Model]:
        start = add_prefix(received.model, "shared.") | add_prefix(state.model, "personal.")
        if self.adaptive:
            start |= {"alpha": torch.tensor(state.alpha)}
        found, metrics = fit(solving(ctx, _Joint(ctx.task, state.alpha)), start, self.local, ctx.data["train"])
        alpha = min(max(found["alpha"].item(), 0.0), 1.0) if self.adaptive else state.alpha
        site = Site(strip_prefix(found, "personal."), alpha)
        return upload(strip_prefix(found, "shared."), site, ctx, {**metrics, "alpha": alpha})

    def client_model(self, received: Model, state: Site) -> Tensors | None:
        return mix(received.model, state.model, state.alpha)
