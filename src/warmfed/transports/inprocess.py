"""All sites on this machine: one after another in this process, or over worker processes, with the same bytes."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from ..core import Exchange, Metrics, Reply, silent
from ..errors import InputError
from ..files import read_bytes, write_whole
from ..messages import Message, decode, encode, message
from ..tensors import Tensors
from .worker import Worker, exchange


@message
class Memory:
    """What a site keeps: its last reply, with the state in it, and the step that it answered."""

    step: int
    reply: Message


@dataclass
class InProcess:
    """A transport over workers in this process or in processes of their own.

    With a `folder`, each site's last reply is written there as soon as it is made. A site that is asked again for the
    step that it has answered repeats its answer: a run killed in the middle of a round recomputes only unfinished sites.
    Every process computes with one thread, so their number cannot change a result.
    """

    workers: Mapping[str, Worker]
    processes: int = 1
    folder: Path | None = None
    progress: Callable[[str, str, int, int], None] | None = None
    """progress(site, what, done, total)"""
    _memories: dict[str, Memory] = field(default_factory=dict, init=False)
    _pool: ProcessPoolExecutor | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.sites = tuple(sorted(self.workers))
        torch.set_num_threads(1)
        if self.processes > 1:
            context = get_context("forkserver" if os.name == "posix" else "spawn")
            if os.name == "posix":
                context.set_forkserver_preload(["warmfed.transports.worker"])
            plain = {site: replace(worker, progress=silent) for site, worker in self.workers.items()}
            self._pool = ProcessPoolExecutor(self.processes, context, _begin, (plain,))

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def __enter__(self) -> "InProcess":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def spread(self, function: Callable[..., Any], jobs: Iterable[tuple[Any, ...]]) -> list[Any]:
        """The results of independent jobs in their order, over the worker processes if there are any."""
        if self._pool is None:
            return [function(*job) for job in jobs]
        return [future.result() for future in [self._pool.submit(function, *job) for job in jobs]]

    def state(self, site: str) -> Message:
        """The state that a site keeps; None before it has any."""
        memory = self._recall(site)
        return memory.reply.state if memory else None

    def send(
        self, step: int, stage: str, number: int, down: Mapping[str, Message]
    ) -> Iterator[tuple[str, Reply, tuple[Exchange, ...]]]:
        sent = _encode_once(down)
        todo = []
        for site, data in sent.items():
            memory = self._recall(site)
            if memory is not None and memory.step > step:
                raise InputError(
                    f"site {site!r} has answered step {memory.step}, but the server is at step {step}: the folder mixes two runs; "
                    "restore it or start the run anew"
                )
            if memory is not None and memory.step == step:
                yield site, memory.reply, self._crossed(site, down[site], data, memory.reply)
            else:
                todo.append(site)
        for site, reply in self._work(stage, number, {s: (down[s], sent[s]) for s in todo}):
            self._memories[site] = Memory(step, reply)
            if self.folder is not None:
                write_whole(self._path(site), encode(self._memories[site]))
            yield site, reply, self._crossed(site, down[site], sent[site], reply)

    def evaluate(self, down: Mapping[str, Message], model: Tensors | None) -> dict[str, dict[str, Metrics]]:
        if self._pool is None:
            return {s: self.workers[s].evaluate(m, self.state(s), model) for s, m in down.items()}
        sent = _encode_once(down)
        jobs = [(s, sent[s], _pack(self.state(s)), model) for s in down]
        return dict(zip(down, self.spread(_evaluate, jobs), strict=True))

    def _work(self, stage: str, number: int, down: Mapping[str, tuple[Message, bytes]]) -> Iterator[tuple[str, Reply]]:
        if self._pool is None:
            for site, (content, _) in down.items():
                worker = self.workers[site]
                if self.progress:
                    worker = replace(worker, progress=_named(self.progress, site))
                yield site, worker.work(stage, number, content, self.state(site))
            return
        waiting = {
            self._pool.submit(_work, site, stage, number, data, _pack(self.state(site))): site
            for site, (_, data) in down.items()
        }
        total = len(waiting)
        try:
            while waiting:
                for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                    site = waiting.pop(future)
                    yield site, decode(future.result(), Reply, f"the reply of site {site!r}")
                    if self.progress:
                        self.progress("", "sites", total - len(waiting), total)
        except BrokenProcessPool as error:
            raise InputError("a worker process died (out of memory?); use fewer workers, then `warmfed resume`") from error
        finally:
            for future in waiting:
                future.cancel()

    def _crossed(self, site: str, down: Message, data: bytes, reply: Reply) -> tuple[Exchange, ...]:
        return exchange(site, "down", down, data), exchange(site, "up", reply.message)

    def _path(self, site: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{site}.safetensors"

    def _recall(self, site: str) -> Memory | None:
        if site not in self._memories and self.folder is not None and self._path(site).exists():
            what = f"the memory of site {site!r} ({self._path(site)})"
            self._memories[site] = decode(read_bytes(self._path(site), what), Memory, what)
        return self._memories.get(site)


def _encode_once(down: Mapping[str, Message]) -> dict[str, bytes]:
    # most algorithms send every site the same message
    encoded = {id(content): encode(content) for content in {id(m): m for m in down.values()}.values()}
    return {site: encoded[id(content)] for site, content in down.items()}


def _pack(state: Message) -> bytes | None:
    return None if state is None else encode(state)


def _named(progress: Callable[[str, str, int, int], None], site: str) -> Callable[[str, int, int], None]:
    return lambda what, done, total: progress(site, what, done, total)


_workers: dict[str, Worker] = {}


def _begin(workers: Mapping[str, Worker]) -> None:
    torch.set_num_threads(1)
    _workers.update(workers)


def _work(site: str, stage: str, number: int, down: bytes, state: bytes | None) -> bytes:
    return encode(_workers[site].work(stage, number, decode(down), None if state is None else decode(state)))


def _evaluate(site: str, down: bytes, state: bytes | None, model: Tensors | None) -> dict[str, Metrics]:
    return _workers[site].evaluate(decode(down), None if state is None else decode(state), model)
