"""Pictures in folders, as people unpack them, and pictures named by a table (CSV)."""

import csv as tables
import io
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...utils.errors import InputError, suggest
from ...utils.files import open_regular, read_bytes
from ..build import finished
from ..decode import Entry
from ..examples import WHOLE, reader_options
from ..federation import SPLIT_NAMES, Federation
from ..image_io import SUFFIXES

_LAYOUT = "folders site/class/image, site/{train,validation,test}/class/image or class/image were expected"
_LIST = re.compile(r"(?P<site>.+)_(?P<split>train|val|validation|crossval|test)(?P<kfold>_kfold)?\.txt")


def folder(path: str | Path, *, lists: str = "", **options: Any) -> Federation:
    """Pictures in folders: PATH/site/class/image, PATH/site/{train,validation,test}/class/image, or one site without `site/`.

    Classes are the union of all sites', sorted (numbers by value), or those of `classes`, in that order; a site that
    lacks some is noted. Hidden files and files of other kinds are left out, and noted.

    Args:
        lists: folder of split lists, such as DomainNet's SITE_train.txt and SITE_test.txt or PACS's SITE_train_kfold.txt:
            lines `path label`, paths below PATH. Empty: those that lie in PATH itself, if any; "off": none.
        options: the fields of `pool.Common`.

    Raises:
        InputError: all faults at once: empty or one-class sites, files that do not decode, lists that name absent files, …
    """
    asked = reader_options(options)
    root = _root(path)
    faults: list[str] = []
    notes: list[str] = []
    entries = _entries(root, faults, notes)
    if not entries and not faults:
        raise InputError(f"{root} is not an image folder: {_LAYOUT}, no image was found there")
    order: tuple[str, ...] = ()
    if lists != "off":
        where = Path(lists).expanduser() if lists else root
        found = sorted(each for each in where.glob("*.txt") if _LIST.fullmatch(each.name)) if where.is_dir() else []
        if lists and not found:
            raise InputError(f"{where} holds no split lists; SITE_train.txt and SITE_test.txt were expected")
        if found:
            entries, order = _listed(root, entries, found, faults, notes)
    return finished(root.resolve().name, entries, asked, faults, notes, order)


def _root(path: str | Path) -> Path:
    root = Path(path).expanduser()
    if not root.is_dir():
        what = "is not a folder" if root.exists() else "does not exist"
        raise InputError(f"data folder {root} {what}; {_LAYOUT}")
    return root


def _inside(path: Path, *, folders: bool) -> list[Path]:
    """What is in a folder, sorted by name, without hidden things."""
    try:
        return sorted(p for p in path.iterdir() if not p.name.startswith(".") and p.is_dir() == folders)
    except OSError as error:
        raise InputError(f"data folder {path} cannot be read: {error.strerror}; check its permissions") from error


def _images(path: Path) -> list[Path]:
    return [file for file in _inside(path, folders=False) if file.suffix.lower() in SUFFIXES]


def _entries(root: Path, faults: list[str], notes: list[str]) -> list[Entry]:
    """All pictures below a folder."""
    below = _inside(root, folders=True)
    one = any(_images(each) for each in below) or (
        {"train"} <= {each.name for each in below} <= set(SPLIT_NAMES)
        and any(_images(c) for c in _inside(root / "train", folders=True))
    )
    entries = []
    for site in [root] if one else below:
        name = site.resolve().name if one else site.name
        held = _site(root, name, site, faults, notes)
        if not held:
            faults.append(f"site {name!r} is empty; give it images or leave it out")
        entries += held
    return entries


def _site(root: Path, name: str, site: Path, faults: list[str], notes: list[str]) -> list[Entry]:
    below = _inside(site, folders=True)
    if [each.name for each in below] == ["images"] and _inside(below[0], folders=True):  # as Office-31 is packed
        site, below = below[0], _inside(below[0], folders=True)
    if not any(part.name in ("train", "training") and _inside(part, folders=True) for part in below):  # else it is a class
        return list(_members(root, name, site, WHOLE, notes))
    splits = [SPLIT_NAMES.get(part.name, "") for part in below]
    if "" in splits or len(set(splits)) < len(splits):
        came = ", ".join(part.name for part in below)
        faults.append(f"site {name!r}: train, validation and test were expected beside each other, {came} came")
    return [e for split, part in zip(splits, below, strict=True) if split for e in _members(root, name, part, split, notes)]


def _members(root: Path, site: str, path: Path, split: str, notes: list[str]) -> Iterable[Entry]:
    other = _inside(path, folders=False)
    for group in _inside(path, folders=True):
        for file in _inside(group, folders=False):
            if file.suffix.lower() in SUFFIXES:
                yield Entry(file.relative_to(root).as_posix(), file, group.name, site, split)
            else:
                other.append(file)
        other += _inside(group, folders=True)
    other = [each for each in other if not _LIST.fullmatch(each.name)]
    if other:
        where = "/".join(path.parts[-2:])
        notes.append(f"{len(other)} things in {where} are no images of a class and were left out, {other[0].name} first")


