"""Executes and resumes runs. Every file of a run folder is written atomically, and a killed run resumes.

The folder holds config.toml, rounds.jsonl, ledger.jsonl, adapters/, synthetic/, models/, report_images/ and report.html.
summary.json is written last: it exists if the run has finished. An unfinished run has checkpoint/, with the server's state
and each site's last reply.
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
    """Callbacks of a run, which other threads may also call; the defaults do nothing."""

    def plan(self, folder: Path, config: Config, sites: tuple[str, ...], records: Sequence[Mapping[str, Any]]) -> None:
        """Receive the run folder and the records of stages that are already done, before the first stage."""

    def progress(self, site: str, what: str, done: int, total: int) -> None:
        """Receive progress within a stage: at a site or, with site "", of the server's work or of finished sites."""

    def round(self, record: Mapping[str, Any]) -> None:
        """Receive the record of a finished stage, as in rounds.jsonl."""


SITES = "sites.json"
"""File in checkpoint/ with the descriptions of remote sites."""


@message("runs.Checkpoint")
class Checkpoint:
    """State of the server after `steps` stages."""

    version: str
    run: str
    steps: int
    history: str
    """SHA-256 of the records so far."""
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
    listener: RunListener | None = None,
) -> abc.Generator[Round, None, None]:
    """Run an algorithm over a federation on this machine; yield the record of each stage.

    Args:
        algorithm: the algorithm.
        federation: sites with their images.
        task: the task; None: classification with the small CNN.
        seed: seed of all random streams.
        generator: the run's generator; None: the algorithm uses none.
        workers: number of worker processes; results do not depend on it.
        device: "cpu" or "cuda".
        evaluate: "every", "last" or "never", as in `run`.
        admission: checks of the replies, and the number of replies that a stage needs.
        folder: run folder for artefacts and client states; None: they stay in memory.
        start: (stages done, the server's state then), to resume.
        listener: callbacks of the run.
    """
    listener = listener or RunListener()
    task = task or Classify(federation.shape, len(federation.classes))
    sites = clients_of(algorithm, federation, task, seed, generator, device)
    with InProcess(
        sites, min(workers, len(sites)), client_states_folder(folder) if folder else None, listener.progress
    ) as transport:
        prompts, rows = federation.prompts, federation.rows
        central = server_side(task, transport, prompts, generator, device, folder, listener, rows, transport.map_jobs)
        yield from run(algorithm, central, transport, seed, start=start, evaluate=evaluate, admission=admission)


def server_side(
    task: Task,
    transport: Transport,
    prompts: tuple[str, ...],
    generator: Generator | None,
    device: str,
    folder: Path | None,
    listener: RunListener,
    rows: Mapping[str, Mapping[str, int]],
    map_jobs: Callable[[Callable[..., Any], Iterable[tuple[Any, ...]]], list[Any]] = map_serial,
) -> ServerContext:
    """Return the context of the server functions in a run over this transport.

    Args:
        rows: declared rows by site and split; entries may be added when sites connect.
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
        map_jobs=map_jobs,
        progress=lambda what, done, total: listener.progress("", what, done, total),
    )


def client_states_folder(folder: Path) -> Path:
    """Return the folder of the client states in a run folder."""
    return folder / "checkpoint" / "sites"


class Backend(ABC):
    """Place where the sites of a run are executed; it has access to their images and personal models."""

    @abstractmethod
    def prepare(self, config: Config) -> PreparedRun:
        """Load and check the configuration's data, task and base; raise `InputError` if they are not valid. Write nothing."""

    @abstractmethod
    def rounds(
        self,
        prepared: PreparedRun,
        folder: Path,
        start: tuple[int, ServerState] | None,
        generator: Generator | None,
        listener: RunListener,
    ) -> abc.Generator[Round, None, None]:
        """Execute the run; yield the record of each stage, as `simulate`."""

    def personal(self, prepared: PreparedRun, folder: Path, server: ServerState) -> dict[str, Tensors]:
        """Return the personal models by site; empty if they are not accessible."""
        return {}

    @abstractmethod
    def finish(self, prepared: PreparedRun, folder: Path, server: ServerState) -> tuple[dict[str, str], float | None]:
        """Make the personal models; return their SHA-256 by site, and their mean accuracy (or loss) on the union of test sets.

        The mean is None if it cannot be measured.
        """


