"""APFL: a mixture of the global model and a personal branch.

Deng, Kamani, Mahdavi, "Adaptive Personalized Federated Learning", 2020, arXiv:2003.13461, Algorithm 1.

The default α = 0.25 is one of the paper's values. A learned α falls to 0 within five rounds: the global branch w fits better
than the personal branch v throughout. APFL at α = 0 is FedAvg.

Departures: w, v and α share one optimizer (`local`), so momentum applies to all three and `max_grad_norm` bounds their joint
gradient. α is clipped to [0, 1] in the loss and after each round. The personal model mixes v with the last global model,
not with the site's own w.
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
    """A site's personal branch and its share α in the personal model."""

    model: Tensors  # v_i
    alpha: float  # α_i


class _Branches(nn.Module):
    """Both branches and α as one module, so that one training loop updates all three."""

    def __init__(self, task: Any, alpha: float) -> None:
        super().__init__()
        self.shared, self.personal = task.build(), task.build()
        self.alpha = nn.Parameter(torch.tensor(alpha))


@dataclass(frozen=True)
class _Joint:
    """Task of both branches: f(w) + f(αv + (1 - α)w); the second term has gradients for v and α only."""

    task: Task
    alpha: float

    def build(self) -> nn.Module:
        return _Branches(self.task, self.alpha)

    def loss(self, model: Any, batch: Table) -> Tensor:
        # Clip the value, not the gradient, so that an α outside [0, 1] can return.
        alpha = model.alpha + (model.alpha.clamp(0, 1) - model.alpha).detach()
        shared = dict(model.shared.named_parameters())
        mixed = {name: torch.lerp(shared[name].detach(), v, alpha) for name, v in model.personal.named_parameters()}  # v̄_i
        return self.task.loss(model.shared, batch) + self.task.loss(at(model.personal, mixed), batch)


@final
@dataclass(frozen=True)
class APFL(Averaging[Site, Model]):
    """Run FedAvg, and train a personal branch through its mixture with the global model."""

    alpha: float = 0.25
    """Share α of the personal branch in the personal model, from 0 to 1; its initial value if `adaptive`."""
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
