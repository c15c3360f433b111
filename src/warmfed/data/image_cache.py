"""Decoded images on disk, memory-mapped: made once, under a name that says what they were made from."""

import errno
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..utils.errors import InputError
from ..utils.files import make_folder as make_folder

Bytes = NDArray[np.uint8]
_PARTIAL = ".partial"
_DAY = 86_400.0


def usual() -> Path:
    """Where decoded images are kept: $WARMFED_CACHE, or `warmfed` in the user's cache folder."""
    if named := os.environ.get("WARMFED_CACHE"):
        return Path(named).expanduser()
    match sys.platform:
        case "win32":
            base = Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local"))
        case "darwin":
            base = Path.home() / "Library" / "Caches"
        case _:
            base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "warmfed"


@dataclass(frozen=True)
class Cache:
    """Arrays of bytes in files. What lies under a name never changes, so any number of processes may use one folder.

    Folder and files are private: they hold a site's images.
    """

    folder: Path = field(default_factory=usual)

    def array(self, name: str, shape: tuple[int, ...], make: Callable[[Bytes], None]) -> Bytes:
        """The array of this name, mapped into memory; where there is none, `make` fills one, which then is moved into place.

        Two processes that make the same one both make it, and the later one replaces the file by an equal one. Writing to
        what is returned changes this process's copy only. Where `make` raises, nothing is kept.
        Raises InputError where the disk is full or the folder cannot be written.
        """
        size, path = math.prod(shape), self.path(name)
        if not size:
            return np.zeros(shape, np.uint8)
        if not path.is_file() or path.stat().st_size != size:
            try:
                self._make(path, shape, make)
            except OSError as error:
                raise InputError(
                    f"cannot keep {size / 1e6:.0f} MB of decoded images in {self.folder}: {error.strerror or error}; "
                    "free some space, or name another place by data.cache or WARMFED_CACHE"
                ) from error
        return np.memmap(path, np.uint8, "c", shape=shape)

    def path(self, name: str) -> Path:
        return self.folder / f"{name}.u8"

    def size(self) -> int:
        """Bytes of all that the folder holds."""
        return sum(path.stat().st_size for path in self.folder.glob("*.u8")) if self.folder.is_dir() else 0

    def _make(self, path: Path, shape: tuple[int, ...], make: Callable[[Bytes], None]) -> None:
        make_folder(self.folder)
        for left in self.folder.glob(f".*{_PARTIAL}"):  # of a process that was killed; a living one writes to its own
            if time.time() - left.stat().st_mtime > _DAY:
                left.unlink(missing_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=self.folder, prefix=f".{path.stem[:12]}.", suffix=_PARTIAL)
        try:
            with os.fdopen(descriptor, "r+b") as file:
                _reserve(file.fileno(), math.prod(shape))
                content = np.memmap(file, np.uint8, "r+", shape=shape)
                make(content)
                content.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            Path(temporary).unlink(missing_ok=True)


def _reserve(descriptor: int, size: int) -> None:
    """Take the space now: writing to a map on a full disk would end the process by a signal."""
    try:
        os.posix_fallocate(descriptor, 0, size)
    except AttributeError:  # not on this system
        os.truncate(descriptor, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # not on this kind of disk
            raise
        os.truncate(descriptor, size)


@lru_cache(maxsize=64)
def _mapped(path: Path, shape: tuple[int, ...]) -> Tensor:
    try:
        return torch.from_numpy(np.memmap(path, np.uint8, "c", shape=shape))
    except (OSError, ValueError) as error:
        raise InputError(f"the decoded images in {path} are gone or damaged; start the command anew") from error


class Mapped(Mapping[str, Tensor]):
    """A table whose images are rows `start` to `stop` of a file. It goes to other processes by the file's name."""

    def __init__(self, path: Path, shape: tuple[int, ...], start: int, stop: int, label: Tensor) -> None:
        self._recipe = (path, shape, start, stop, label)
        self._columns = {"image": _mapped(path, shape)[start:stop], "label": label}

    def __getitem__(self, name: str) -> Tensor:
        return self._columns[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._columns)

    def __len__(self) -> int:
        return len(self._columns)

    def __reduce__(self) -> tuple[Any, ...]:
        return Mapped, self._recipe
