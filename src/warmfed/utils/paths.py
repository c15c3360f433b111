"""Examine paths that a user, a configuration or a table names; a path that cannot be examined gives one line.

`pathlib` raises several exceptions for such paths. `PermissionError`: a folder above may not be searched. `OSError`: a name is
too long. `ValueError`: a name has a NUL character, or the file system cannot store it. `RuntimeError`: `~` has no home folder.
These functions raise `InputError` for all of them. A missing path is not an error.
"""

import errno
import os
import stat
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import TypeVar

from .errors import InputError, printable

T = TypeVar("T")
_ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.EBADF, errno.ELOOP)


def expanded(path: str | Path) -> Path:
    """Return the path with `~` and `~user` replaced by home folders; raise `InputError` if such a folder is not known."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise InputError(f"the home folder of {printable(str(path))} is not known ({error}); write the whole path") from error


def exists(path: Path) -> bool:
    """Return whether a file or folder exists; raise `InputError` if the system does not tell."""
    return _mode(path) != 0


def is_file(path: Path) -> bool:
    """Return whether a path is a regular file; raise `InputError` if the system does not tell."""
    return stat.S_ISREG(_mode(path))


def is_folder(path: Path) -> bool:
    """Return whether a path is a folder; raise `InputError` if the system does not tell."""
    return stat.S_ISDIR(_mode(path))


def resolved(path: Path) -> Path:
    """Return the absolute path without links; raise `InputError` if a folder on the way cannot be read."""
    return _examined(path, path.resolve)


def children(folder: Path) -> list[Path]:
    """Return the entries of a folder, sorted; raise `InputError` if it cannot be read."""
    return _examined(folder, lambda: sorted(folder.iterdir()))


def matching(folder: Path, pattern: str, *, below: bool = False) -> list[Path]:
    """Return the entries that match a pattern, sorted; raise `InputError` if a folder cannot be read.

    Args:
        folder: the folder; a missing one has no entries.
        pattern: the pattern of names, such as "*.pub".
        below: whether to search all folders below as well; links to folders are not followed.

    Raises:
        InputError: A folder cannot be read.
    """
    if not is_folder(folder):
        return []
    if below:
        return sorted(path for path in _below(folder) if fnmatch(path.name, pattern))
    # a cache may have many files, of which few match
    return sorted(folder / name for name in _examined(folder, lambda: os.listdir(folder)) if fnmatch(name, pattern))


def unusable(path: str | Path, error: Exception) -> InputError:
    """Return the error for a path that the system refuses to examine."""
    text = str(path)
    if "\0" in text:
        return InputError(f"{printable(text)!r} has a NUL character, which no path may have; remove it")
    if isinstance(error, UnicodeError):
        return InputError(f"{printable(text)!r} cannot be a file name here ({error}); use other letters")
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        return InputError(f"the path {printable(text, 80)} has {len(os.fsencode(text))} bytes, which is too long; shorten it")
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return InputError(f"cannot examine {printable(text)}: {reason}; check the permissions of the folders above it")


def _below(folder: Path) -> Iterator[Path]:
    """Yield all entries below a folder; unlike `Path.rglob`, raise for a folder that cannot be read."""

    def refuse(error: OSError) -> None:
        raise unusable(error.filename or folder, error) from error

    for place, folders, files in os.walk(folder, onerror=refuse):
        yield from (Path(place, name) for name in (*folders, *files))


def _mode(path: Path) -> int:
    """Return the mode of a path, 0 if it does not exist."""
    try:
        return os.stat(path).st_mode
    except OSError as error:
        if error.errno in _ABSENT:
            return 0
        raise unusable(path, error) from error
    except ValueError as error:
        raise unusable(path, error) from error


def _examined(path: Path, function: Callable[[], T]) -> T:
    try:
        return function()
    except (OSError, ValueError, RuntimeError) as error:
        raise unusable(path, error) from error
