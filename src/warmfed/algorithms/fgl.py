"""FGL, Federated Generative Learning. Zhang et al., 2023, arXiv:2306.16064; class prompts, multi-round form.

The sites send their class names only; the server samples from the unadapted base by prompts, trains the start on the
samples, and fine-tunes on them after every aggregation.
Departures: the samples are filtered as WarmFed's are, so that only the adapters tell the two apart.
"""

from dataclasses import dataclass, replace
from typing import final

import torch

from ..core import Central, Local, Metrics, Nothing, Replies, Reply, ServerState, Stage, State
from ..fit import Training, fit
from ..messages import Message, message
from ..tensors import Tensors, rows
from .averaging import Averaging, Model, average, upload
from .synthetic import Synthesis, warm_start


@message
class Server:
    """What the server keeps between stages."""

    model: Tensors
    classes: Tensors
    subset: Tensors


@message
class Classes:
    """All that a site sends before the warm start: which classes it holds."""

    classes: tuple[int, ...]


@final
@dataclass(frozen=True)
class FGL(Averaging):
    """Warm start from prompts alone, then FedAvg with server fine-tuning on a synthetic subset."""

    synthesis: Synthesis = Synthesis()
    """How S is drawn and learned."""
    tune: bool = True
    """Whether the server fine-tunes the aggregated model on S_sub."""
    tune_training: Training = Training(lr=0.01, epochs=2, clip=1.0)
    """That fine-tuning."""

    def init(self, ctx: Central) -> ServerState:
        return Server(ctx.task.init(ctx.rng), {}, {})

    def down(self, server: ServerState, site: str) -> Message:
        return Model(server.model)

    def stages(self) -> tuple[Stage, ...]:
        adapt = Stage("adapt", self.collect, self.ask, down=lambda server, site: Nothing(), evaluated=False)
        train = Stage("train", self.merge, self.train, sample=self.sample)
        return (adapt, Stage("warm", self.start)) + (train,) * self.rounds

    def ask(self, down: Message, state: State, ctx: Local) -> Reply:
        held = tuple(ctx.data["train"]["label"].unique().tolist())
        return Reply(Classes(held), None, float(rows(ctx.data["train"])), {})

    def collect(self, server: ServerState, replies: Replies, ctx: Central) -> tuple[ServerState, Metrics]:
        return replace(server, classes={site: torch.tensor(r.message.classes) for site, r in replies.items()}), {}

    def start(self, server: ServerState, replies: Replies, ctx: Central) -> tuple[ServerState, Metrics]:
        classes = {site: tuple(held.tolist()) for site, held in server.classes.items()}
        model, subset, metrics = warm_start(ctx, dict.fromkeys(classes), classes, self.synthesis)
        return replace(server, model=model, subset=subset), metrics

    def train(self, down: Message, state: State, ctx: Local) -> Reply:
        model, metrics = fit(ctx, down.model, self.local, ctx.data["train"])
        return upload(model, state, ctx, metrics)

    def merge(self, server: ServerState, replies: Replies, ctx: Central) -> tuple[ServerState, Metrics]:
        model, metrics = average(replies), {}
        if self.tune:
            model, info = fit(ctx, model, self.tune_training, server.subset)
            metrics = {"tune_loss": info["loss"]}
        return replace(server, model=model), metrics
