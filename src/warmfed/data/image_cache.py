"""Cache of decoded images on disk, memory-mapped; the name of a file is the hash of its sources."""

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
from ..utils.paths import expanded, is_file, matching

Bytes = NDArray[np.uint8]
_PARTIAL = ".partial"
_DAY = 86_400.0


def usual() -> Path:
    """Return the default cache folder: $WARMFED_CACHE, or `warmfed` in the user's cache folder.

    Raises:
        InputError: The user has no home folder, as in a container with another user id.
    """
    if named := os.environ.get("WARMFED_CACHE"):
        return expanded(named)
    own = {"win32": "LOCALAPPDATA", "darwin": ""}.get(sys.platform, "XDG_CACHE_HOME")
    if own and (base := os.environ.get(own)):
        return expanded(base) / "warmfed"
    try:
        home = Path.home()
    except RuntimeError as error:
        raise InputError(
            "this user has no home folder for the cache of decoded images; set data.cache or WARMFED_CACHE to a folder"
        ) from error
    places = {"win32": ("AppData", "Local"), "darwin": ("Library", "Caches")}
    return home.joinpath(*places.get(sys.platform, (".cache",)), "warmfed")


@dataclass(frozen=True)
class Cache:
    """Arrays of bytes in files. The content of a name never changes, so several processes may share a folder.

    Folder and files are private, since they hold a site's images.
    """

    folder: Path = field(default_factory=usual)

    def array(self, name: str, shape: tuple[int, ...], make: Callable[[Bytes], None]) -> Bytes:
        """Return an array, memory-mapped; if it does not exist, `make` fills it and it is moved into place.

        Two processes may make the same array; the later one replaces the file with an equal one. Writes to the result
        change only this process's copy. If `make` raises, the cache keeps nothing.

        Args:
            name: name of the array.
            shape: its shape, in bytes.
            make: fills the array that it receives.

        Raises:
            InputError: if the disk is full or the folder cannot be written.
        """
        size, path = math.prod(shape), self.path(name)
        if not size:
            return np.zeros(shape, np.uint8)
        if not is_file(path) or path.stat().st_size != size:
            try:
                self._make(path, shape, make)
            except OSError as error:
                raise InputError(
                    f"cannot keep {size / 1e6:.0f} MB of decoded images in {self.folder}: {error.strerror or error}; "
                    "free some space, or set data.cache or WARMFED_CACHE to another folder"
                ) from error
        return np.memmap(path, np.uint8, "c", shape=shape)

    def path(self, name: str) -> Path:
        """Return the file of an array."""
        return self.folder / f"{name}.u8"

    def size(self) -> int:
        """Return the bytes of all arrays in the folder."""
        return sum(path.stat().st_size for path in matching(self.folder, "*.u8"))

    def _make(self, path: Path, shape: tuple[int, ...], make: Callable[[Bytes], None]) -> None:
        make_folder(self.folder)
        for left in matching(self.folder, f".*{_PARTIAL}"):  # of a killed process; a running one writes to its own file
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
    """Reserve the disk space: a write to a memory map on a full disk ends the process with a signal."""
    try:
        os.posix_fallocate(descriptor, 0, size)
    except AttributeError:  # not available on this system
        os.truncate(descriptor, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # not supported by this file system
            raise
        os.truncate(descriptor, size)


@lru_cache(maxsize=64)
def _mapped(path: Path, shape: tuple[int, ...]) -> Tensor:
    try:
        return torch.from_numpy(np.memmap(path, np.uint8, "c", shape=shape))
    except (OSError, ValueError) as error:
        raise InputError(f"the decoded images in {path} are gone or damaged; start the command again") from error


class Mapped(Mapping[str, Tensor]):
    """A table whose images are rows `start` to `stop` of a file. Its pickle holds the file's name, not the images."""

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
