"""A run from its configuration to its folder: everything in the folder is written whole, and a killed run resumes.

The folder holds config.toml, rounds.jsonl, ledger.jsonl, adapters/, synthetic/, models/, panel/, summary.json and
report.html; while the run is under way also checkpoint/ (the server's state, and each site's last reply).
"""

import hashlib
import json
import shutil
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from . import __version__, report
from .algorithms import ALGORITHMS
from .config import Config, build
from .core import Algorithm, Central, Generator, Round, ServerState, Stage, Task
from .data import Federation, load
from .diffusion import pipeline
from .errors import InputError
from .files import read_bytes, read_json, read_lines, read_sealed, write_json, write_lines, write_sealed, write_whole
from .memory import Meter
from .messages import Message, decode, encode, message
from .panel import write_panel
from .run import run
from .tasks import Classify
from .tensors import Tensors, join, rows, sha256
from .transports.inprocess import InProcess
from .transports.worker import Worker


class Watcher:
    """Is told how a run goes; this one keeps silent."""

    def plan(self, stages: tuple[Stage, ...], done: int) -> None:
        """The run's stages, and how many of them an earlier process has done."""

    def progress(self, site: str, what: str, done: int, total: int) -> None:
        """Work within a stage, at a site or (site "") at the server."""

    def round(self, record: Mapping[str, Any]) -> None:
        """A stage is done; its record as in rounds.jsonl."""


@message
class Checkpoint:
    """The server after `steps` stages."""

    version: str
    run: str
    steps: int
    server: Message


def simulate(
    algorithm: Algorithm,
    federation: Federation,
    task: Task | None = None,
    *,
    seed: int = 0,
    generator: Generator | None = None,
    workers: int = 1,
    device: str = "cpu",
    evaluate: str = "every",
    folder: Path | None = None,
    start: tuple[int, ServerState] | None = None,
    watcher: Watcher | None = None,
    ended: Callable[[InProcess], None] | None = None,
) -> Iterator[Round]:
    """Run an algorithm over a federation on this machine; yields after each stage.

    Args:
        task: what is learned; none: classification by the small CNN.
        workers: processes that work at the same time; the results do not depend on it.
        folder: where artefacts and the sites' memories go; none: they stay in this process.
        start: (stages done, the server's state then), to resume.
        ended: is called with the transport at the end, while the sites' states are at hand.
    """
    watcher = watcher or Watcher()
    task = task or Classify(federation.shape, len(federation.classes))
    common = {"algorithm": algorithm, "task": task, "seed": seed, "prompts": federation.prompts}
    sites = {
        name: Worker(name, data=site.splits, generator=generator, device=device, **common)  # type: ignore[arg-type]
        for name, site in federation.sites.items()
    }
    memories = folder / "checkpoint" / "sites" if folder else None
    with InProcess(sites, min(workers, len(sites)), memories, watcher.progress) as transport:
        central = Central(
            task=task,
            rng=torch.Generator(),
            sites=transport.sites,
            prompts=federation.prompts,
            generator=generator,
            device=device,
            folder=folder,
            spread=transport.spread,
            progress=lambda what, done, total: watcher.progress("", what, done, total),
        )
        yield from run(algorithm, central, transport, seed, start=start, evaluate=evaluate)
        if ended:
            ended(transport)


@dataclass(frozen=True)
class Ready:
    """What a configuration stands for, loaded and checked."""

    config: Config
    federation: Federation
    task: Classify
    base: str
    """SHA-256 of the generator's base; empty where the algorithm uses none."""

    @property
    def fingerprint(self) -> str:
        """Names a run: its settings (but for the number of workers), data and base."""
        values = tomllib.loads(self.config.toml())
        values.pop("workers")
        text = json.dumps([values, self.federation.fingerprint, self.base], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def prepare(config: Config) -> Ready:
    """Load and check all that a run needs, before anything is written; raises `InputError`."""
    federation = load(config.data.source, **config.data.options)
    for name, known in (("device", ("cpu", "cuda")), ("evaluate", ("every", "last", "never"))):
        if getattr(config, name) not in known:
            raise InputError(f"{name} must be one of {', '.join(known)}; got {getattr(config, name)!r}")
    if config.workers < 1:
        raise InputError(f"workers must be at least 1; got {config.workers}")
    if config.device == "cuda" and not torch.cuda.is_available():
        raise InputError("device is cuda, but torch finds no graphics card; set device to cpu")
    start = config.model.start
    if start == "public":
        start = str(pipeline.find(config.generator.base) / "classifier.safetensors")
    task = Classify(federation.shape, len(federation.classes), config.model.name, start)
    task.init(torch.Generator())
    uses = any(stage.name == "warm" for stage in config.algorithm.stages())
    return Ready(config, federation, task, config.generator.fingerprint() if uses else "")


def execute(config: Config, folder: Path, watcher: Watcher | None = None) -> dict[str, Any]:
    """Run a configuration into a new folder and return its summary."""
    ready = prepare(config)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} is there already; `warmfed resume {folder}` finishes it, or choose another --out")
    write_whole(folder / "config.toml", config.toml())
    return _go(ready, folder, watcher or Watcher(), [], None)


