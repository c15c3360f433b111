"""The synthetic set S: sampled from the sites' adapters, filtered, stored as an artefact, and trained on.

`WarmStarted` is the abstract family of methods that start from S. They differ in what a site sends for it. `FromGenerator` is
the family of all methods whose sites may send adapters first.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, Generic, Literal, TypeVar, cast

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor

from ...core import (
    ClientContext,
    Empty,
    Generator,
    GeneratorSpec,
    Metrics,
    Replies,
    Reply,
    SamplingContext,
    ServerContext,
    Stage,
    Task,
    Workload,
    classifier,
    prompts_of,
)
from ...core.messages import Message, message
from ...core.rng import spawn, stream, stream_seed
from ...core.tensors import Table, Tensors, apportion, join, rows, select, sha256
from ...core.training import Training
from ...fit import fit
from ...utils.errors import InputError
from ...utils.files import atomic_write, write_json
from ...utils.settings import check_choices
from .adapter_screening import suspects
from .base import Combined, Model, gathering, upload


@dataclass(frozen=True)
class Synthesis:
    """Sampling and filtering of S, and the training of a classifier on it."""

    RENAMED: ClassVar[Mapping[str, str]] = {
        "least": "min_class_probability",
        "focus": "hard_fraction",
        "distinct": "dedup_distance",
        "soft": "soft_label_weight",
    }

    per_class: int = 80
    """Images per site and class that it holds; at least 1."""
    classes: Literal["held", "all"] = "held"
    """Classes sampled from a site's adapter: held (those of its training images) or all of the federation. The number of
    samples is the same; with all, the classes that a site lacks are drawn in its style."""
    contradicted: float = 0.4
    """Minimum share of a site's classes that others contradict to exclude the site, from 0 to 1; 0: no screening."""
    filter: Literal["cross", "none"] = "cross"
    """Filter: cross (drop samples to whose class a classifier of the other half of S gives a low probability) or none."""
    min_class_probability: float = 0.1
    """Minimum probability of a sample's class, from 0 to below 1. A low value keeps hard samples, which teach most."""
    hard_fraction: float = 0.0
    """Share of S that is sampled last, from 0 to below 1: more of what was confused and of what few sites hold."""
    dedup_distance: float = 0.0
    """Minimum distance to an earlier sample of the class (RMS of 8×8 means, of 255); at least 0, 0: no deduplication."""
    soft_label_weight: float = 0.0
    """Share of the filter's prediction in a sample's label, from 0 to 1; the rest is the prompt's class; 0: hard labels."""
    filter_training: Training = Training(lr=0.02, epochs=8, batch_size=64, schedule="cosine", max_grad_norm=1.0)
    """Training of the two classifiers of the filter."""
    training: Training = Training(lr=0.02, epochs=15, batch_size=64, schedule="cosine", weight_decay=5e-4, max_grad_norm=1.0)
    """Training of the classifier on S, from random weights."""
    subset: int = 400
    """Size of S_sub, the subset for fine-tuning, balanced over sites and classes; at least 1."""

    def workload(self, pairs: int) -> tuple[Workload, ...]:
        """Return the trainings before the rounds, for so many pairs of a site and a class."""
        samples = self.per_class * pairs
        return (
            # trained without a filter, too: the record shows how many samples are recognised
            Workload("filter", "server", 2 * self.filter_training.count(samples // 2), self.filter_training),
            Workload("warm start", "server", self.training.count(samples), self.training),
        )

    def __post_init__(self) -> None:
        check_choices(self)
        if self.per_class < 1 or self.subset < 1:
            raise InputError("per_class and subset must be at least 1; check [algorithm.synthesis]")
        if not 0 <= self.contradicted <= 1:
            raise InputError(f"contradicted must be from 0 to 1; got {self.contradicted}; check [algorithm.synthesis]")
        if not (
            0 <= self.min_class_probability < 1
            and 0 <= self.hard_fraction < 1
            and self.dedup_distance >= 0
            and 0 <= self.soft_label_weight <= 1
        ):
            raise InputError(
                "min_class_probability and hard_fraction must be at least 0 and below 1, dedup_distance at least 0, "
                "soft_label_weight from 0 to 1; "
                f"got {self.min_class_probability}, {self.hard_fraction}, {self.dedup_distance}, {self.soft_label_weight}"
            )


def _draw(
    generator: Generator, adapter: Tensors | None, prompts: tuple[str, ...], label: Tensor, seed: int, device: str
) -> Tensor:
    return generator.synthesize(adapter, prompts, label, SamplingContext(stream("synthesize", seed), device))


def draw(
    ctx: ServerContext, adapters: Mapping[str, Tensors | None], classes: Mapping[str, tuple[int, ...]], per_class: int
) -> Table:
    """Return S: `per_class` images for each class of each site, in order of sites.

    Returns:
        {"image", "label", "site"}.
    """
    return drawn(ctx, adapters, {site: torch.tensor(classes[site]).repeat_interleave(per_class) for site in adapters})


def drawn(ctx: ServerContext, adapters: Mapping[str, Tensors | None], labels: Mapping[str, Tensor]) -> Table:
    """Return one image for each of the labels of each site, as `draw` does."""
    generator = generator_of(ctx)
    seeds = {site: stream_seed(int(torch.randint(2**62, (), generator=ctx.rng)), site) for site in adapters}
    told = {site: prompts_of(site, ctx.prompts) for site in adapters}
    jobs = [(generator, adapters[site], told[site], labels[site], seeds[site], ctx.device) for site in adapters]
    images = ctx.map_jobs(_draw, jobs)
    return {
        "image": torch.cat(images),
        "label": torch.cat(list(labels.values())),
        "site": torch.cat([torch.full((len(label),), i) for i, label in enumerate(labels.values())]),
    }


def demand_held_classes(settings: Synthesis, name: str) -> None:
    """Raise `InputError` if all classes are to be sampled by a method whose sites learn each class by itself."""
    if settings.classes == "all":
        raise InputError(f"{name} learns only the classes that a site holds; set algorithm.synthesis.classes to held")


def planned(
    classes: Mapping[str, tuple[int, ...]], count: int, per_class: int, settings: Synthesis
) -> tuple[Mapping[str, tuple[int, ...]], int]:
    """Return the classes to sample for each site, and the images of each.

    Args:
        classes: the classes that each site holds.
        count: number of classes of the federation.
        per_class: images per site and class that it holds.
        settings: the settings of the sampling.
    """
    held = sum(len(each) for each in classes.values())
    if settings.classes == "held" or held == count * len(classes):
        return classes, per_class
    return {site: tuple(range(count)) for site in classes}, max(1, round(per_class * held / (count * len(classes))))


def of_held(samples: Table, sites: Sequence[str], classes: Mapping[str, tuple[int, ...]]) -> Tensor:
    """Return whether each sample's class is one that its site holds, bool [n]."""
    held = torch.zeros(len(sites), 1 + int(samples["label"].max()), dtype=torch.bool)
    for i, site in enumerate(sites):
        held[i, [label for label in classes[site] if label < held.shape[1]]] = True
    return held[samples["site"], samples["label"]]


def held_only(samples: Table, sites: Sequence[str], classes: Mapping[str, tuple[int, ...]]) -> Table:
    """Return the samples of classes that their sites hold; sites are judged by them."""
    own = of_held(samples, sites, classes)
    return samples if own.all() else select(samples, own)


def of_lacking(kept: Table, sites: Sequence[str], classes: Mapping[str, tuple[int, ...]], most: int) -> dict[str, Table]:
    """Return, by site, at most `most` samples of each class that the site lacks, in its own style.

    Args:
        kept: the samples, {"image", "label", "site"}; "site" is an index into `sites`.
        sites: names of the sites.
        classes: the classes that each site holds.
        most: most samples of each class.
    """
    own, found = of_held(kept, sites, classes), dict[str, Table]()
    for i, site in enumerate(sites):
        mine = ((kept["site"] == i) & ~own).nonzero()[:, 0]
        labels = kept["label"][mine]
        parts = [mine[labels == label][:most] for label in labels.unique().tolist()]
        if parts and most:
            found[site] = {name: kept[name][torch.cat(parts)] for name in ("image", "label")}
    return found


def _recognise(task: Task, training: Training, learn: Table, guess: Table, seed: int, device: str) -> Tensor:
    ctx = ServerContext(task, stream("filter", seed), device=device)
    model, _ = fit(ctx, ctx.task.init(ctx.rng), training, learn)
    return classifier(ctx).predict(model, guess, device=device).softmax(-1)


def cross_predict(ctx: ServerContext, samples: Table, training: Training) -> Tensor:
    """Return each sample's class probabilities by a classifier of the other half of S, float [n, classes]."""
    order = torch.randperm(rows(samples), generator=ctx.rng)
    halves = order[: len(order) // 2].sort().values, order[len(order) // 2 :].sort().values
    seed = int(torch.randint(2**62, (), generator=ctx.rng))
    jobs = [
        (ctx.task, training, select(samples, learn), select(samples, guess), seed + i, ctx.device)
        for i, (learn, guess) in enumerate((halves, halves[::-1]))
    ]
    first, second = ctx.map_jobs(_recognise, jobs)
    return torch.cat([first, second])[torch.cat(halves[::-1]).argsort()]


def likely(belief: Tensor, label: Tensor) -> Tensor:
    """Return the probability of each sample's own class, float [n]."""
    return belief.gather(1, label[:, None])[:, 0]


def labelled(samples: Table, belief: Tensor, soft: float) -> dict[str, Tensor]:
    """Return the training table of the samples.

    Returns:
        {"image", "label"}; with soft labels also "target", float [n, classes].
    """
    table = {"image": samples["image"], "label": samples["label"]}
    if soft:
        table["target"] = F.one_hot(samples["label"], belief.shape[1]).float().lerp(belief, soft)
    return table


def sample_hard(samples: Table, probability: Tensor, adapters: Mapping[str, object], count: int) -> dict[str, Tensor]:
    """Return the labels, by site, of `count` more samples.

    A class of a site gets more samples if its samples are doubtful and if few sites hold it. Both follow from S; the sites send
    nothing.
    """
    sites, classes = len(adapters), int(samples["label"].max()) + 1
    cell = samples["site"] * classes + samples["label"]
    held = cell.bincount(minlength=sites * classes).double()
    doubt = torch.zeros_like(held).index_add_(0, cell, 1 - probability.double()) / held.clamp_min(1)
    holders = (held.view(sites, classes) > 0).sum(0).clamp_min(1).repeat(sites)
    more = apportion(doubt / holders + 1e-9 * (held > 0), count)
    return {site: more[more // classes == i] % classes for i, site in enumerate(adapters)}


def repeated(samples: Table, distance: float) -> Tensor:
    """Return whether each sample is nearer than `distance` to an earlier kept one of its class, bool [n]."""
    small = F.adaptive_avg_pool2d(samples["image"].float(), 8).flatten(1)
    again = torch.zeros(rows(samples), dtype=torch.bool)
    for label in samples["label"].unique():
        place = (samples["label"] == label).nonzero()[:, 0]
        near = torch.cdist(small[place], small[place]) < distance * small.shape[1] ** 0.5
        for row, at in enumerate(place.tolist()):
            again[at] = bool((near[row, :row] & ~again[place[:row]]).any())
    return again


def without(samples: Table, sites: tuple[str, ...], aside: tuple[str, ...]) -> Table:
    """Return the samples of the sites that are not in `aside`; the column "site" is renumbered."""
    if not aside:
        return samples
    left = torch.tensor([site not in aside for site in sites])
    kept = select(samples, left[samples["site"]])
    return {**kept, "site": (left.long().cumsum(0) - 1)[kept["site"]]}


def balanced_subset(samples: Table, count: int, rng: torch.Generator) -> Table:
    """Return at most `count` rows, as balanced over sites and classes as the samples allow."""
    order = torch.randperm(rows(samples), generator=rng)
    group = samples["site"] * (int(samples["label"].max()) + 1) + samples["label"]
    turn = torch.zeros(rows(samples), dtype=torch.int64)
    seen: dict[int, int] = {}
    for i in order.tolist():
        turn[i] = seen.get(int(group[i]), 0)
        seen[int(group[i])] = int(turn[i]) + 1
    chosen = order[turn[order].sort(stable=True).indices[:count]]
    return select(samples, chosen.sort().values)


@dataclass(frozen=True)
class WarmStart:
    """Result of the warm start."""

    model: Tensors
    """θ_g^0."""
    subset: Table
    """S_sub in the form of `labelled`."""
    kept: Table
    """The samples that passed the filter, {"image", "label", "site", …}; "site" is an index into `sites`."""
    sites: tuple[str, ...]
    """The sites that were not excluded."""
    metrics: Metrics
    """The samples drawn and kept by site, and the excluded sites."""


def warm_start(
    ctx: ServerContext, adapters: Mapping[str, Tensors | None], classes: Mapping[str, tuple[int, ...]], settings: Synthesis
) -> WarmStart:
    """Sample S, exclude contradicted sites, filter the rest, and train the task's model on it from random weights.

    A site is judged by the classes that it holds.

    Args:
        ctx: the server's context.
        adapters: adapters by site; None samples from the base.
        classes: the classes that each site holds.
        settings: the settings of the sampling.
    """
    first = max(1, round(settings.per_class * (1 - settings.hard_fraction)))
    wanted, first = planned(classes, len(ctx.prompts), first, settings)
    samples = draw(ctx, adapters, wanted, first)
    aside, told = suspects(held_only(samples, tuple(adapters), classes), tuple(adapters), settings.contradicted)
    told = {**told, **{f"samples/{site}": float(first * len(wanted[site])) for site in aside}}
    told |= {f"kept/{site}": 0.0 for site in aside}
    samples = without(samples, tuple(adapters), aside)
    adapters = {site: adapter for site, adapter in adapters.items() if site not in aside}
    belief = cross_predict(ctx, samples, settings.filter_training)
    more = settings.per_class * sum(len(classes[site]) for site in adapters) - rows(samples)
    if settings.hard_fraction and more > 0:
        extra = drawn(ctx, adapters, sample_hard(samples, likely(belief, samples["label"]), adapters, more))
        samples = join([samples, extra])
        belief = cross_predict(ctx, samples, settings.filter_training)
    right = belief.argmax(-1) == samples["label"]
    keep = (
        likely(belief, samples["label"]) >= settings.min_class_probability
        if settings.filter == "cross"
        else torch.ones_like(right)
    )
    if settings.dedup_distance:
        keep &= ~repeated(samples, settings.dedup_distance)
    kept = select({**samples, **labelled(samples, belief, settings.soft_label_weight)}, keep)
    if not rows(kept):
        raise InputError("no synthetic sample was recognised; adapt longer (generator.training.epochs) or set filter to none")
    columns = {name: column for name, column in kept.items() if name != "site"}
    model, info = fit(replace(ctx, rng=spawn(ctx.rng)), ctx.task.init(spawn(ctx.rng)), settings.training, columns)
    subset = balanced_subset(kept, settings.subset, spawn(ctx.rng))
    lacking = ~of_held(samples, tuple(adapters), classes)
    metrics = {"samples": float(rows(samples)), "kept": float(rows(kept)), "loss": info["loss"], **told}
    for i, site in enumerate(adapters):
        mine = samples["site"] == i
        metrics |= {
            f"samples/{site}": float(mine.sum()),
            f"recognised/{site}": right[mine].double().mean().item(),
            f"kept/{site}": float(keep[mine].sum()),
        }
        if (drawn_lacking := mine & lacking).any():
            metrics |= {
                f"recognised_lacking/{site}": right[drawn_lacking].double().mean().item(),
                f"kept_lacking/{site}": float(keep[drawn_lacking].sum()),
            }
    keep_samples(ctx, tuple(adapters), {**samples, "kept": keep}, asdict(settings))
    return WarmStart(model, {name: subset[name] for name in columns}, kept, tuple(adapters), metrics)


def keep_samples(ctx: ServerContext, sites: tuple[str, ...], table: Table, settings: Mapping[str, object]) -> None:
    """Write the samples {"image", "label", "site", "kept"} to the run folder, with settings and hash beside them."""
    if ctx.folder is None:
        return
    manifest = {"sites": list(sites), "prompts": list(ctx.prompts), "settings": settings, "sha256": sha256(table)}
    atomic_write(ctx.folder / "synthetic" / "samples.safetensors", save({k: v.contiguous() for k, v in table.items()}))
    write_json(ctx.folder / "synthetic" / "manifest.json", json.loads(json.dumps(manifest)))


def generator_of(ctx: ClientContext | ServerContext) -> Generator:
    """Return the run's generator; raise `InputError` if there is none."""
    if ctx.generator is None:
        raise InputError("this algorithm needs a generator; set generator.base to a base or a pipeline folder")
    return ctx.generator


def classes_of(ctx: ClientContext) -> tuple[int, ...]:
    """Return the classes of a site's training images."""
    return tuple(ctx.data["train"]["label"].unique().tolist())


def check_classes(classes: tuple[int, ...], ctx: ServerContext) -> None:
    """Raise `InputError` unless these are one or more known classes without repetition."""
    if not classes or len(set(classes)) < len(classes) or not set(classes) <= set(range(len(ctx.prompts))):
        raise InputError(f"expected one or more distinct classes from 0 to {len(ctx.prompts) - 1}, got {list(classes)}")


def check_adapter(generator: Generator, reply: Reply[Any], site: str, ctx: ServerContext) -> None:
    """Raise `InputError` if an adapter cannot be sampled from, or if a declared class is unknown."""
    check_classes(reply.message.classes, ctx)
    generator.check(reply.message.adapter, ctx.prompts, f"the adapter of site {site!r}", reply.message.classes)


def gather(ctx: ServerContext, generator: Generator, replies: Replies[Any]) -> tuple[dict[str, Tensors], dict[str, Tensor]]:
    """Return the sites' adapters, stored as artefacts, and the classes that each site holds."""
    for site, reply in replies.items():
        if ctx.folder is not None:
            generator.write(reply.message.adapter, ctx.folder / "adapters", site)
    adapters = {site: reply.message.adapter for site, reply in replies.items()}
    return adapters, {site: torch.tensor(reply.message.classes) for site, reply in replies.items()}


@message("synthetic.Server")
class Server:
    """The server's state between stages."""

    model: Tensors
    adapters: Mapping[str, Tensors]  # until S is sampled
    classes: Tensors
    subset: Tensors


@message("synthetic.Offer")
class AdapterUpload:
    """All that a site sends before the warm start: an adapter and its classes."""

    adapter: Tensors
    classes: tuple[int, ...]


Offered = TypeVar("Offered", bound=Message)
"""The message that a site sends before the warm start."""


@dataclass(frozen=True)
class FromGenerator(Combined[Server, Model, None, Model], Generic[Offered]):
    """Abstract: rounds of FedAvg, before which the sites may send adapters of the run's generator."""

    offers: ClassVar[tuple[type, ...]] = (AdapterUpload,)
    """Message kinds that a site may send before the rounds."""

    @property
    def needs_generator(self) -> GeneratorSpec | None:
        return GeneratorSpec()

    def init(self, ctx: ServerContext) -> Server:
        return Server(ctx.task.init(ctx.rng), {}, {}, {})

    def broadcast(self, server: Server, site: str) -> Model:
        return Model(server.model)

    def adapt(self, received: Empty, state: None, ctx: ClientContext) -> Reply[Offered]:
        tensors, metrics = generator_of(ctx).adapt(ctx)
        return Reply(cast(Offered, AdapterUpload(tensors, classes_of(ctx))), None, float(rows(ctx.data["train"])), metrics)

    def check_upload(self, reply: Reply[Offered], site: str, ctx: ServerContext) -> None:
        """Raise `InputError` if a site's upload cannot be sampled from."""
        check_adapter(generator_of(ctx), reply, site, ctx)

    def collect(self, server: Server, replies: Replies[Offered], ctx: ServerContext) -> tuple[Server, Metrics]:
        adapters, classes = gather(ctx, generator_of(ctx), replies)
        return replace(server, adapters=adapters, classes=classes), {}

    def train(self, received: Model, state: None, ctx: ClientContext) -> Reply[Model]:
        model, metrics = fit(ctx, received.model, self.local, ctx.data["train"])
        return upload(model, state, ctx, metrics)


@dataclass(frozen=True)
class WarmStarted(FromGenerator[Offered]):
    """Abstract: train a classifier on samples of the sites' generators, then run FedAvg with fine-tuning on S_sub."""

    images: ClassVar[bool]
    """Whether a site's upload for the warm start holds its images in any form."""

    synthesis: Synthesis = Synthesis()
    """Sampling and filtering of S, and training on it."""
    tune: bool = True
    """Whether the server fine-tunes the aggregated model on S_sub."""
    tune_training: Training = Training(lr=0.01, epochs=2, max_grad_norm=1.0)
    """Training of the server's fine-tuning."""

    @property
    def samples_per_class(self) -> int:
        return self.synthesis.per_class

    def further_work(self, rows: Mapping[str, int], pairs: int) -> tuple[Workload, ...]:
        tuning = self.rounds * self.tune_training.count(self.synthesis.subset) if self.tune else 0
        return (
            Workload("fine-tuning", "server", tuning, self.tune_training),
            *self.synthesis.workload(pairs),
        )

    def stages(self) -> tuple[Stage, ...]:
        adapt = gathering("adapt", self.collect, self.adapt, replies=self.offers, check=self.check_upload, images=self.images)
        train = Stage("train", self.aggregate, self.train, client_fraction=self.client_fraction, images=False)
        return (adapt, Stage("warm", self.start)) + (train,) * self.rounds

    def start(self, server: Server, replies: Replies[Empty], ctx: ServerContext) -> tuple[Server, Metrics]:
        classes = {site: tuple(held.tolist()) for site, held in server.classes.items()}
        adapters = {site: server.adapters.get(site) for site in classes}
        warm = warm_start(ctx, adapters, classes, self.synthesis)
        return replace(server, model=warm.model, subset=warm.subset, adapters={}), warm.metrics

    def aggregate(self, server: Server, replies: Replies[Model], ctx: ServerContext) -> tuple[Server, Metrics]:
        model, metrics = self.robust.combine(server.model, replies), {}
        if self.tune:
            model, info = fit(ctx, model, self.tune_training, server.subset)
            metrics = {"tune_loss": info["loss"]}
        return replace(server, model=model), metrics
