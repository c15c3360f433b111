"""FedRoD: a generic head for all classes and a personal head for the site's own.

Chen, Chao, "On Bridging Generic and Personalized Federated Learning for Image Classification", ICLR 2022, arXiv:2107.00778,
Algorithm 1, with a linear personal head.

The generic model is trained with a balanced loss and averaged. On its features, each site trains a personal head with the
plain loss. The personal logits are added to the generic ones. Both heads are linear, so their sum is one head. As in the paper,
the personal head sends no gradient into the generic model.

Departures: in each round, the personal head is trained after the generic model, not in the same steps.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import torch.nn.functional as F
from torch import Tensor, nn

from ..algorithms.shared.base import at_sites
from ..core import ClientContext, Reply, Workload, classifier
from ..core.tensors import Table, Tensors, add, only, sub, zeros
from ..core.training import Training
from ..fit import Loss, fit
from .shared.base import Averaging, Model, upload


def balanced(ctx: ClientContext) -> Loss:
    """Return the balanced softmax loss (Ren et al. 2020): cross-entropy of the logits + log of the site's class shares."""
    label = ctx.data["train"]["label"]

    def loss(model: nn.Module, batch: Table) -> Tensor:
        logits = classifier(ctx).logits(model, batch)
        often = label.bincount(minlength=logits.shape[1]).to(logits.device) / len(label)
        return F.cross_entropy(logits + often.log(), batch["label"])

    return loss


@final
@dataclass(frozen=True)
class FedRoD(Averaging[Model, Model]):
    """Train a generic model with a balanced loss, and a personal head beside its head."""

    head: str = "head."
    """Prefix of the names of the head's tensors."""
    personal: Training = Training(lr=0.02, epochs=5, max_grad_norm=1.0)
    """Training of the personal head in one round."""

    def further_work(self, rows: Mapping[str, int], pairs: int) -> tuple[Workload, ...]:
        return (at_sites("personal models", self.personal, rows, self.rounds),)

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
