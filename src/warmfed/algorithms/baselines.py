"""Baselines: each site alone (`local`), and all images in one place (`centralized`).

Both train for as many local epochs as the federated methods do over their rounds (`until` budget), or until validation stops
improving (`until` validation); then the weights with the best validation result are kept.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, final

import torch
from torch import Tensor

from ..core import ClientContext, Empty, Metrics, Replies, Reply, ServerContext, Stage, Workload
from ..core.messages import message
from ..core.tensors import Table, Tensors, join, layout_mismatch, rows
from ..core.training import Training
from ..fit import Context, fit
from ..utils.errors import InputError
from ..utils.settings import check_choices
from .shared.base import Model, WithoutGenerator, at_sites, gathering


@dataclass(frozen=True)
class Budget:
    """Training time of the baselines."""

    until: Literal["budget", "validation"] = "budget"
    """Stopping rule: budget (`rounds` times `local`) or validation (accuracy has not risen for `patience` times `local`)."""
    patience: int = 4
    """Trainings without a better validation accuracy before the end; the lower loss breaks ties."""
    limit: int = 60
    """Maximum number of trainings."""

    def __post_init__(self) -> None:
        check_choices(self)


def train_once(
    ctx: Context, start: Tensors, training: Training, train: Table, check: Table, budget: Budget
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Train as one stage of the baseline does; return the weights and their metrics.

    With `until` budget, this is one training. With `until` validation, it is as many as improve the result on `check`, and
    the weights are the best ones.
    """
    if budget.until == "budget":
        return fit(ctx, start, training, train)
    task = ctx.task
    model, info = dict(start), {"loss": 0.0}
    best, score, waited = model, (-1.0, 0.0), 0
    pieces = 0
    while waited < budget.patience and pieces < budget.limit:
        model, info = fit(ctx, model, training, train)
        found = task.metrics(model, check, ctx.device)  # type: ignore[attr-defined]
        now = (found["accuracy"], -found["loss"])
        waited = 0 if now > score else waited + 1
        best, score = (model, now) if now > score else (best, score)
        pieces += 1
    return best, {"loss": info["loss"], "trainings": float(pieces), "validation_accuracy": score[0]}


@final
@dataclass(frozen=True)
class LocalOnly(WithoutGenerator):
    """Train each site alone; no weights are exchanged, and there is no global model."""

    rounds: int = 5
    """Trainings in the budget."""
    local: Training = Training(lr=0.02, epochs=5, max_grad_norm=1.0)
    """Local training in one round."""
    budget: Budget = Budget()
    """Stopping rule."""

    def workload(self, rows: Mapping[str, int], pairs: int) -> tuple[Workload, ...]:
        return (at_sites("local training", self.local, rows, self.rounds),)

    def init_client_state(self, received: Model, ctx: ClientContext) -> Model:
        return Model(received.model)

    def broadcast(self, server: Model, site: str) -> Model:
        return server

    def init(self, ctx: ServerContext) -> Model:
        # The same random initial weights for all sites, as in FedAvg.
        return Model(ctx.task.init(ctx.rng))

    def stages(self) -> tuple[Stage, ...]:
        first = Stage("train", self.done, self.train, replies=(Empty,), images=False)
        later = replace(first, broadcast=lambda server, site: Empty())
        count = self.rounds if self.budget.until == "budget" else 1
        return ((first,) + (later,) * count)[:count]

    def train(self, received: Model | Empty, state: Model, ctx: ClientContext) -> Reply[Empty]:
        data = ctx.data
        model, metrics = train_once(ctx, state.model, self.local, data["train"], data["validation"], self.budget)
        return Reply(Empty(), Model(model), float(rows(data["train"])), metrics)

    def done(self, server: Model, replies: Replies[Empty], ctx: ServerContext) -> tuple[Model, Metrics]:
        return server, {}

    def global_model(self, server: Model) -> Tensors | None:
        return None

    def client_model(self, received: Model | Empty, state: Model) -> Tensors | None:
        return state.model


@message("references.Pool")
class Pool:
    """All sites' images, and the model trained on them."""

    model: Tensors
    train: Tensors
    validation: Tensors


@message("references.Images")
class Images:
    """A site's images, which federated learning avoids sending."""

    train: Tensors
    validation: Tensors


@final
@dataclass(frozen=True)
class Centralized(WithoutGenerator):
    """Train one model on the images of all sites; an upper reference for federated methods."""

    rounds: int = 5
    """Trainings in the budget."""
    local: Training = Training(lr=0.02, epochs=5, max_grad_norm=1.0)
    """Training of one round, on all images."""
    budget: Budget = Budget()
    """Stopping rule."""

    def workload(self, rows: Mapping[str, int], pairs: int) -> tuple[Workload, ...]:
        return (Workload("training", "server", self.rounds * self.local.count(sum(rows.values())), self.local),)

    def init(self, ctx: ServerContext) -> Pool:
        return Pool(ctx.task.init(ctx.rng), {}, {})

    def broadcast(self, server: Pool, site: str) -> Model:
        return Model(server.model)

    def init_client_state(self, received: Model, ctx: ClientContext) -> None:
        return None

    def stages(self) -> tuple[Stage, ...]:
        collect = gathering("collect", self.pool, self.send, replies=(Images,), check=self.check, images=True)
        return (collect,) + (Stage("train", self.train),) * (self.rounds if self.budget.until == "budget" else 1)

    def send(self, received: Empty, state: None, ctx: ClientContext) -> Reply[Images]:
        images = Images(ctx.data["train"], ctx.data["validation"])
        return Reply(images, None, float(rows(ctx.data["train"])), {})

    def check(self, reply: Reply[Images], site: str, ctx: ServerContext) -> None:
        """Raise `InputError` if a table lacks the columns that the task needs, or has unknown labels."""
        blank = {"image": torch.zeros(1, *ctx.task.shape, dtype=torch.uint8), "label": torch.zeros(1, dtype=torch.int64)}
        like = ctx.task.tables({"train": blank})["train"]
        declared = {"train": reply.weight, **ctx.rows.get(site, {})}
        for split, table in (("train", reply.message.train), ("validation", reply.message.validation)):
            label = table.get("label", torch.empty(0))
            count = int(declared.get(split, label.numel()))
            if wrong := layout_mismatch(
                table, {name: column.expand(count, *column.shape[1:]) for name, column in like.items()}
            ):
                raise InputError(f"{split}: {wrong}")
            if not count or not 0 <= int(label.min()) <= int(label.max()) < ctx.task.classes:
                raise InputError(f"{split}: it has no labels, or one that is not from 0 to {ctx.task.classes - 1}")

    def pool(self, server: Pool, replies: Replies[Images], ctx: ServerContext) -> tuple[Pool, Metrics]:
        train = join(reply.message.train for reply in replies.values())
        validation = join(reply.message.validation for reply in replies.values())
        return replace(server, train=train, validation=validation), {}

    def train(self, server: Pool, replies: Replies[Empty], ctx: ServerContext) -> tuple[Pool, Metrics]:
        model, info = train_once(ctx, server.model, self.local, server.train, server.validation, self.budget)
        return replace(server, model=model), info

    def global_model(self, server: Pool) -> Tensors | None:
        return server.model

    def client_model(self, received: Model, state: None) -> Tensors | None:
        return received.model
