"""Readers of arrays: in memory, in `.npz` files and in MNIST's idx files."""

import gzip
import hashlib
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import PIL
from numpy.typing import NDArray

from ...core import SPLITS
from ...utils.errors import InputError, suggest
from ...utils.files import check_size, open_regular
from ...utils.paths import expanded, is_file, matching, resolved
from ..build import assemble
from ..examples import WHOLE, Examples, Names, ReaderOptions, Texts, absent_sites, digests, reader_options, refuse, texts
from ..federation import SPLIT_NAMES, Federation
from ..image_cache import Bytes
from ..image_io import UnreadableError, from_array
from ..partition import Partition
from .archives import DAMAGE, Archive, plausible

_ROWS = 1024
_VERSION = 1
_IDX = re.compile(r"(?P<prefix>.*?)-?(?P<split>train|t10k|test)-images[-.]idx3-ubyte(\.gz)?")
_PIECE = 2**28
"""Maximum bytes of one read, unless one row has more."""
_SPARSE = 20
"""Number of classes without names from which at least half must have images."""
Chunks = Callable[[], Iterator[NDArray[Any]]]


@dataclass(frozen=True)
class Block:
    """Images of one array, read in chunks, and their labels."""

    site: str | Sequence[str]
    """Site of all images, or of each."""
    split: str
    count: int
    chunks: Chunks
    label: Any
    """Labels, [n] or [n, 1]."""
    stem: str
    """Prefix of the images' names: row i is STEM/i."""

    @property
    def where(self) -> str:
        """Site and split, for error messages."""
        site = f"site {self.site!r}" if isinstance(self.site, str) else "the images"
        return site + (f", {self.split}" if self.split != WHOLE else "")


def arrays(sites: Mapping[str, Any], /, **options: Any) -> Federation:
    """Return the federation of arrays in memory.

    Args:
        sites: {"site": (images, labels)}, or {"site": {"train": (images, labels), "test": …}} for data with splits.
        options: the fields of `ReaderOptions`; without `image_size` the images keep their size, and without `classes` a class
            name is the label's number.

    Shapes:
        images: NumPy arrays or CPU tensors [n, h, w], [n, h, w, 3] or [n, 3, h, w]; uint8, or floats from 0 to 1.
        labels: whole numbers from 0, [n] or [n, 1].

    Raises:
        InputError: with all faults, if the data cannot be used.
    """
    common = reader_options(options)
    faults: list[str] = []
    notes: list[str] = []
    blocks = []
    names = Names(notes)
    for each, given in sites.items():
        site = names(str(each))
        for key, pair in (given if isinstance(given, Mapping) else {WHOLE: given}).items():
            where = f"site {site!r}" + (f", {key}" if key != WHOLE else "")
            if isinstance(given, Mapping) and key not in SPLITS:
                faults.append(f"{where}: expected train, validation or test{suggest(key, list(SPLITS))}")
            elif not isinstance(pair, tuple | list) or len(pair) != 2:
                faults.append(f"{where}: expected a pair (images, labels), got {type(pair).__name__}")
            else:
                images = np.asarray(pair[0])
                blocks.append(Block(site, key, len(images), _whole(images), pair[1], f"{site}/{key}"))
        if isinstance(given, Mapping) and "train" not in given:
            faults.append(f"site {site!r}: expected a train split, got {', '.join(given) or 'nothing'}")
    return _gathered("arrays", blocks, common, "", faults, notes)


def _check_numbers(values: NDArray[Any], count: int, what: str, most: int | None = None) -> None:
    """Raise `UnreadableError` if the values are not `count` whole numbers from 0, below `most` if it is given."""
    if values.shape != (count,) or values.dtype.kind not in "iu":
        raise UnreadableError(f"expected whole-number {what} [{count}], got {values.dtype} {list(values.shape)}")
    low, high = (int(values.min()), int(values.max())) if count else (0, 0)
    limit = 2**31 if most is None else most
    if low < 0 or high >= limit:
        raise UnreadableError(f"expected {what} from 0 to {limit - 1}, got {low} to {high}; number them from 0")


def _names(site: str | Sequence[str]) -> Texts:
    return texts([site] if isinstance(site, str) else site)


