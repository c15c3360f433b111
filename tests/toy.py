"""A federation that runs in milliseconds: 8×8 images of three classes at four sites, and a generator of class means.

The generator is no stand-in for ours but a second, honest one: it adapts (to a site's class means) and samples (around them).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from warmfed.algorithms import ALGORITHMS, entry
from warmfed.algorithms.baselines import Budget
from warmfed.algorithms.shared.synthetic_data import Synthesis
from warmfed.core import Algorithm, ClientContext, Exchange, Metrics, Reply, Round, ServerContext
from warmfed.core.admission import DEFAULT_ADMISSION, AdmissionPolicy
from warmfed.core.messages import Message
from warmfed.core.rng import stream
from warmfed.core.tensors import Table, Tensors
from warmfed.core.training import Training
from warmfed.diffusion.networks import DenoiserSettings
from warmfed.models import Split
from warmfed.run import run
from warmfed.tasks import Classify
from warmfed.tasks.denoising import Denoise
from warmfed.transports.client import Client
from warmfed.transports.in_process import InProcess
from warmfed.utils.errors import InputError
from warmfed.utils.files import atomic_write

SHAPE, CLASSES = (3, 8, 8), 3
PROMPTS = ("a left bar", "a middle bar", "a right bar")
TASK = Classify(SHAPE, CLASSES, "linear")
DRAWING = Denoise(
    SHAPE, CLASSES, DenoiserSettings(width=32, depth=1, latent="", prediction="epsilon", schedule="linear", times=50, steps=3)
)
"""For algorithms that learn to draw."""
LEARNING = Training(optimizer="adamw", lr=3e-3, batch_size=12, epochs=3)
"""Their training."""


@dataclass(frozen=True)
class Layered(Classify):
    """The same task for a network with a normalised backbone and a head."""

    def build(self) -> Split:
        body = nn.Sequential(nn.Flatten(), nn.Linear(192, 96), nn.GroupNorm(4, 96), nn.ReLU())
        return Split(body, 96, self.classes)


LAYERED = Layered(SHAPE, CLASSES)
TRAINING = Training(lr=0.03, batch_size=12)


def pattern(label: int) -> Tensor:
    """Class c is a bright bar in the c-th part of the width; float [3, 8, 8]."""
    image = torch.zeros(SHAPE)
    image[:, :, (0, 3, 5)[label] : (3, 5, 8)[label]] = 1
    return image


def table(site: int, split: str, count: int) -> dict[str, Tensor]:
    """`count` images of a site: its own light, colour and contrast, and much noise."""
    rng = stream("toy", site, split)
    label = torch.arange(count) % CLASSES
    tint = torch.tensor([1.0, 0.8, 0.6]).roll(site)[:, None, None]
    clean = torch.stack([40 + 20 * site + (40 + 10 * site) * tint * pattern(int(c)) for c in label])
    noisy = clean + 60 * torch.randn(clean.shape, generator=rng)
    return {"image": noisy.clamp(0, 255).to(torch.uint8), "label": label}


def site(number: int) -> dict[str, Table]:
    return {
        "train": table(number, "train", 24 + 4 * number),
        "validation": table(number, "validation", 15),
        "test": table(number, "test", 48),
    }


SITES: Mapping[str, Mapping[str, Table]] = {name: site(i) for i, name in enumerate("abcd")}


@dataclass(frozen=True)
class Means:
    """A `Generator` with one pattern per prompt; its adapter is the difference of a site's class means from them."""

    noise: float = 60.0
    neutral: bool = False
    """Whether `adapt` returns the adapter that changes nothing."""

    def base(self, prompts: Sequence[str]) -> Tensor:
        return torch.stack([70 + 50 * pattern(PROMPTS.index(prompt)) for prompt in prompts])

    def adapt(self, ctx: ClientContext) -> tuple[Tensors, Metrics]:
        base, data = self.base(ctx.prompts), ctx.data["train"]
        shift = torch.zeros_like(base)
        for label in [] if self.neutral else data["label"].unique().tolist():
            shift[label] = data["image"][data["label"] == label].float().mean(0) - base[label]
        return {"shift": shift.half()}, {"loss": shift.square().mean().item()}

    def check(self, adapter: Tensors, prompts: Sequence[str], who: str, classes: Sequence[int] = ()) -> None:
        wanted = (len(prompts), *SHAPE)
        if adapter.keys() != {"shift"} or adapter["shift"].shape != wanted or not adapter["shift"].isfinite().all():
            raise InputError(f"{who} does not hold a finite shift of shape {wanted}; adapt again")

    def write(self, adapter: Tensors, folder: Path, site: str) -> None:
        atomic_write(folder / f"{site}.safetensors", save(dict(adapter)))

    def synthesize(
        self, adapter: Tensors | None, prompts: Sequence[str], labels: Tensor, ctx: ClientContext | ServerContext
    ) -> Tensor:
        means = self.base(prompts) + (adapter["shift"].float() if adapter else 0)
        drawn = means[labels] + self.noise * torch.randn(len(labels), *SHAPE, generator=ctx.rng)
        return drawn.clamp(0, 255).to(torch.uint8)


