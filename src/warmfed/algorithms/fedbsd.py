"""FedBSD: distillation from the global backbone into each site's own backbone.

Wang et al., "Personalized Federated Learning via Backbone Self-Distillation", ACM MMAsia 2023, arXiv:2409.15636.

The full text and code were not available; this reading follows the abstract and summaries. Backbones are averaged, heads are
private. In each round, the global backbone is the frozen teacher and the site's own backbone the student:

    head:      min_ψ  CE(g(φ(x; θ̄); ψ), y)                                train the head on the teacher's features
    backbone:  min_θ  CE(g(φ(x; θ); ψ), y) + λ·D(φ(x; θ), φ(x; θ̄))        train the student under that head

Departures: the order of the two trainings, D, its weight and the student's start are ours. With `start` own, the student
continues from the site's own backbone and D is its only link to the global one. With `start` global, it starts as a copy
of its teacher, and D is a proximal term on features.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal, final

import torch.nn.functional as F
from torch import Tensor, nn

from ..algorithms.shared.base import at_sites
from ..core import ClientContext, Reply, Workload, classifier
from ..core.tensors import Table, only
from ..core.training import Training
from ..fit import Loss, fit
from ..utils.settings import check_choices
from .shared.base import Model, SplitByName, upload
from .shared.distillation import divergence


def distance(student: Tensor, teacher: Tensor, kind: str, temperature: float) -> Tensor:
    """Return D, the distance of features float [n, width] to the teacher's, mean over rows, by kl, mse or cosine."""
    match kind:
        case "kl":
            return divergence(student, teacher, temperature)
        case "mse":
            return F.mse_loss(student, teacher)
        case _:
            return 1 - F.cosine_similarity(student, teacher, -1).mean()


@final
@dataclass(frozen=True)
class FedBSD(SplitByName):
    """Distil a shared backbone into each site's own, on features; heads never leave the sites."""

    start: Literal["own", "global"] = "own"
    """Student's initial weights: own (the site's previous backbone) or global (the global backbone)."""
    distance: Literal["kl", "mse", "cosine"] = "kl"
    """Distance D: kl (of the softmax of the features), mse or cosine."""
    temperature: float = 2.0
    """Temperature T of kl."""
    weight: float = 1.0
    """Weight λ of D; at least 0."""
    head: Training = Training(lr=0.02, epochs=1, max_grad_norm=1.0)
    """Training of the head in one round."""
    local: Training = Training(lr=0.02, epochs=4, max_grad_norm=1.0)
    """Training of the backbone in one round, after the head's."""

    def further_work(self, rows: Mapping[str, int], pairs: int) -> tuple[Workload, ...]:
        return (at_sites("heads", self.head, rows, self.rounds),)

    def __post_init__(self) -> None:
        check_choices(self)

    def train(self, received: Model, state: Model, ctx: ClientContext) -> Reply[Model]:
        mine, shared, data = self.mine(ctx.task), self.shared(ctx.task), ctx.data["train"]
        teacher, info = fit(ctx, {**state.model, **received.model}, self.head, data, trainable=mine)
        student = {**teacher, **only(state.model, shared)} if self.start == "own" else teacher
        loss: Loss | None = None
        if self.weight:
            data = {**data, "wanted": classifier(ctx).features(teacher, data, device=ctx.device)}  # φ(x; θ̄)
            loss = partial(self.taught, ctx)
        model, metrics = fit(ctx, student, self.local, data, loss=loss, trainable=shared)
        return upload(only(model, shared), Model(model), ctx, {**metrics, "head_loss": info["loss"]})

    def taught(self, ctx: ClientContext, student: nn.Module, batch: Table) -> Tensor:
        """Return cross-entropy + λ·D."""
        features = classifier(ctx).embed(student, batch)  # φ(x; θ)
        far = distance(features, batch["wanted"], self.distance, self.temperature)
        return F.cross_entropy(student.get_submodule("head")(features), batch["label"]) + self.weight * far
