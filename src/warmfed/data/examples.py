"""Every image of a source in one list, before it is split and dealt: `Pool`, and how readers tell what is wrong."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ..utils.errors import InputError, suggest
from .image_cache import Bytes, Cache, usual

Texts = NDArray[np.str_]
WHOLE = "all"
"""Split of images that none has claimed yet, beside "train", "validation" and "test"."""
TEMPLATE = "a photo of a {}"
_DIGITS = 20
"""From so many on, a number is a name like any other."""


class DataError(InputError):
    """Data that cannot be used: one line with the first faults; `faults` holds all of them."""

    def __init__(self, name: str, faults: Sequence[str], most: int = 12) -> None:
        self.name, self.faults = name, tuple(faults)
        more = f"; and {len(faults) - most} more, `warmfed data` names them all" if len(faults) > most else ""
        super().__init__(f"{name} is not usable: {'; '.join(faults[:most])}{more}")


def refuse(name: str, faults: Sequence[str]) -> None:
    """DataError where there are faults."""
    if faults:
        raise DataError(name, list(dict.fromkeys(faults)))


@dataclass(frozen=True)
class ReaderOptions:
    """What every reader of images takes."""

    RENAMED: ClassVar[Mapping[str, str]] = {"deal": "partition"}

    name: str = ""
    """What the federation is called in reports; empty: as its file or folder."""
    image_size: int | None = None
    """Pixels that a side of the square images has; none: folders 32, arrays keep their size."""
    channels: int = 3
    """3: colour, 1: grey (ITU-R 601 luma)."""
    validation: float = 0.2
    """Share that validates, where the data bring no validation split."""
    test: float = 0.2
    """Share that tests, where the data bring no test split."""
    public: float = 0.0
    """Share that no site has, out of what would be for training: public images, on which a base may be pre-trained."""
    template: str = TEMPLATE
    """The prompt, with one {} for the class name."""
    classes: Sequence[str] | None = None
    """Of folders: these classes, in this order. Of arrays: the names of labels 0, 1, …"""
    sites: Sequence[str] | None = None
    """These sites only."""
    limit: int = 0
    """Images of each site, class and split at the most, drawn before any deal; 0: all."""
    seed: int = 0
    """Names the draws of that and of the splits; not the seed of a training."""
    partition: Mapping[str, Any] | None = None
    """How the images are dealt to other sites (`partition.Partition`); none: they stay where they are."""
    cache: str | Path | None = None
    """Folder of the decoded images; none: `cache.usual()`."""

    def __post_init__(self) -> None:
        if not (self.validation > 0 and self.test > 0 and self.validation + self.test + self.public < 1):
            raise InputError(
                "validation and test shares above 0, together below 1 (with the public share, too), were expected, "
                f"{self.validation:g}, {self.test:g} and {self.public:g} came; 0.2, 0.2 and 0 are usual"
            )
        if self.public < 0:
            raise InputError(f"expected a public share of 0 (none) or more, got {self.public:g}")
        if self.image_size is not None and self.image_size < 1:
            raise InputError(f"expected an image_size of 1 pixel or more, got {self.image_size}")
        if self.limit < 0:
            raise InputError(f"expected a limit of 0 images (all) or more, got {self.limit}")
        if self.channels not in (1, 3):
            raise InputError(f"channels must be 3 (colour) or 1 (grey); got {self.channels}")

    @property
    def store(self) -> Cache:
        return Cache((Path(self.cache).expanduser() if self.cache else usual()).absolute())


def reader_options(options: Mapping[str, Any]) -> ReaderOptions:
    """`Common` of keyword arguments; InputError for a name that it has not."""
    known = [f.name for f in fields(ReaderOptions)]
    for key in options:
        if key not in known:
            raise InputError(f"there is no option {key!r}{suggest(key, known)}")
    return ReaderOptions(**options)


@dataclass(frozen=True)
class Examples:
    """Images in a row, with what is known of each."""

    images: Bytes
    """uint8 [n, c, h, w], in memory or memory-mapped."""
    label: NDArray[np.int64]
    site: Texts
    split: Texts
    """train, validation, test, or all where it is open."""
    name: Texts
    """What its source calls it: a path, or train/17 of an array."""
    digest: Bytes
    """SHA-256 of each image's pixels, [n, 32]."""
    group: Texts | None = None
    """Images of one group (a patient, a slide) go to one split together; empty: none."""
    at: NDArray[np.int64] | None = field(default=None, kw_only=True)
    """Where the image of each row lies in `images`; none: row by row."""
    key: str = field(default="", kw_only=True)
    """Names `images` where they are kept in a cache."""
    sides: tuple[tuple[int, int], ...] = field(default=(), kw_only=True)
    """Width and height of the smallest and of the largest picture before they were squeezed, where they were."""

    def take(self, rows: NDArray[Any]) -> dict[str, Any]:
        """The columns (not the images) of these rows."""
        return {f.name: getattr(self, f.name)[rows] for f in fields(self) if f.name in ("label", "site", "split", "name")}


LONGEST = 1024
"""Characters of a name; every row of a column takes the memory of the longest one."""


def texts(values: Iterable[str]) -> Texts:
    """Return a column of text; raises `InputError` where a name is longer than `LONGEST`."""
    names = list(values)
    if (longest := max(map(len, names), default=0)) > LONGEST:
        raise InputError(f"expected names of at most {LONGEST} characters, got {longest}; shorten it in the data")
    return np.array(names, dtype=np.str_)


def digests(images: Bytes, into: Bytes) -> None:
    """SHA-256 of each image, [n, 32]."""
    for row, image in enumerate(images):
        into[row] = np.frombuffer(hashlib.sha256(np.ascontiguousarray(image).data).digest(), np.uint8)


def names_in_order(found: Iterable[str]) -> tuple[str, ...]:
    """Sorted; by value where all are numbers, so that class 10 follows 9."""
    names = set(found)
    if all(name.isdecimal() and len(name) < _DIGITS for name in names):
        return tuple(sorted(names, key=lambda name: (int(name), name)))
    return tuple(sorted(names))
