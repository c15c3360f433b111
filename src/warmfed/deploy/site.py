"""A site of a deployment: its folder and its answers. Its images and its state are never sent, unless the policy allows it.

The folder holds site.toml and, by default, work/. For each run, work/ holds the client state and the models, which
`warmfed predict` reads. work/ledger.jsonl has a line for each message that the site has sent.
"""

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import torch

from .. import models
from ..config import Config, Data, Holdout, Model, build, read_toml
from ..core import Empty, Reply
from ..core.messages import Message, decode, encode, kind, tensors_of
from ..core.tensors import sha256
from ..data import SPLITS, Federation, FederationInfo
from ..data import Site as Tables
from ..diffusion import pipeline
from ..evaluation.generators import Evaluation
from ..runs.folder import write_model
from ..runs.prepare import PreparedRun, load_data, prepare
from ..transports.client import Client, exchange
from ..transports.client_state import ClientStates, snapshot_path
from ..transports.protocol import (
    EVALUATE,
    FINISH,
    HELLO,
    REFUSED,
    Answer,
    EvaluateReply,
    FinishReply,
    Models,
    Refusal,
    Request,
    SiteInfo,
    check_site_info,
)
from ..utils.errors import InputError, printable, suggest
from ..utils.files import PRIVATE, atomic_write, file_lock, loads_toml, make_folder, read_lines, write_json, write_lines
from ..utils.names import plain_name, plain_names
from ..utils.output import announce
from ..utils.paths import exists, is_folder, resolved
from ..utils.settings import construct
from ..utils.version import __version__
from .policy import Policy, images_in


@dataclass(frozen=True)
class SiteConfig:
    """Settings of site.toml; paths are relative to its folder."""

    name: str = ""
    """Name of the site in the consortium."""
    work: str = "work"
    """Folder of the site's state, models and ledger. Default work."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Device: cpu (default) or cuda."""
    base: str = ""
    """Base of the generator: its folder, or its agreed name. Default empty: only bases that are installed with warmfed."""
    adapter: str = ""
    """Imported adapter, a safetensors file, which replaces the site's own. Default empty: the site trains one."""
    start: str = ""
    """File of the initial classifier, if the run starts from a file."""
    network: str = ""
    """Network that the site allows besides warmfed's own: python:module:function, or the folder of a pretrained backbone."""
    classes: tuple[str, ...] = ()
    """Classes of the consortium in order. Default empty: those of the data."""
    prompts: str = ""
    """Template of the prompts, with one {} for the class. Default empty: that of the data."""
    policy: Policy = field(default_factory=Policy)
    """Policy of the site. By default, every run is refused."""
    data: Data = field(default_factory=Data)
    """Source of the images; of a federation, the site of this name is used."""
    folder: Path = Path()
    """Folder of site.toml."""

    def path(self, name: str) -> Path:
        return resolved(self.folder / name)

    def generator(self, asked: str) -> str:
        """Return the base that the site uses instead of `asked`: its own folder, or the agreed name."""
        own = self.path(self.base) if self.base else None
        return str(own) if own is not None and is_folder(own) else self.base or asked

    def federation(self) -> Federation:
        """Return the site's tables as a federation of one site with the consortium's classes.

        Raises:
            InputError: The data cannot be read, or lack the site, or have other classes.
        """
        source, path = self.data.source, self.data.path
        reader, colon, rest = source.partition(":")
        if colon and not path:
            source, path = reader, rest
        if path:
            path = str(self.path(path))
        elif exists(self.path(source)):
            source = str(self.path(source))
        loaded = load_data(replace(self.data, source=source, path=path))
        if self.name not in loaded.sites:
            raise InputError(f"the data {source!r} have no site {self.name!r}{suggest(self.name, list(loaded.sites))}")
        classes, tables = self.classes or loaded.classes, loaded.sites[self.name]
        held = {label for table in tables.splits.values() for label in table["label"].unique().tolist()}
        unknown = [name for label, name in enumerate(loaded.classes) if label in held and name not in classes]
        if unknown:
            raise InputError(f"the data {source!r} have classes {unknown} that are not among the consortium's {list(classes)}")
        if classes != loaded.classes:
            tables = Tables(**{split: _relabelled(table, loaded.classes, classes) for split, table in tables.splits.items()})
        return Federation(loaded.name, classes, self.prompts or loaded.template, {self.name: tables})


