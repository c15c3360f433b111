"""The contract: what an algorithm is, and what it may see.

State and payload are values, never attributes: a site's state is an argument and a return value, so it cannot cross the
wire by accident, be forgotten by a checkpoint, or depend on which process a site ran in.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Literal, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn

from ..utils.errors import printable
from .messages import Message, message
from .tensors import Table, Tensors
from .training import Training

Metrics = Mapping[str, float]
SPLITS = ("train", "validation", "test")
"""The tables of a site, in the order in which digests are given."""
GeneratorKind = Literal["adapter", "prompts", "concepts"]
ServerState = Message
"""What the server keeps between stages: a message of the algorithm's own kind."""
ClientState = Message | None
"""What a site keeps between stages; None before its first contact, and if the algorithm keeps nothing."""
R = TypeVar("R", bound=Message, covariant=True)
Progress = Callable[[str, int, int], None]
"""progress(what, done, total)."""


class Task(Protocol):
    """How to build a model, its loss and its metrics."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of an image."""
        ...

    @property
    def classes(self) -> int:
        """The number of classes."""
        ...

    @property
    def measure(self) -> str:
        """The metric that sums up a model: accuracy (higher is better) or loss."""
        ...

    def tables(self, splits: Mapping[str, Table]) -> Mapping[str, Table]:
        """A site's {"image", "label"} tables by split, as this task takes them."""
        ...

    def fitting(self, model: Tensors) -> "Task":
        """This task for the network of a model, which may have been pruned to another width than the task's own."""
        ...

    def build(self) -> nn.Module: ...
    def init(self, rng: torch.Generator) -> Tensors: ...
    def loss(self, model: nn.Module, batch: Table) -> Tensor: ...
    def metrics(self, model: Tensors, data: Table, device: str = "cpu") -> Metrics: ...


class ClassifierTask(Task, Protocol):
    """A task whose model is a classifier with a body and a head."""

    def logits(self, model: nn.Module, batch: Table) -> Tensor:
        """Return float [n, classes]; gradients flow."""
        ...

    def embed(self, model: Any, batch: Table) -> Tensor:
        """Return what the head takes, float [n, width]; gradients flow."""
        ...

    def predict(self, model: Tensors, data: Table, batch: int = 256, device: str = "cpu") -> Tensor:
        """Return logits, float [n, classes], without gradients."""
        ...

    def features(self, model: Tensors, data: Table, batch: int = 256, device: str = "cpu") -> Tensor:
        """Return what the head takes, float [n, width], without gradients."""
        ...


class GenerativeTask(Task, Protocol):
    """A task whose model draws images: a denoiser."""

    def part(self, name: str) -> str:
        """Return where a tensor lies: encoder, bottleneck or decoder."""
        ...

    def pruned(self, model: Tensors, share: float) -> Tensors:
        """Return the model without that share of its hidden units."""
        ...

    def decoded(self, latent: Tensor) -> Tensor:
        """Return uint8 images [n, 3, h, w] of latents."""
        ...

    def learned_alone(self, ctx: "ClientContext", training: Any) -> tuple[Tensors, Metrics]:
        """Train a model on a site's own images from a fresh start."""
        ...

    def sample_alone(self, model: Tensors, label: Tensor, ctx: "ClientContext | ServerContext") -> Tensor:
        """Return one latent for each label, drawn by a model that a site has trained alone."""
        ...

    def fidelity(
        self, model: Tensors, data: Mapping[str, Table], count: int, rng: torch.Generator, device: str = "cpu"
    ) -> dict[str, float]:
        """Return how near samples are to a site's own images: fid, kid and memorization_rate of latents."""
        ...


class Generator(Protocol):
    """A text-conditioned image generator that adapts to a site and samples as that site."""

    def adapt(self, ctx: "ClientContext") -> tuple[Tensors, Metrics]:
        """Tune a small adapter on the site's images. Returns its tensors, and what the report shows."""
        ...

    def check(self, adapter: Tensors, prompts: Sequence[str], who: str, classes: Sequence[int] = ()) -> None:
        """Raise `InputError` where an adapter does not fit the base, is not finite, or cannot draw one of the classes.

        Args:
            who: names it.
        """
        ...

    def write(self, adapter: Tensors, folder: Path, site: str) -> None:
        """Keep a site's adapter as files that other tools open."""
        ...

    def synthesize(self, adapter: Tensors | None, prompts: Sequence[str], labels: Tensor, ctx: "AnyContext") -> Tensor:
        """One image for each label, uint8 [n, 3, h, w], drawn from `ctx.rng`; None: from the base alone."""
        ...


