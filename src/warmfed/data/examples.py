"""Examples: all images of a source before the split and the partition; the readers' options and errors."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ..utils.errors import InputError, suggest
from ..utils.names import plain_name, plain_names
from ..utils.paths import expanded
from .image_cache import Bytes, Cache, usual
from .image_io import DEEP

Texts = NDArray[np.str_]
WHOLE = "all"
"""Split of the images without a split, beside "train", "validation" and "test"."""
TEMPLATE = "a photo of a {}"
_DIGITS = 20
"""Digits from which a number is sorted as text."""


class DataError(InputError):
    """Data that cannot be used. The message has the first faults; `faults` has all of them."""

    def __init__(self, name: str, faults: Sequence[str], most: int = 12) -> None:
        self.name, self.faults = name, tuple(faults)
        more = f"; and {len(faults) - most} more, `warmfed data` names them all" if len(faults) > most else ""
        super().__init__(f"{name} is not usable: {'; '.join(faults[:most])}{more}")


def refuse(name: str, faults: Sequence[str]) -> None:
    """Raise DataError if there are faults."""
    if faults:
        raise DataError(name, list(dict.fromkeys(faults)))


@dataclass(frozen=True)
class ReaderOptions:
    """Options of every reader of images."""

    RENAMED: ClassVar[Mapping[str, str]] = {"deal": "partition"}

    name: str = ""
    """Federation's name in reports; empty: the name of its file or folder."""
    image_size: int | None = None
    """Side of the square images in pixels; none: 32 for pictures, unchanged for arrays."""
    channels: int = 3
    """Channels of the images: 3 (colour) or 1 (grey, ITU-R 601 luma)."""
    max_value: int = 0
    """Pixel value of 16-bit grey pictures that becomes white, such as 4095 for 12-bit scans; 0: 65535."""
    validation: float = 0.2
    """Share of the validation split, above 0, if the data have no such split."""
    test: float = 0.2
    """Share of the test split, above 0, if the data have no such split."""
    public: float = 0.0
    """Share of public images, taken from the training split: no site has them, and a base may be pre-trained on them."""
    template: str = TEMPLATE
    """Prompt, with one {} for the class name."""
    classes: Sequence[str] | None = None
    """For folders: the classes to use, in this order. For arrays: the names of labels 0, 1, …"""
    sites: Sequence[str] | None = None
    """Sites to use; none: all."""
    limit: int = 0
    """Maximum number of images of each site, class and split, applied before any partition; 0: all."""
    seed: int = 0
    """Seed of `limit` and of the splits; not the seed of a training."""
    partition: Mapping[str, Any] | None = None
    """Fields of `partition.Partition`, which assigns the images to new sites; none: the sites stay."""
    cache: str | Path | None = None
    """Folder of the decoded images; none: `image_cache.usual()`."""

    def __post_init__(self) -> None:
        if not (self.validation > 0 and self.test > 0 and self.validation + self.test + self.public < 1):
            raise InputError(
                "expected validation and test shares above 0, and a sum with the public share below 1, "
                f"got {self.validation:g}, {self.test:g} and {self.public:g}; 0.2, 0.2 and 0 are usual"
            )
        if self.public < 0:
            raise InputError(f"expected a public share of 0 (none) or more, got {self.public:g}")
        if self.image_size is not None and self.image_size < 1:
            raise InputError(f"expected an image_size of 1 pixel or more, got {self.image_size}")
        for key in ("classes", "sites"):
            if (names := getattr(self, key)) is not None:
                object.__setattr__(self, key, plain_names(names, f"the option {key}"))
        if self.limit < 0:
            raise InputError(f"expected a limit of 0 images (all) or more, got {self.limit}")
        if not 0 <= self.max_value <= DEEP:
            raise InputError(f"expected a max_value from 1 to {DEEP} (0: {DEEP}), got {self.max_value}")
        if self.channels not in (1, 3):
            raise InputError(f"channels must be 3 (colour) or 1 (grey); got {self.channels}")

    @property
    def store(self) -> Cache:
        """Cache of the decoded images."""
        return Cache((expanded(self.cache) if self.cache else usual()).absolute())


def reader_options(options: Mapping[str, Any]) -> ReaderOptions:
    """Return the `ReaderOptions` of keyword arguments; raise InputError for an unknown name."""
    known = [f.name for f in fields(ReaderOptions)]
    for key in options:
        if key not in known:
            raise InputError(f"there is no option {key!r}{suggest(key, known)}")
    return ReaderOptions(**options)


@dataclass(frozen=True)
class Examples:
    """Images of a source, with the label, site, split, name and digest of each."""

    images: Bytes
    """uint8 [n, c, h, w], in memory or memory-mapped."""
    label: NDArray[np.int64]
    site: Texts
    split: Texts
    """train, validation or test; all (`WHOLE`) if the image has no split."""
    name: Texts
    """Name in the source: a path, or train/17 for an array."""
    digest: Bytes
    """SHA-256 of each image's pixels, [n, 32]."""
    group: Texts | None = None
    """Group of each image (a patient, a slide); the images of a group share one split; empty: no group."""
    at: NDArray[np.int64] | None = field(default=None, kw_only=True)
    """Index in `images` of each row's image; none: the row itself."""
    key: str = field(default="", kw_only=True)
    """Cache key of `images`; empty: not cached."""
    sides: tuple[tuple[int, int], ...] = field(default=(), kw_only=True)
    """Original width and height of the smallest and of the largest picture; empty if unknown."""

    def take(self, rows: NDArray[Any]) -> dict[str, Any]:
        """Return the columns label, site, split and name of these rows."""
        return {f.name: getattr(self, f.name)[rows] for f in fields(self) if f.name in ("label", "site", "split", "name")}


LONGEST = 1024
"""Maximum length of a name in characters; each row of a column uses the memory of the longest name."""


def absent_sites(wanted: Iterable[str], here: Iterable[str]) -> list[str]:
    """Return a fault for each wanted site that is not among those of the source."""
    known = sorted(set(here))
    return [f"there is no site {site!r}{suggest(site, known)}" for site in wanted if site not in known]


class Names:
    """Reads names of sites and classes in their plain form (`utils.names`), and notes each that had another."""

    def __init__(self, notes: list[str]) -> None:
        self.notes = notes
        self._plain: dict[str, str] = {}

    def __call__(self, name: str) -> str:
        found = self._plain.get(name)
        if found is None:
            found = self._plain[name] = plain_name(name)
            if found != name and found:
                self.notes.append(f"the name {name!r} was read as {found!r}")
        return found


def texts(values: Iterable[str]) -> Texts:
    """Return a column of text; raise `InputError` if a name is longer than `LONGEST`."""
    names = list(values)
    if (longest := max(map(len, names), default=0)) > LONGEST:
        raise InputError(f"expected names of at most {LONGEST} characters, got {longest}; shorten it in the data")
    return np.array(names, dtype=np.str_)


def digests(images: Bytes, into: Bytes) -> None:
    """Write the SHA-256 of each image into `into`, uint8 [n, 32]."""
    for row, image in enumerate(images):
        into[row] = np.frombuffer(hashlib.sha256(np.ascontiguousarray(image).data).digest(), np.uint8)


def names_in_order(found: Iterable[str]) -> tuple[str, ...]:
    """Return the names sorted; by value if all are numbers, so that class 10 follows 9."""
    names = set(found)
    if all(name.isdecimal() and len(name) < _DIGITS for name in names):
        return tuple(sorted(names, key=lambda name: (int(name), name)))
    return tuple(sorted(names))