def _relabelled(table: Mapping[str, Any], was: tuple[str, ...], now: tuple[str, ...]) -> dict[str, Any]:
    places = {label: now.index(name) for label, name in enumerate(was) if name in now}
    return {"image": table["image"], "label": table["label"].new_tensor([places[label] for label in table["label"].tolist()])}


def read_site(folder: Path) -> SiteConfig:
    """Return the configuration of a site's folder; raise `InputError` if it is missing or not valid."""
    path = folder / "site.toml"
    table = read_toml(path)
    if "algorithms" in table:
        raise InputError(f"{path}: algorithms is a setting of [policy] now; move it there: policy.algorithms = [...]")
    found = construct(SiteConfig, table, "", skip=("folder",))
    if not found.name or found.name != Path(found.name).name or found.name.startswith("."):
        raise InputError(f"{path}: name must be the site's name, without slashes; got {found.name!r}")
    classes = plain_names(found.classes, f"{path}: classes")
    return replace(found, name=plain_name(found.name), classes=classes, folder=resolved(folder))


_CONFIG = 65_536
"""Largest configuration of a request, in characters."""
_LEAST = 1_000_000
"""Size in bytes up to which a request is accepted by every policy."""
_RUN = re.compile(r"[0-9a-f]{16}")


def answer(folder: Path, request_bytes: bytes) -> bytes:
    """Return a site's answer to a request, recorded in the site's ledger before it is sent.

    A request that is not valid, or that the site's policy does not allow, is refused: the answer holds only the reason.

    Args:
        folder: the site's folder.
        request_bytes: the encoded request.

    Raises:
        InputError: The site's folder cannot be read or written, or `request_bytes` is not a request; the ledger records it.
    """
    site = read_site(folder)
    work = site.path(site.work)
    with _alone(work):
        before = _ledger(work)
        try:
            asked = decode(request_bytes, Request, "the request")
        except InputError as error:
            lost = Request("", "", "", "", 0, 0, None)
            _record(work, before, lost, _refusal(str(error)))
            raise
        made = answered(asked, site.name, lambda: _answered(site, work, asked, len(request_bytes), before))
        _record(work, before, asked, made.body)
    return encode(made)


def answered(asked: Request, site: str, work: Callable[[], tuple[float, Message]]) -> Answer:
    """Return a site's answer: the result of work(), or a refusal if it raises `InputError`."""
    torch.set_num_threads(1)  # sums depend on the number of threads
    try:
        seconds, body = work()
    except InputError as error:
        seconds, body = 0.0, _refusal(str(error), asked)
    return Answer(asked.run, site, asked.stage, asked.step, asked.number, seconds, body)


def _refusal(reason: str, asked: Request | None = None) -> Refusal:
    """Print the reason of a refusal and return the refusal."""
    refusal = Refusal(printable(reason))
    stage = f" ({printable(asked.stage, 40)})" if asked else ""
    announce(f"this site has refused a request{stage}: {refusal.reason}")
    return refusal


def _answered(
    site: SiteConfig, work: Path, asked: Request, size: int, before: Sequence[Mapping[str, Any]]
) -> tuple[float, Message]:
    if asked.stage == REFUSED and isinstance(asked.body, Refusal):
        announce(f"the server has refused this site: {printable(asked.body.reason)}")
        return 0.0, Empty()
    if asked.stage != HELLO and asked.site != site.name:
        raise InputError(f"the request is for site {asked.site!r}, this is {site.name!r}")
    if not _RUN.fullmatch(asked.run):
        raise InputError(f"{asked.run!r} is not a run's name; expected 16 hexadecimal digits")
    config = _local(site, asked.config)
    if asked.stage in (HELLO, EVALUATE, FINISH) and (asked.step, asked.number) != (0, 0):
        raise InputError(f"a request to {asked.stage} must have step 0 and number 0; got {asked.step}, {asked.number}")
    _within(site.policy, asked, size, before)
    prepared = prepare(config, site.federation(), weights=asked.stage == HELLO)
    if asked.stage == HELLO:
        return 0.0, _card(site, prepared)
    folder = work / "runs" / asked.run
    client_states = ClientStates(folder)
    worker = replace(prepared.workers()[site.name], snapshot_path=snapshot_path(folder, site.name))
    if asked.stage == FINISH and isinstance(asked.body, Models):
        return 0.0, _finished(site, folder, prepared, asked.body, client_states)
    seconds, body = perform(asked, worker, client_states)
    _leaving(site, prepared, body, sum(_size(line) for line in _of(before, asked.run)))
    return seconds, body


