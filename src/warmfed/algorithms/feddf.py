"""FedDF: after each average, the server distils the ensemble of the sites' models into it, on unlabelled images.

Lin et al., "Ensemble Distillation for Robust Model Fusion in Federated Learning", NeurIPS 2020, arXiv:2006.07242, Algorithm 1.

The student starts from the weighted average of the sites' models. It learns the mean of their logits on images without labels
by KL divergence. The paper's images are public or come from a generator. Here the generator of the run draws them: the base
alone by prompts (`images = "base"`: the sites send nothing for them), or the sites' adapters (`images = "adapters"`: WarmFed's
set S).

Departures: a fixed number of steps, with a cosine schedule as in the paper; the paper stops at the best validation accuracy,
within 10,000 steps of 128 images. One network for all sites (the paper's Algorithm 1; its Algorithm 3 groups different ones).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, final

import torch
from torch import Tensor, nn

from ..core import (
    Empty,
    Metrics,
    Replies,
    ServerContext,
    Stage,
    Workload,
    classifier,
)
from ..core.tensors import Table, Tensors
from ..core.training import Training
from ..fit import Loss, fit
from ..utils.errors import InputError
from ..utils.settings import check_choices
from .shared.base import Model, gathering
from .shared.distillation import divergence
from .shared.synthetic_data import AdapterUpload, FromGenerator, Server, draw


@final
@dataclass(frozen=True)
class FedDF(FromGenerator[AdapterUpload]):
    """Average the sites' models and distil their ensemble into the average, on generated images without labels."""

    images: Literal["base", "adapters"] = "base"
    """Source of the images: base (prompts alone, all classes) or adapters (each site's adapter, its classes)."""
    per_class: int = 20
    """Images of each site and class; at least 1. Their labels are not used."""
    distillation: Training = Training(optimizer="adam", lr=1e-3, steps=200, batch_size=64, schedule="cosine")
    """Training of the student on the images in one round."""
    temperature: float = 1.0
    """Temperature T of the distillation; above 0."""

    def __post_init__(self) -> None:
        check_choices(self)
        if self.per_class < 1 or not self.temperature > 0:
            raise InputError("per_class must be at least 1 and temperature above 0; check [algorithm]")

    @property
    def samples_per_class(self) -> int:
        return self.per_class

    def further_work(self, rows: Mapping[str, int], pairs: int) -> tuple[Workload, ...]:
        steps = self.rounds * self.distillation.count(self.per_class * pairs)
        return (Workload("distillation", "server", steps, self.distillation),)

    def stages(self) -> tuple[Stage, ...]:
        adapt = gathering("adapt", self.collect, self.adapt, replies=(AdapterUpload,), check=self.check_upload, images=False)
        before = (adapt,) if self.images == "adapters" else ()
        return (*before, Stage("draw", self.draw, evaluated=False)) + (self.round,) * self.rounds

    def draw(self, server: Server, replies: Replies[Empty], ctx: ServerContext) -> tuple[Server, Metrics]:
        every = tuple(range(ctx.task.classes))
        classes = {site: tuple(held.tolist()) for site, held in server.classes.items()} or dict.fromkeys(ctx.sites, every)
        adapters: dict[str, Tensors | None] = {site: server.adapters.get(site) for site in classes}
        image = draw(ctx, adapters, classes, self.per_class)["image"]
        return replace(server, subset={"image": image}, adapters={}), {"samples": float(len(image))}

    def aggregate(self, server: Server, replies: Replies[Model], ctx: ServerContext) -> tuple[Server, Metrics]:
        student = self.robust.combine(server.model, replies)
        said = [classifier(ctx).predict(reply.message.model, server.subset, device=ctx.device) for reply in replies.values()]
        model, info = fit(
            ctx, student, self.distillation, {**server.subset, "wanted": torch.stack(said).mean(0)}, loss=self.kl(ctx)
        )
        return replace(server, model=model), {"distillation_loss": info["loss"]}

    def kl(self, ctx: ServerContext) -> Loss:
        """Return T²·KL(mean logits of the sites' models ‖ student)."""

        def loss(model: nn.Module, batch: Table) -> Tensor:
            return divergence(classifier(ctx).logits(model, batch), batch["wanted"], self.temperature)

        return loss