def _whole(values: NDArray[Any]) -> Chunks:
    if values.ndim < 3:
        return lambda: iter([values])
    return lambda: (values[start : start + _ROWS] for start in range(0, max(1, len(values)), _ROWS))


def _gathered(
    name: str, blocks: Sequence[Block], common: ReaderOptions, key: str, faults: list[str], notes: list[str]
) -> Federation:
    """Return the federation of these blocks; `key` identifies their images in the cache, "" keeps them in memory."""
    name = common.name or name
    if common.sites is not None:  # before their arrays are examined; `assemble` chooses among sites of single images
        if all(isinstance(block.site, str) for block in blocks):
            faults += absent_sites(common.sites, (str(block.site) for block in blocks))
        blocks = [block for block in blocks if not isinstance(block.site, str) or block.site in common.sites]
    labels, sides = [], set()
    for block in blocks:
        label = np.asarray(block.label)
        label = label[:, 0] if label.ndim == 2 and label.shape[1] == 1 else label
        try:
            _check_numbers(label, block.count, "labels")
            side = from_array(next(block.chunks()), None, common.channels).shape[1:]
        except UnreadableError as error:
            faults.append(f"{block.where}: {error}")
            continue
        labels.append(label.astype(np.int64))
        sides.add(side if common.image_size is None else (common.channels, common.image_size, common.image_size))
    for site in dict.fromkeys(block.site for block in blocks if isinstance(block.site, str)):
        if not sum(block.count for block in blocks if block.site == site):
            faults.append(f"site {site!r} is empty; give it images or leave it out")
    if len(sides) > 1:
        faults.append("expected images of one size, got several; give an image_size")
    if not blocks and not faults:
        faults.append("expected at least one site, got none")
    refuse(name, faults)
    shape = (sum(block.count for block in blocks), *sides.pop())

    def fill(into: Bytes) -> None:
        end = 0
        for block in blocks:
            row, end = end, end + block.count
            try:
                for chunk in block.chunks():
                    into[row : row + len(chunk)] = from_array(chunk, common.image_size, common.channels)
                    row += len(chunk)
            except UnreadableError as error:
                faults.append(f"{block.where}: {error}")
        refuse(name, faults)

    if key:
        key = hashlib.sha256(f"{_VERSION} {PIL.__version__} {common.image_size} {common.channels} {key}".encode()).hexdigest()
        images = common.store.array(key, shape, fill)
        found = common.store.array(f"{key}-facts", (len(images), 32), lambda into: digests(images, into))
    else:
        images, found = np.empty(shape, np.uint8), np.empty((shape[0], 32), np.uint8)
        fill(images)
        digests(images, found)
    label = np.concatenate(labels)
    if not common.classes:
        _check_labels(name, label)
    last = int(label.max(initial=0))
    classes = common.classes or [str(value) for value in range(last + 1)]
    examples = Examples(
        images,
        label,
        np.concatenate([np.broadcast_to(_names(block.site), block.count) for block in blocks]),
        np.concatenate([np.full(block.count, block.split) for block in blocks]),
        texts(f"{block.stem}/{row}" for block in blocks for row in range(block.count)),
        found,
        key=key,
    )
    return assemble(
        name,
        examples,
        classes,
        common,
        None if common.partition is None else Partition(**common.partition),
        faults=faults,
        notes=notes,
    )


def _check_labels(name: str, label: NDArray[np.int64]) -> None:
    """Raise `DataError` if labels without class names leave most classes empty, as identifiers and dates do."""
    used = np.unique(label)
    count = int(label.max(initial=0)) + 1
    if count > max(_SPARSE, 2 * len(used)):
        some = ", ".join(map(str, used[:3].tolist())) + (", …" if len(used) > 3 else "")
        refuse(name, [f"the labels {some} leave {count - len(used):,} of {count:,} classes empty; number them from 0"])


