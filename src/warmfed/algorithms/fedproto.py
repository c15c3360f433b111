"""FedProto: an exchange of class prototypes instead of weights.

Tan et al., "FedProto: Federated Prototype Learning across Heterogeneous Clients", AAAI 2022, arXiv:2105.00243, Algorithm 1.

A prototype is the mean feature of a class. The sites exchange prototypes and nothing else. λ = 1 is the paper's.

Departures: a global prototype is weighted by the sites' numbers of images of the class; the authors' code takes the plain
mean over sites. The distance in the loss is the mean squared difference, as in that code, not its root.
"""

from dataclasses import dataclass
from typing import Any, Literal, final

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core import ClientContext, Metrics, Replies, Reply, ServerContext, classifier
from ..core.messages import message
from ..core.tensors import Table, Tensors, layout_mismatch, rows
from ..fit import Loss, fit
from ..utils.errors import InputError
from ..utils.settings import check_choices
from .shared.base import Model, Rounds, count_fits, counted


@message("fedproto.Prototypes")
class Prototypes:
    """Mean feature of each class, float [classes, width], and the number of images behind it, int64 [classes]."""

    feature: Tensors  # {"mean": C̄}; {} before the first round
    count: Tensors


def prototypes(features: Tensor, label: Tensor, classes: int) -> Prototypes:
    """Return the mean feature of each class; zeros for a class without images."""
    count = torch.bincount(label, minlength=classes)
    total = torch.zeros(classes, features.shape[1], dtype=torch.float64).index_add_(0, label, features.double())
    return Prototypes({"mean": (total / count.clamp_min(1)[:, None]).float()}, {"images": count})


def nearest(prototypes: Prototypes) -> Tensors:
    """Return a linear head that predicts the class of the nearest prototype.

    Its logits 2·C̄ᵀh - ||C̄||² equal -||h - C̄||² up to the constant ||h||².
    """
    mean, known = prototypes.feature["mean"], prototypes.count["images"] > 0
    bias = torch.where(known, -mean.square().sum(1), torch.tensor(-1e6))
    return {"head.weight": 2 * mean, "head.bias": bias}


@final
@dataclass(frozen=True)
class FedProto(Rounds[Prototypes, Prototypes, Model, Prototypes]):
    """Train each site's own model, with a penalty on the distance to the global prototypes; no global model."""

    lam: float = 1.0
    """Weight λ of the distance to the prototypes; at least 0."""
    predict: Literal["prototype", "head"] = "prototype"
    """Prediction of a site's model: prototype (the nearest global prototype, as in the paper) or head (its own head)."""

    def __post_init__(self) -> None:
        check_choices(self)

    def init(self, ctx: ServerContext) -> Prototypes:
        return Prototypes({}, {})

    def init_client_state(self, received: Prototypes, ctx: ClientContext) -> Model:
        return Model(ctx.task.init(ctx.rng))

    def train(self, received: Prototypes, state: Model, ctx: ClientContext) -> Reply[Prototypes]:
        data = ctx.data["train"]
        pulled = self.pull(ctx, received) if self.lam and received.feature else None
        model, metrics = fit(ctx, state.model, self.local, data, loss=pulled)
        mine = prototypes(classifier(ctx).features(model, data, device=ctx.device), data["label"], ctx.task.classes)
        return Reply(mine, Model(model), float(rows(data)), metrics)

    def pull(self, ctx: ClientContext, received: Prototypes) -> Loss:
        """Return cross-entropy plus λ times the distance of each image's feature to its class's prototype, if there is one."""
        mean, known = received.feature["mean"].to(ctx.device), (received.count["images"] > 0).to(ctx.device)

        def loss(model: Any, batch: Table) -> Tensor:
            features, label = classifier(ctx).embed(model, batch), batch["label"]
            far = (features - mean[label]).square().mean(1)
            return F.cross_entropy(model.head(features), label) + self.lam * (far * known[label]).mean()

        return loss

    def check(self, reply: Reply[Prototypes], site: str, ctx: ServerContext) -> None:
        with torch.device("meta"):  # build shapes only, without weights
            mean = torch.empty_like(ctx.task.build().get_parameter("head.weight"))
            count = torch.empty(ctx.task.classes, dtype=torch.int64)
        wrong = layout_mismatch(reply.message.feature, {"mean": mean}) or layout_mismatch(
            reply.message.count, {"images": count}
        )
        if wrong:
            raise InputError(wrong)
        count_fits(reply.message.count["images"].tolist(), ctx.task.classes, reply.weight)

    def change(self, message: Prototypes, received: Prototypes) -> Tensors:
        # Only the site's own classes: it sends zeros for the others.
        known = message.count["images"] > 0
        now = message.feature["mean"][known].double()
        return {"feature/mean": now - received.feature["mean"][known].double() if received.feature else now}

    def aggregate(self, server: Prototypes, replies: Replies[Prototypes], ctx: ServerContext) -> tuple[Prototypes, Metrics]:
        counts = [counted(reply.message.count["images"], reply.weight) for reply in replies.values()]
        sent = [reply.message.feature["mean"].double() for reply in replies.values()]
        weight = torch.stack(counts).sum(0)
        total = torch.stack([mean * n[:, None] for mean, n in zip(sent, counts, strict=True)]).sum(0)
        mean = (total / torch.where(weight > 0, weight, 1)[:, None]).float()
        count = torch.stack([reply.message.count["images"] for reply in replies.values()]).sum(0)
        if server.feature:
            # A class that no site of this round holds keeps its prototype.
            old = count == 0
            mean = torch.where(old[:, None], server.feature["mean"], mean)
            count = torch.where(old, server.count["images"], count)
        return Prototypes({"mean": mean}, {"images": count}), {}

    def global_model(self, server: Prototypes) -> Tensors | None:
        return None

    def client_model(self, received: Prototypes, state: Model) -> Tensors | None:
        decides = nearest(received) if self.predict == "prototype" and received.feature else {}
        return {**state.model, **decides}
