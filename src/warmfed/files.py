"""Files are written whole or not at all: a reader never sees half of one, and a full disk leaves the old one."""

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from .errors import InputError

_PARTIAL = ".partial"


def occupied(folder: Path) -> bool:
    """Whether something stands where a new folder is wanted: a file, or a folder that is not empty."""
    return folder.exists() and (not folder.is_dir() or any(folder.iterdir()))


def write_whole(path: Path, content: bytes | str, mode: int = 0o644) -> None:
    """Write `content` beside `path`, flush it to the disk, then move it into place in one step.

    It is readable by others, where `mode` lets them, only when it is whole.

    Raises `InputError` where the disk is full, the folder cannot be written, or `path` is a folder or a device; what stood
    at `path` is then untouched.
    """
    data = content.encode() if isinstance(content, str) else content
    temporary = None
    if path.exists() and not path.is_file():  # a device or a pipe would be replaced by a file
        raise InputError(f"cannot write {path}: it is there and no file; choose another path")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=_PARTIAL)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, mode)
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        raise InputError(f"cannot write {path}: {error.strerror}; free some space or choose another place") from error


def writable(path: Path) -> None:
    """Raise `InputError` now where `write_whole` would, after the work that gives what is to be written there."""
    if path.exists() and not path.is_file():
        raise InputError(f"cannot write {path}: it is there and no file; choose another path")
    try:
        with tempfile.TemporaryFile(dir=next(above for above in path.absolute().parents if above.exists())):
            pass
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}; choose another place") from error


def sweep(folder: Path) -> None:
    """Remove what a killed process had not finished writing, in `folder` and below."""
    for path in folder.rglob(f".*{_PARTIAL}"):
        path.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    write_whole(path, json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n")


def write_lines(path: Path, values: list[Any]) -> None:
    """Write one JSON value a line; raise `ValueError` for a number that is not finite, which JSON does not have."""
    write_whole(path, "".join(json.dumps(v, sort_keys=True, allow_nan=False) + "\n" for v in values))


def read_bytes(path: Path, what: str) -> bytes:
    """The content of `path`; `what` names it in the error ("the adapter of site 'ink'")."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {what} at {path}: {error.strerror}; check the path") from error


def read_json(path: Path, what: str) -> Any:
    content = read_bytes(path, what)
    try:
        return json.loads(content)
    except ValueError as error:
        raise InputError(f"{what} at {path} is damaged ({error}); restore it or start the run anew") from error


def read_lines(path: Path, what: str) -> list[Any]:
    content = read_bytes(path, what)
    try:
        return [json.loads(line) for line in content.splitlines()]
    except ValueError as error:
        raise InputError(f"{what} at {path} is damaged ({error}); restore it or start the run anew") from error


def write_sealed(path: Path, content: bytes) -> None:
    """Write `content` under the line of its SHA-256, so that a reader sees damage of any kind."""
    write_whole(path, hashlib.sha256(content).hexdigest().encode() + b"\n" + content)


def read_sealed(path: Path, what: str) -> bytes:
    """What `write_sealed` wrote; raises `InputError` where a bit of it has changed."""
    seal, _, content = read_bytes(path, what).partition(b"\n")
    if hashlib.sha256(content).hexdigest().encode() != seal:
        raise InputError(f"{what} at {path} is damaged (its digest differs); restore it from a backup or start the run anew")
    return content
