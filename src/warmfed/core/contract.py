"""Interfaces of algorithms, tasks, generators and transports, and the contexts of client and server functions.

State and payload are values, never attributes. A client function takes the site's state and returns the new one. So state
cannot cross the wire by accident, be missing from a checkpoint, or depend on the process that ran the site.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Literal, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn

from .messages import Message, message
from .records import Exchange, Failure, Metrics
from .tensors import Table, Tensors
from .training import Training

SPLITS = ("train", "validation", "test")
"""Names of a site's tables, in the order of its digests."""
GeneratorKind = Literal["adapter", "prompts", "concepts"]
ServerState = Message
"""State of the server between stages: a message of the algorithm's own kind."""
ClientState = Message | None
"""State of a site between stages; None before its first stage, and if the algorithm has no client state."""
R = TypeVar("R", bound=Message, covariant=True)
Progress = Callable[[str, int, int], None]
"""progress(what, done, total)."""


class Task(Protocol):
    """A problem to train on: builds a model, and computes its loss and its metrics."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Return (channels, height, width) of an image."""
        ...

    @property
    def classes(self) -> int:
        """Return the number of classes."""
        ...

    @property
    def measure(self) -> str:
        """Return the name of the main metric: accuracy (higher is better) or loss."""
        ...

    def tables(self, splits: Mapping[str, Table]) -> Mapping[str, Table]:
        """Return a site's tables for this task, by split, from its {"image", "label"} tables."""
        ...

    def fitting(self, model: Tensors) -> "Task":
        """Return this task with the network width of `model`, which may be pruned."""
        ...

    def build(self) -> nn.Module: ...
    def init(self, rng: torch.Generator) -> Tensors: ...
    def loss(self, model: nn.Module, batch: Table) -> Tensor: ...
    def metrics(self, model: Tensors, data: Table, device: str = "cpu", held: Collection[int] | None = None) -> Metrics:
        """Return the metrics of a model on a table; `held` are the classes of the site's training images, if known."""
        ...


class ClassifierTask(Task, Protocol):
    """A task whose model is a classifier with a backbone and a head."""

    def logits(self, model: nn.Module, batch: Table) -> Tensor:
        """Return float [n, classes]; gradients flow."""
        ...

    def embed(self, model: Any, batch: Table) -> Tensor:
        """Return the input of the head, float [n, width]; gradients flow."""
        ...

    def predict(self, model: Tensors, data: Table, batch: int = 256, device: str = "cpu") -> Tensor:
        """Return logits, float [n, classes], without gradients."""
        ...

    def features(self, model: Tensors, data: Table, batch: int = 256, device: str = "cpu") -> Tensor:
        """Return the input of the head, float [n, width], without gradients."""
        ...


class GenerativeTask(Task, Protocol):
    """A task whose model generates images: a denoiser."""

    def part(self, name: str) -> str:
        """Return the part of a tensor: encoder, bottleneck or decoder."""
        ...

    def pruned(self, model: Tensors, share: float) -> Tensors:
        """Return the model with this share of its hidden units removed."""
        ...

    def decoded(self, latent: Tensor) -> Tensor:
        """Return uint8 images [n, 3, h, w] of latents."""
        ...

    def learned_alone(self, ctx: "ClientContext", training: Any) -> tuple[Tensors, Metrics]:
        """Train a model on a site's own images from random weights; return its tensors and metrics."""
        ...

    def sample_alone(self, model: Tensors, label: Tensor, ctx: "ClientContext | ServerContext") -> Tensor:
        """Return one latent for each label, sampled from a model that a site has trained alone."""
        ...

    def fidelity(
        self, model: Tensors, data: Mapping[str, Table], count: int, rng: torch.Generator, device: str = "cpu"
    ) -> dict[str, float]:
        """Return fid, kid and memorization_rate of samples against a site's own images, on latents."""
        ...