def read_config(folder: Path) -> Config:
    """The configuration of a run folder."""
    data = read_bytes(folder / "config.toml", "the run's configuration (is this a run folder?)")
    try:
        return build(tomllib.loads(data.decode()))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{folder / 'config.toml'} is damaged ({error}); restore it or start the run anew") from error


def resume(folder: Path, watcher: Watcher | None = None) -> dict[str, Any]:
    """Finish a run that was interrupted; a finished one is left as it is."""
    if (folder / "summary.json").exists():
        return dict(read_json(folder / "summary.json", "the run's summary"))
    ready, watcher = prepare(read_config(folder)), watcher or Watcher()
    path = folder / "checkpoint" / "server.safetensors"
    if not path.exists():
        return _go(ready, folder, watcher, [], None)
    kept = decode(read_sealed(path, "the checkpoint"), Checkpoint, f"the checkpoint {path}")
    if kept.version != __version__:
        raise InputError(f"{folder} was begun by warmfed {kept.version}, this is {__version__}; finish it with that version")
    if kept.run != ready.fingerprint:
        raise InputError(
            f"{folder} was begun with other settings, data or base than its config.toml names now; start a new run"
        )
    records = read_lines(folder / "rounds.jsonl", "the run's records")
    if len(records) < kept.steps:
        raise InputError(f"{folder / 'rounds.jsonl'} lacks records of stages that are done; restore it or start the run anew")
    return _go(ready, folder, watcher, records[: kept.steps], (kept.steps, kept.server))


def _go(
    ready: Ready, folder: Path, watcher: Watcher, records: list[dict[str, Any]], start: tuple[int, ServerState] | None
) -> dict[str, Any]:
    config, federation, task = ready.config, ready.federation, ready.task
    ledger = read_lines(folder / "ledger.jsonl", "the run's ledger") if records else []
    ledger = [line for line in ledger if line["step"] < len(records)]
    watcher.plan(config.algorithm.stages(), len(records))
    states: dict[str, Message] = {}
    server: ServerState = start[1] if start else None
    with Meter() as meter:
        rounds = simulate(
            config.algorithm,
            federation,
            task,
            seed=config.seed,
            generator=config.generator,
            workers=config.workers,
            device=config.device,
            evaluate=config.evaluate,
            folder=folder,
            start=start,
            watcher=watcher,
            ended=lambda transport: states.update({site: transport.state(site) for site in transport.sites}),
        )
        for done in rounds:
            server, peak = done.server, round(meter.lap(), 1)
            records.append({**done.results(), "seconds": round(done.seconds, 3), "peak_memory_mb": peak})
            where = {"step": done.step, "stage": done.stage, "number": done.number}
            ledger += [{**where, **asdict(exchange)} for exchange in done.exchanges]
            ledger.append({**where, "seconds": round(done.seconds, 3), "peak_memory_mb": peak})
            # the records first: should a kill fall between, the surplus record is dropped on resume
            write_lines(folder / "rounds.jsonl", records)
            write_lines(folder / "ledger.jsonl", ledger)
            state = Checkpoint(__version__, ready.fingerprint, done.step + 1, server)
            write_sealed(folder / "checkpoint" / "server.safetensors", encode(state))
            watcher.round(records[-1])
    return _finish(ready, folder, records, server, states)


