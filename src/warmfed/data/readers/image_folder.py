"""Readers of pictures in folders and of pictures that a CSV table lists."""

import csv as tables
import io
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...utils.errors import InputError, suggest
from ...utils.files import open_regular, read_bytes
from ...utils.paths import children, exists, expanded, is_folder, matching, resolved
from ..build import finished
from ..decode import Entry
from ..examples import WHOLE, reader_options
from ..federation import SPLIT_NAMES, Federation
from ..image_io import SUFFIXES

_LAYOUT = "expected folders site/class/image, site/{train,validation,test}/class/image or class/image"
_LIST = re.compile(r"(?P<site>.+)_(?P<split>train|val|validation|crossval|test)(?P<kfold>_kfold)?\.txt")


def folder(path: str | Path, *, lists: str = "", **options: Any) -> Federation:
    """Return the federation of pictures in folders.

    The layout is PATH/site/class/image, PATH/site/{train,validation,test}/class/image, or one site without `site/`. The
    classes are the union over all sites, sorted (numbers by value), or those of `classes`, in that order. Notes give missing
    classes, and other files, which are ignored; hidden files are ignored too.

    Args:
        path: the folder.
        lists: folder of split lists, such as DomainNet's SITE_train.txt and SITE_test.txt or PACS's SITE_train_kfold.txt:
            lines `path label`, with paths relative to PATH. Empty: the lists in PATH itself, if any; "off": none.
        options: the fields of `ReaderOptions`.

    Raises:
        InputError: with all faults: empty or one-class sites, files that do not decode, lists that name missing files, …
    """
    common = reader_options(options)
    root = _root(path)
    faults: list[str] = []
    notes: list[str] = []
    entries = _entries(root, faults, notes)
    if not entries and not faults:
        raise InputError(f"{root} is not an image folder: {_LAYOUT}, got no image")
    order: tuple[str, ...] = ()
    if lists != "off":
        where = expanded(lists) if lists else root
        found = sorted(each for each in matching(where, "*.txt") if _LIST.fullmatch(each.name)) if is_folder(where) else []
        if lists and not found:
            raise InputError(f"{where} has no split lists; expected SITE_train.txt and SITE_test.txt")
        if found:
            entries, order = _listed(root, entries, found, faults, notes)
    return finished(resolved(root).name, entries, common, faults, notes, order)


def _root(path: str | Path) -> Path:
    root = expanded(path)
    if not is_folder(root):
        what = "is not a folder" if exists(root) else "does not exist"
        raise InputError(f"data folder {root} {what}; {_LAYOUT}")
    return root


def _inside(path: Path, *, folders: bool) -> list[Path]:
    """Return the folders or the files in a folder, sorted by name, without hidden ones."""
    try:
        return sorted(p for p in children(path) if not p.name.startswith(".") and is_folder(p) == folders)
    except OSError as error:
        raise InputError(f"data folder {path} cannot be read: {error.strerror}; check its permissions") from error


def _images(path: Path) -> list[Path]:
    return [file for file in _inside(path, folders=False) if file.suffix.lower() in SUFFIXES]


def _entries(root: Path, faults: list[str], notes: list[str]) -> list[Entry]:
    """Return all pictures below a folder."""
    below = _inside(root, folders=True)
    one = any(_images(each) for each in below) or (
        {"train"} <= {each.name for each in below} <= set(SPLIT_NAMES)
        and any(_images(c) for c in _inside(root / "train", folders=True))
    )
    entries = []
    for site in [root] if one else below:
        name = resolved(site).name if one else site.name
        held = _site(root, name, site, faults, notes)
        if not held:
            faults.append(f"site {name!r} is empty; give it images or leave it out")
        entries += held
    return entries


def _site(root: Path, name: str, site: Path, faults: list[str], notes: list[str]) -> list[Entry]:
    below = _inside(site, folders=True)
    if [each.name for each in below] == ["images"] and _inside(below[0], folders=True):  # the layout of Office-31
        site, below = below[0], _inside(below[0], folders=True)
    if not any(part.name in ("train", "training") and _inside(part, folders=True) for part in below):  # else it is a class
        return list(_members(root, name, site, WHOLE, notes))
    splits = [SPLIT_NAMES.get(part.name, "") for part in below]
    if "" in splits or len(set(splits)) < len(splits):
        found = ", ".join(part.name for part in below)
        faults.append(f"site {name!r}: expected the folders train, validation and test, got {found}")
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
        notes.append(f"{len(other)} entries in {where} are not images of a class and were ignored, {other[0].name} first")


def _listed(
    root: Path, entries: list[Entry], lists: list[Path], faults: list[str], notes: list[str]
) -> tuple[list[Entry], tuple[str, ...]]:
    """Return the pictures in the lists, with the lists' splits, and the classes in the order of the lists' labels."""
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
            notes.append(f"{path.name} was ignored, since there is no site {match['site']!r}")
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
        notes.append(f"{len(entries) - len(kept)} images were left out, since no list has them")
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
    """Return the federation of pictures in a CSV file, one per row, such as HAM10000's or CheXpert's.

    Args:
        path: the CSV file.
        image: column of the picture's path, or a pattern of columns: "patches/{patient}_{x}.png".
        label: column of the class.
        site: column of the site (the natural partition); empty: one site, with the file's name.
        split: column of train, validation or test; empty: random splits.
        group: column (patient, slide) whose images share one split.
        root: folder to which the paths are relative; empty: the folder of the CSV file.
        options: the fields of `ReaderOptions`.

    Raises:
        InputError: with all faults: missing columns or files, empty fields, unknown splits, …
    """
    common = reader_options(options)
    file = expanded(path)
    base = expanded(root) if root else file.parent
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
            faults.append(f"line {number}: expected an image, a label and a site, got an empty field")
        elif split and value["split"] not in SPLIT_NAMES:
            faults.append(f"line {number}: expected split train, validation or test, got {value['split']!r}")
        else:
            part = SPLIT_NAMES[value["split"]] if split else WHOLE
            entries.append(Entry(name, base / name, value["label"], value["site"] or file.stem, part, value["group"]))
    return finished(file.stem, entries, common, faults, notes)


def _rows(file: Path) -> Iterable[Mapping[str, str]]:
    try:
        with io.TextIOWrapper(open_regular(file), encoding="utf-8-sig", newline="") as lines:
            for row in tables.DictReader(lines):
                yield {key or "": value or "" for key, value in row.items() if isinstance(value, str | None)}
    except OSError as error:
        raise InputError(f"table {file} cannot be read: {error.strerror}; check the path") from error
    except (UnicodeDecodeError, tables.Error) as error:
        raise InputError(f"table {file} is not a CSV file in UTF-8 ({error}); save it again") from error


def camelyon17(path: str | Path, **options: Any) -> Federation:
    """Return WILDS's Camelyon17: each hospital is a site, and the images of a slide share one split.

    WILDS's own splits hold out whole hospitals; here each hospital has training, validation and test images.

    Args:
        path: folder with metadata.csv and patches.
        options: the fields of `ReaderOptions`.

    Raises:
        InputError: with all faults, if the data cannot be used.

    References:
        WILDS: Koh et al., 2021.
    """
    options = {"template": "a histology image of {} tissue", **options}
    common = reader_options(options)
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
            raise InputError(f"{root}/metadata.csv has no column {error}; expected WILDS's Camelyon17") from error
        if label:
            entries.append(Entry(name, root / name, label, site, WHOLE, f"slide-{slide}"))
        else:
            faults.append(f"metadata.csv, line {number}: expected tumor 0 or 1, got {row['tumor']!r}")
    return finished("camelyon17", entries, common, faults, [])
