"""Abstract families of algorithms: rounds of training, and averaging; defaults for every method except `train`."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Protocol, TypeVar, cast

import torch
from torch import Tensor

from ...core import (
    ClientContext,
    ClientFunction,
    ClientState,
    Empty,
    GeneratorSpec,
    Metrics,
    Replies,
    Reply,
    ServerContext,
    ServerFunction,
    Stage,
    Task,
    Workload,
)
from ...core.messages import Message, message
from ...core.tensors import Tensors, layout_mismatch, mean, only, rows
from ...core.training import Training
from ...fit import fit
from ...models import initial
from ...utils.errors import InputError
from .robust_aggregation import Robust

DRAWING = Training(optimizer="adam", lr=2e-4, epochs=5, batch_size=32, max_grad_norm=1.0)
"""Default local training in one round for a diffusion model."""


@message("averaging.Model")
class Model:
    """A model's weights, or their shared part."""

    model: Tensors


class HasModel(Message, Protocol):
    """A message that holds a model or a part of one."""

    @property
    def model(self) -> Tensors: ...


@message("averaging.Personal")
class Personal:
    """A site's own last model; None before its first round."""

    model: Tensors | None


def at_sites(what: str, training: Training, rows: Mapping[str, int], times: int) -> Workload:
    """Return the work of a training that each site does so many times on its training rows."""
    return Workload(what, "sites", times * sum(map(training.count, rows.values())), training)


S = TypeVar("S", bound=Message)
"""The server's state."""
M = TypeVar("M", bound=Message)
"""The message that a site receives."""
C = TypeVar("C", bound=ClientState)
"""The state that a site keeps."""
R = TypeVar("R", bound=Message)
"""The message that a site replies with."""


def upload(model: Tensors, state: ClientState, ctx: ClientContext, metrics: Metrics) -> Reply[Model]:
    """Return a reply with model weights, weighted by the number of training rows."""
    return Reply(Model(model), state, float(rows(ctx.data["train"])), metrics)


def average(replies: Replies[HasModel]) -> Tensors:
    """Return the weighted mean Σ_k n_k/n·w_k of the replies' models."""
    return mean((reply.message.model, reply.weight) for reply in replies.values())


def expect(model: Tensors, ctx: ServerContext, keep: Callable[[str], bool] = lambda name: True) -> None:
    """Raise `InputError` if a reply's model does not have the layout of the task's model.

    Args:
        keep: predicate on tensor names; the model must hold exactly the tensors for which it is true.
    """
    with torch.device("meta"):  # build shapes only, without weights or random draws
        like = only(initial(ctx.task.build()), keep)
    if wrong := layout_mismatch(model, like):
        raise InputError(f"{wrong}; do all run one version of warmfed?")


def count_fits(count: Sequence[int | float], classes: int, weight: float) -> None:
    """Raise `InputError` unless these are class counts of `classes` classes whose sum is the reply's weight."""
    whole = len(count) == classes and all(0 <= n <= weight and n == int(n) for n in count)
    if not whole or sum(count) != weight:
        raise InputError(f"expected {classes} class counts whose sum is {weight:.0f}, got {list(count)[:20]}")


def counted(count: Tensor, weight: float) -> Tensor:
    """Return a site's class counts, scaled down so that their sum is at most its reply's admitted weight."""
    total = int(count.sum())
    return count if total <= weight else count.double() * (weight / total)


def gathering(
    name: str,
    server: ServerFunction,
    client: ClientFunction,
    *,
    replies: tuple[type, ...],
    check: Callable[[Reply[Any], str, ServerContext], None],
    images: bool,
) -> Stage:
    """Return a stage before the rounds: it sends the sites no message and leaves the models unchanged."""
    return Stage(
        name,
        server,
        client,
        broadcast=lambda server, site: Empty(),
        evaluated=False,
        replies=replies,
        check=check,
        images=images,
    )


@dataclass(frozen=True)
class WithoutGenerator:
    """Abstract: an algorithm without a generator, for any number of sites."""

    @property
    def needs_generator(self) -> GeneratorSpec | None:
        return None

    @property
    def samples_per_class(self) -> int:
        return 0

    def check_sites(self, count: int) -> None:
        """Raise `InputError` if so many sites are too few."""


