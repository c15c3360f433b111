"""A site of a deployment: its folder, and how it answers. Its images and its state never leave it.

The folder holds site.toml and, by default, work/: for each run the site's memory and its models (`warmfed predict` reads
them), and ledger.jsonl, a line for each message that has left.
"""

import time
import tomllib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from . import __version__
from .config import Config, Data, Unseen, build, construct, read_toml
from .core import Nothing, Reply
from .data import SPLITS, Federation, Roster
from .data import Site as Tables
from .errors import InputError, printable, suggest
from .files import read_lines, write_json, write_lines, write_whole
from .messages import Message, decode, encode, kind, tensors_of
from .ready import Ready, load_data, prepare
from .runfolder import write_model
from .tensors import sha256
from .transports.memories import Memories, unfinished
from .transports.wire import (
    EVALUATE,
    FINISH,
    HELLO,
    REFUSED,
    Answer,
    Card,
    Kept,
    Measures,
    Models,
    Refusal,
    Request,
    check_card,
)
from .transports.worker import Worker, exchange


@dataclass(frozen=True)
class SiteConfig:
    """What site.toml says; paths are relative to its folder."""

    name: str = ""
    """The site's name in the consortium."""
    work: str = "work"
    """Where the site keeps its state, models and ledger."""
    device: str = "cpu"
    """cpu or cuda."""
    base: str = ""
    """The generator's folder; empty: the name in the run's configuration."""
    adapter: str = ""
    """An adapter that was made elsewhere, a safetensors file: the site then learns none."""
    start: str = ""
    """The classifier to start from, where the run starts from a file."""
    classes: tuple[str, ...] = ()
    """The consortium's classes in order; empty: those of the data."""
    prompts: str = ""
    """The template of the prompts, with one {} for the class; empty: that of the data."""
    algorithms: tuple[str, ...] = ()
    """The algorithms that this site takes part in; empty: all."""
    data: Data = field(default_factory=Data)
    """Where its images are; of a federation, the site of this name."""
    folder: Path = Path()
    """Where site.toml lies."""

    def path(self, name: str) -> Path:
        return (self.folder / name).resolve()

    def federation(self) -> Federation:
        """The site's tables, as a federation of one site with the consortium's classes; raises `InputError`."""
        source, path = self.data.source, self.data.path
        reader, colon, rest = source.partition(":")
        if colon and not path:
            source, path = reader, rest
        if path:
            path = str(self.path(path))
        elif self.path(source).exists():
            source = str(self.path(source))
        loaded = load_data(replace(self.data, source=source, path=path))
        if self.name not in loaded.sites:
            raise InputError(f"the data {source!r} have no site {self.name!r}{suggest(self.name, list(loaded.sites))}")
        classes, tables = self.classes or loaded.classes, loaded.sites[self.name]
        unknown = [name for name in loaded.present[self.name] if name not in classes]
        if unknown:
            raise InputError(f"the data {source!r} have classes {unknown} that are not among the consortium's {list(classes)}")
        if classes != loaded.classes:
            tables = Tables(**{split: _relabelled(table, loaded.classes, classes) for split, table in tables.splits.items()})
        return Federation(loaded.name, classes, self.prompts or loaded.template, {self.name: tables})


def _relabelled(table: Mapping[str, Any], was: tuple[str, ...], now: tuple[str, ...]) -> dict[str, Any]:
    labels = [now.index(was[label]) for label in table["label"].tolist()]
    return {"image": table["image"], "label": table["label"].new_tensor(labels)}


def read_site(folder: Path) -> SiteConfig:
    """The configuration of a site's folder; raises `InputError`."""
    path = folder / "site.toml"
    found = construct(SiteConfig, read_toml(path), "", skip=("folder",))
    if not found.name or found.name != Path(found.name).name or found.name.startswith("."):
        raise InputError(f"{path}: name must be the site's name, without slashes; got {found.name!r}")
    return replace(found, folder=folder.resolve())


