"""Per-FedAvg: an initial model that one gradient step adapts to a site.

Fallah, Mokhtari, Ozdaglar, "Personalized Federated Learning with Theoretical Guarantees: A Model-Agnostic Meta-Learning
Approach", NeurIPS 2020, arXiv:2002.07948, Algorithm 1.

The sites minimise f(w - α∇f(w)), by the exact gradient, FO or HF. α is 0.01; the paper has 0.001. A run here has five rounds
instead of a thousand. FO does not tolerate so large an α.

Departures: the batches D, D' and D'' of one step are parts of one batch (`independent`), or each is the whole batch.
A site's adaptation is one pass over its images (`personal`); `personal.steps` 1 is the paper's single step.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor, nn
from torch.func import grad

from ..algorithms.shared.base import at_sites
from ..core import ClientContext, Metrics, Reply, Task, Workload
from ..core.tensors import Table, Tensors, add, rows, scale, select, sub
from ..core.training import Training
from ..fit import Loss, at, fit, untracked
from ..utils.settings import check_choices
from .shared.base import Model, Personalized, upload


@final
@dataclass(frozen=True)
class PerFedAvg(Personalized[Model]):
    """Average the sites' meta-gradient updates; at the end, each site adapts the last global model by `personal`."""

    alpha: float = 0.01
    """Inner learning rate α."""
    variant: Literal["exact", "first-order", "hessian-free"] = "exact"
    """Meta-gradient: exact, first-order (FO, without the Hessian) or hessian-free (HF, a difference of gradients)."""
    delta: float = 0.001
    """Step δ of the difference of gradients; used by hessian-free."""
    independent: bool = True
    """Whether inner step, outer gradient and Hessian use different rows of a batch."""
    personal: Training = Training(lr=0.01, momentum=0.0)
    """Training that adapts the last global model to a site."""

    def further_work(self, rows: Mapping[str, int], pairs: int) -> tuple[Workload, ...]:
        return (at_sites("personal models", self.personal, rows, 1),)

    def __post_init__(self) -> None:
        check_choices(self)

    def train(self, received: Model, state: Model | None, ctx: ClientContext) -> Reply[Model]:
        model, metrics = fit(ctx, received.model, self.local, ctx.data["train"], loss=self.meta(ctx.task))
        return upload(model, state, ctx, metrics)

    def own(self, model: Tensors, ctx: ClientContext) -> tuple[Tensors, Metrics]:
        stepped, info = fit(ctx, model, self.personal, ctx.data["train"])
        return stepped, {"personal_loss": info["loss"]}

    def meta(self, task: Task) -> Loss:
        """Return a loss whose gradient is the meta-gradient (I - α∇²f(w; D''))·∇f(w - α∇f(w; D); D')."""

        def loss(model: nn.Module, batch: Table) -> Tensor:
            with untracked(model) as follows:
                value = gradient_of(model, batch)
            if follows:
                with torch.no_grad():
                    task.loss(model, batch)  # records the running statistics of normalisation layers
            return value

        def gradient_of(model: nn.Module, batch: Table) -> Tensor:
            def slope(weights: Tensors, part: Table) -> Tensors:
                found: Tensors = grad(lambda w: task.loss(at(model, w), part))(dict(weights))
                return found

            w = dict(model.named_parameters())
            still = {name: value.detach() for name, value in w.items()}
            inner, outer, curved = self.parts(batch)
            if self.variant == "exact":
                return task.loss(at(model, sub(w, scale(slope(w, inner), self.alpha))), outer)
            step = scale(slope(still, inner), self.alpha)
            value = task.loss(at(model, sub(w, step)), outer)
            if self.variant == "first-order":
                return value
            towards = scale(slope(sub(still, step), outer), self.delta)  # δ·∇f(w̃; D')
            change = sub(slope(add(still, towards), curved), slope(sub(still, towards), curved))
            product = scale(change, self.alpha / (2 * self.delta))  # α·d
            # The value of this term is 0; its gradient is -α·d.
            return value - torch.stack([((w[name] - still[name]) * product[name]).sum() for name in w]).sum()

        return loss

    def parts(self, batch: Table) -> tuple[Table, Table, Table]:
        """Return D, D' and D''; each is the whole batch if it has too few rows."""
        count = 3 if self.variant == "hessian-free" else 2
        if not self.independent or rows(batch) < count:
            return batch, batch, batch
        inner, outer, *rest = (select(batch, slice(i, None, count)) for i in range(count))
        return inner, outer, rest[0] if rest else inner
