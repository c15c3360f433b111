"""Transport to sites on this machine: in this process or in worker processes, with equal results."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import as_completed
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch

from ..core import ClientState, Exchange, Metrics, Reply, no_progress
from ..core.messages import Message, decode, encode
from ..core.tensors import Tensors, rows
from .client import Client, exchange
from .client_state import ClientStates, snapshot_path
from .process_pool import ProcessPool, tell

Progress = Callable[[str, str, int, int], None]
T = TypeVar("T")


_JOBS = 16
"""Jobs of a stage for each worker process; a job is one site, or several if there are more sites."""


def _silent(site: str, what: str, done: int, total: int) -> None:
    """Ignore progress: the default of `progress`."""


@dataclass
class InProcess:
    """A transport to clients in this process or in worker processes.

    With a `folder`, each site's last reply is written there at once. A second request for the same step returns that reply.
    So a run that was killed during a round recomputes unfinished sites only. Every process computes with one thread, so
    results do not depend on the number of processes.
    """

    workers: Mapping[str, Client]
    processes: int = 1
    folder: Path | None = None
    progress: Progress = _silent
    """progress(site, what, done, total) reports work at a site; with site "", finished sites or jobs of the server."""
    client_states: ClientStates = field(init=False)
    _pool: ProcessPool | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.sites = tuple(sorted(self.workers))
        self.client_states = ClientStates(self.folder)
        if self.folder is not None:
            self.workers = {s: replace(w, snapshot_path=snapshot_path(self.folder, s)) for s, w in self.workers.items()}
        torch.set_num_threads(1)
        if self.processes > 1:
            plain = {site: replace(worker, progress=no_progress) for site, worker in self.workers.items()}
            self._pool = ProcessPool(self.processes, _begin, (plain,), self.progress)

    def close(self, *, at_once: bool = False) -> None:
        if self._pool is not None:
            self._pool.close(at_once=at_once)

    def __enter__(self) -> "InProcess":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close(at_once=kind is not None)

    def map_jobs(self, function: Callable[..., Any], jobs: Iterable[tuple[Any, ...]]) -> list[Any]:
        """Return the results of independent jobs, in order, run in the worker processes if there are any."""
        jobs = list(jobs)
        what = function.__name__.strip("_")
        if self._pool is not None:
            return self._pool.map(function, jobs, lambda done, total: self.progress("", what, done, total))
        results = []
        for job in jobs:
            results.append(function(*job))
            self.progress("", what, len(results), len(jobs))
        return results

    def state(self, site: str) -> ClientState:
        """Return the state of a site, or None if it has none yet."""
        return self.client_states.state(site)

    def send(
        self, step: int, stage: str, number: int, down: Mapping[str, Message]
    ) -> Iterator[tuple[str, Reply[Message], tuple[Exchange, ...]]]:
        sent = _once(_sent, down)
        answers = self._answers(step, stage, number, {site: (down[site], data) for site, (data, _) in sent.items()})
        for done, (site, reply, seconds) in enumerate(answers, 1):
            up = replace(exchange(site, "up", reply.message), seconds=round(seconds, 3))
            yield site, reply, (replace(sent[site][1], site=site), up)
            self.progress("", "sites", done, len(down))

    def _answers(
        self, step: int, stage: str, number: int, down: Mapping[str, tuple[Message, bytes]]
    ) -> Iterator[tuple[str, Reply[Message], float]]:
        """Yield (site, reply, seconds of work): first the saved replies, then the others in order of arrival."""
        todo = {}
        for site, content in down.items():
            record = self.client_states.answered(site, step)
            if record is not None:
                yield site, record.answer, record.seconds
            else:
                todo[site] = content
        for site, reply, seconds in self._work(stage, number, todo):
            self.client_states.save(site, step, seconds, reply)
            yield site, reply, seconds

    def evaluate(self, down: Mapping[str, Message], model: Tensors | None) -> dict[str, dict[str, Metrics]]:
        if self._pool is None:
            return {s: self.workers[s].evaluate(m, self.state(s), model) for s, m in down.items()}
        sent = _once(encode, down)
        jobs = [(s, sent[s], _pack(self.state(s)), model) for s in down]
        return dict(zip(down, self.map_jobs(_evaluate, jobs), strict=True))

    def _work(
        self, stage: str, number: int, down: Mapping[str, tuple[Message, bytes]]
    ) -> Iterator[tuple[str, Reply[Message], float]]:
        if self._pool is None:
            for site, (content, _) in down.items():
                worker = replace(self.workers[site], progress=_named(self.progress, site))
                began = time.perf_counter()
                reply = worker.work(stage, number, content, self.state(site))
                yield site, reply, time.perf_counter() - began
            return
        # the largest sites first, so that no process works alone for long at the end
        size = {site: max((rows(table) for table in self.workers[site].data.values()), default=0) for site in down}
        order = sorted(down, key=lambda site: -size[site])
        count = max(1, -(-len(order) // (_JOBS * self.processes)))
        jobs = [[(s, down[s][1], _pack(self.state(s))) for s in order[i : i + count]] for i in range(0, len(order), count)]
        waiting = [self._pool.submit(_work, stage, number, job) for job in jobs]
        try:
            for future in as_completed(waiting):
                with self._pool.death_told():
                    replies = future.result()
                for site, data, seconds in replies:
                    yield site, decode(data, Reply, f"the reply of site {site!r}"), seconds
        finally:
            for future in waiting:
                future.cancel()


def _once(function: Callable[[Message], T], down: Mapping[str, Message]) -> dict[str, T]:
    # most algorithms send the same message to every site
    made = {key: function(content) for key, content in {id(m): m for m in down.values()}.items()}
    return {site: made[id(content)] for site, content in down.items()}


def _sent(content: Message) -> tuple[bytes, Exchange]:
    data = encode(content)
    return data, exchange("", "down", content, data)


def _pack(state: ClientState) -> bytes | None:
    return None if state is None else encode(state)


def _named(progress: Progress, site: str) -> Callable[[str, int, int], None]:
    return lambda what, done, total: progress(site, what, done, total)


_workers: dict[str, Client] = {}


def _begin(workers: Mapping[str, Client]) -> None:
    _workers.update(workers)


def _work(stage: str, number: int, sites: list[tuple[str, bytes, bytes | None]]) -> list[tuple[str, bytes, float]]:
    """Return (site, reply, seconds of work) for each (site, message, state)."""
    received = {data: decode(data) for _, data, _ in sites}
    replies = []
    for site, down, state in sites:
        worker = replace(_workers[site], progress=_named(tell, site))
        began = time.perf_counter()
        reply = worker.work(stage, number, received[down], None if state is None else decode(state))
        replies.append((site, encode(reply), time.perf_counter() - began))
    return replies


def _evaluate(site: str, down: bytes, state: bytes | None, model: Tensors | None) -> dict[str, Metrics]:
    return _workers[site].evaluate(decode(down), None if state is None else decode(state), model)