def answer(folder: Path, letter: bytes) -> bytes:
    """A site's answer to a request, recorded in its ledger before it leaves. Bad requests are refused with the reason."""
    asked = decode(letter, Request, "the request")
    site = read_site(folder)
    work = site.path(site.work)
    with _alone(work):
        made = answered(asked, site.name, lambda: _answered(site, work, asked))
        _record(work, asked, made.body)
    return encode(made)


def answered(asked: Request, site: str, work: Callable[[], tuple[float, Message]]) -> Answer:
    """The answer of a site to a request: what its work yields, or the refusal that it ends in."""
    torch.set_num_threads(1)  # sums depend on how many there are
    try:
        seconds, body = work()
    except InputError as error:
        seconds, body = 0.0, Refusal(str(error))
    return Answer(asked.run, site, asked.stage, asked.step, asked.number, seconds, body)


def _answered(site: SiteConfig, work: Path, asked: Request) -> tuple[float, Message]:
    if asked.stage == REFUSED and isinstance(asked.body, Refusal):
        print(f"the server has refused this site: {asked.body.reason}", flush=True)
        return 0.0, Nothing()
    if asked.stage != HELLO and asked.site != site.name:
        raise InputError(f"the request is for site {asked.site!r}, this is {site.name!r}")
    if asked.run and not (len(asked.run) == 16 and asked.run.isalnum()):
        raise InputError(f"{asked.run!r} is no run's name")
    config = _local(site, asked.config)
    ready = prepare(config, site.federation(), weights=asked.stage == HELLO)
    if asked.stage == HELLO:
        return 0.0, _card(site, ready)
    folder = work / "runs" / asked.run
    memories = Memories(folder)
    worker = replace(ready.workers()[site.name], unfinished=unfinished(folder, site.name))
    if asked.stage == FINISH and isinstance(asked.body, Models):
        return 0.0, _finished(site, folder, ready, asked.body, memories)
    return perform(asked, worker, memories)


def perform(asked: Request, worker: Worker, memories: Memories) -> tuple[float, Message]:
    """Measure or do a stage's work, or repeat its answer: how long the site worked for it, and the answer's body.

    Raises:
        InputError: the request makes no sense, or the work cannot be done.
    """
    site, plan = worker.site, worker.algorithm.stages()
    match asked.stage, asked.body:
        case (stage, Models()) if stage == EVALUATE:
            found = worker.evaluate(asked.body.down, memories.state(site), asked.body.model)
            return 0.0, Measures({f"{view}/{name}": value for view, values in found.items() for name, value in values.items()})
        case (stage, _) if stage in (EVALUATE, FINISH):
            raise InputError(f"a request to {stage} without models")
        case _:
            if not (0 <= asked.step < len(plan) and plan[asked.step].name == asked.stage):
                raise InputError(f"step {asked.step} is not stage {asked.stage!r} in this version of the algorithm")
            memory = memories.answered(site, asked.step)
            if memory is not None:
                return memory.seconds, replace(memory.reply, state=None)
            began = time.perf_counter()
            reply = worker.work(asked.stage, asked.number, asked.body, memories.state(site))
            seconds = time.perf_counter() - began
            memories.keep(site, asked.step, seconds, reply)
            return seconds, replace(reply, state=None)


def _local(site: SiteConfig, text: str) -> Config:
    """The run's configuration with what is the site's own business."""
    try:
        config = build(tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"the request's configuration is not TOML ({error})") from error
    if site.algorithms and config.name not in site.algorithms:
        raise InputError(f"site {site.name!r} takes part in {', '.join(site.algorithms)} only, not in {config.name}")
    if config.generator.adapters:
        raise InputError("the run names adapters by files of the server; name this site's own by adapter in site.toml")
    start = config.model.start
    if start and start != "public":
        if not site.start:
            raise InputError("the run starts from a file; name this site's copy of it by start in site.toml")
        start = str(site.path(site.start))
    return replace(
        config,
        data=site.data,
        device=site.device,
        workers=1,
        unseen=Unseen(),
        generator=replace(
            config.generator,
            base=str(site.path(site.base)) if site.base else config.generator.base,
            adapters={site.name: str(site.path(site.adapter))} if site.adapter else {},
        ),
        model=replace(config.model, start=start),
    )


