"""A run from its configuration to its folder: everything in the folder is written whole, and a killed run resumes.

The folder holds config.toml, rounds.jsonl, ledger.jsonl, adapters/, synthetic/, models/, report_images/, report.html and, as
the last one, summary.json: where it is, the run has finished. Until then there is also checkpoint/ (the server's state,
and each site's last reply).
"""

import shutil
from abc import ABC, abstractmethod
from collections import abc
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from .. import report
from ..config import Config
from ..core import Algorithm, Generator, Round, ServerContext, ServerState, Task, Transport, map_serial
from ..core.admission import DEFAULT_ADMISSION, AdmissionPolicy
from ..core.messages import Message, decode, encode, message
from ..core.tensors import Tensors, join, sha256
from ..data import Federation, Site
from ..diffusion.result_cache import CachedGenerator
from ..evaluation.generators import GeneratorEvaluator
from ..fit import fit
from ..run import run
from ..tasks import Classify
from ..tasks.denoising import Denoise
from ..transports.client import Client
from ..transports.client_state import ClientStates
from ..transports.in_process import InProcess
from ..utils.errors import InputError
from ..utils.files import (
    atomic_write,
    occupied,
    read_checksummed,
    read_lines,
    remove_partial_files,
    write_checksummed,
    write_json,
    write_lines,
)
from ..utils.memory import MemoryMonitor
from ..utils.version import __version__
from .folder import claim_run_folder, lock_run_folder, read_config, read_summary, write_model
from .prepare import PreparedRun, clients_of, prepare
from .report_images import write_report_images, write_samples
from .summary import history_sha256, summarize


class RunListener:
    """Is told how a run goes, also from other threads; this one keeps silent."""

    def plan(self, folder: Path, config: Config, sites: tuple[str, ...], records: Sequence[Mapping[str, Any]]) -> None:
        """The run's folder, and the records of stages that an earlier process has done."""

    def progress(self, site: str, what: str, done: int, total: int) -> None:
        """Work within a stage: at a site; or, for site "", at the server, or how many sites have finished."""

    def round(self, record: Mapping[str, Any]) -> None:
        """A stage is done; its record as in rounds.jsonl."""


SITES = "sites.json"
"""In checkpoint/: the sites of a run whose sites are elsewhere, as they presented themselves."""


@message("runs.Checkpoint")
class Checkpoint:
    """The server after `steps` stages."""

    version: str
    run: str
    steps: int
    history: str
    """Digest of the records so far."""
    server: Message | None


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
    admission: AdmissionPolicy = DEFAULT_ADMISSION,
    folder: Path | None = None,
    start: tuple[int, ServerState] | None = None,
    watcher: RunListener | None = None,
) -> abc.Generator[Round, None, None]:
    """Run an algorithm over a federation on this machine; yields after each stage.

    Args:
        task: what is learned; none: classification by the small CNN.
        workers: processes that work at the same time; the results do not depend on it.
        border: which replies are taken, and how many a stage needs.
        folder: where artefacts and the sites' memories go; none: they stay in this process.
        start: (stages done, the server's state then), to resume.
    """
    watcher = watcher or RunListener()
    task = task or Classify(federation.shape, len(federation.classes))
    sites = clients_of(algorithm, federation, task, seed, generator, device)
    with InProcess(
        sites, min(workers, len(sites)), client_states_folder(folder) if folder else None, watcher.progress
    ) as transport:
        prompts, rows = federation.prompts, federation.rows
        central = server_side(task, transport, prompts, generator, device, folder, watcher, rows, transport.map_jobs)
        yield from run(algorithm, central, transport, seed, start=start, evaluate=evaluate, admission=admission)


def server_side(
    task: Task,
    transport: Transport,
    prompts: tuple[str, ...],
    generator: Generator | None,
    device: str,
    folder: Path | None,
    watcher: RunListener,
    rows: Mapping[str, Mapping[str, int]],
    spread: Callable[[Callable[..., Any], Iterable[tuple[Any, ...]]], list[Any]] = map_serial,
) -> ServerContext:
    """Return what the server may see in a run over this transport.

    Args:
        rows: what each site has declared, by split; it may grow while sites come.
    """
    return ServerContext(
        task=task,
        rng=torch.Generator(),
        sites=transport.sites,
        rows=rows,
        prompts=prompts,
        generator=generator,
        device=device,
        folder=folder,
        map_jobs=spread,
        progress=lambda what, done, total: watcher.progress("", what, done, total),
    )