class Generator(Protocol):
    """A text-conditioned image generator that adapts to a site and samples as that site."""

    def adapt(self, ctx: "ClientContext") -> tuple[Tensors, Metrics]:
        """Train an adapter on the site's images; return its tensors and its metrics."""
        ...

    def check(self, adapter: Tensors, prompts: Sequence[str], who: str, classes: Sequence[int] = ()) -> None:
        """Raise `InputError` if an adapter does not fit the base, is not finite, or lacks one of the classes.

        Args:
            who: name of the adapter in the error.
        """
        ...

    def write(self, adapter: Tensors, folder: Path, site: str) -> None:
        """Write a site's adapter as files in the formats of other tools."""
        ...

    def synthesize(self, adapter: Tensors | None, prompts: Sequence[str], labels: Tensor, ctx: "AnyContext") -> Tensor:
        """Return one image for each label, uint8 [n, 3, h, w].

        Args:
            adapter: tensors of a site's adapter; None: the base alone.
            ctx: context whose `rng` gives the noise.
        """
        ...


@dataclass(frozen=True)
class GeneratorSpec:
    """Kind of the generator that an algorithm needs, and its settings."""

    kind: GeneratorKind = "adapter"
    """Content of a site's adapter: LoRA layers and prompts (`adapter`), learned prompt embeddings of the classes only
    (`prompts`), or vectors of domain and classes with noised latents (`concepts`)."""
    training: Training | None = None
    """`Training` of prompts or concepts. Default None: the training of the generator's settings."""
    signal: float = 0.0
    """For `concepts`: share of the image in a latent's variance; the rest is noise."""
    variation: float = 0.0
    """For `concepts`: standard deviation of the noise added to the domain vector of each sample."""


def no_progress(what: str, done: int, total: int) -> None:
    """Ignore progress: the default of `progress`."""


def map_serial(function: Callable[..., Any], jobs: Iterable[tuple[Any, ...]]) -> list[Any]:
    """Return the results of the jobs, run one after another in this process: the default of `map_jobs`."""
    return [function(*job) for job in jobs]


@dataclass(frozen=True)
class ClientContext:
    """Inputs of a client function."""

    task: Task
    data: Mapping[str, Table]
    """The site's tables: train, validation, test."""
    rng: torch.Generator
    site: str = ""
    prompts: tuple[str, ...] = ()
    """Prompt of each class, in the order of the labels."""
    generator: Generator | None = None
    device: str = "cpu"
    snapshot_path: Path | None = None
    """File for the snapshot of a long training; removed when the reply is saved. None: no snapshots."""
    progress: Progress = no_progress


@dataclass(frozen=True)
class SamplingContext:
    """Inputs of sampling without a task."""

    rng: torch.Generator
    device: str = "cpu"
    progress: Progress = no_progress


@dataclass(frozen=True)
class ServerContext:
    """Inputs of a server function."""

    task: Task
    rng: torch.Generator
    sites: tuple[str, ...] = ()
    """Names of all sites of the federation, sorted."""
    rows: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """Rows that each site has declared, by split. A site that has declared none is missing, and its rows have no limit."""
    prompts: tuple[str, ...] = ()
    generator: Generator | None = None
    device: str = "cpu"
    folder: Path | None = None
    """Folder for artefacts (adapters, the synthetic set); None: artefacts are discarded."""
    map_jobs: Callable[..., list[Any]] = map_serial
    """map_jobs(function, jobs) returns the results of independent jobs in order, run in the worker processes if any."""
    progress: Progress = no_progress


def classifier(ctx: ClientContext | ServerContext) -> ClassifierTask:
    """Return the context's task, typed as a classifier's; the registry lists the algorithms that train one."""
    return cast(ClassifierTask, ctx.task)


def denoiser(ctx: ClientContext | ServerContext) -> GenerativeTask:
    """Return the context's task, typed as a diffusion model's; the registry lists the algorithms that train one."""
    return cast(GenerativeTask, ctx.task)