@dataclass(frozen=True)
class GeneratorSpec:
    """The form of the run's generator that an algorithm works with."""

    kind: GeneratorKind = "adapter"
    """What a site's adapter is: LoRA layers and prompts (`adapter`), learned prompt embeddings of the classes alone
    (`prompts`), or vectors for domain and classes with noised latents to sample from (`concepts`)."""
    training: Training | None = None
    """A site's `Training` of prompts or concepts; None: that of the generator's settings."""
    signal: float = 0.0
    """Of `concepts`: share of a latent's variance that is image; the rest is noise."""
    variation: float = 0.0
    """Of `concepts`: standard deviation of what is added to the domain's vector of each sample."""


_SITE = re.compile(r"\{site((?:\|[^|={}]+=[^|={}]+)*)\}")


def prompt(template: str, name: str) -> str:
    """The prompt of a class: its name in the place of `{}`, its words in that of `{class}`; `{site}` stays for `prompts_of`."""
    return template.replace("{}", name).replace("{class}", name.replace("_", " "))


def prompts_of(site: str, prompts: Sequence[str]) -> tuple[str, ...]:
    """A site's prompts: its name in the place of `{site}`, or what `{site|real=photo|quickdraw=doodle}` says of it.

    Without a site ("") it is a photo.
    """

    def word(found: re.Match[str]) -> str:
        given = dict(pair.split("=", 1) for pair in found[1].split("|")[1:])
        return given.get(site, site.replace("_", " ") or "photo")

    return tuple(_SITE.sub(word, text) for text in prompts)


def no_progress(what: str, done: int, total: int) -> None:
    """The default of `progress`: says nothing."""


def map_serial(function: Callable[..., Any], jobs: Iterable[tuple[Any, ...]]) -> list[Any]:
    """The default of `spread`: one job after another, in this process."""
    return [function(*job) for job in jobs]


@dataclass(frozen=True)
class ClientContext:
    """All that a client function may see."""

    task: Task
    data: Mapping[str, Table]
    """The site's tables: train, validation, test."""
    rng: torch.Generator
    site: str = ""
    prompts: tuple[str, ...] = ()
    """The text of each class, in the order of the labels."""
    generator: Generator | None = None
    device: str = "cpu"
    snapshot_path: Path | None = None
    """Where a long training may keep its snapshots; it is removed when the reply is safe. None: they are not kept."""
    progress: Progress = no_progress


@dataclass(frozen=True)
class SamplingContext:
    """All that drawing samples needs, if there is no task."""

    rng: torch.Generator
    device: str = "cpu"
    progress: Progress = no_progress


@dataclass(frozen=True)
class ServerContext:
    """All that a server function may see."""

    task: Task
    rng: torch.Generator
    sites: tuple[str, ...] = ()
    """Every site of the federation, sorted by name."""
    rows: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """Rows that each site has declared, by split; a site that is missing has declared none, and may have any number."""
    prompts: tuple[str, ...] = ()
    generator: Generator | None = None
    device: str = "cpu"
    folder: Path | None = None
    """Where artefacts go (adapters, the synthetic set); None: they are not kept."""
    map_jobs: Callable[..., list[Any]] = map_serial
    """spread(function, jobs): the results of independent jobs in order, over the worker processes if there are any."""
    progress: Progress = no_progress


def classifier(ctx: ClientContext | ServerContext) -> ClassifierTask:
    """Return the context's task as that of a classifier; the registry says which algorithms learn one."""
    return cast(ClassifierTask, ctx.task)


def denoiser(ctx: ClientContext | ServerContext) -> GenerativeTask:
    """Return the context's task as that of a diffusion model; the registry says which algorithms learn one."""
    return cast(GenerativeTask, ctx.task)


@message("core.Reply")
class Reply(Generic[R]):
    """What a client function returns."""

    message: R
    """Crosses the wire."""
    state: Message | None
    """Stays with the site."""
    weight: float
    metrics: Mapping[str, float]


@message("core.Nothing")
class Empty:
    """A message without content."""


