"""Decode pictures (files, or rows of a table) into examples, once for each content, through the cache."""

import hashlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL
from numpy.typing import NDArray

from ..utils.files import read_regular
from ..utils.paths import is_file
from .examples import WHOLE, Examples, ReaderOptions, digests, texts
from .image_cache import Bytes
from .image_io import DEEP, MOST, Facts, UnreadableError, picture, quiet

SIZE = 32
_EACH = 64
_VERSION = 2
_FACTS = 32 + 4 * len(Facts._fields)
"""Bytes of the facts of a picture in the cache: the SHA-256 of its pixels, and `Facts`."""


@dataclass(frozen=True)
class Entry:
    """One encoded picture."""

    name: str
    """Name in the source, for reports and saved partitions."""
    open: Path | Callable[[], bytes]
    """File, or function that returns its content."""
    label: str
    site: str
    split: str = WHOLE
    group: str = ""

    def content(self) -> bytes:
        """Return the encoded bytes."""
        return read_regular(self.open, MOST) if isinstance(self.open, Path) else self.open()


def pictures(
    entries: Sequence[Entry], classes: Sequence[str], options: ReaderOptions, faults: list[str], notes: list[str]
) -> Examples:
    """Return the examples of these pictures; add those that cannot be used to `faults`.

    The cache key is the content: moved or renamed files are not decoded again, changed files are.

    Args:
        entries: the pictures; each label is in `classes`.
        classes: class names.
        options: the reader's options.
        faults: list of faults, extended here.
        notes: list of remarks, extended here.
    """
    size, channels, white, store = options.image_size or SIZE, options.channels, options.max_value, options.store
    failed: dict[int, str] = {}
    key = hashlib.sha256(f"{_VERSION} {PIL.__version__} {size} {channels} {white}".encode())
    for digest in _hashed(entries, failed):
        key.update(digest)
    name = key.hexdigest()
    shape, had = (len(entries), channels, size, size), np.zeros((len(entries), len(Facts._fields)), "<u4")

    def decode(into: Bytes | None) -> None:
        def one(row: int) -> None:
            if row in failed:
                return
            try:
                pixels, had[row] = picture(entries[row].content(), size, channels, white)
                if into is not None:
                    into[row] = pixels
            except UnreadableError as error:
                failed[row] = str(error)
            except (OSError, ValueError) as error:  # ValueError: a NUL character in the path
                failed[row] = f"cannot be read: {getattr(error, 'strerror', None) or error}; check its permissions"

        with quiet():
            _each(one, len(entries))
        if failed:
            raise _StopError  # the cache keeps no set with faults

    def describe(into: Bytes) -> None:
        digests(images, into[:, :32])
        into[:, 32:] = had.view(np.uint8)

    try:
        if failed:
            decode(None)  # so that one report names every fault
        images = store.array(name, shape, decode)
        if not had.any() and len(entries) and not is_file(store.path(f"{name}-facts")):
            store.path(name).unlink()  # its digests are lost: make both again
            images = store.array(name, shape, decode)
        facts = store.array(f"{name}-facts", (len(entries), _FACTS), describe)
    except _StopError:
        faults += [f"{entries[row].name} {why}" for row, why in sorted(failed.items())]
        entries = [entry for row, entry in enumerate(entries) if row not in failed]
        # the images are not used, but later checks must run to find all faults
        facts = np.zeros((len(entries), _FACTS), np.uint8)
        facts[:, :8] = np.arange(len(entries), dtype="<u8")[:, None].view(np.uint8)
        images = np.zeros((len(entries), 1, 1, 1), np.uint8)
    known = np.ascontiguousarray(facts[:, 32:]).view("<u4").reshape(len(entries), len(Facts._fields))
    sides = sorted(known[:, :2].tolist(), key=lambda side: (side[0] * side[1], side))
    if not failed:
        _remarks(entries, known, white, faults, notes)
    place = {label: i for i, label in enumerate(classes)}
    return Examples(
        images,
        np.array([place[entry.label] for entry in entries], np.int64),
        texts(entry.site for entry in entries),
        texts(entry.split for entry in entries),
        texts(entry.name for entry in entries),
        np.ascontiguousarray(facts[:, :32]),
        texts(entry.group for entry in entries) if any(entry.group for entry in entries) else None,
        key=name,
        sides=tuple((w, h) for w, h in (sides[0], sides[-1])) if sides else (),
    )


def _remarks(entries: Sequence[Entry], known: NDArray[np.uint32], white: int, faults: list[str], notes: list[str]) -> None:
    """Add a fault or a note for each site whose 16-bit pictures use a small part of their range, and one on frames."""
    site = np.array([entry.site for entry in entries], dtype=object)
    deep = known[:, Facts._fields.index("deep")].astype(np.int64)
    for name in sorted(set(site[deep > 0].tolist())):
        mine = deep[(site == name) & (deep > 0)]
        most = int(mine.max()) - 1
        if most >= (white or DEEP) // 2:
            continue
        told = f"no 16-bit picture of site {name!r} has a value above {most:,}"
        if most * 255 < (white or DEEP):
            faults.append(f"{told}: they would be black; set data.options.max_value to the largest possible value")
        else:
            bits = most.bit_length()
            notes.append(f"{told} ({bits} bits), so they are dark; set data.options.max_value={2**bits - 1} to brighten them")
    frames = known[:, Facts._fields.index("frames")].tolist()
    several = [entry.name for entry, more in zip(entries, frames, strict=True) if more]
    if several:
        notes.append(f"of {len(several)} pictures with several frames or pages the first one is used, {several[0]} among them")


class _StopError(Exception):
    """Some pictures cannot be used; the cache keeps nothing."""


def _hashed(entries: Sequence[Entry], failed: dict[int, str]) -> list[bytes]:
    found = [b""] * len(entries)

    def one(row: int) -> None:
        try:
            found[row] = hashlib.sha256(entries[row].content()).digest()
        except (OSError, ValueError) as error:
            failed[row] = f"cannot be read: {getattr(error, 'strerror', None) or error}; check the path and its permissions"

    _each(one, len(entries))
    return found


def _each(function: Callable[[int], None], count: int) -> None:
    """Call the function for each number below `count`, in one thread per core: Pillow and hashlib release Python's lock."""

    def piece(start: int) -> None:
        for row in range(start, min(start + _EACH, count)):
            function(row)

    with ThreadPoolExecutor(os.cpu_count() or 1) as threads:
        for _ in threads.map(piece, range(0, count, _EACH)):
            pass
