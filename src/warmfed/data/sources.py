"""Where federations come from: the embedded one, folders of pictures, arrays in memory, `.npz` files."""

import inspect
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError, suggest
from . import partition
from .digits4 import digits4
from .federation import SPLITS, Federation
from .images import SUFFIXES, UnreadableError, decode, from_array
from .splits import WHOLE, Pile, Share, assemble, refuse

TEMPLATE = "a photo of a {}"
_FOLDERS = {"train": "train", "validation": "validation", "val": "validation", "valid": "validation", "test": "test"}
_LAYOUT = "folders site/class/image or site/{train,validation,test}/class/image were expected"


def load(name: str, /, *, deal: Mapping[str, Any] | None = None, **options: Any) -> Federation:
    """The federation of this name: "digits4", "folder:PATH" or a folder's path, or the path of a ".npz" file.

    `options` are those of `digits4`, `folder` or `npz`. `deal` holds the options of `partition.deal`, for data that
    shall be pooled and dealt to other sites: {"sites": 10, "rule": "dirichlet", "alpha": 0.3}.
    Raises InputError for an unknown name or option (with the nearest known one), and for data that cannot be used.
    """
    path, what = Path(name.removeprefix("folder:")).expanduser(), f"data {name!r}"
    if name == "digits4":
        federation = digits4(**_checked(digits4, options, what))
    elif name.startswith("folder:") or path.is_dir():
        federation = folder(path, **_checked(folder, options, what))
    elif path.suffix == ".npz":
        federation = npz(path, **_checked(npz, options, what))
    else:
        expected = "the name of a federation, a folder or an .npz file was expected"
        raise InputError(f"there is no {what}: {expected}{suggest(name, ['digits4'])}")
    if deal is None:
        return federation
    if not isinstance(deal, Mapping):
        raise InputError(f"the deal of data must be a table of options; got {deal!r}")
    return partition.deal(federation, **_checked(partition.deal, deal, "the deal of data"))


def folder(
    path: str | Path,
    image_size: int = 32,
    validation: float = 0.2,
    test: float = 0.2,
    template: str = TEMPLATE,
    seed: int = 0,
) -> Federation:
    """Pictures in folders: PATH/site/class/*.{png,jpg,jpeg,bmp,webp}, or PATH/site/{train,validation,test}/class/*.

    Pictures become RGB and are squeezed to `image_size` pixels square. Classes are the union of all sites', sorted
    (numbers by value); that a site lacks some is noted. `validation` and `test` are shares, drawn by `seed`; a site
    that has its own "test" or "validation" keeps it. Hidden files and files of other kinds are left out, and noted.
    Raises InputError with all faults at once: no such folder, empty or one-class sites, files that do not decode, ...
    """
    root = Path(path).expanduser()
    share = Share(validation, test, seed)
    if image_size < 1:
        raise InputError(f"an image_size of 1 pixel or more was expected, {image_size} came")
    if not root.is_dir():
        what = "is not a folder" if root.exists() else "does not exist"
        raise InputError(f"data folder {root} {what}; {_LAYOUT}")
    faults: list[str] = []
    notes: list[str] = []
    files: dict[str, dict[str, list[tuple[str, Path]]]] = {}
    for site in _inside(root, folders=True):
        files[site.name] = _scan(site, faults, notes)
    if not any(members for parts in files.values() for members in parts.values()):
        level = "; its folders hold images directly: put them into one folder per site" if _flat(root) else ""
        raise InputError(f"{root} is not an image folder: {_LAYOUT}, no image was found there{level}")

    classes = _sorted({name for parts in files.values() for members in parts.values() for name, _ in members})
    piles: dict[str, dict[str, Pile]] = {}
    for site_name, parts in files.items():
        piles[site_name] = {}
        for key, members in parts.items():
            images, labels = [], []
            for label, file in members:
                try:
                    images.append(decode(file, image_size))
                    labels.append(classes.index(label))
                except UnreadableError as error:
                    faults.append(f"{file.relative_to(root)} {error}")
            square = np.zeros((0, 3, image_size, image_size), np.uint8)
            piles[site_name][key] = Pile(np.stack(images) if images else square, np.array(labels, np.int64))
    return assemble(root.resolve().name, piles, classes, template, share, faults=faults, notes=notes)