QUICK = {
    Training: TRAINING,
    Synthesis: Synthesis(
        per_class=8,
        min_class_probability=0.4,
        subset=36,
        filter_training=Training(lr=0.02, epochs=2),
        training=Training(lr=0.01),
    ),
    Budget: Budget(patience=1, limit=2),
}
"""Settings under which every algorithm is quick, by the type of the field."""


def quick(name: str, **changes: Any) -> Any:
    """A registered algorithm with two rounds of little training."""
    found, task = ALGORITHMS[name], task_of(name)
    settings = {**QUICK, Training: LEARNING} if task is DRAWING else QUICK
    values = {f.name: settings[type(f.default)] for f in fields(found.cls) if type(f.default) in settings}
    if "synthesis" in values:
        values["synthesis"] = replace(values["synthesis"], classes=found.cls.synthesis.classes)
    for key, value in found.settings.items():
        match key.split("."):
            case ["algorithm", "local", _]:
                pass  # it has a quick one
            case ["algorithm", field, part]:
                values[field] = replace(values.get(field, getattr(found.cls, field)), **{part: value})
            case ["algorithm", "correct"]:
                values |= {"correct": value, "slow": 1.0, "window": 1}
            case ["algorithm", field]:
                values[field] = value
    return found.cls(**{"rounds": 2, **values, **changes})


def task_of(name: str) -> Any:
    """Return the toy task of an algorithm."""
    return LAYERED if "classify" in entry(name).tasks else DRAWING


@dataclass
class Outcome:
    """A finished run, and the transport with its sites' states."""

    algorithm: Any
    rounds: list[Round]
    transport: InProcess

    @property
    def server(self) -> Message:
        return self.rounds[-1].server

    @property
    def results(self) -> list[dict[str, Any]]:
        return [record.results() for record in self.rounds]

    @property
    def model(self) -> Tensors:
        return self.algorithm.global_model(self.server)

    def personal(self, name: str) -> Tensors:
        return self.algorithm.client_model(self.algorithm.broadcast(self.server, name), self.transport.state(name))

    def after(self, stage: str, number: int) -> Round:
        return next(r for r in self.rounds if (r.stage, r.number) == (stage, number))


def workers(
    algorithm: Algorithm, *, seed: int = 0, task: Any = TASK, generator: Any = Means(), sites: Any = SITES
) -> dict[str, Client]:
    return {
        name: Client(name, algorithm, task, task.tables(data), seed, prompts=PROMPTS, generator=generator)
        for name, data in sites.items()
    }


def central(*, task: Any = TASK, generator: Any = Means(), sites: Any = SITES, **more: Any) -> ServerContext:
    return ServerContext(task, stream("unused"), tuple(sorted(sites)), prompts=PROMPTS, generator=generator, **more)


def play(
    algorithm: Algorithm,
    *,
    seed: int = 0,
    task: Any = TASK,
    generator: Any = Means(),
    sites: Any = SITES,
    folder: Path | None = None,
    artefacts: Path | None = None,
    start: tuple[int, Message] | None = None,
    evaluate: str = "every",
    admission: AdmissionPolicy = DEFAULT_ADMISSION,
) -> Outcome:
    """Run an algorithm to the end, one site at a time."""
    transport = InProcess(workers(algorithm, seed=seed, task=task, generator=generator, sites=sites), folder=folder)
    server = central(task=task, generator=generator, sites=sites, folder=artefacts)
    rounds = run(algorithm, server, transport, seed, start=start, evaluate=evaluate, admission=admission)
    return Outcome(algorithm, list(rounds), transport)


@dataclass
class Tap:
    """A transport that records its messages: (stage, site, received message, state before, reply)."""

    inner: InProcess
    seen: list[tuple[str, str, Message, Message, Reply]] = field(default_factory=list)

    @property
    def sites(self) -> tuple[str, ...]:
        return self.inner.sites

    def send(
        self, step: int, stage: str, number: int, down: Mapping[str, Message]
    ) -> Iterator[tuple[str, Reply, tuple[Exchange, ...]]]:
        before = {site: self.inner.state(site) for site in down}
        for site, reply, exchanges in self.inner.send(step, stage, number, down):
            self.seen.append((stage, site, down[site], before[site], reply))
            yield site, reply, exchanges

    def taken(self) -> list[tuple[str, str, Message, Message, Reply]]:
        """Return the messages since the last call."""
        taken, self.seen = self.seen, []
        return taken

    def evaluate(self, down: Mapping[str, Message], model: Tensors | None) -> Mapping[str, Mapping[str, Metrics]]:
        return self.inner.evaluate(down, model)


def accuracy(record: Round, model: str) -> float:
    """Return the mean test accuracy of a model over the sites, in percent."""
    return mean(record, model, "accuracy")


def mean(record: Round, model: str, measure: str) -> float:
    """Return the mean of a metric of a model over the sites' test images."""
    found = [views[f"{model}/test"][measure] for views in record.evaluation.values()]
    return sum(found) / len(found)


def same(a: Tensors, b: Tensors) -> bool:
    """Return whether all tensors are equal, bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