def npz(path: str | Path, **options: Any) -> Federation:
    """Return the federation in an .npz file, which may be larger than the memory.

    The reader uses these keys and ignores others:

    - SITE_x_train, SITE_y_train, SITE_x_test, … (also val or validation);
    - MedMNIST's train_images, train_labels, val_images, …;
    - Keras's x_train, y_train, x_test, y_test;
    - x and y of all images, with domain (a number for each image) and domains (names);
    - classes, the class names, unless the options set them.

    Without site names the file is one site with the file's name; `partition={"sites": 5}` divides it.

    Args:
        path: the file.
        options: the fields of `ReaderOptions`.

    Raises:
        InputError: if the file is not such an .npz file; objects in it are never unpickled.
    """
    common, path = reader_options(options), expanded(path)
    try:
        with open_regular(path) as file:
            if file.read(6) == b"\x93NUMPY":
                raise InputError(f"{path} holds one array; expected an .npz file with several: save it with numpy.savez")
            archive = Archive(path)
            file.seek(0)
            key = hashlib.file_digest(file, "sha256").hexdigest()
        if common.classes is None and "classes" in archive:
            common = replace(common, classes=_texts_of(archive, "classes", path))
        notes: list[str] = []
        return _gathered(path.stem, _grouped(archive, path, Names(notes)), common, key, [], notes)
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"data file {path} cannot be read: {error.strerror or 'it is damaged'}; check the path") from error
    except DAMAGE as error:
        why = str(error).split("\n")[0]
        raise InputError(
            f"{path} is damaged or not an .npz file of plain arrays ({why}); save it again with numpy.savez"
        ) from error


def _texts_of(archive: Archive, key: str, path: Path) -> list[str]:
    """Return an array of texts or whole numbers as texts; raise `InputError` if it holds anything else."""
    shape, _, kind = archive.header(key)
    if len(shape) != 1 or kind.kind not in "USiu":
        raise InputError(f"{path}: expected {key!r} as texts [n], got {kind} {list(shape)}; save it as an array of texts")
    try:
        return [name.decode() if isinstance(name, bytes) else str(name) for name in archive[key].tolist()]
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: {key!r} has texts that are not UTF-8 ({error.reason}); save them as texts") from error


def _sites_of(archive: Archive, path: Path, names: Names) -> list[str]:
    """Return the site of each image: `domains[domain[i]]`."""
    given, number = [names(name) for name in _texts_of(archive, "domains", path)], archive["domain"]
    try:
        _check_numbers(number, number.size, "numbers of 'domain'", len(given))
    except UnreadableError as error:
        raise InputError(f"{path}: {error}; they are places in 'domains', which has {len(given)} names") from error
    return [given[place] for place in number.tolist()]


def _grouped(archive: Archive, path: Path, names: Names) -> list[Block]:
    blocks = []
    for key in archive.files:
        head, _, tail = key.rpartition("_")
        sites: Any = names(path.stem)
        if tail == "images" and head in SPLIT_NAMES:
            split, partner = SPLIT_NAMES[head], f"{head}_labels"
        elif head == "x" and tail in SPLIT_NAMES:
            split, partner = SPLIT_NAMES[tail], f"y_{tail}"
        elif head.endswith("_x") and tail in SPLIT_NAMES:
            sites, split, partner = names(head[:-2]), SPLIT_NAMES[tail], f"{head[:-1]}y_{tail}"
        elif key == "x":
            split, partner = WHOLE, "y"
            if "domain" in archive and "domains" in archive:
                sites = _sites_of(archive, path, names)
                rows = archive.header(key)[0][:1]
                if (len(sites),) != rows:
                    raise InputError(f"{path}: 'domain' has {len(sites)} numbers, 'x' {list(rows)} images; save one for each")
        else:
            continue
        count, chunks = _member(archive, key)
        if partner not in archive:
            raise InputError(f"{path} has {key!r} but no {partner!r}; save the labels beside the images")
        blocks.append(Block(sites, split, count, chunks, archive[partner], key))
    if not blocks:
        keys = ", ".join(sorted(archive.files)[:20]) or "nothing"
        raise InputError(f"{path}: expected keys SITE_x_train, SITE_y_train or train_images, train_labels, got {keys}")
    return blocks


def _member(archive: Archive, key: str) -> tuple[int, Chunks]:
    """Return the number of rows of an array, and its rows in chunks, without reading the whole array."""
    shape, columns_first, kind = archive.header(key)
    if columns_first or len(shape) < 3:
        values = archive[key]
        return (len(values) if values.ndim else 0), _whole(values)

    def chunks() -> Iterator[NDArray[Any]]:
        with archive.rows(key) as stream:
            yield from _read(stream, shape, kind)

    return shape[0], chunks