def client_states_folder(folder: Path) -> Path:
    """Where the sites' memories lie in a run folder."""
    return folder / "checkpoint" / "sites"


class Backend(ABC):
    """Where the sites of a run are, and with them the images and the personal models."""

    @abstractmethod
    def prepare(self, config: Config) -> PreparedRun:
        """What the configuration stands for; raises `InputError`, and writes nothing."""

    @abstractmethod
    def rounds(
        self,
        ready: PreparedRun,
        folder: Path,
        start: tuple[int, ServerState] | None,
        generator: Generator | None,
        watcher: RunListener,
    ) -> abc.Generator[Round, None, None]:
        """The run, round by round; see `simulate`."""

    def personal(self, ready: PreparedRun, folder: Path, server: ServerState) -> dict[str, Tensors]:
        """The sites' own models, where they can be had."""
        return {}

    @abstractmethod
    def finish(self, ready: PreparedRun, folder: Path, server: ServerState) -> tuple[dict[str, str], float | None]:
        """Make the personal models: their digests by site, and their mean accuracy (or loss) on all test sets if known."""


class LocalBackend(Backend):
    """All sites are on this machine."""

    def prepare(self, config: Config) -> PreparedRun:
        return prepare(config)

    def rounds(
        self,
        ready: PreparedRun,
        folder: Path,
        start: tuple[int, ServerState] | None,
        generator: Generator | None,
        watcher: RunListener,
    ) -> abc.Generator[Round, None, None]:
        config = ready.config
        return simulate(
            config.method,
            ready.images,
            ready.task,
            seed=config.seed,
            generator=generator,
            workers=config.workers,
            device=config.device,
            evaluate=config.evaluate,
            admission=config.server,
            folder=folder,
            start=start,
            watcher=watcher,
        )

    def personal(self, ready: PreparedRun, folder: Path, server: ServerState) -> dict[str, Tensors]:
        memories, config = ClientStates(client_states_folder(folder)), ready.config
        found = {
            site: worker.model(config.method.broadcast(server, site), memories.state(site))
            for site, worker in ready.workers().items()
        }
        return {site: model for site, model in found.items() if model is not None}

    def finish(self, ready: PreparedRun, folder: Path, server: ServerState) -> tuple[dict[str, str], float | None]:
        config, federation, task = ready.config, ready.images, ready.task
        personal = self.personal(ready, folder, server)
        for site, model in personal.items():
            write_model(folder / "models" / "personal" / f"{site}.safetensors", model)
        everywhere = config.method.global_model(server)
        shown = everywhere if everywhere is not None else next(iter(personal.values()), None)
        if shown is not None and isinstance(task, Denoise):
            write_samples(folder, federation, task, shown, config.seed)
        if shown is not None and isinstance(task, Classify):
            write_report_images(folder, federation, task, shown, config.evaluation, config.generator.base)
        if not personal:
            return {}, None
        union = join(task.tables({"test": site.test})["test"] for site in federation.sites.values())
        found = sum(task.metrics(model, union, config.device)[task.measure] for model in personal.values()) / len(personal)
        return {site: sha256(model) for site, model in personal.items()}, found


LOCAL = LocalBackend()


def execute(
    config: Config,
    folder: Path | None = None,
    watcher: RunListener | None = None,
    shared: Path | None = None,
    place: Backend = LOCAL,
) -> dict[str, Any]:
    """Run a configuration into a new folder and return its summary.

    Args:
        folder: the run folder itself; none: runs/<algorithm>-<seed>, or the first free of -2, -3, … after it.
        shared: where adapters and samples are kept for other runs that need the same ones; none: they are not.
        place: where the sites are.
    """
    ready = place.prepare(config)
    folder = claim_run_folder(config) if folder is None else folder
    if occupied(folder):
        raise InputError(f"{folder} is there already; `warmfed resume {folder}` finishes a run, or choose another --out")
    try:
        atomic_write(folder / "config.toml", config.toml())
    except InputError:
        with suppress(OSError):
            folder.rmdir()
        raise
    with lock_run_folder(folder):
        return _run_rounds(ready, folder, watcher or RunListener(), [], None, shared, place)


