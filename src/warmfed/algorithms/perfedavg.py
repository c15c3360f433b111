"""Per-FedAvg. Fallah, Mokhtari, Ozdaglar, NeurIPS 2020, arXiv:2002.07948, Algorithm 1; FO, HF and the exact gradient.

The sites train f(w - α∇f(w)): a start from which one step of a site's own gives a good model.
α is larger than the paper's (0.01 for 0.001), since there are five rounds and not a thousand; FO does
not bear that much.
Departures: the batches D, D' and D'' of a step are parts of one batch (`independent`), or all of them the whole of it;
a site's own step is one pass over its images (`personal`; steps = 1 is the paper's).
"""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn
from torch.func import grad

from ..core import ClientContext, Metrics, Reply, Task
from ..core.tensors import Table, Tensors, add, rows, scale, select, sub
from ..fit import Loss, Training, at, fit
from ..utils.errors import InputError
from .shared.base import Model, Personalized, upload


@final
@dataclass(frozen=True)
class PerFedAvg(Personalized[Model]):
    """FedAvg of the sites' meta-gradients; at the end each site takes its own step from the last global model."""

    alpha: float = 0.01
    """α, the inner learning rate: how far the step goes for which the start is trained."""
    variant: str = "exact"
    """exact, first-order (FO: the Hessian is dropped) or hessian-free (HF: its product by a difference of gradients)."""
    delta: float = 0.001
    """δ of that difference."""
    independent: bool = True
    """Whether inner step, outer gradient and Hessian see different rows of a batch."""
    personal: Training = Training(lr=0.01, momentum=0.0)
    """A site's own step from the last global model."""

    def __post_init__(self) -> None:
        if self.variant not in ("exact", "first-order", "hessian-free"):
            raise InputError(f"variant must be exact, first-order or hessian-free; got {self.variant!r}")

    def train(self, received: Model, state: Model | None, ctx: ClientContext) -> Reply[Model]:
        model, metrics = fit(ctx, received.model, self.local, ctx.data["train"], loss=self.meta(ctx.task))
        return upload(model, state, ctx, metrics)

    def own(self, model: Tensors, ctx: ClientContext) -> tuple[Tensors, Metrics]:
        stepped, info = fit(ctx, model, self.personal, ctx.data["train"])
        return stepped, {"personal_loss": info["loss"]}

    def meta(self, task: Task) -> Loss:
        """A loss whose gradient is the meta-gradient (I - α∇²f(w; D''))·∇f(w - α∇f(w; D); D')."""

        def loss(model: nn.Module, batch: Table) -> Tensor:
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
            # worth nothing, and its gradient is -α·d
            return value - torch.stack([((w[name] - still[name]) * product[name]).sum() for name in w]).sum()

        return loss

    def parts(self, batch: Table) -> tuple[Table, Table, Table]:
        """D, D' and D''; all of them the whole batch where it has too few rows."""
        count = 3 if self.variant == "hessian-free" else 2
        if not self.independent or rows(batch) < count:
            return batch, batch, batch
        inner, outer, *rest = (select(batch, slice(i, None, count)) for i in range(count))
        return inner, outer, rest[0] if rest else inner