def _read(stream: IO[bytes] | gzip.GzipFile, shape: tuple[int, ...], kind: np.dtype[Any]) -> Iterator[NDArray[Any]]:
    each = math.prod(shape[1:]) * kind.itemsize
    most = max(1, min(_ROWS, _PIECE // max(each, 1)))
    for start in range(0, max(1, shape[0]), most):
        count = min(most, shape[0] - start)
        check_size(count * each)
        data = stream.read(count * each)
        if len(data) != count * each:
            raise EOFError("the file ends too early")
        yield np.frombuffer(data, kind).reshape(count, *shape[1:])


def idx(path: str | Path, **options: Any) -> Federation:
    """Return the federation in MNIST's idx files, plain or gzipped: train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-…

    Args:
        path: a folder of such files, which is one site, or a folder of such folders, one per site. A prefix of the file
            names (EMNIST's emnist-letters-) names a site.
        options: the fields of `ReaderOptions`.

    Raises:
        InputError: if files are missing or damaged.
    """
    common, root = reader_options(options), expanded(path)
    found = [file for file in matching(root, "*images*", below=True) if is_file(file) and _IDX.fullmatch(file.name)]
    if not found:
        raise InputError(f"{root} has no idx files; expected train-images-idx3-ubyte and train-labels-idx1-ubyte")
    blocks, faults, key = [], [], hashlib.sha256()
    notes: list[str] = []
    names, here = Names(notes), set()
    plain = len({file.parent for file in found}) == 1
    for file in found:
        match = _IDX.fullmatch(file.name)
        assert match
        site = names(match["prefix"] or (resolved(root).name if plain else file.parent.relative_to(root).parts[0]))
        here.add(site)
        if common.sites is not None and site not in common.sites:
            continue
        partner = file.with_name(file.name.replace("-images", "-labels").replace("idx3", "idx1"))
        other = partner.with_suffix("") if partner.suffix == ".gz" else partner.with_name(f"{partner.name}.gz")
        label_file = next((each for each in (partner, other) if is_file(each)), None)
        if label_file is None:
            faults.append(f"{file.name} has no {partner.name} in its folder")
            continue
        try:
            shape, chunks = _idx(file, 3)
            label = np.concatenate(list(_idx(label_file, 1)[1]()))
            for each in (file, label_file):
                with open_regular(each) as content:
                    key.update(hashlib.file_digest(content, "sha256").digest())
        except DAMAGE as error:
            faults.append(f"{file.relative_to(root)} or its labels are damaged ({error}); download them again")
            continue
        split = "test" if match["split"] == "t10k" else SPLIT_NAMES[match["split"]]
        blocks.append(Block(site, split, shape[0], chunks, label, f"{site}/{split}"))
    faults += absent_sites(common.sites or (), here)
    refuse(root.name, faults)
    try:
        return _gathered(resolved(root).name, blocks, common, key.hexdigest(), faults, notes)
    except InputError:
        raise
    except DAMAGE as error:
        raise InputError(f"the idx files in {root} are damaged ({error}); download them again") from error


def _idx(path: Path, dimensions: int) -> tuple[tuple[int, ...], Chunks]:
    """Return the shape and the rows of one idx file of bytes."""

    @contextmanager
    def opened() -> Iterator[IO[bytes] | gzip.GzipFile]:
        with open_regular(path) as raw:
            yield gzip.GzipFile(fileobj=raw) if packed else raw

    packed = path.suffix == ".gz"
    with opened() as stream:
        head = stream.read(4 + 4 * dimensions)
    if head[:4] != bytes([0, 0, 8, dimensions]) or len(head) != 4 + 4 * dimensions:
        raise ValueError(f"{path.name} does not have the header of an idx file of bytes with {dimensions} dimensions")
    shape = tuple(int(side) for side in np.frombuffer(head[4:], ">u4"))
    needed, held = math.prod(shape) + len(head), path.stat().st_size
    if packed:
        plausible(needed, held)
    elif needed > held:
        raise EOFError("the file ends too early")

    def chunks() -> Iterator[NDArray[Any]]:
        with opened() as stream:
            stream.read(len(head))
            yield from _read(stream, shape, np.dtype(np.uint8))

    return shape, chunks