Replies = Mapping[str, Reply[R]]
"""By site, sorted by name: sums must not depend on who answered first."""
AnyContext = ClientContext | ServerContext | SamplingContext
ServerFunction = Callable[[Any, Replies[Any], ServerContext], tuple[ServerState, Metrics]]
"""server(state, replies, ctx): the server's new state, and what the report shows. A leaf names the types of its messages."""
ClientFunction = Callable[[Any, Any, ClientContext], Reply[Message]]
"""client(received, state, ctx)."""


@dataclass(frozen=True)
class Stage:
    """One exchange with the sites, or a piece of work at the server alone."""

    name: str
    """Also the name of Flower's action: train.<name>."""
    server: ServerFunction
    client: ClientFunction | None = None
    """None: only the server works."""
    broadcast: Callable[[Any, str], Message] | None = None
    """broadcast(server, site), if this stage sends something else than `Algorithm.broadcast`."""
    client_fraction: float = 1.0
    """Share of the sites that is asked."""
    evaluated: bool = True
    """Whether the models are measured after it; not where it leaves them as they were."""
    replies: tuple[type, ...] = ()
    """Kinds of message that it takes; empty: the kind that was sent, with the layout that was sent."""
    check: Callable[[Reply[Any], str, ServerContext], None] | None = None
    """check(reply, site, ctx) raises an error if a reply cannot be used: the site is then left out of the round. It checks the
    layout of what is not of the kind that was sent, and the range of every number."""
    change: Callable[[Any, Any], Tensors] | None = None
    """change(reply's message, what was sent): how far the site went, by `field/name`; its size is compared with the other
    sites'. None: the difference of the tensors that both have, or the reply's tensors if there are none."""
    weight_split: str = "train"
    """Split whose rows a reply's weight counts."""
    images: bool | None = None
    """Whether its replies hold images of the site, raw or encoded; None: not declared, and every site refuses the stage."""


@dataclass(frozen=True)
class Workload:
    """One kind of training that an algorithm does in a run."""

    what: str
    where: Literal["sites", "server"]
    steps: int
    """Optimizer steps of all of it, over all sites and rounds."""
    training: Training


class Algorithm(Protocol):
    """A frozen dataclass of hyper-parameters with pure methods.

    A leaf names the types of its own messages, in place of `Any`: its server's state, what it sends, what a site keeps.
    """

    @property
    def rounds(self) -> int:
        """The number of rounds of training."""
        ...

    @property
    def needs_generator(self) -> GeneratorSpec | None:
        """The form of the run's generator that its contexts hold; None: it uses none."""
        ...

    @property
    def samples_per_class(self) -> int:
        """Images that the generator draws for each class of each site; 0: none."""
        ...

    def check_sites(self, count: int) -> None:
        """Raise `InputError` if so many sites are too few."""
        ...

    def workload(self, rows: Mapping[str, int], pairs: int) -> tuple[Workload, ...]:
        """Return the trainings of a run.

        Args:
            rows: training rows of each site.
            pairs: number of pairs of a site and a class that it holds.
        """
        ...

    def init(self, ctx: ServerContext) -> ServerState:
        """Return the server's state before anything has happened."""
        ...

    def broadcast(self, server: Any, site: str) -> Message:
        """Return what this site is sent."""
        ...

    def init_client_state(self, received: Any, ctx: ClientContext) -> ClientState:
        """Return a site's state at first contact; None: it needs none yet."""
        ...

    def stages(self) -> tuple[Stage, ...]:
        """Return the plan: every exchange of the run, in order. A stage that recurs is a round of training."""
        ...

    def global_model(self, server: Any) -> Tensors | None:
        """Return the model that the server would release; None: there is none."""
        ...

    def client_model(self, received: Any, state: Any) -> Tensors | None:
        """Return the model that a site would use: all it has is its last message and its state. None: nothing yet."""
        ...


@dataclass(frozen=True)
class Exchange:
    """One message, as the ledger records it."""

    site: str
    direction: str
    kind: str
    bytes: int
    tensors: int
    sha256: str
    seconds: float | None = field(default=None, compare=False)
    """How long the site worked for it; up only."""


@dataclass(frozen=True)
class Failure:
    """What comes in the place of a reply: why a site is left out of this round, as one printable line."""

    reason: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "reason", printable(self.reason))