def _card(site: SiteConfig, ready: Ready) -> Card:
    data = ready.federation
    return Card(
        __version__, data.name, data.classes, data.template, tuple(float(n) for n in data.shape),
        {split: float(count) for split, count in data.rows[site.name].items()},
        tuple(data.digests[site.name][split] for split in SPLITS), ready.base, ready.start,
    )  # fmt: skip


def _finished(site: SiteConfig, folder: Path, ready: Ready, body: Models, memories: Memories) -> Kept:
    """The run's folder at the site: what `warmfed predict` needs."""
    models = {"global": body.model}
    models[f"personal/{site.name}"] = ready.workers()[site.name].model(body.down, memories.state(site.name))
    there = {name: model for name, model in models.items() if model is not None}
    for name, model in there.items():
        write_model(folder / "models" / f"{name}.safetensors", model)
    write_whole(folder / "config.toml", ready.config.toml())
    digests = {name: sha256(model) for name, model in there.items()}
    summary = {"warmfed": __version__, "algorithm": ready.config.name, "seed": ready.config.seed, "models_sha256": digests}
    data = {"federation": ready.federation.name, "classes": ready.federation.classes, "image": ready.federation.shape}
    write_json(folder / "summary.json", summary | data)
    return Kept(digests.get(f"personal/{site.name}", ""))


@contextmanager
def _alone(work: Path) -> Iterator[None]:
    """One answer at a time: a SuperNode may start two apps."""
    try:
        work.mkdir(parents=True, exist_ok=True)
        file = (work / ".lock").open("w")
    except OSError as error:
        raise InputError(f"cannot write to {work}: {error.strerror}; free some space, or choose another work folder") from error
    with file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        except ImportError:
            pass  # no such locks on this system
        yield


def _record(work: Path, asked: Request, body: Message) -> None:
    """A line in the site's ledger; it is there before the message leaves."""
    path = work / "ledger.jsonl"
    lines = read_lines(path, "the site's ledger") if path.exists() else []
    what = body.message if isinstance(body, Reply) else body
    crossed = exchange("", "up", what)
    line: dict[str, Any] = {
        "when": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "run": asked.run, "stage": asked.stage, "step": asked.step, "number": asked.number,
        "kind": kind(type(what)), "bytes": crossed.bytes, "sha256": crossed.sha256,
        "tensors": {name: [str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in sorted(tensors_of(what).items())},
    }  # fmt: skip
    if isinstance(body, Reply):
        line |= {"weight": body.weight, "metrics": dict(body.metrics)}
    elif isinstance(body, Measures):
        line["metrics"] = dict(body.metrics)
    elif isinstance(body, Refusal):
        line["reason"] = body.reason
    write_lines(path, [*lines, line])


def roster(cards: Mapping[str, Card], sites: tuple[str, ...]) -> Roster:
    """The federation as these cards describe it; a site that has shown none has no rows yet.

    Raises:
        InputError: a card is not one, or two differ in what must be equal everywhere, naming the sites and both values.
    """
    for card in cards.values():
        check_card(card)
    first = next(iter(sorted(cards)))
    for site in sorted(cards):
        agree(cards[site], site, cards[first], first)
    card = cards[first]
    channels, height, width = (int(n) for n in card.shape)
    rows = {s: {k: int(n) for k, n in cards[s].rows.items()} if s in cards else dict.fromkeys(SPLITS, 0) for s in sites}
    digests = {s: dict(zip(SPLITS, cards[s].digests if s in cards else ("",) * len(SPLITS), strict=True)) for s in sites}
    return Roster(card.federation, card.classes, card.template, (channels, height, width), rows, digests)


def agree(card: Card, site: str, other: Card, whose: str) -> None:
    """Raise `InputError` where two cards differ in what must be equal everywhere."""
    for name in ("version", "classes", "template", "shape", "base", "start"):
        if getattr(card, name) != getattr(other, name):
            raise InputError(
                f"site {site!r} has {name} {printable(repr(getattr(card, name)), 120)}, "
                f"{whose} has {printable(repr(getattr(other, name)), 120)}; they must be equal"
            )
