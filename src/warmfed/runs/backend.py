"""Backends: where the sites of a run are executed. `simulate` runs an algorithm on this machine."""

from abc import ABC, abstractmethod
from collections import abc
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..config import Config
from ..core import Algorithm, Generator, Round, ServerContext, ServerState, Task, Transport, map_serial
from ..core.admission import DEFAULT_ADMISSION, AdmissionPolicy
from ..core.tensors import Tensors, join, sha256
from ..data import Federation
from ..run import run
from ..tasks import Classify
from ..tasks.denoising import Denoise
from ..transports.client_state import ClientStates
from ..transports.in_process import InProcess
from ..utils.settings import check_seed
from .folder import write_model
from .prepare import PreparedRun, clients_of, prepare
from .progress import RunListener
from .report_images import write_report_images, write_samples

SITES = "sites.json"
"""File in checkpoint/ with the descriptions of remote sites."""


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
        seed: seed of all random streams, from 0 to 2**63 - 1.
        generator: the run's generator; None: the algorithm uses none.
        workers: number of worker processes; results do not depend on it.
        device: "cpu" or "cuda".
        evaluate: "every", "last" or "never", as in `run`.
        admission: checks of the replies, and the number of replies that a stage needs.
        folder: run folder for artefacts and client states; None: they stay in memory.
        start: (stages done, the server's state then), to resume.
        listener: callbacks of the run.
    """
    check_seed(seed)
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


@dataclass(frozen=True)
class Execution:
    """The stages of a prepared run that are still to do, and where their results go."""

    prepared: PreparedRun
    folder: Path
    """The run folder."""
    start: tuple[int, ServerState] | None
    """(stages done, the server's state then), or None for the whole run."""
    generator: Generator | None
    listener: RunListener

    def over(self, transport: Transport, rows: Mapping[str, Mapping[str, int]]) -> Iterator[Round]:
        """Run the stages over a transport; yield the record of each.

        Args:
            rows: as in `server_side`.
        """
        prepared, config = self.prepared, self.prepared.config
        central = server_side(
            prepared.task,
            transport,
            prepared.federation.prompts,
            self.generator,
            config.device,
            self.folder,
            self.listener,
            rows,
        )
        return run(
            config.method,
            central,
            transport,
            config.seed,
            start=self.start,
            evaluate=config.evaluate,
            admission=config.server,
        )


class Backend(ABC):
    """Place where the sites of a run are executed; it has access to their images and personal models."""

    @abstractmethod
    def prepare(self, config: Config) -> PreparedRun:
        """Load and check the configuration's data, task and base; raise `InputError` if they are not valid. Write nothing."""

    @abstractmethod
    def rounds(self, execution: Execution) -> abc.Generator[Round, None, None]:
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

    def rounds(self, execution: Execution) -> abc.Generator[Round, None, None]:
        prepared, config = execution.prepared, execution.prepared.config
        return simulate(
            config.method,
            prepared.images,
            prepared.task,
            seed=config.seed,
            generator=execution.generator,
            workers=config.workers,
            device=config.device,
            evaluate=config.evaluate,
            admission=config.server,
            folder=execution.folder,
            start=execution.start,
            listener=execution.listener,
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