@dataclass(frozen=True)
class Rounds(WithoutGenerator, ABC, Generic[S, M, C, R]):
    """Abstract: rounds of local training; each method aggregates the replies in its own way."""

    RENAMED: ClassVar[Mapping[str, str]] = {"sample": "client_fraction"}

    rounds: int = 5
    """Training rounds."""
    client_fraction: float = 1.0
    """Share of the sites that train in each round."""
    local: Training = Training(lr=0.02, epochs=5, max_grad_norm=1.0)
    """Local training in one round."""
    replies: ClassVar[tuple[type, ...]] = ()
    """Message kinds that a site may reply with; empty: the kind that it received."""
    change: ClassVar[Any] = None
    """`Stage.change` of a round."""

    @abstractmethod
    def train(self, received: M, state: C, ctx: ClientContext) -> Reply[R]: ...

    @abstractmethod
    def aggregate(self, server: S, replies: Replies[R], ctx: ServerContext) -> tuple[S, Metrics]: ...

    def workload(self, rows: Mapping[str, int], pairs: int) -> tuple[Workload, ...]:
        return (at_sites("local training", self.local, rows, self.rounds), *self.further_work(rows, pairs))

    def further_work(self, rows: Mapping[str, int], pairs: int) -> tuple[Workload, ...]:
        """Return the trainings beside the local ones; see `Algorithm.workload`."""
        return ()

    def init(self, ctx: ServerContext) -> S:
        return cast(S, Model(ctx.task.init(ctx.rng)))

    def broadcast(self, server: S, site: str) -> M:
        return cast(M, server)

    def init_client_state(self, received: M, ctx: ClientContext) -> C:
        return cast(C, None)

    def stages(self) -> tuple[Stage, ...]:
        return (self.round,) * self.rounds

    @property
    def round(self) -> Stage:
        """One round of training."""
        return Stage(
            "train",
            self.aggregate,
            self.train,
            client_fraction=self.client_fraction,
            replies=self.replies,
            check=self.check,
            change=self.change,
            images=False,
        )

    def check(self, reply: Reply[R], site: str, ctx: ServerContext) -> None:
        """Raise `InputError` if a reply fails a check that the admission policy does not make."""

    def global_model(self, server: S) -> Tensors | None:
        return cast(HasModel, server).model

    def client_model(self, received: M, state: C) -> Tensors | None:
        return cast(HasModel, received).model


@dataclass(frozen=True)
class Combined(Rounds[S, M, C, R]):
    """Abstract: rounds whose models a configurable rule aggregates."""

    robust: Robust = Robust()
    """Aggregation rule; the default is the weighted mean."""

    def check_sites(self, count: int) -> None:
        self.robust.enough(count)


@dataclass(frozen=True)
class Averaging(Combined[Model, Model, C, R], Generic[C, R]):
    """Abstract: rounds of local training and weighted averaging of the tensors that the sites return."""

    def aggregate(self, server: Model, replies: Replies[R], ctx: ServerContext) -> tuple[Model, Metrics]:
        return Model({**server.model, **self.robust.combine(server.model, replies)}), {}


@dataclass(frozen=True)
class PartlyShared(Averaging[Model, Model]):
    """Abstract: some tensors never leave the site; by default, the whole model is trained at once.

    The server holds and sends only the shared part. There is no global model, since the server has no private part.
    """

    @abstractmethod
    def mine(self, task: Task) -> Callable[[str], bool]:
        """Return a predicate on tensor names: whether the tensor stays at the site."""

    def shared(self, task: Task) -> Callable[[str], bool]:
        mine = self.mine(task)
        return lambda name: not mine(name)

    def init(self, ctx: ServerContext) -> Model:
        return Model(only(ctx.task.init(ctx.rng), self.shared(ctx.task)))

    def init_client_state(self, received: Model, ctx: ClientContext) -> Model:
        return Model(only(ctx.task.init(ctx.rng), self.mine(ctx.task)))

    def train(self, received: Model, state: Model, ctx: ClientContext) -> Reply[Model]:
        model, metrics = fit(ctx, self.whole(received, state), self.local, ctx.data["train"])
        return self.split(model, ctx, metrics)

    def whole(self, received: Model, state: Model) -> Tensors:
        return {**received.model, **state.model}

    def split(self, model: Tensors, ctx: ClientContext, metrics: Metrics) -> Reply[Model]:
        return upload(only(model, self.shared(ctx.task)), Model(only(model, self.mine(ctx.task))), ctx, metrics)

    def global_model(self, server: Model) -> Tensors | None:
        return None

    def client_model(self, received: Model, state: Model) -> Tensors | None:
        return self.whole(received, state)


@dataclass(frozen=True)
class SplitByName(PartlyShared):
    """Abstract: the tensors whose names start with `private` stay at the site."""

    private: str = "head."
    """Prefix of the names of the tensors that stay at the site."""

    def mine(self, task: Task) -> Callable[[str], bool]:
        return lambda name: name.startswith(self.private)


@dataclass(frozen=True)
class Personalized(Averaging[Model | None, R]):
    """Abstract: the rounds of `Averaging`, and a last stage that adapts the last global model to each site."""

    @abstractmethod
    def own(self, model: Tensors, ctx: ClientContext) -> tuple[Tensors, Metrics]:
        """Return a site's own model, adapted from the last global model, and its metrics."""

    def stages(self) -> tuple[Stage, ...]:
        personalize = Stage("personalize", self.done, self.personalize, replies=(Empty,), images=False)
        return (self.round,) * self.rounds + (personalize,)

    def personalize(self, received: Model, state: Model | None, ctx: ClientContext) -> Reply[Empty]:
        model, info = self.own(received.model, ctx)
        return Reply(Empty(), Model(model), float(rows(ctx.data["train"])), info)

    def done(self, server: Model, replies: Replies[Empty], ctx: ServerContext) -> tuple[Model, Metrics]:
        return server, {}

    def client_model(self, received: Model, state: Model | None) -> Tensors | None:
        return received.model if state is None else state.model
