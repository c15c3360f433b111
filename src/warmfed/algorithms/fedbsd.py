"""FedBSD. Wang et al., ACM MMAsia 2023, arXiv:2409.15636, "Personalized Federated Learning via Backbone Self-Distillation".

Backbones are averaged, heads are private. Each round the global backbone is the frozen teacher and the site's own the student:

    head:      min_ψ  CE(g(φ(x; θ̄); ψ), y)                                the head learns on the teacher's features
    backbone:  min_θ  CE(g(φ(x; θ); ψ), y) + λ·D(φ(x; θ), φ(x; θ̄))        and the student under that head

Departures: only the abstract and summaries were at hand, and no code: the order of the two, D, its weight and the student's
start are our reading. The student may start as the site's own backbone of the round before, through which the global one
reaches it only by D, or as the global one, where D is a proximal term on features.
"""

from dataclasses import dataclass
from functools import partial
from typing import final

import torch.nn.functional as F
from torch import Tensor, nn

from ..core import ClientContext, Reply, classifier
from ..core.tensors import Table, only
from ..fit import Loss, Training, fit
from ..utils.errors import one_of
from .shared.base import Model, SplitByName, upload
from .shared.distillation import divergence


def distance(student: Tensor, teacher: Tensor, kind: str, temperature: float) -> Tensor:
    """D: how far features float [n, width] are from the teacher's, mean over rows: kl, mse or cosine."""
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
    """A shared backbone teaches each site's own, feature by feature; heads never leave the sites."""

    start: str = "own"
    """What the student starts from: its own previous backbone (own), or the global one (global)."""
    distance: str = "kl"
    """D: kl (of the features' softmax), mse or cosine."""
    temperature: float = 2.0
    """T of kl."""
    weight: float = 1.0
    """λ, the weight of D."""
    head: Training = Training(lr=0.02, epochs=1, max_grad_norm=1.0)
    """The head's training in one round."""
    local: Training = Training(lr=0.02, epochs=4, max_grad_norm=1.0)
    """The backbone's training in one round, after the head's."""

    def __post_init__(self) -> None:
        one_of(self, start=("own", "global"), distance=("kl", "mse", "cosine"))

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
        """Cross-entropy + λ·D."""
        features = classifier(ctx).embed(student, batch)  # φ(x; θ)
        far = distance(features, batch["wanted"], self.distance, self.temperature)
        return F.cross_entropy(student.get_submodule("head")(features), batch["label"]) + self.weight * far