def _finish(
    ready: Ready, folder: Path, records: list[dict[str, Any]], server: ServerState, states: Mapping[str, Message]
) -> dict[str, Any]:
    algorithm, federation = ready.config.algorithm, ready.federation
    states = states or _kept_states(folder, federation)
    everywhere = algorithm.global_model(server)
    personal = {
        site: model
        for site in federation.sites
        if (model := algorithm.client_model(algorithm.down(server, site), states[site])) is not None
    }
    models: dict[str, Tensors] = {f"personal/{site}": model for site, model in personal.items()}
    if everywhere is not None:
        models["global"] = everywhere
    for name, model in models.items():
        write_whole(folder / "models" / f"{name}.safetensors", save({k: v.clone() for k, v in model.items()}))
    write_panel(folder, federation, ready.task, everywhere if everywhere is not None else next(iter(personal.values())))
    summary = _summary(ready, records, personal, {name: sha256(model) for name, model in sorted(models.items())})
    report_first = folder / "summary.json"
    write_json(folder / "checkpoint" / "summary.json", summary)
    (folder / "checkpoint" / "summary.json").replace(report_first)
    report.write(folder)
    shutil.rmtree(folder / "checkpoint", ignore_errors=True)
    return summary


def _kept_states(folder: Path, federation: Federation) -> dict[str, Message]:
    """The sites' states of a run that was killed between its last stage and its end."""
    memories = InProcess(dict.fromkeys(federation.sites), folder=folder / "checkpoint" / "sites")  # type: ignore[arg-type]
    return {site: memories.state(site) for site in federation.sites}


def history_sha256(records: list[dict[str, Any]]) -> str:
    """Digest of all records' results: everything but seconds and memory."""
    times = ("seconds", "peak_memory_mb")
    lines = [json.dumps({k: v for k, v in r.items() if k not in times}, sort_keys=True) for r in records]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _accuracies(record: Mapping[str, Any]) -> tuple[dict[str, float] | None, dict[str, float] | None]:
    """The summary's global and personal test accuracies of one record, in percent."""
    whole, own = record["global"], record["personal"]
    sites = [views["test"]["accuracy"] for views in whole.values()]
    everywhere = (
        {"union": record["union"]["global"]["accuracy"], "site_mean": sum(sites) / len(sites), "site_worst": min(sites)}
        if sites
        else None
    )
    values = torch.tensor([views["test"]["accuracy"] for views in own.values()], dtype=torch.float64)
    personal = (
        {"mean": values.mean().item(), "worst": values.min().item(), "std": values.std(correction=0).item()}
        if len(values)
        else None
    )
    return everywhere, personal


def _one_shot(records: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The warm start alone: the global model right after it, the personal ones after the sites' first training from it."""
    warm = next((i for i, r in enumerate(records) if r["stage"] == "warm"), None)
    if warm is None or not records[warm]["global"]:
        return None
    first = next((r for r in records[warm + 1 :] if r["personal"]), None)
    return {"global": _accuracies(records[warm])[0], "personal": _accuracies(first)[1] if first else None}


def _summary(
    ready: Ready, records: list[dict[str, Any]], personal: Mapping[str, Tensors], models: Mapping[str, str]
) -> dict[str, Any]:
    config, federation, task = ready.config, ready.federation, ready.task
    last = records[-1]
    everywhere, own = _accuracies(last) if last["personal"] or last["global"] else (None, None)
    if own is not None:
        union = join(site.test for site in federation.sites.values())
        own["union"] = sum(task.metrics(model, union)["accuracy"] for model in personal.values()) / len(personal)
    seconds: dict[str, float] = {}
    for record in records:
        seconds[record["stage"]] = round(seconds.get(record["stage"], 0.0) + record["seconds"], 3)
    traffic = {
        key: round(sum(sum(record[key].values()) for record in records) / len(federation.sites))
        for key in ("bytes_up", "bytes_down")
    }
    sites = {
        name: {
            "global": last["global"][name]["test"]["accuracy"] if last["global"] else None,
            "personal": last["personal"][name]["test"]["accuracy"] if last["personal"] else None,
            **{split: rows(table) for split, table in site.splits.items()},
        }
        for name, site in federation.sites.items()
    }
    return {
        "warmfed": __version__,
        "algorithm": config.name,
        "seed": config.seed,
        "rounds": getattr(config.algorithm, "rounds", 0),
        "federation": federation.name,
        "classes": list(federation.classes),
        "data_sha256": federation.fingerprint,
        "base_sha256": ready.base or None,
        "global": everywhere,
        "personal": own,
        "one_shot": _one_shot(records),
        "sites": sites,
        "bytes_up_per_site": traffic["bytes_up"],
        "bytes_down_per_site": traffic["bytes_down"],
        "seconds": round(sum(seconds.values()), 3),
        "seconds_by_stage": seconds,
        "peak_memory_mb": max(record["peak_memory_mb"] for record in records),
        "history_sha256": history_sha256(records),
        "models_sha256": dict(models),
    }


__all__ = ["ALGORITHMS", "Watcher", "execute", "history_sha256", "prepare", "read_config", "resume", "simulate"]