def _inside(path: Path, *, folders: bool) -> list[Path]:
    """What is in a folder, sorted by name, without hidden things."""
    try:
        return sorted(p for p in path.iterdir() if not p.name.startswith(".") and p.is_dir() == folders)
    except OSError as error:
        raise InputError(f"data folder {path} cannot be read: {error.strerror}; check its permissions") from error


def _flat(root: Path) -> bool:
    files = [file for inner in _inside(root, folders=True) for file in _inside(inner, folders=False)]
    return any(file.suffix.lower() in SUFFIXES for file in files)


def _scan(site: Path, faults: list[str], notes: list[str]) -> dict[str, list[tuple[str, Path]]]:
    """The files of one site, {"all" or split: [(class, file)]}."""
    below = _inside(site, folders=True)
    if not any(part.name == "train" and _inside(part, folders=True) for part in below):  # else it is a class of this name
        return {WHOLE: _members(site, notes)}
    names = [_FOLDERS.get(part.name, "") for part in below]
    if "" in names or len(set(names)) < len(names):
        came = ", ".join(part.name for part in below)
        faults.append(f"site {site.name!r}: train, validation and test were expected beside each other, {came} came")
    return {name: _members(part, notes) for name, part in zip(names, below, strict=True) if name}


def _members(path: Path, notes: list[str]) -> list[tuple[str, Path]]:
    members, other = [], _inside(path, folders=False)
    for group in _inside(path, folders=True):
        for file in _inside(group, folders=False):
            if file.suffix.lower() in SUFFIXES:
                members.append((group.name, file))
            else:
                other.append(file)
        other += _inside(group, folders=True)
    if other:
        where = "/".join(path.parts[-2:])
        notes.append(f"{len(other)} things in {where} are no images of a class and were left out, {other[0].name} first")
    return members


def _sorted(names: Iterable[str]) -> tuple[str, ...]:
    """By value where all are numbers, so that class 10 follows 9."""
    names = set(names)
    return tuple(sorted(names, key=lambda name: (int(name), name)) if all(n.isdecimal() for n in names) else sorted(names))


def arrays(
    sites: Mapping[str, Any],
    *,
    classes: Sequence[str] | None = None,
    template: str = TEMPLATE,
    name: str = "arrays",
    image_size: int | None = None,
    validation: float = 0.2,
    test: float = 0.2,
    seed: int = 0,
) -> Federation:
    """Data in memory: {"site": (images, labels)}, or {"site": {"train": (images, labels), "test": …}} with own splits.

    Images are NumPy arrays or CPU tensors: uint8, or floats from 0 to 1; [n, h, w], [n, h, w, 3] or [n, 3, h, w].
    Labels are whole numbers [n] or [n, 1] from 0; `classes` names them, else they are called by their number.
    The other options are those of `folder`; without `image_size` the images keep their size.
    """
    share = Share(validation, test, seed)
    faults: list[str] = []
    piles: dict[str, dict[str, Pile]] = {}
    for site, given in sites.items():
        piles[site] = {}
        for key, pair in (given if isinstance(given, Mapping) else {WHOLE: given}).items():
            where = f"site {site!r}" + (f", {key}" if key != WHOLE else "")
            if isinstance(given, Mapping) and key not in SPLITS:
                faults.append(f"{where}: train, validation or test were expected{suggest(key, list(SPLITS))}")
                continue
            try:
                piles[site][key] = _pile(pair, image_size)
            except UnreadableError as error:
                faults.append(f"{where}: {error}")
        if isinstance(given, Mapping) and "train" not in given:
            faults.append(f"site {site!r}: a train split was expected, {', '.join(given) or 'nothing'} came")
    if classes is None:
        highest = max((int(p.labels.max()) for parts in piles.values() for p in parts.values() if len(p.labels)), default=0)
        classes = [str(label) for label in range(highest + 1)]
    refuse(name, faults)
    return assemble(name, piles, classes, template, share)