def _of(lines: Sequence[Mapping[str, Any]], run: str) -> list[Mapping[str, Any]]:
    """Return the lines of a ledger that record answers to a run, without refusals."""
    return [line for line in lines if line.get("run") == run and "reason" not in line]


def _size(line: Mapping[str, Any]) -> int:
    size = line.get("bytes", 0)
    return size if isinstance(size, int) else 0


def _within(policy: Policy, asked: Request, size: int, before: Sequence[Mapping[str, Any]]) -> None:
    """Raise `InputError` if a request exceeds the policy's limits on runs, requests or bytes."""
    begun = {line.get("run") for line in before if "reason" not in line and line.get("stage") not in (HELLO, REFUSED)}
    if (runs := len(begun | {asked.run})) > policy.max_runs:
        raise InputError(f"this is run {runs} of the site, at most {policy.max_runs} are answered (policy.max_runs)")
    if (count := len(_of(before, asked.run)) + 1) > policy.max_requests:
        raise InputError(
            f"this is request {count} of the run, at most {policy.max_requests} are answered (policy.max_requests)"
        )
    if size > max(policy.max_bytes, _LEAST):
        raise InputError(f"the request has {size:,} bytes, at most {policy.max_bytes:,} are allowed (policy.max_bytes)")


def _leaving(site: SiteConfig, prepared: PreparedRun, body: Message, left: int) -> None:
    """Raise `InputError` if the policy forbids a reply: it exceeds the run's bytes, or holds images."""
    message = body.message if isinstance(body, Reply) else body
    size, most = len(encode(message)), site.policy.max_bytes
    if left + size > most:
        raise InputError(
            f"the reply has {size:,} bytes after {left:,} bytes of this run, at most {most:,} are allowed (policy.max_bytes)"
        )
    if not site.policy.images:
        tables = (split["image"] for split in prepared.images.sites[site.name].splits.values())
        if name := images_in(message, tables):
            raise InputError(f"tensor {name!r} of the reply holds images of the site, which needs images = true below [policy]")


def perform(asked: Request, worker: Client, client_states: ClientStates) -> tuple[float, Message]:
    """Evaluate the models or do a stage's work; a repeated request returns the saved reply.

    Returns:
        Seconds of work, and the body of the answer.

    Raises:
        InputError: The request is not valid, or the work fails.
    """
    site, plan = worker.site, worker.algorithm.stages()
    match asked.stage, asked.body:
        case (stage, Models()) if stage == EVALUATE:
            found = worker.evaluate(asked.body.down, client_states.state(site), asked.body.model)
            return 0.0, EvaluateReply(
                {f"{view}/{name}": value for view, values in found.items() for name, value in values.items()}
            )
        case (stage, _) if stage in (EVALUATE, FINISH):
            raise InputError(f"a request to {stage} without models")
        case _:
            if not (0 <= asked.step < len(plan) and plan[asked.step].name == asked.stage):
                raise InputError(f"step {asked.step} is not stage {asked.stage!r} in this version of the algorithm")
            number = sum(stage.name == asked.stage for stage in plan[: asked.step])
            if asked.number != number:
                raise InputError(f"step {asked.step} is number {number} of stage {asked.stage!r}, not {asked.number}")
            if asked.body is None:
                raise InputError(f"a request to stage {asked.stage!r} without a message")
            record = client_states.answered(site, asked.step)
            if record is not None:
                return record.seconds, replace(record.answer, state=None)
            began = time.perf_counter()
            reply = worker.work(asked.stage, asked.number, asked.body, client_states.state(site))
            seconds = time.perf_counter() - began
            client_states.save(site, asked.step, seconds, reply)
            return seconds, replace(reply, state=None)


def _tables(text: str) -> dict[str, Any]:
    """Return the tables of a request's configuration; raise `InputError` if it is too long or not TOML."""
    if len(text) > _CONFIG:
        raise InputError(f"the request's configuration has {len(text):,} characters, expected at most {_CONFIG:,}")
    try:
        return loads_toml(text)
    except ValueError as error:
        raise InputError(f"the request's configuration is not TOML ({error})") from error


