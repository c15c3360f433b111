"""FedRoD, with a linear personal head. Chen, Chao, ICLR 2022, arXiv:2107.00778, Algorithm 1.

The generic model is trained with a balanced loss and averaged; on its features each site trains a head of its own, whose
logits are added to the generic ones, with the plain loss. Both heads are linear, so their sum is one head.
Departures: the personal head is trained after the generic model of the round, not in the same steps; as in the paper, no
gradient of it reaches the generic model.
"""

from dataclasses import dataclass
from typing import final

import torch.nn.functional as F
from torch import Tensor, nn

from ..core import ClientContext, Reply, classifier
from ..core.tensors import Table, Tensors, add, only, sub, zeros
from ..fit import Loss, Training, fit
from .shared.base import Averaging, Model, upload


def balanced(ctx: ClientContext) -> Loss:
    """Balanced softmax (Ren et al. 2020): cross-entropy of the logits + log of how often each class occurs at the site."""
    label = ctx.data["train"]["label"]

    def loss(model: nn.Module, batch: Table) -> Tensor:
        logits = classifier(ctx).logits(model, batch)
        often = label.bincount(minlength=logits.shape[1]).to(logits.device) / len(label)
        return F.cross_entropy(logits + often.log(), batch["label"])

    return loss


@final
@dataclass(frozen=True)
class FedRoD(Averaging[Model]):
    """A generic model for all classes alike, and beside its head a personal one for the site's own."""

    head: str = "head."
    """How the names of the head's tensors begin."""
    personal: Training = Training(lr=0.02, epochs=5, max_grad_norm=1.0)
    """The personal head's training in one round."""

    def init_client_state(self, received: Model, ctx: ClientContext) -> Model:
        return Model(zeros(only(received.model, self.of_head)))

    def of_head(self, name: str) -> bool:
        return name.startswith(self.head)

    def train(self, received: Model, state: Model, ctx: ClientContext) -> Reply[Model]:
        model, metrics = fit(ctx, received.model, self.local, ctx.data["train"], loss=balanced(ctx))
        both = self.client_model(Model(model), state)
        tuned, info = fit(ctx, both, self.personal, ctx.data["train"], trainable=self.of_head)
        head = sub(only(tuned, self.of_head), only(model, self.of_head))
        return upload(model, Model(head), ctx, {**metrics, "personal_loss": info["loss"]})

    def client_model(self, received: Model, state: Model) -> Tensors:
        return {**received.model, **add(only(received.model, self.of_head), state.model)}
