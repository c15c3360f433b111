"""FedNCM: the class means of the features become the head; rounds of FedAvg follow.

Legate, Bernier, Page-Caccia, Oyallon, Belilovsky, "Guiding The Last Layer in Federated Learning with Pre-Trained Models",
NeurIPS 2023, arXiv:2306.03937.

The sites send the mean feature and the number of images of each class that they hold. The server's weighted means, with norm 1,
are the rows of the head. With `rounds` 0 this is the paper's one-shot FedNCM, otherwise its first stage before fine-tuning.

Departures: the full text was not at hand for the scale of the head; rows of norm 1 and no bias are our reading.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, final

import torch
import torch.nn.functional as F

from ..core import ClientContext, Metrics, Replies, Reply, ServerContext, Stage, Workload, classifier
from ..core.tensors import Tensors, layout_mismatch, rows
from ..fit import fit
from ..utils.errors import InputError
from .fedproto import Prototypes, prototypes
from .shared.base import Averaging, Model, count_fits, counted, upload


def means_of(message: Prototypes, received: Model) -> Tensors:
    """Return what the admission policy compares between sites: the means, not the numbers of images."""
    return {"feature/mean": message.feature["mean"]}


@final
@dataclass(frozen=True)
class FedNCM(Averaging[None, Model]):
    """Set the head to the class means of the sites' features, then run FedAvg."""

    described: ClassVar[tuple[type, ...]] = (Prototypes,)

    def further_work(self, rows: Mapping[str, int], pairs: int) -> tuple[Workload, ...]:
        return ()

    def stages(self) -> tuple[Stage, ...]:
        means = Stage(
            "describe",
            self.set_head,
            self.describe,
            replies=self.described,
            check=self.check_means,
            change=means_of,
            images=False,
        )
        return (means,) + (self.round,) * self.rounds

    def describe(self, received: Model, state: None, ctx: ClientContext) -> Reply[Prototypes]:
        data = ctx.data["train"]
        features = classifier(ctx).features(received.model, data, device=ctx.device)
        return Reply(prototypes(features, data["label"], len(ctx.prompts)), None, float(rows(data)), {})

    def check_means(self, reply: Reply[Prototypes], site: str, ctx: ServerContext) -> None:
        classes = len(ctx.prompts)
        with torch.device("meta"):  # build shapes only, without weights
            mean = torch.empty_like(ctx.task.build().get_parameter("head.weight"))
        wrong = layout_mismatch(reply.message.feature, {"mean": mean})
        wrong = wrong or layout_mismatch(reply.message.count, {"images": torch.empty(classes, dtype=torch.int64)})
        if wrong:
            raise InputError(wrong)
        count_fits(reply.message.count["images"].tolist(), classes, reply.weight)

    def set_head(self, server: Model, replies: Replies[Prototypes], ctx: ServerContext) -> tuple[Model, Metrics]:
        counts = [counted(reply.message.count["images"], reply.weight).double() for reply in replies.values()]
        sums = [r.message.feature["mean"].double() * n[:, None] for r, n in zip(replies.values(), counts, strict=True)]
        weight = F.normalize(torch.stack(sums).sum(0), dim=1).float()  # does not depend on the number of images
        held = torch.stack(counts).sum(0) > 0
        return Model({**server.model, "head.weight": weight, "head.bias": torch.where(held, 0.0, -1e6)}), {}

    def train(self, received: Model, state: None, ctx: ClientContext) -> Reply[Model]:
        model, metrics = fit(ctx, received.model, self.local, ctx.data["train"])
        return upload(model, state, ctx, metrics)
