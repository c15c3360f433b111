"""Paths that the system refuses to examine give one line, at every function that examines them."""

import errno
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from warmfed.utils.errors import InputError
from warmfed.utils.files import atomic_write, check_writable, make_folder, occupied, read_bytes
from warmfed.utils.paths import children, exists, expanded, is_file, is_folder, matching, resolved

EXAMINE: tuple[Callable[[Path], Any], ...] = (exists, is_file, is_folder, resolved, occupied)


@pytest.fixture
def locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that this user may not search; for the super-user, the system's answers are replaced by those of others."""
    folder = tmp_path / "locked"
    folder.mkdir(0)
    if os.access(folder, os.X_OK):
        for name in ("stat", "scandir", "listdir"):
            monkeypatch.setattr(os, name, _refusing(getattr(os, name), folder))
    return folder


def _refusing(function: Callable[..., Any], folder: Path) -> Callable[..., Any]:
    def examine(path: Any, *arguments: Any, **options: Any) -> Any:
        inside = Path(path).is_relative_to(folder) if isinstance(path, str | Path) else False
        if inside and (Path(path) != folder or function.__name__ != "stat"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return function(path, *arguments, **options)

    return examine


@pytest.mark.parametrize("examine", [exists, is_file, is_folder, occupied, check_writable])
def test_a_folder_above_may_not_be_searched(examine: Callable[[Path], Any], locked: Path) -> None:
    with pytest.raises(InputError, match="Permission denied; check the permissions"):
        examine(locked / "inside" / "file")


def test_a_folder_that_cannot_be_read(locked: Path) -> None:
    for examine in (children, lambda path: matching(path, "*"), lambda path: matching(path.parent, "*", below=True)):
        with pytest.raises(InputError, match="locked: Permission denied"):
            examine(locked)


@pytest.mark.parametrize("examine", [*EXAMINE, lambda path: atomic_write(path, b"")])
@pytest.mark.parametrize(
    ("name", "told"), [("a" * 300, "too long"), ("a\0b", "NUL"), ("/".join("a" * 200 for _ in range(30)), "too long")]
)
def test_names_that_no_file_has(examine: Callable[[Path], Any], name: str, told: str, tmp_path: Path) -> None:
    if examine is resolved and told == "too long":
        return  # the system resolves a path that does not exist without examining it
    with pytest.raises(InputError, match=told):
        examine(tmp_path / name)


def test_a_home_that_does_not_exist() -> None:
    with pytest.raises(InputError, match="the home folder of ~nobody-has-this-name/x is not known"):
        expanded("~nobody-has-this-name/x")


@pytest.mark.parametrize("absent", ["missing", "file/below", "loop"])
def test_a_missing_path_is_no_error(absent: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    path = tmp_path / absent
    assert (exists(path), is_file(path), is_folder(path)) == (False, False, False)
    assert matching(path, "*") == []


def test_search_below(tmp_path: Path) -> None:
    for name in ("a/b/one.txt", "a/two.txt", "three.txt", "a/four.png"):
        make_folder((tmp_path / name).parent)
        (tmp_path / name).write_bytes(b"")
    assert [path.name for path in matching(tmp_path, "*.txt")] == ["three.txt"]
    assert [path.name for path in matching(tmp_path, "*.txt", below=True)] == ["one.txt", "two.txt", "three.txt"]


@settings(max_examples=200, deadline=None)
@given(st.text(min_size=1, max_size=400))
def test_any_text_as_a_path(name: str) -> None:
    for examine in (expanded, *EXAMINE, children, lambda path: matching(path, "*"), lambda path: read_bytes(path, "a file")):
        with suppress(InputError):
            examine(Path("no such folder", name))