def _local(site: SiteConfig, text: str) -> Config:
    """Return the run's configuration with the site's own settings; raise `InputError` if the policy does not allow it."""
    config = build(_tables(text))
    if config.generator.adapters:
        raise InputError("the run sets generator.adapters to files of the server; set adapter in site.toml instead")
    start = config.model.start
    if start not in ("", "public", "auto"):
        if not site.start:
            raise InputError("the run starts from a file; set start in site.toml to this site's copy of it")
        start = str(site.path(site.start))
    local = replace(
        config,
        data=site.data,
        device=site.device,
        workers=1,
        holdout=Holdout(),
        evaluation=Evaluation(samples=0),
        generator=replace(
            config.generator,
            base=_base(site, "generator.base", config.generator.base),
            adapters={site.name: str(site.path(site.adapter))} if site.adapter else {},
            compile="",
        ),
        denoising=replace(config.denoising, latent=_base(site, "denoising.latent", config.denoising.latent)),
        model=replace(config.model, start=start, backbone=_network(site, config.model)),
    )
    # check the numbers first: a plan with a billion rounds must not be built
    if outside := site.policy.excess(local) or site.policy.sending(local.algorithm.stages()):
        more = f"; and {len(outside) - 2} more" if len(outside) > 2 else ""
        raise InputError(f"site {site.name!r} does not allow this run: {'; '.join(outside[:2])}{more}")
    return local


def _network(site: SiteConfig, model: Model) -> str:
    """Return the site's folder of the run's backbone, if any; raise `InputError` for a network that the site does not allow."""
    if model.backbone:
        if not site.network or site.network.startswith(models.PYTHON):
            raise InputError("the run has a pretrained backbone; set network in site.toml to this site's copy of its folder")
        return str(site.path(site.network))
    if models.outside(model.name) and model.name != site.network:
        raise InputError(
            f"the run's network is {printable(repr(model.name), 80)}, which this site does not allow; if the site has "
            f"installed it and agrees, it writes network = {printable(repr(model.name), 80)} in its site.toml"
        )
    return ""


def _base(site: SiteConfig, setting: str, asked: str) -> str:
    """Return the base that a site uses for the run's; raise `InputError` if it is not the agreed one."""
    if not asked or (asked in pipeline.embedded() and setting != "generator.base"):
        return asked
    found = site.generator(asked)
    if Path(found).is_absolute() and site.base:
        return found
    if found != asked or (not site.base and asked not in pipeline.embedded()):
        agreed = f"{site.base!r} was agreed" if site.base else f"this site has only {', '.join(pipeline.embedded())}"
        raise InputError(f"{setting} is {asked!r}, {agreed}; set base in site.toml to this site's base")
    return asked


def _card(site: SiteConfig, prepared: PreparedRun) -> SiteInfo:
    data = prepared.federation
    return SiteInfo(
        __version__, data.name, data.classes, data.template, tuple(float(n) for n in data.shape),
        {split: float(count) for split, count in data.rows[site.name].items()},
        tuple(data.digests[site.name][split] for split in SPLITS), prepared.base, prepared.start,
    )  # fmt: skip


def _finished(site: SiteConfig, folder: Path, prepared: PreparedRun, body: Models, client_states: ClientStates) -> FinishReply:
    """Write the run's folder at the site, which `warmfed predict` reads; return the digest of the personal model."""
    models = {"global": body.model}
    models[f"personal/{site.name}"] = prepared.workers()[site.name].model(body.down, client_states.state(site.name))
    there = {name: model for name, model in models.items() if model is not None}
    for name, model in there.items():
        write_model(folder / "models" / f"{name}.safetensors", model)
    atomic_write(folder / "config.toml", prepared.config.toml())
    digests = {name: sha256(model) for name, model in there.items()}
    summary = {
        "warmfed": __version__,
        "algorithm": prepared.config.name,
        "seed": prepared.config.seed,
        "models_sha256": digests,
    }
    data = {"federation": prepared.federation.name, "classes": prepared.federation.classes, "image": prepared.federation.shape}
    write_json(folder / "summary.json", {"site": site.name, **summary, **data})
    return FinishReply(digests.get(f"personal/{site.name}", ""))


