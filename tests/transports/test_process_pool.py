"""Worker processes: which programs may start them, where their sockets are, and how they end."""

import multiprocessing.util
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from multiprocessing import current_process
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from warmfed.transports import process_pool
from warmfed.transports.process_pool import ProcessPool
from warmfed.utils.errors import InputError

GUARD = "if __name__ == '__main__':\n    pass\n"
MINE = """
import os
class Mine:
    def __init__(self, value): self.value = value
def double(mine): return 2 * mine.value
with open({marker!r}, "a") as file:
    file.write(f"{{__name__}} ")
"""
POOL = "from warmfed.transports.process_pool import ProcessPool\nif __name__ != '__main__': ProcessPool(2, print, ())\n"


def nothing() -> None:
    """Start nothing in the worker processes."""


def mapped(function: Any, *jobs: tuple[Any, ...]) -> list[Any]:
    pool = ProcessPool(1, nothing, ())
    try:
        return pool.map(function, jobs, lambda done, total: None)
    finally:
        pool.close()


class Program:
    """Replaces `__main__` by another program."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.marker, self._path, self._patch = folder / "imported", folder / "program.py", monkeypatch

    def __call__(self, source: str = "", file: str | None = "", spec: str = "") -> Any:
        source = MINE.format(marker=str(self.marker)) + source
        self._path.write_text(source)
        module = ModuleType("__main__")
        if file is not None:
            module.__file__ = file or str(self._path)
        module.__spec__ = SimpleNamespace(name=spec) if spec else None  # type: ignore[assignment]
        self._patch.setitem(sys.modules, "__main__", module)
        exec(compile(source, str(self._path), "exec"), module.__dict__)
        self.marker.unlink()
        return module


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Program:
    return Program(tmp_path, monkeypatch)


@pytest.mark.parametrize("file", ["", "<stdin>", None])
def test_a_program_without_a_guard_is_not_imported(file: str | None, program: Program) -> None:
    main = program(file=file)
    assert mapped(abs, (-3,)) == [3]
    assert not program.marker.exists()
    with pytest.raises(InputError, match=r"cannot import Mine.*under `if __name__ == '__main__':`, or set workers=1"):
        ProcessPool(1, nothing, (main.Mine(4),))
    with pytest.raises(InputError, match="cannot import double"):
        mapped(main.double, (main.Mine(4),))


def test_a_program_with_a_guard_is_imported_in_the_worker_processes(program: Program) -> None:
    main = program(GUARD)
    assert mapped(main.double, (main.Mine(4),)) == [8]
    assert set(program.marker.read_text().split()) == {"__mp_main__"}


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (POOL + GUARD, "starts worker processes outside of `if __name__"),
        (GUARD + "if __name__ != '__main__': raise SystemExit('bye')\n", "again raises SystemExit: bye"),
    ],
)
def test_a_program_that_cannot_be_imported_twice(source: str, words: str, program: Program, capfd: Any) -> None:
    main = program(source)
    assert mapped(abs, (-3,)) == [3]
    with pytest.raises(InputError, match=words):
        mapped(main.double, (main.Mine(4),))
    assert capfd.readouterr() == ("", "")


def test_later_jobs_may_need_the_program(program: Program) -> None:
    main = program(GUARD)
    pool = ProcessPool(1, nothing, ())
    try:
        early = pool.submit(time.sleep, 0.05)
        late = pool.submit(main.double, main.Mine(5))
        assert (early.result(), late.result()) == (None, 10)
    finally:
        pool.close()


@pytest.mark.parametrize(
    ("source", "spec", "reason"),
    [
        ("", "", "has no `if __name__ == '__main__':`"),
        ("def main():\n    if __name__ == '__main__':\n        pass\n", "", "has no `if __name__"),
        ("this is no Python", "", "not a file of Python"),
        (GUARD, "__main__", "main program of a package or an archive"),
        (GUARD, "package.__main__", "main program of a package or an archive"),
        (GUARD, "package.module", ""),
        ("if '__main__' == __name__: pass", "", ""),
        ("if True and __name__ == '__main__': pass", "", ""),
    ],
)
def test_which_programs_can_be_imported(
    source: str, spec: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "program.py").write_text(source)
    module = SimpleNamespace(__file__=str(tmp_path / "program.py"), __spec__=SimpleNamespace(name=spec))
    monkeypatch.setitem(sys.modules, "__main__", module)  # type: ignore[arg-type]
    found = process_pool._Main.of_this_process().reason
    assert reason in found
    assert bool(found) == bool(reason)


def test_what_cannot_be_sent_is_one_error() -> None:
    with pytest.raises(InputError, match=r"cannot be sent to worker processes.*set workers=1"):
        ProcessPool(1, nothing, (lambda: 0,))


def test_references_are_found_without_a_copy_of_the_tensors(program: Program) -> None:
    main = program(GUARD)
    held = {"a": torch.zeros(3), "b": [torch.nn.Linear(2, 2), main.Mine(torch.zeros(2))]}
    found = process_pool._References(process_pool._Nowhere())
    found.dump(held)
    assert found.name == "Mine"


def test_a_dead_worker_process_keeps_its_advice() -> None:
    with pytest.raises(InputError, match=r"a worker process died \(out of memory\?\); use fewer workers, and continue with"):
        mapped(os._exit, (1,))


def test_worker_processes_are_not_reached_by_sigterm() -> None:
    assert mapped(signal.raise_signal, (signal.SIGTERM,)) == [None]
    pool = ProcessPool(1, nothing, ())
    pid = pool.submit(os.getpid).result()
    pool.submit(time.sleep, 60)
    pool.close(at_once=True)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """Return multiprocessing's settings of this process, without its temporary folder."""
    settings = current_process()._config  # type: ignore[attr-defined]
    before = settings.pop("tempdir", None)
    yield settings
    settings["tempdir"] = before  # multiprocessing removes both at exit


def test_a_long_temporary_folder_is_not_used_for_sockets(fresh: dict[str, Any], monkeypatch: Any, tmp_path: Path) -> None:
    long = tmp_path / ("x" * 120)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    process_pool._make_socket_folder()
    folder = Path(fresh["tempdir"])
    assert len(str(folder)) < 90
    assert folder.stat().st_mode & 0o77 == 0
    assert tempfile.tempdir == str(long)
    assert not list(long.iterdir())


def test_without_a_short_folder_the_error_names_tmpdir(fresh: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(multiprocessing.util, "get_temp_dir", refuse)
    with pytest.raises(InputError, match=r"TMPDIR has .* bytes, expected at most"):
        process_pool._make_socket_folder()
