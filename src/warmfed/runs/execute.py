"""Executes and resumes runs. Every file of a run folder is written atomically, and a killed run resumes.

The folder holds config.toml, rounds.jsonl, ledger.jsonl, adapters/, synthetic/, models/, report_images/ and report.html.
summary.json is written last: it exists if the run has finished. An unfinished run has checkpoint/, with the server's state
and each site's last reply.
"""

import shutil
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from .. import report
from ..config import Config, with_absolute_paths
from ..core import ServerState
from ..core.tensors import Tensors, sha256
from ..data import Site
from ..diffusion.result_cache import CachedGenerator
from ..evaluation.generators import GeneratorEvaluator
from ..fit import fit
from ..tasks.denoising import Denoise
from ..transports.client import Client
from ..utils.errors import InputError
from ..utils.files import (
    atomic_write,
    occupied,
    remove_partial_files,
    write_json,
)
from ..utils.memory import MemoryMonitor
from ..utils.paths import exists
from .backend import LOCAL, SITES, Backend, Execution, LocalBackend
from .checkpoint import Recorder, load_checkpoint
from .folder import claim_run_folder, lock_run_folder, read_config, read_summary, write_model
from .prepare import PreparedRun
from .progress import RunListener
from .summary import summarize


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
    if isinstance(backend, LocalBackend):
        config = with_absolute_paths(config)
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
    if exists(folder / "summary.json"):
        summary = read_summary(folder)
        shutil.rmtree(folder / "checkpoint", ignore_errors=True)
        return summary
    config = read_config(folder)
    if isinstance(backend, LocalBackend) and exists(folder / "checkpoint" / SITES):
        raise InputError(
            f"the run in {folder} has remote sites; finish it with `warmfed run --transport flower --out {folder}`"
        )
    with lock_run_folder(folder):
        prepared = backend.prepare(replace(config, workers=workers or config.workers))
        records, server = load_checkpoint(prepared, folder)
        remove_partial_files(folder)
        return _run_rounds(prepared, folder, listener or RunListener(), records, server, shared, backend)


def proceed(config: Config, folder: Path, listener: RunListener | None = None, backend: Backend = LOCAL) -> dict[str, Any]:
    """Run a configuration into `folder`, or finish its run there; raise `InputError` if the folder holds another run."""
    if not exists(folder / "config.toml"):
        return execute(config, folder, listener, backend=backend)
    begun = read_config(folder)
    # of [server], max_weight_share is the only setting that changes results
    server = replace(config.server, max_weight_share=begun.server.max_weight_share)
    if replace(begun, server=server, workers=config.workers) != config:
        raise InputError(f"{folder} holds a run with other settings than the configuration; choose another out")
    return resume(folder, listener, backend=backend)


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
    listener.plan(folder, config, tuple(federation.sites), tuple(records))
    recorder = Recorder(prepared, folder, records)
    generator = CachedGenerator(prepared.generator, shared) if shared and prepared.generator else prepared.generator
    if shared and isinstance(prepared.task, Denoise):
        prepared = replace(prepared, task=replace(prepared.task, shared=shared))
    start = (len(records), server) if server is not None else None
    rounds = backend.rounds(Execution(prepared, folder, start, generator, listener))
    evaluator = GeneratorEvaluator.for_run(
        config.evaluation, prepared.task, federation, config.denoising.latent or "digits", config.seed, config.device
    )
    steps = len(config.algorithm.stages())
    with MemoryMonitor() as monitor, closing(rounds):
        for done in rounds:
            server, record = done.server, recorder.append(done, round(monitor.peak(), 1))
            if evaluator is not None and evaluator.due(done, last=len(records) == steps):
                listener.progress("", "measure", 0, 1)
                model = config.method.global_model(server) or backend.personal(prepared, folder, server)
                if model:
                    record["quality"] = evaluator.measure(model, len(records))
                monitor.peak()
            recorder.write(server)
            listener.round(record)
    listener.progress("", "report", 0, 1)
    assert server is not None, "a run has at least one stage"
    return _finish(prepared, folder, records, server, backend)


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
