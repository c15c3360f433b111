"""Reads regular files only; writes files atomically, private to their owner.

A reader never sees a partial file, and a full disk keeps the old one. State, caches, models and ledgers are private data of
a site. So files have mode 0600 and folders 0700, unless the caller sets another mode. The umask narrows both.
"""

import errno
import hashlib
import json
import os
import secrets
import stat
import tempfile
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any

from .errors import InputError
from .paths import children, exists, is_file, is_folder, matching, unusable

_PARTIAL = ".partial"
PRIVATE = 0o600
"""Mode of private files: readable and writable by the owner only."""
PUBLIC = 0o644
"""Mode of reports and plots. Their folder may still be private."""
DEPTH = 64
"""Most levels of nested tables and lists in a TOML file."""
_SMALL = 2**26
"""Bytes up to which a file is read without a check of the free memory."""
_READ = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0)
_KINDS = (
    (stat.S_ISDIR, errno.EISDIR, "is a folder"),
    (stat.S_ISFIFO, errno.EINVAL, "is a named pipe"),
    (stat.S_ISSOCK, errno.EINVAL, "is a socket"),
    (stat.S_ISCHR, errno.EINVAL, "is a device"),
    (stat.S_ISBLK, errno.EINVAL, "is a device"),
)


def occupied(folder: Path) -> bool:
    """Return whether the path is a file or a folder that is not empty."""
    return exists(folder) and (not is_folder(folder) or bool(children(folder)))


def make_folder(folder: Path, mode: int = 0o700) -> None:
    """Create `folder` and the missing folders above it, all with `mode`, narrowed by the umask.

    A folder that exists keeps its mode.

    Raises:
        OSError: The folder cannot be created, or a file has its name.
    """
    try:
        folder.mkdir(mode)
    except FileNotFoundError:
        make_folder(folder.parent, mode)
        folder.mkdir(mode, exist_ok=True)
    except OSError:
        if not folder.is_dir():
            raise


def restrict_access(folder: Path) -> None:
    """Remove all permissions of group and others from `folder` and its contents; other libraries apply only the umask."""
    for path in (folder, *folder.rglob("*")):
        if not path.is_symlink():
            path.chmod(stat.S_IMODE(path.stat().st_mode) & 0o700)


def atomic_write(path: Path, content: bytes | str, mode: int = PRIVATE) -> None:
    """Write `content` to a temporary file beside `path`, flush it to the disk, and rename it to `path`.

    Args:
        path: the file; missing parent folders are created, accessible to all who may read the file.
        content: bytes, or text that is stored as UTF-8.
        mode: permissions of the file; the umask narrows them.

    Raises:
        InputError: The disk is full, the folder is not writable, or `path` is a folder or a device. `path` is not changed.
    """
    data = content.encode() if isinstance(content, str) else content
    temporary = None
    if exists(path) and not is_file(path):  # a device or a pipe would be replaced by a file
        raise InputError(f"cannot write {path}: it exists and is not a regular file; choose another path")
    try:
        make_folder(path.parent, 0o700 | (mode & 0o044) | (mode & 0o044) >> 2)
        unfinished = path.with_name(f".{path.name}.{secrets.token_hex(4)}{_PARTIAL}")
        descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), mode)
        temporary = unfinished
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        raise InputError(f"cannot write {path}: {error.strerror}; free some space or choose another path") from error
    except ValueError as error:
        raise unusable(path, error) from error


def check_writable(path: Path) -> None:
    """Raise `InputError` if `atomic_write` to `path` would fail; for a check before long work."""
    if exists(path) and not is_file(path):
        raise InputError(f"cannot write {path}: it exists and is not a regular file; choose another path")
    try:
        with tempfile.TemporaryFile(dir=next(above for above in path.absolute().parents if exists(above))):
            pass
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}; choose another path") from error