class LocalBackend(Backend):
    """Backend that executes all sites on this machine."""

    def prepare(self, config: Config) -> PreparedRun:
        return prepare(config)

    def rounds(
        self,
        prepared: PreparedRun,
        folder: Path,
        start: tuple[int, ServerState] | None,
        generator: Generator | None,
        listener: RunListener,
    ) -> abc.Generator[Round, None, None]:
        config = prepared.config
        return simulate(
            config.method,
            prepared.images,
            prepared.task,
            seed=config.seed,
            generator=generator,
            workers=config.workers,
            device=config.device,
            evaluate=config.evaluate,
            admission=config.server,
            folder=folder,
            start=start,
            listener=listener,
        )

    def personal(self, prepared: PreparedRun, folder: Path, server: ServerState) -> dict[str, Tensors]:
        client_states, config = ClientStates(client_states_folder(folder)), prepared.config
        found = {
            site: worker.model(config.method.broadcast(server, site), client_states.state(site))
            for site, worker in prepared.workers().items()
        }
        return {site: model for site, model in found.items() if model is not None}

    def finish(self, prepared: PreparedRun, folder: Path, server: ServerState) -> tuple[dict[str, str], float | None]:
        config, federation, task = prepared.config, prepared.images, prepared.task
        personal = self.personal(prepared, folder, server)
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
    listener: RunListener | None = None,
    shared: Path | None = None,
    backend: Backend = LOCAL,
) -> dict[str, Any]:
    """Run a configuration into a new folder and return its summary.

    Args:
        config: the configuration.
        folder: the run folder. Default None: runs/<algorithm>-<seed>, or with -2, -3, … if it exists.
        listener: callbacks of the run.
        shared: folder of adapters and samples that other runs may reuse. Default None: no reuse.
        backend: place where the sites are executed.

    Raises:
        InputError: The configuration is not valid, or the folder is not empty.
    """
    prepared = backend.prepare(config)
    folder = claim_run_folder(config) if folder is None else folder
    if occupied(folder):
        raise InputError(f"{folder} exists already; finish its run with `warmfed resume {folder}`, or choose another --out")
    try:
        atomic_write(folder / "config.toml", config.toml())
    except InputError:
        with suppress(OSError):
            folder.rmdir()
        raise
    with lock_run_folder(folder):
        return _run_rounds(prepared, folder, listener or RunListener(), [], None, shared, backend)


def resume(
    folder: Path, listener: RunListener | None = None, workers: int = 0, shared: Path | None = None, backend: Backend = LOCAL
) -> dict[str, Any]:
    """Finish an interrupted run and return its summary; a finished run is not changed.

    Args:
        folder: the run folder.
        listener: callbacks of the run.
        workers: number of worker processes; 0: as in the configuration.
        shared, backend: as in `execute`.

    Raises:
        InputError: The folder is damaged, or its settings, data or base differ from the checkpoint's.
    """
    if (folder / "summary.json").exists():
        summary = read_summary(folder)
        shutil.rmtree(folder / "checkpoint", ignore_errors=True)
        return summary
    config = read_config(folder)
    if isinstance(backend, LocalBackend) and (folder / "checkpoint" / SITES).exists():
        raise InputError(
            f"the run in {folder} has remote sites; finish it with `warmfed run --transport flower --out {folder}`"
        )
    with lock_run_folder(folder):
        prepared = backend.prepare(replace(config, workers=workers or config.workers))
        records, server = _resumed(prepared, folder)
        remove_partial_files(folder)
        return _run_rounds(prepared, folder, listener or RunListener(), records, server, shared, backend)


def proceed(config: Config, folder: Path, listener: RunListener | None = None, backend: Backend = LOCAL) -> dict[str, Any]:
    """Run a configuration into `folder`, or finish its run there; raise `InputError` if the folder holds another run."""
    if not (folder / "config.toml").exists():
        return execute(config, folder, listener, backend=backend)
    begun = read_config(folder)
    # of [server], max_weight_share is the only setting that changes results
    server = replace(config.server, max_weight_share=begun.server.max_weight_share)
    if replace(begun, server=server, workers=config.workers) != config:
        raise InputError(f"{folder} holds a run with other settings than the configuration; choose another out")
    return resume(folder, listener, backend=backend)


def _resumed(prepared: PreparedRun, folder: Path) -> tuple[list[dict[str, Any]], ServerState | None]:
    """Return the records and the server's state of an unfinished run, checked against each other; write nothing."""
    path = folder / "checkpoint" / "server.safetensors"
    if not path.exists():
        if (folder / "rounds.jsonl").exists():
            raise InputError(f"{path} is missing, but the run has records; restore it or start a new run")
        return [], None
    checkpoint = decode(read_checksummed(path, "the checkpoint"), Checkpoint, f"the checkpoint {path}")
    if checkpoint.version != __version__:
        raise InputError(
            f"{folder} was started with warmfed {checkpoint.version}, this is {__version__}; finish it with that version"
        )
    if checkpoint.run != prepared.fingerprint:
        raise InputError(
            f"{folder} was started with other settings, data or base than config.toml has now; restore them or start a new run"
        )
    records = read_lines(folder / "rounds.jsonl", "the run's records")[: checkpoint.steps] if checkpoint.steps else []
    ledger = read_lines(folder / "ledger.jsonl", "the run's ledger") if checkpoint.steps else []
    if not all(isinstance(line, dict) and isinstance(line.get("step"), int) for line in (*records, *ledger)):
        raise InputError(f"{folder / 'ledger.jsonl'} or rounds.jsonl beside it is damaged; restore it or start a new run")
    if history_sha256(records) != checkpoint.history:
        raise InputError(f"{folder / 'rounds.jsonl'} differs from the checkpoint; restore it or start a new run")
    client_states = ClientStates(client_states_folder(folder))
    for site in prepared.federation.sites:
        client_states.load(site)  # raises if the file is damaged, before anything is written
    return records, checkpoint.server