def _pile(pair: Any, image_size: int | None) -> Pile:
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        raise UnreadableError(f"a pair (images, labels) was expected, {type(pair).__name__} came")
    images, labels = from_array(pair[0], image_size), np.asarray(pair[1])
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.shape != (len(images),) or labels.dtype.kind not in "iu":
        raise UnreadableError(f"whole-number labels [{len(images)}] were expected, {labels.dtype} {list(labels.shape)} came")
    return Pile(images, labels.astype(np.int64))


def npz(
    path: str | Path,
    *,
    classes: Sequence[str] | None = None,
    template: str = TEMPLATE,
    image_size: int | None = None,
    validation: float = 0.2,
    test: float = 0.2,
    seed: int = 0,
) -> Federation:
    """Arrays in a file: keys SITE_{x,y}_{train,validation,test}, or MedMNIST's {train,val,test}_{images,labels}.

    MedMNIST's files are one site, named as the file; `load(…, deal={"sites": 5})` makes several of it. An array
    `classes` of names is used where `classes` is not given; other arrays are left alone. Options as in `arrays`.
    Raises InputError for what is no such file; objects in it are never unpickled.
    """
    path = Path(path).expanduser()
    try:
        with path.open("rb") as file:
            archive = np.load(file, allow_pickle=False)
            content = {key: archive[key] for key in archive.files} if isinstance(archive, np.lib.npyio.NpzFile) else None
    except OSError as error:
        raise InputError(f"data file {path} cannot be read: {error.strerror or 'it is damaged'}; check the path") from error
    except (ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"{path} is damaged or no .npz file of plain arrays; save it anew by numpy.savez") from error
    if content is None:
        raise InputError(f"{path} holds one array, an .npz file with several was expected; save it anew by numpy.savez")
    if classes is None and "classes" in content and content["classes"].dtype.kind == "U":
        classes = [str(name) for name in content["classes"]]
    sites = _grouped(content, path)
    return arrays(
        sites, classes=classes, template=template, name=path.stem,
        image_size=image_size, validation=validation, test=test, seed=seed,
    )  # fmt: skip


def _grouped(content: Mapping[str, NDArray[Any]], path: Path) -> dict[str, dict[str, tuple[NDArray[Any], NDArray[Any]]]]:
    sites: dict[str, dict[str, tuple[NDArray[Any], NDArray[Any]]]] = {}
    for key, values in content.items():
        head, _, tail = key.rpartition("_")
        if tail == "images" and head in _FOLDERS:
            site, split, partner = path.stem, _FOLDERS[head], f"{head}_labels"
        elif head.endswith("_x") and tail in _FOLDERS:
            site, split, partner = head[:-2], _FOLDERS[tail], f"{head[:-1]}y_{tail}"
        else:
            continue
        if partner not in content:
            raise InputError(f"{path} has {key!r} but no {partner!r}; save the labels beside the images")
        sites.setdefault(site, {})[split] = (values, content[partner])
    if not sites:
        keys = ", ".join(sorted(content)[:20]) or "nothing"
        raise InputError(f"{path}: keys SITE_x_train, SITE_y_train or train_images, train_labels were expected, {keys} came")
    return sites


def _checked(function: Callable[..., Any], options: Mapping[str, Any], what: str) -> dict[str, Any]:
    """`options` where each is a parameter of `function` and of its type; else InputError."""
    parameters = inspect.signature(function).parameters
    known = {key: p for key, p in parameters.items() if p.annotation not in (Federation, str | Path)}
    for key, value in options.items():
        if key not in known:
            raise InputError(f"{what} has no option {key!r}{suggest(key, list(known))}")
        kinds = [get_origin(kind) or kind for kind in get_args(known[key].annotation) or (known[key].annotation,)]
        if not any(_is_a(value, kind) for kind in kinds):
            names = " or ".join("none" if kind is type(None) else kind.__name__.lower() for kind in kinds)
            raise InputError(f"option {key!r} of {what}: {names} was expected, {value!r} came")
    missing = [key for key, p in known.items() if p.default is p.empty and key not in options]
    if missing:
        raise InputError(f"{what} needs {', '.join(missing)}")
    return dict(options)


def _is_a(value: object, kind: type) -> bool:
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, kind) and not (kind is Sequence and isinstance(value, str))