def remove_partial_files(folder: Path) -> None:
    """Remove temporary files of killed processes in `folder` and below."""
    for path in matching(folder, f".*{_PARTIAL}", below=True):
        path.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON, atomically; raise `ValueError` for a number that is not finite."""
    atomic_write(path, json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n")


def write_lines(path: Path, values: list[Any]) -> None:
    """Write one JSON value per line, atomically; raise `ValueError` for a number that is not finite."""
    atomic_write(path, "".join(json.dumps(v, sort_keys=True, allow_nan=False) + "\n" for v in values))


def open_regular(path: Path) -> BufferedReader:
    """Open a regular file for reading in binary mode.

    The kind is checked before opening, because opening a named pipe blocks and opening a device may have effects. It is
    checked again afterwards, because the file may have been replaced.

    Raises:
        OSError: The file is missing, unreadable, or a folder, named pipe, socket or device; `strerror` gives the reason.
    """
    return os.fdopen(_opened(path)[0], "rb")


def _opened(path: Path) -> tuple[int, int]:
    """Return the descriptor and the size of a regular file."""
    _demand_regular(os.stat(path).st_mode, path)
    descriptor = os.open(path, _READ)
    try:
        found = os.fstat(descriptor)
        _demand_regular(found.st_mode, path)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor, found.st_size


def _demand_regular(mode: int, path: Path) -> None:
    if not stat.S_ISREG(mode):
        code, kind = next(((code, kind) for holds, code, kind in _KINDS if holds(mode)), (errno.EINVAL, "is of another kind"))
        raise OSError(code, f"it {kind}, not a regular file", str(path))


def read_regular(path: Path, most: int = 0) -> bytes:
    """Return the bytes of a regular file; its size is checked before memory is allocated.

    Args:
        most: largest size in bytes; 0: the free memory.

    Raises:
        OSError: As `open_regular`, or the file is larger.
    """
    descriptor, size = _opened(path)
    with os.fdopen(descriptor, "rb", 0 if size <= _SMALL else -1) as file:
        if (most and size > most) or size > _SMALL:
            check_size(size, most, str(path))
        return file.read()


def check_size(size: int, most: int = 0, path: str = "") -> None:
    """Raise `OSError` if `size` bytes are more than `most` (0: no limit), or more than the free memory."""
    import psutil

    allowed, which = (
        (most, "are allowed") if most and size > most else (psutil.virtual_memory().available, "of memory are free")
    )
    if size > allowed:
        raise OSError(errno.EFBIG, f"it holds {size / 1e6:,.0f} MB, {allowed / 1e6:,.0f} MB {which}", path)


def loads_json(text: bytes | str) -> Any:
    """Return the value of a JSON text; raise `ValueError` if it is not valid or nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def loads_toml(text: bytes | str) -> dict[str, Any]:
    """Return the tables of a TOML text; raise `ValueError` if it is not valid or nested more than `DEPTH` levels deep."""
    try:
        # Windows programs begin a file with a byte order mark
        tables = tomllib.loads(text.decode("utf-8-sig") if isinstance(text, bytes) else text.removeprefix("\ufeff"))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    level: list[Any] = [tables]
    for _ in range(DEPTH):
        level = [inner for each in level for inner in (each.values() if isinstance(each, dict) else each)]
        level = [each for each in level if isinstance(each, dict | list)]
    if level:
        raise ValueError(f"it is nested more than {DEPTH} levels deep")
    return tables


def read_bytes(path: Path, what: str, most: int = 0) -> bytes:
    """Return the content of a regular file.

    Args:
        what: name of the file in the error ("the adapter of site 'ink'").
        most: largest size in bytes; 0: the free memory.

    Raises:
        InputError: The file is missing, unreadable, too large, or not a regular file.
    """
    try:
        return read_regular(path, most)
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        raise InputError(f"cannot read {what} at {path}: {getattr(error, 'strerror', error)}; check the path") from error


def read_json(path: Path, what: str, most: int = 0) -> Any:
    content = read_bytes(path, what, most)
    try:
        return loads_json(content)
    except ValueError as error:
        raise InputError(f"{what} at {path} is damaged ({error}); restore it or start a new run") from error


def read_lines(path: Path, what: str) -> list[Any]:
    content = read_bytes(path, what)
    try:
        return [loads_json(line) for line in content.splitlines()]
    except ValueError as error:
        raise InputError(f"{what} at {path} is damaged ({error}); restore it or start a new run") from error


def write_checksummed(path: Path, content: bytes) -> None:
    """Write a line with the SHA-256 of `content`, then `content`, atomically; `read_checksummed` detects any damage."""
    atomic_write(path, hashlib.sha256(content).hexdigest().encode() + b"\n" + content)


def read_checksummed(path: Path, what: str) -> bytes:
    """Return the content that `write_checksummed` wrote; raise `InputError` if it has changed."""
    checksum, _, content = read_bytes(path, what).partition(b"\n")
    if hashlib.sha256(content).hexdigest().encode() != checksum:
        raise InputError(f"{what} at {path} is damaged (its digest differs); restore it from a backup or start a new run")
    return content


@contextmanager
def file_lock(path: Path, busy: str = "") -> Iterator[None]:
    """Hold a file's lock within this context; the operating system releases it if the process dies.

    Args:
        path: an existing file.
        busy: text of the error if another process holds the lock; empty: wait for the lock.

    Raises:
        InputError: The file cannot be read, or another process holds the lock and `busy` is set.
    """
    try:
        file = path.open("rb")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}; check the path") from error
    with file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | (fcntl.LOCK_NB if busy else 0))
        except ImportError:
            pass  # the system has no such locks
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise InputError(busy) from error
        yield