class Transport(Protocol):
    """Where the clients run."""

    sites: tuple[str, ...]

    def send(
        self, step: int, stage: str, number: int, messages: Mapping[str, Message]
    ) -> Iterator[tuple[str, Reply[Message] | Failure, tuple[Exchange, ...]]]:
        """Send each site its message; yield replies as they come, with what crossed the wire."""
        ...

    def evaluate(self, messages: Mapping[str, Message], model: Tensors | None) -> Mapping[str, Mapping[str, Metrics] | Failure]:
        """By site: the metrics of "global/validation", "global/test", "personal/validation", "personal/test", or why not."""
        ...


@dataclass(frozen=True)
class Round:
    """The record yielded after each stage: JSON lines on disk; reports read only these."""

    step: int
    """Stages done before this one."""
    stage: str
    number: int
    """How often this stage had run before."""
    server: ServerState = field(repr=False)
    """The server's state now: what a checkpoint keeps (not part of the record)."""
    cohort: tuple[str, ...]
    train: Mapping[str, Metrics]
    aggregate: Metrics
    evaluation: Mapping[str, Mapping[str, Metrics]]
    exchanges: tuple[Exchange, ...]
    seconds: float
    absent: Mapping[str, str] = field(default_factory=dict)
    """Sites that were left out of the stage or of its evaluation, and why."""
    share: float = 1.0
    """Largest part of the union of test sets that any one site may have."""

    def results(self) -> dict[str, Any]:
        """Return what must be equal in every rerun: everything but times. A number that is not finite is None."""
        return {
            "step": self.step,
            "stage": self.stage,
            "number": self.number,
            "cohort": list(self.cohort),
            "train": {site: _numbers(m) for site, m in self.train.items()},
            "aggregate": _numbers(self.aggregate),
            "global": _view(self.evaluation, "global"),
            "personal": _view(self.evaluation, "personal"),
            "union": _union(self.evaluation, self.share),
            "bytes_up": _traffic(self.exchanges, "up"),
            "bytes_down": _traffic(self.exchanges, "down"),
        } | ({"absent": dict(self.absent)} if self.absent else {})


def cap_weights(weights: Mapping[str, float], share: float) -> dict[str, float]:
    """Return weights of which none is more than `share` of their sum: heavier ones are reduced to it.

    If there are too few for that (`share` below one divided by their number), all become equal to the smallest.
    """
    most, heavy = math.inf, sorted(weights.values(), reverse=True)
    for reduced in range(len(heavy) if share < 1 else 0):
        most = max(heavy[-1], share * sum(heavy[reduced:]) / (1 - share * reduced) if share * reduced < 1 else 0.0)
        if heavy[reduced] <= most:
            break
    return {name: min(weight, most) for name, weight in weights.items()}


LARGEST = 1e30
"""Largest number that is recorded: sums and squares of such stay finite."""


def _numbers(metrics: Metrics) -> dict[str, float | None]:
    return {name: value if abs(value) <= LARGEST else None for name, value in metrics.items()}


def _view(evaluation: Mapping[str, Mapping[str, Metrics]], model: str) -> dict[str, dict[str, dict[str, float]]]:
    views = {
        site: {key.removeprefix(f"{model}/"): _counted(m) for key, m in views.items() if key.startswith(f"{model}/")}
        for site, views in evaluation.items()
    }
    return {site: view for site, view in views.items() if view}


def _counted(metrics: Metrics) -> dict[str, float]:
    # a metric is a float on the wire; a count reads better as what it is
    return {name: int(value) if name == "count" else value for name, value in metrics.items() if abs(value) <= LARGEST}


def _union(evaluation: Mapping[str, Mapping[str, Metrics]], share: float) -> dict[str, dict[str, float]]:
    """The global model on all test sets joined: means weighted by the sites' counts."""
    tests = {site: _counted(views["global/test"]) for site, views in evaluation.items() if "global/test" in views}
    weights = cap_weights({site: m["count"] for site, m in tests.items()}, share)
    total = sum(weights.values())
    if not total:
        return {}
    names = [name for name in ("accuracy", "loss") if all(name in m for m in tests.values())]
    joined = {name: sum(m[name] * weights[site] for site, m in tests.items()) / total for name in names}
    return {"global": joined | {"count": sum(int(m["count"]) for m in tests.values())}}


def _traffic(exchanges: Iterable[Exchange], direction: str) -> dict[str, int]:
    total: dict[str, int] = {}
    for exchange in exchanges:
        if exchange.direction == direction:
            total[exchange.site] = total.get(exchange.site, 0) + exchange.bytes
    return total