@message("core.Reply")
class Reply(Generic[R]):
    """Return value of a client function."""

    message: R
    """Content that crosses the wire."""
    state: Message | None
    """Client state; it stays at the site."""
    weight: float
    metrics: Mapping[str, float]


@message("core.Nothing")
class Empty:
    """A message without content."""


Replies = Mapping[str, Reply[R]]
"""Replies by site, sorted by name, so that sums do not depend on the order of arrival."""
AnyContext = ClientContext | ServerContext | SamplingContext
ServerFunction = Callable[[Any, Replies[Any], ServerContext], tuple[ServerState, Metrics]]
"""server(state, replies, ctx) returns the new state and the metrics. Implementations declare their message types."""
ClientFunction = Callable[[Any, Any, ClientContext], Reply[Message]]
"""client(received, state, ctx) returns the site's reply."""


@dataclass(frozen=True)
class Stage:
    """One exchange with the sites, or one step of work at the server."""

    name: str
    """Name of the stage; Flower's action is train.<name>."""
    server: ServerFunction
    client: ClientFunction | None = None
    """Client function; None: the stage runs at the server only."""
    broadcast: Callable[[Any, str], Message] | None = None
    """broadcast(server, site) returns the site's message. Default None: `Algorithm.broadcast`."""
    client_fraction: float = 1.0
    """Share of the sites in the cohort."""
    evaluated: bool = True
    """Whether the models are evaluated after the stage; False if the stage does not change them."""
    replies: tuple[type, ...] = ()
    """Accepted kinds of message. Default empty: the kind and the tensor layout that were sent."""
    check: Callable[[Reply[Any], str, ServerContext], None] | None = None
    """check(reply, site, ctx) raises an error if a reply is not valid; the site then fails in this round.

    It checks the layout of replies of another kind than was sent, and the range of every number."""
    change: Callable[[Any, Any], Tensors] | None = None
    """change(reply's message, sent message) returns the update of a site by `field/name`, for the norm and ratio limits.

    Default None: the difference of the tensors that both messages have, or the reply's tensors if there are none."""
    weight_split: str = "train"
    """Split whose number of rows limits a reply's weight."""
    images: bool | None = None
    """Whether replies hold images of the site, raw or encoded. None: not declared; every site refuses the stage."""


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

    Implementations declare their own message types in place of `Any`: server state, broadcast message and client state.
    """

    @property
    def rounds(self) -> int:
        """The number of rounds of training."""
        ...

    @property
    def needs_generator(self) -> GeneratorSpec | None:
        """Return the kind of generator that the algorithm needs, or None."""
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
        """Return the initial state of the server."""
        ...

    def broadcast(self, server: Any, site: str) -> Message:
        """Return the message for this site."""
        ...

    def init_client_state(self, received: Any, ctx: ClientContext) -> ClientState:
        """Return a site's initial state, or None if it needs none."""
        ...

    def stages(self) -> tuple[Stage, ...]:
        """Return all stages of the run, in order. A repeated stage is a round of training."""
        ...

    def global_model(self, server: Any) -> Tensors | None:
        """Return the global model, or None if there is none."""
        ...

    def client_model(self, received: Any, state: Any) -> Tensors | None:
        """Return the site's personal model, from its last message and its state, or None if there is none."""
        ...


class Transport(Protocol):
    """Connection to the clients."""

    sites: tuple[str, ...]

    def send(
        self, step: int, stage: str, number: int, messages: Mapping[str, Message]
    ) -> Iterator[tuple[str, Reply[Message] | Failure, tuple[Exchange, ...]]]:
        """Send each site its message; yield (site, reply, exchanges) in order of arrival."""
        ...

    def evaluate(self, messages: Mapping[str, Message], model: Tensors | None) -> Mapping[str, Mapping[str, Metrics] | Failure]:
        """Return, by site, the metrics by "view/split", or a `Failure`.

        The keys are "global/validation", "global/test", "personal/validation" and "personal/test".
        """
        ...
