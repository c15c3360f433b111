"""Pool of worker processes that report progress, end with their parent, and can be stopped at once."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import active_children, get_context, parent_process
from multiprocessing.queues import SimpleQueue
from typing import Any

import torch

from ..utils.errors import InputError

_EVERY = 0.2


class ProcessPool:
    """Pool of worker processes.

    Args:
        processes: number of processes.
        start: start(*arguments) is called in each process before its first job.
        report: report(*event) is called in a thread of this process for each event of `tell`; it cannot change results.
    """

    def __init__(
        self, processes: int, start: Callable[..., None], arguments: tuple[Any, ...], report: Callable[..., None] | None = None
    ) -> None:
        context = get_context("forkserver" if os.name == "posix" else "spawn")
        if os.name == "posix":
            # the first optimizer of a process imports torch._dynamo, which takes as long as torch: preload it once for all
            context.set_forkserver_preload(["warmfed.runs.execute", "torch._dynamo"])
        self._events: SimpleQueue[Any] = context.SimpleQueue()
        self._report = report
        self._pids: set[int] = set()
        self._executor = ProcessPoolExecutor(processes, context, _begin, (self._events, start, arguments))
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def submit(self, function: Callable[..., Any], *arguments: Any) -> "Future[Any]":
        with death_told(), _undisturbed():  # the first job starts the processes
            return self._executor.submit(function, *arguments)

    def map(self, function: Callable[..., Any], jobs: Iterable[tuple[Any, ...]], done: Callable[[int, int], None]) -> list[Any]:
        """Return the results of independent jobs, in order; done(finished, total) is called after each."""
        futures = [self.submit(function, *job) for job in jobs]
        counted, lock = 0, threading.Lock()

        def count(_: "Future[Any]") -> None:
            nonlocal counted
            with lock:
                counted += 1
                done(counted, len(futures))

        for future in futures:
            future.add_done_callback(count)
        with death_told():
            return [future.result() for future in futures]

    def close(self, *, at_once: bool = False) -> None:
        """End the processes, after their jobs or at once."""
        if at_once:
            # a terminated process breaks the pool, and a broken pool ends all its processes
            for process in active_children():
                if process.pid in self._pids:
                    process.terminate()
        self._executor.shutdown(cancel_futures=True)
        self._events.put(None)
        self._reader.join()
        self._events.close()

    def _read(self) -> None:
        report = self._report
        while (event := self._events.get()) is not None:
            if isinstance(event, int):
                self._pids.add(event)
            elif report:
                try:
                    report(*event)
                except OSError:
                    report = None  # the output is closed; events are still read, or the workers would block


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Block SIGINT in processes that start within this context, also during their imports."""
    if os.name != "posix":
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def death_told() -> Iterator[None]:
    """Raise `InputError` if a worker process dies within this context."""
    try:
        yield
    except BrokenProcessPool as error:
        raise InputError(
            "a worker process died (out of memory?); use fewer workers, and continue with `warmfed resume`"
        ) from error


_events: "SimpleQueue[Any] | None" = None
_told = 0.0


def tell(*event: Any) -> None:
    """Send an event from a worker process to the pool's `report`, at most five a second; further events are dropped."""
    global _told
    now = time.monotonic()
    if _events is not None and now - _told >= _EVERY:
        _told = now
        _events.put(event)


def _begin(events: "SimpleQueue[Any]", start: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    global _events
    _events = events
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    events.put(os.getpid())
    start(*arguments)


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