def resume(
    folder: Path, watcher: RunListener | None = None, workers: int = 0, shared: Path | None = None, place: Backend = LOCAL
) -> dict[str, Any]:
    """Finish a run that was interrupted; a finished one is left as it is.

    Args:
        workers: how many from here on; 0: as many as the configuration says.
        shared, place: as in `execute`.
    """
    if (folder / "summary.json").exists():
        summary = read_summary(folder)
        shutil.rmtree(folder / "checkpoint", ignore_errors=True)
        return summary
    config = read_config(folder)
    if isinstance(place, LocalBackend) and (folder / "checkpoint" / SITES).exists():
        raise InputError(f"the sites of {folder} are elsewhere; `warmfed run --transport flower --out {folder}` finishes it")
    with lock_run_folder(folder):
        ready = place.prepare(replace(config, workers=workers or config.workers))
        records, server = _resumed(ready, folder)
        remove_partial_files(folder)
        return _run_rounds(ready, folder, watcher or RunListener(), records, server, shared, place)


def proceed(config: Config, folder: Path, watcher: RunListener | None = None, place: Backend = LOCAL) -> dict[str, Any]:
    """Run a configuration into `folder`, or finish its run that the folder holds; raises `InputError` where it is another."""
    if not (folder / "config.toml").exists():
        return execute(config, folder, watcher, place=place)
    begun = read_config(folder)
    border = replace(
        config.server, max_weight_share=begun.server.max_weight_share
    )  # of the border, the only setting that changes results
    if replace(begun, server=border, workers=config.workers) != config:
        raise InputError(f"{folder} holds a run of other settings than the configuration names; choose another out")
    return resume(folder, watcher, place=place)


def _resumed(ready: PreparedRun, folder: Path) -> tuple[list[dict[str, Any]], ServerState | None]:
    """The records and the server's state of an unfinished run, checked against each other; writes nothing."""
    path = folder / "checkpoint" / "server.safetensors"
    if not path.exists():
        if (folder / "rounds.jsonl").exists():
            raise InputError(f"{path} is missing, but the run has records; restore it or start the run anew")
        return [], None
    kept = decode(read_checksummed(path, "the checkpoint"), Checkpoint, f"the checkpoint {path}")
    if kept.version != __version__:
        raise InputError(f"{folder} was begun by warmfed {kept.version}, this is {__version__}; finish it with that version")
    if kept.run != ready.fingerprint:
        raise InputError(
            f"{folder} was begun with other settings, data or base than its config.toml names now; restore them or start anew"
        )
    records = read_lines(folder / "rounds.jsonl", "the run's records")[: kept.steps] if kept.steps else []
    ledger = read_lines(folder / "ledger.jsonl", "the run's ledger") if kept.steps else []
    if not all(isinstance(line, dict) and isinstance(line.get("step"), int) for line in (*records, *ledger)):
        raise InputError(f"{folder / 'ledger.jsonl'} or rounds.jsonl beside it is damaged; restore it or start the run anew")
    if history_sha256(records) != kept.history:
        raise InputError(f"{folder / 'rounds.jsonl'} differs from what the checkpoint knows; restore it or start the run anew")
    memories = ClientStates(client_states_folder(folder))
    for site in ready.federation.sites:
        memories.load(site)  # damage shows here, before anything is written
    return records, kept.server


