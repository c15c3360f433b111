"""Pool of worker processes that report progress, end with their parent, and can be stopped at once.

Worker processes import `__main__` only if it has a guard. So programs from standard input, notebooks and unguarded scripts
can start them, as long as nothing that is sent to a worker is defined there.
"""

import ast
import os
import pickle
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from io import BytesIO
from multiprocessing import active_children, current_process, get_context, parent_process, spawn, util
from multiprocessing.queues import SimpleQueue
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from types import FunctionType
from typing import Any

import torch

if sys.platform != "win32":
    from multiprocessing.context import ForkServerContext, ForkServerProcess

from ..utils.errors import InputError

_EVERY = 0.2
_SOCKET = 103 if sys.platform == "darwin" else 107
"""Most bytes in the name of a socket."""
_OWN = len("/pymp-12345678/listener-12345678")
"""Bytes that multiprocessing adds to the folder of a socket."""
_ALIGNED = 64
"""Bytes to which each storage is aligned in shared memory, as torch aligns its own."""
_ADVICE = "put the code into a file, with the start of the run under `if __name__ == '__main__':`, or set workers=1"


class ProcessPool:
    """Pool of worker processes.

    Args:
        processes: number of processes.
        start: start(*arguments) is called in each process before its first job.
        report: report(*event) is called in a thread of this process for each event of `tell`; it cannot change results.

    Raises:
        InputError: What is sent to the processes is defined in a program that they cannot import.
    """

    def __init__(
        self, processes: int, start: Callable[..., None], arguments: tuple[Any, ...], report: Callable[..., None] | None = None
    ) -> None:
        if getattr(current_process(), "_inheriting", False):
            raise _Unguarded  # a worker process imports a program that starts worker processes
        self._processes, self._start, self._arguments = processes, start, arguments
        self._main = _Main.of_this_process()
        self._needs_main = self._check(start, arguments)
        self._packed: _Packed | None = None
        self._context: Any
        if sys.platform == "win32":
            self._context = get_context("spawn")
        else:
            self._context = _Context()
            _make_socket_folder()
            # the first optimizer of a process imports torch._dynamo, which takes as long as torch: preload it once for all
            self._context.set_forkserver_preload(["warmfed.runs.execute", "torch._dynamo"])
        self._events: SimpleQueue[Any] = self._context.SimpleQueue()
        self._report = report
        self._pids: set[int] = set()
        self._failure = ""
        self._read_so_far = threading.Event()
        self._executors = [self._executor()]
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def submit(self, function: Callable[..., Any], *arguments: Any) -> "Future[Any]":
        if self._check(function, arguments) and not self._needs_main:
            self._needs_main = True
            self._executors[-1].shutdown(wait=False)  # its processes lack `__main__`; they finish their jobs
            self._executors.append(self._executor())
        with self.death_told(), _undisturbed(), _without_main():  # the first job starts the processes
            return self._executors[-1].submit(function, *arguments)

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
        with self.death_told():
            return [future.result() for future in futures]

    @contextmanager
    def death_told(self) -> Iterator[None]:
        """Raise `InputError` if a worker process dies within this context."""
        try:
            yield
        except BrokenProcessPool as error:
            self._read_so_far.clear()
            self._events.put("")
            self._read_so_far.wait(5)
            dead = "a worker process died (out of memory?); use fewer workers, and continue with `warmfed resume`"
            raise InputError(self._failure or dead) from error

    def close(self, *, at_once: bool = False) -> None:
        """End the processes, after their jobs or at once."""
        if at_once:
            # a killed process breaks the pool, and a broken pool ends all its processes
            for process in active_children():
                if process.pid in self._pids:
                    process.kill()
        for executor in self._executors:
            executor.shutdown(cancel_futures=True)
        self._events.put(None)
        self._reader.join()
        self._events.close()

    def _executor(self) -> ProcessPoolExecutor:
        # a process reads its arguments in order, so it imports `__main__` before it reads what is defined there
        main = _Import(self._main, self._needs_main, self._events)
        self._packed = self._packed or _Packed(self._arguments)
        arguments: Any = (self._events, main, self._start, self._packed)
        return ProcessPoolExecutor(self._processes, self._context, _begin, arguments)

    def _check(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> bool:
        """Return whether worker processes need `__main__`; raise `InputError` if they need it and cannot import it."""
        found, error = _References(_Nowhere()), None
        try:
            found.dump((function, arguments))
        except Exception as fault:  # whatever a class raises that cannot be sent
            error = fault
        if found.name and self._main.reason:
            raise InputError(f"worker processes cannot import {found.name}: {self._main.reason}; {_ADVICE}") from error
        if error is not None:
            raise InputError(
                f"a part of the run cannot be sent to worker processes ({error}); define it in a module, outside of functions, "
                "or set workers=1"
            ) from error
        return bool(found.name)

    def _read(self) -> None:
        report = self._report
        while (event := self._events.get()) is not None:
            if isinstance(event, int):
                self._pids.add(event)
            elif isinstance(event, str):
                self._failure = self._failure or event
                if not event:
                    self._read_so_far.set()
            elif report:
                try:
                    report(*event)
                except (OSError, ValueError):
                    report = None  # the output is closed; events are still read, or the workers would block


class _Unguarded(BaseException):
    """A program without a guard, imported by a worker process, has come to the start of its own worker processes."""


class _Main:
    """The program of this process, `__main__`, as worker processes may import it.

    Args:
        module: the module's name, for `python -m`; or empty.
        path: the script; or empty.
        reason: why worker processes do not import it; empty if they do.
    """

    def __init__(self, module: str = "", path: str = "", reason: str = "") -> None:
        self.module, self.path, self.reason = module, path, reason

    @classmethod
    def of_this_process(cls) -> "_Main":
        main = sys.modules.get("__main__")
        module = getattr(getattr(main, "__spec__", None), "name", None) or ""
        path = getattr(main, "__file__", None) or ""
        try:
            program = Path(path).absolute()
            tree = ast.parse(program.read_bytes())
        except (OSError, ValueError, SyntaxError, RecursionError, MemoryError):
            return cls(reason="the program is not a file of Python that they can read")
        if module == "__main__" or module.endswith(".__main__"):
            return cls(reason=f"{path} is the main program of a package or an archive; move it to another module of it")
        if not _guarded(tree):
            return cls(reason=f"{path} has no `if __name__ == '__main__':`")
        return cls(module, str(program))

    def load(self) -> None:
        """Import the program under the name `__mp_main__`, as multiprocessing does."""
        data = {"init_main_from_name": self.module} if self.module else {"init_main_from_path": self.path}
        spawn.prepare(data)


def _guarded(tree: ast.Module) -> bool:
    """Return whether the program has, outside of functions, an `if` with `__name__`."""
    return any(
        isinstance(part, ast.Name) and part.id == "__name__"
        for statement in tree.body
        if isinstance(statement, ast.If | ast.Match | ast.Try)
        for part in ast.walk(statement.test if isinstance(statement, ast.If) else statement)
    )


class _Import:
    """Imports `__main__` in the process that unpickles this object."""

    def __init__(self, main: _Main, needed: bool, events: "SimpleQueue[Any]") -> None:
        self._arguments = (main.module, main.path, main.reason, needed, events)

    def __reduce__(self) -> tuple[Any, ...]:
        return _import_main, self._arguments


def _import_main(module: str, path: str, reason: str, needed: bool, events: "SimpleQueue[Any]") -> None:
    if reason:
        return
    try:
        _Main(module, path).load()
    except _Unguarded:
        _give_up(needed, events, f"{path} starts worker processes outside of `if __name__ == '__main__':`")
    except BaseException as error:
        _give_up(needed, events, f"importing {path} again raises {type(error).__name__}: {error}")


def _give_up(needed: bool, events: "SimpleQueue[Any]", reason: str) -> None:
    """End this process if it needs `__main__`, without a traceback."""
    if needed:
        events.put(f"worker processes cannot import the program: {reason}; {_ADVICE}")
        os._exit(1)


class _References(ForkingPickler):
    """Pickler that only finds what is defined in `__main__`; it copies no tensors."""

    def __init__(self, file: Any) -> None:
        super().__init__(file, 5)
        self.name = ""

    def reducer_override(self, content: Any) -> Any:
        kind = content if isinstance(content, type | FunctionType) else type(content)
        if kind.__module__ == "__main__":
            self.name = self.name or kind.__qualname__
        if isinstance(content, torch.Tensor | torch.UntypedStorage | torch.TypedStorage):
            return int, ()
        return NotImplemented


class _Packed:
    """Content that worker processes share: all its tensors lie in one block of shared memory, which has one descriptor.

    A process can be started with few descriptors, and torch sends one for each storage. The tensors of this process become
    views of the block, so that the data are in memory once.
    """

    def __init__(self, content: Any) -> None:
        file = BytesIO()
        packer = _Packer(file)
        packer.dump(content)
        self._content, self._block = file.getvalue(), packer.block()

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpacked, (self._content, self._block)


class _Packer(ForkingPickler):
    """Pickler that names plain tensors of the CPU by their place in one block of memory."""

    def __init__(self, file: Any) -> None:
        super().__init__(file, 5)
        self._tensors: list[torch.Tensor] = []
        self._begins: dict[int, int] = {}
        self._size = 0

    def persistent_id(self, content: Any) -> Any:
        if type(content) is not torch.Tensor or content.device.type != "cpu" or content.layout != torch.strided:
            return None
        if content.requires_grad or content.is_quantized or content.is_conj() or content.is_neg():
            return None
        storage = content.untyped_storage()
        if storage._cdata not in self._begins:
            self._begins[storage._cdata] = self._size
            self._size += -(-storage.nbytes() // _ALIGNED) * _ALIGNED
        self._tensors.append(content)  # keeps the storage, and so its number, until the block is filled
        offset = self._begins[storage._cdata] // content.element_size() + content.storage_offset()
        return content.dtype, offset, tuple(content.shape), content.stride()

    def block(self) -> torch.Tensor:
        """Return the block, uint8 [bytes], and make the tensors views of it."""
        block: torch.Tensor = torch.empty(self._size, dtype=torch.uint8).share_memory_()
        filled = set()
        for tensor in {id(tensor): tensor for tensor in self._tensors}.values():
            storage = tensor.untyped_storage()
            begin = self._begins[storage._cdata]
            if begin not in filled and storage.nbytes():
                block[begin : begin + storage.nbytes()] = torch.empty(0, dtype=torch.uint8).set_(storage)
            filled.add(begin)
        for tensor in {id(tensor): tensor for tensor in self._tensors}.values():
            begin = self._begins[tensor.untyped_storage()._cdata]
            offset = begin // tensor.element_size() + int(tensor.storage_offset())
            with torch.no_grad():
                _place(tensor, block, offset, tuple(tensor.shape), tensor.stride())
        return block


def _place(tensor: torch.Tensor, block: torch.Tensor, offset: int, shape: tuple[int, ...], stride: Any) -> torch.Tensor:
    """Make `tensor` a view of `block`, from an element of its own type, and return it."""
    tensor.set_(block.untyped_storage(), offset, shape, stride)
    return tensor


def _unpacked(content: bytes, block: torch.Tensor) -> Any:
    class Unpacker(pickle.Unpickler):
        def persistent_load(self, place: Any) -> torch.Tensor:
            dtype, offset, shape, stride = place
            return _place(torch.empty(0, dtype=dtype), block, offset, shape, stride)

    return Unpacker(BytesIO(content)).load()


class _Nowhere:
    """File that keeps nothing."""

    def write(self, data: Any) -> int:
        return len(data)


@contextmanager
def _without_main() -> Iterator[None]:
    """Leave the import of `__main__` to `_Import` in processes that this thread starts within this context."""
    described, thread = spawn.get_preparation_data, threading.get_ident()

    def without(name: str) -> dict[str, Any]:
        data = described(name)
        if threading.get_ident() == thread:
            data = {key: value for key, value in data.items() if not key.startswith("init_main")}
        return data

    spawn.get_preparation_data = without
    try:
        yield
    finally:
        spawn.get_preparation_data = described


def _make_socket_folder() -> None:
    """Create multiprocessing's private folder, in another place than TMPDIR if a socket there had too long a name.

    Worker processes use the same folder; multiprocessing removes it when this process ends.

    Raises:
        InputError: No such folder can be created.
    """
    if current_process()._config.get("tempdir") is not None:  # type: ignore[attr-defined]
        return
    try:
        usual = tempfile.gettempdir()
    except OSError as error:
        raise InputError(f"worker processes need a temporary folder: {error.strerror}; set TMPDIR to a folder") from error
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    for place in (usual, *([runtime] if runtime else []), "/tmp", "/var/tmp", "/dev/shm"):
        if len(os.fsencode(place)) + _OWN <= _SOCKET:
            before, tempfile.tempdir = tempfile.tempdir, place
            try:
                util.get_temp_dir()
            except OSError:
                continue
            finally:
                tempfile.tempdir = before
            return
    size = len(os.fsencode(usual))
    raise InputError(
        f"worker processes cannot create a socket: TMPDIR has {size} bytes, expected at most {_SOCKET - _OWN}, or is not "
        "writable; set TMPDIR to a short path, or workers=1"
    )


if sys.platform != "win32":

    class _Process(ForkServerProcess):
        """Process that SIGTERM does not end: it ends with its parent, which SIGTERM reaches, too."""

        def terminate(self) -> None:
            self.kill()

    class _Context(ForkServerContext):
        Process = _Process


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Block SIGINT and SIGTERM in processes that start within this context, also during their imports."""
    if os.name != "posix":
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_events: "SimpleQueue[Any] | None" = None
_told = 0.0


def tell(*event: Any) -> None:
    """Send an event from a worker process to the pool's `report`, at most five a second; further events are dropped."""
    global _told
    now = time.monotonic()
    if _events is not None and now - _told >= _EVERY:
        _told = now
        _events.put(event)


def _begin(events: "SimpleQueue[Any]", _: Any, start: Callable[..., None], arguments: tuple[Any, ...]) -> None:
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
