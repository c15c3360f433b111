"""Arrays in `.npz` files. Declared sizes are checked before memory is allocated; nothing is unpickled."""

import math
import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from ...utils.files import check_size, open_regular

FREELY = 2**30
"""Unpacked size in bytes that every compressed file may have."""
RATIO = 100
"""Maximum ratio of unpacked to packed size beyond `FREELY`; images reach about 20."""
_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0}
DAMAGE = (
    OSError, ValueError, IndexError, KeyError, TypeError, EOFError, RuntimeError, MemoryError, SyntaxError,
    tokenize.TokenError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip
"""Exceptions that reading a damaged archive raises."""
Header = tuple[tuple[int, ...], bool, np.dtype[Any]]
"""Shape, whether the array is in column-major order, type."""


def plausible(unpacked: int, packed: int) -> None:
    """Raise `ValueError` if a file of `packed` bytes would unpack to more than `FREELY` and `RATIO` allow."""
    if unpacked > max(FREELY, RATIO * packed):
        raise ValueError(
            f"it unpacks from {packed / 1e6:,.1f} to {unpacked / 1e6:,.0f} MB, more than {FREELY / 1e6:,.0f} MB and more than "
            f"{RATIO} times its size; store it without compression"
        )


class Archive:
    """Arrays of an .npz file by name; opening it reads only the zip directory.

    Raises:
        OSError: if it cannot be read, is not a regular file, or an array needs more memory than is free.
        ValueError: if it is damaged, unpacks to too many bytes, or an array holds objects.
        zipfile.BadZipFile: if it is not a zip file, or a checksum differs.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with open_regular(path) as file, zipfile.ZipFile(file) as archive:
            self._sizes = {info.filename: info.file_size for info in archive.infolist()}
            plausible(sum(info.file_size for info in archive.infolist()), file.seek(0, 2))

    @property
    def files(self) -> list[str]:
        """Names of the arrays."""
        return [name.removesuffix(".npy") for name in self._sizes]

    def __contains__(self, key: str) -> bool:
        return f"{key}.npy" in self._sizes

    def __getitem__(self, key: str) -> NDArray[Any]:
        """Return the whole array."""
        shape, _, kind = self.header(key)
        check_size(math.prod(shape) * kind.itemsize, path=str(self._path))
        with self._member(key) as stream:
            return np.lib.format.read_array(stream, allow_pickle=False)

    def header(self, key: str) -> Header:
        """Return the header of an array, checked against the array's bytes in the file."""
        with self._member(key) as stream:
            return self._header(key, stream)

    @contextmanager
    def rows(self, key: str) -> Iterator[IO[bytes]]:
        """Open an array's bytes after its header."""
        with self._member(key) as stream:
            self._header(key, stream)
            yield stream

    @contextmanager
    def _member(self, key: str) -> Iterator[IO[bytes]]:
        with open_regular(self._path) as file, zipfile.ZipFile(file) as archive, archive.open(f"{key}.npy") as stream:
            yield stream

    def _header(self, key: str, stream: IO[bytes]) -> Header:
        version = np.lib.format.read_magic(stream)
        found: Header = _HEADERS.get(version, np.lib.format.read_array_header_2_0)(stream)
        shape, _, kind = found
        held = self._sizes[f"{key}.npy"] - stream.tell()
        if kind.hasobject:
            raise ValueError(f"{key} holds objects, not numbers")
        if min(shape, default=0) < 0 or math.prod(shape) * kind.itemsize > held or (shape and shape[0] > max(held, 0)):
            raise ValueError(f"{key} declares shape {list(shape)}, but has {max(held, 0)} bytes")
        return found
