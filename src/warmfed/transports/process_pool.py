"""Worker processes that report how they get on, end with their parent, and can be stopped at once."""

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
    """A pool of processes; `start(*arguments)` is called in each before its first job.

    `report(*event)` is called, in a thread of this process, with what the workers `tell`; results come by other ways, so
    it cannot change them.
    """

    def __init__(
        self, processes: int, start: Callable[..., None], arguments: tuple[Any, ...], report: Callable[..., None] | None = None
    ) -> None:
        context = get_context("forkserver" if os.name == "posix" else "spawn")
        if os.name == "posix":
            # the first optimizer of a process imports torch._dynamo, which takes as long as torch itself: once for all of them
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
        """The results of independent jobs in their order; done(how many, of how many) is called as they finish."""
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
            # one process that ends unasked breaks the pool, and a broken pool ends them all
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
                    report = None  # nobody reads our output any more; the workers must not wait for a reader


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Processes that start within this context are not reached by Ctrl-C, not even while they import."""
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
    """Within this context, the death of a worker process is an `InputError` that says what to do."""
    try:
        yield
    except BrokenProcessPool as error:
        raise InputError(
            "a worker process died (out of memory?); use fewer workers, and `warmfed resume` goes on from here"
        ) from error


_events: "SimpleQueue[Any] | None" = None
_told = 0.0


def tell(*event: Any) -> None:
    """Report from a worker process, five times a second at most; what comes in between is dropped."""
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