def _run_rounds(
    prepared: PreparedRun,
    folder: Path,
    listener: RunListener,
    records: list[dict[str, Any]],
    server: ServerState | None,
    shared: Path | None,
    backend: Backend,
) -> dict[str, Any]:
    config, federation = prepared.config, prepared.federation
    ledger = read_lines(folder / "ledger.jsonl", "the run's ledger") if records else []
    ledger = [line for line in ledger if line["step"] < len(records)]
    listener.plan(folder, config, tuple(federation.sites), tuple(records))
    if not records:
        _save_checkpoint(prepared, folder, records, None)
    generator = CachedGenerator(prepared.generator, shared) if shared and prepared.generator else prepared.generator
    if shared and isinstance(prepared.task, Denoise):
        prepared = replace(prepared, task=replace(prepared.task, shared=shared))
    rounds = backend.rounds(prepared, folder, (len(records), server) if server is not None else None, generator, listener)
    evaluator = GeneratorEvaluator.for_run(
        config.evaluation, prepared.task, federation, config.denoising.latent or "digits", config.seed, config.device
    )
    steps = len(config.algorithm.stages())
    with MemoryMonitor() as monitor, closing(rounds):
        for done in rounds:
            server, seconds, peak = done.server, round(done.seconds, 3), round(monitor.peak(), 1)
            records.append({**done.results(), "seconds": seconds, "peak_memory_mb": peak})
            if evaluator is not None and evaluator.due(done, last=len(records) == steps):
                listener.progress("", "measure", 0, 1)
                model = config.method.global_model(server) or backend.personal(prepared, folder, server)
                if model:
                    records[-1]["quality"] = evaluator.measure(model, len(records))
                monitor.peak()
            where = {"step": done.step, "stage": done.stage, "number": done.number}
            for exchange in done.exchanges:
                ledger.append(where | {key: value for key, value in asdict(exchange).items() if value is not None})
            ledger.append({**where, "seconds": seconds, "peak_memory_mb": peak})
            # records first: if the process is killed before the checkpoint, resume drops the surplus record
            write_lines(folder / "rounds.jsonl", records)
            write_lines(folder / "ledger.jsonl", ledger)
            _save_checkpoint(prepared, folder, records, server)
            listener.round(records[-1])
    listener.progress("", "report", 0, 1)
    assert server is not None, "a run has at least one stage"
    return _finish(prepared, folder, records, server, backend)


def _save_checkpoint(prepared: PreparedRun, folder: Path, records: list[dict[str, Any]], server: ServerState | None) -> None:
    state = Checkpoint(__version__, prepared.fingerprint, len(records), history_sha256(records), server)
    write_checksummed(folder / "checkpoint" / "server.safetensors", encode(state))


def _finish(
    prepared: PreparedRun, folder: Path, records: list[dict[str, Any]], server: ServerState, backend: Backend
) -> dict[str, Any]:
    """Write models, report and summary from the checkpoint, which is removed last: a killed process can repeat this step."""
    everywhere = prepared.config.method.global_model(server)
    personal, union = backend.finish(prepared, folder, server)
    models = {f"personal/{site}": digest for site, digest in personal.items()}
    if everywhere is not None:
        write_model(folder / "models" / "global.safetensors", everywhere)
        models["global"] = sha256(everywhere)
    summary = summarize(prepared.config, prepared.federation, prepared.task.measure, prepared.base, records, models, union)
    if prepared.holdout is not None and everywhere is not None:
        summary["holdout"] = _holdout_results(prepared, prepared.holdout, everywhere)
    report.write(folder, summary)
    write_json(folder / "summary.json", summary)
    shutil.rmtree(folder / "checkpoint", ignore_errors=True)
    return summary


def _holdout_results(prepared: PreparedRun, site: Site, model: Tensors) -> dict[str, Any]:
    """Return the test accuracy (or loss) at the held-out site of the global model, and of the model fine-tuned there."""
    config, task = prepared.config, prepared.task
    name = config.holdout.site
    worker = Client(
        name, config.algorithm, task, task.tables(site.splits), config.seed, prepared.federation.prompts, device=config.device
    )
    tuned, _ = fit(worker.local("unseen", 0), model, config.holdout.training, worker.data["train"])
    found = {key: task.metrics(each, worker.data["test"], config.device) for key, each in (("global", model), ("tuned", tuned))}
    return {"site": name, **{key: metrics[task.measure] for key, metrics in found.items()}}