def _listed(
    root: Path, entries: list[Entry], lists: list[Path], faults: list[str], notes: list[str]
) -> tuple[list[Entry], tuple[str, ...]]:
    """The pictures that lists name, in the splits that they say, and the order of the classes by the lists' labels."""
    known = {entry.name: entry for entry in entries}
    given: dict[str, str] = {}
    numbers: dict[str, set[int]] = {}
    sites = {entry.site for entry in entries}
    used = []
    for path in lists:
        match = _LIST.fullmatch(path.name)
        assert match
        split = SPLIT_NAMES[match["split"]]
        if match["kfold"] and split == "test":
            continue  # PACS: all images of the site, the other two lists together
        if match["site"] not in sites:
            notes.append(f"{path.name} was left alone, since there is no site {match['site']!r}")
            continue
        used.append(match["site"])
        for number, line in enumerate(read_bytes(path, "the split list").decode(errors="replace").splitlines(), 1):
            if not line.strip():
                continue
            file, _, label = line.strip().rpartition(" ")
            if not file or not label.isdecimal() or len(label) > 9:
                faults.append(f"{path.name}, line {number}: expected `path label`, got {line.strip()[:60]!r}")
            elif file not in known:
                faults.append(f"{path.name}, line {number}: {file} is not in the folder")
            elif given.setdefault(file, split) != split:
                faults.append(f"{path.name}, line {number}: {file} is in the {given[file]} list as well")
            else:
                numbers.setdefault(known[file].label, set()).add(int(label))
    for label, found in sorted(numbers.items()):
        if len(found) > 1:
            faults.append(f"the lists give class {label!r} several labels, {', '.join(map(str, sorted(found)))}")
    kept = [replace(e, split=given[e.name]) if e.name in given else e for e in entries if e.name in given or e.site not in used]
    notes.append(f"{len(set(used))} sites are split by the lists in {lists[0].parent.name}")
    if len(kept) < len(entries):
        notes.append(f"{len(entries) - len(kept)} images that are in no list were left out")
    first = {label: min(found) for label, found in numbers.items()}
    different = len(set(first.values())) == len(first)
    return kept, tuple(sorted(first, key=lambda label: first[label])) if different else ()


def csv(
    path: str | Path,
    *,
    image: str = "image",
    label: str = "label",
    site: str = "",
    split: str = "",
    group: str = "",
    root: str = "",
    **options: Any,
) -> Federation:
    """Pictures that a CSV file names, one a row, such as HAM10000's or CheXpert's.

    Args:
        image: column of the picture's path, or a pattern of columns: "patches/{patient}_{x}.png".
        label: column of the class.
        site: column of the site (the natural partition); empty: one site, named as the file.
        split: column of train, validation or test; empty: they are drawn.
        group: column (patient, slide) whose images stay in one split together.
        root: where the paths start; empty: the folder of the CSV file.
        options: the fields of `pool.Common`.

    Raises:
        InputError: all faults at once: missing columns, absent files, empty fields, unknown splits, …
    """
    asked = reader_options(options)
    file = Path(path).expanduser()
    base = Path(root).expanduser() if root else file.parent
    columns = {"label": label, "site": site, "split": split, "group": group}
    pattern = image if "{" in image else "{" + image + "}"
    faults: list[str] = []
    notes: list[str] = []
    entries = []
    for number, row in enumerate(_rows(file), 2):
        try:
            name = pattern.format_map(row)
            value = {what: row[column] if column else "" for what, column in columns.items()}
        except (KeyError, IndexError, ValueError, AttributeError) as error:
            raise InputError(f"{file} has no column {error}{suggest(str(error.args[0]), list(row))}") from error
        if not name or not value["label"] or (site and not value["site"]):
            faults.append(f"line {number}: an image, a label and a site were expected, a field is empty")
        elif split and value["split"] not in SPLIT_NAMES:
            faults.append(f"line {number}: expected split train, validation or test, got {value['split']!r}")
        else:
            part = SPLIT_NAMES[value["split"]] if split else WHOLE
            entries.append(Entry(name, base / name, value["label"], value["site"] or file.stem, part, value["group"]))
    return finished(file.stem, entries, asked, faults, notes)


def _rows(file: Path) -> Iterable[Mapping[str, str]]:
    try:
        with io.TextIOWrapper(open_regular(file), encoding="utf-8-sig", newline="") as lines:
            for row in tables.DictReader(lines):
                yield {key or "": value or "" for key, value in row.items() if isinstance(value, str | None)}
    except OSError as error:
        raise InputError(f"table {file} cannot be read: {error.strerror}; check the path") from error
    except (UnicodeDecodeError, tables.Error) as error:
        raise InputError(f"table {file} is no CSV file in UTF-8 ({error}); save it anew") from error


def camelyon17(path: str | Path, **options: Any) -> Federation:
    """WILDS's Camelyon17 (Koh et al. 2021): PATH/metadata.csv and PATH/patches; a hospital is a site, a slide stays whole.

    WILDS's own splits hold out whole hospitals and share slides; here each hospital trains, validates and tests.
    """
    options = {"template": "a histology image of {} tissue", **options}
    asked = reader_options(options)
    root = _root(path)
    faults: list[str] = []
    entries = []
    for number, row in enumerate(_rows(root / "metadata.csv"), 2):
        try:
            patient, node, slide = row["patient"], row["node"], row["slide"]
            stem = f"patient_{patient}_node_{node}"
            name = f"patches/{stem}/patch_{stem}_x_{row['x_coord']}_y_{row['y_coord']}.png"
            label = {"0": "normal", "1": "tumor"}.get(row["tumor"], "")
            site = f"hospital-{row['center']}"
        except KeyError as error:
            raise InputError(f"{root}/metadata.csv has no column {error}; WILDS's Camelyon17 was expected") from error
        if label:
            entries.append(Entry(name, root / name, label, site, WHOLE, f"slide-{slide}"))
        else:
            faults.append(f"metadata.csv, line {number}: expected tumor 0 or 1, got {row['tumor']!r}")
    return finished("camelyon17", entries, asked, faults, [])