@contextmanager
def _alone(work: Path) -> Iterator[None]:
    """Lock the work folder within this context, because a SuperNode may run two apps at the same time."""
    try:
        make_folder(work)
        (work / ".lock").touch(PRIVATE)
    except OSError as error:
        raise InputError(f"cannot write to {work}: {error.strerror}; free some space, or choose another work folder") from error
    with file_lock(work / ".lock"):
        yield


def _ledger(work: Path) -> list[dict[str, Any]]:
    """Return the lines of the site's ledger; raise `InputError` if it is damaged."""
    path = work / "ledger.jsonl"
    lines = read_lines(path, "the site's ledger") if exists(path) else []
    if not all(isinstance(line, dict) for line in lines):
        raise InputError(f"{path} is damaged: a line is not a table; restore it from a backup")
    return lines


def _asked(text: str) -> str:
    """Return the algorithm's name in a request's configuration, or an empty text."""
    try:
        found = _tables(text).get("algorithm", {})
    except InputError:
        return ""
    return printable(str(found.get("name", "")), 40) if isinstance(found, dict) else ""


def _record(work: Path, before: Sequence[Mapping[str, Any]], asked: Request, body: Message) -> None:
    """Append a line to the site's ledger, before the message is sent."""
    what = body.message if isinstance(body, Reply) else body
    crossed = exchange("", "up", what)
    line: dict[str, Any] = {
        "when": _now(),
        "run": printable(asked.run, 40), "algorithm": _asked(asked.config),
        "asked": "" if asked.body is None else kind(type(asked.body)),
        "stage": printable(asked.stage, 40), "step": asked.step, "number": asked.number,
        "kind": kind(type(what)), "bytes": crossed.bytes, "sha256": crossed.sha256,
        "tensors": {name: [str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in sorted(tensors_of(what).items())},
    }  # fmt: skip
    if isinstance(body, Reply):
        line |= {"weight": body.weight, "metrics": dict(body.metrics)}
    elif isinstance(body, EvaluateReply):
        line["metrics"] = dict(body.metrics)
    elif isinstance(body, Refusal):
        line["reason"] = body.reason
    elif isinstance(asked.body, Refusal):
        line["reason"] = printable(asked.body.reason)
    write_lines(work / "ledger.jsonl", [*before, line])


def refused(site: SiteConfig, stage: str, reason: str, sha256: str) -> None:
    """Record a refusal of content that was not opened in the site's ledger; the site sent nothing but the refusal.

    Args:
        site: the site.
        stage: kind of the content: "app".
        reason: reason of the refusal.
        sha256: SHA-256 of the content.
    """
    work = site.path(site.work)
    with _alone(work):
        write_lines(work / "ledger.jsonl", [*_ledger(work), {
            "when": _now(), "run": "", "stage": stage, "step": 0, "number": 0,
            "kind": f"refused {stage}", "bytes": 0, "sha256": sha256, "tensors": {}, "reason": reason,
        }])  # fmt: skip


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def roster(infos: Mapping[str, SiteInfo], sites: tuple[str, ...]) -> FederationInfo:
    """Return the federation of these descriptions; a site without one has no rows.

    Raises:
        InputError: A description is not valid, or two differ in a value that must be equal everywhere.
    """
    for info in infos.values():
        check_site_info(info)
    first = next(iter(sorted(infos)))
    for site in sorted(infos):
        agree(infos[site], site, infos[first], first)
    info = infos[first]
    channels, height, width = (int(n) for n in info.shape)
    rows = {s: {k: int(n) for k, n in infos[s].rows.items()} if s in infos else dict.fromkeys(SPLITS, 0) for s in sites}
    digests = {s: dict(zip(SPLITS, infos[s].digests if s in infos else ("",) * len(SPLITS), strict=True)) for s in sites}
    return FederationInfo(info.federation, info.classes, info.template, (channels, height, width), rows, digests)


def agree(info: SiteInfo, site: str, other: SiteInfo, whose: str) -> None:
    """Raise `InputError` if two descriptions differ in a value that must be equal everywhere."""
    for name in ("version", "classes", "template", "shape", "base", "start"):
        if getattr(info, name) != getattr(other, name):
            raise InputError(
                f"site {site!r} has {name} {printable(repr(getattr(info, name)), 120)}, "
                f"{whose} has {printable(repr(getattr(other, name)), 120)}; they must be equal"
            )