def _run_rounds(
    ready: PreparedRun,
    folder: Path,
    watcher: RunListener,
    records: list[dict[str, Any]],
    server: ServerState | None,
    shared: Path | None,
    place: Backend,
) -> dict[str, Any]:
    config, federation = ready.config, ready.federation
    ledger = read_lines(folder / "ledger.jsonl", "the run's ledger") if records else []
    ledger = [line for line in ledger if line["step"] < len(records)]
    watcher.plan(folder, config, tuple(federation.sites), tuple(records))
    if not records:
        _save_checkpoint(ready, folder, records, None)
    generator = CachedGenerator(ready.generator, shared) if shared and ready.generator else ready.generator
    if shared and isinstance(ready.task, Denoise):
        ready = replace(ready, task=replace(ready.task, shared=shared))
    rounds = place.rounds(ready, folder, (len(records), server) if server is not None else None, generator, watcher)
    gauge = GeneratorEvaluator.for_run(
        config.evaluation, ready.task, federation, config.denoising.latent or "digits", config.seed, config.device
    )
    steps = len(config.algorithm.stages())
    with MemoryMonitor() as meter, closing(rounds):
        for done in rounds:
            server, seconds, peak = done.server, round(done.seconds, 3), round(meter.peak(), 1)
            records.append({**done.results(), "seconds": seconds, "peak_memory_mb": peak})
            if gauge is not None and gauge.due(done, last=len(records) == steps):
                watcher.progress("", "measure", 0, 1)
                model = config.method.global_model(server) or place.personal(ready, folder, server)
                if model:
                    records[-1]["quality"] = gauge.measure(model, len(records))
                meter.peak()
            where = {"step": done.step, "stage": done.stage, "number": done.number}
            for exchange in done.exchanges:
                ledger.append(where | {key: value for key, value in asdict(exchange).items() if value is not None})
            ledger.append({**where, "seconds": seconds, "peak_memory_mb": peak})
            # the records first: should a kill fall between, the surplus record is dropped on resume
            write_lines(folder / "rounds.jsonl", records)
            write_lines(folder / "ledger.jsonl", ledger)
            _save_checkpoint(ready, folder, records, server)
            watcher.round(records[-1])
    watcher.progress("", "report", 0, 1)
    assert server is not None, "a run has at least one stage"
    return _finish(ready, folder, records, server, place)


def _save_checkpoint(ready: PreparedRun, folder: Path, records: list[dict[str, Any]], server: ServerState | None) -> None:
    state = Checkpoint(__version__, ready.fingerprint, len(records), history_sha256(records), server)
    write_checksummed(folder / "checkpoint" / "server.safetensors", encode(state))


def _finish(
    ready: PreparedRun, folder: Path, records: list[dict[str, Any]], server: ServerState, place: Backend
) -> dict[str, Any]:
    """All that is made once at the end, from the checkpoint alone: a kill on the way leaves what it takes to do it again."""
    everywhere = ready.config.method.global_model(server)
    personal, union = place.finish(ready, folder, server)
    models = {f"personal/{site}": digest for site, digest in personal.items()}
    if everywhere is not None:
        write_model(folder / "models" / "global.safetensors", everywhere)
        models["global"] = sha256(everywhere)
    summary = summarize(ready.config, ready.federation, ready.task.measure, ready.base, records, models, union)
    if ready.holdout is not None and everywhere is not None:
        summary["holdout"] = _holdout_results(ready, ready.holdout, everywhere)
    report.write(folder, summary)
    write_json(folder / "summary.json", summary)
    shutil.rmtree(folder / "checkpoint", ignore_errors=True)
    return summary


def _holdout_results(ready: PreparedRun, site: Site, model: Tensors) -> dict[str, Any]:
    """Test accuracy (or loss) of the global model at the site that took no part, and after it has tuned it alone."""
    config, task = ready.config, ready.task
    name = config.holdout.site
    worker = Client(
        name, config.algorithm, task, task.tables(site.splits), config.seed, ready.federation.prompts, device=config.device
    )
    tuned, _ = fit(worker.local("unseen", 0), model, config.holdout.training, worker.data["train"])
    found = {key: task.metrics(each, worker.data["test"], config.device) for key, each in (("global", model), ("tuned", tuned))}
    return {"site": name, **{key: metrics[task.measure] for key, metrics in found.items()}}
