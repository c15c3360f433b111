"""Reader of pictures in folders."""

import posixpath
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ...utils.errors import InputError
from ...utils.files import read_bytes
from ...utils.names import plain_name
from ...utils.paths import children, exists, expanded, is_folder, matching, resolved
from ..build import finished
from ..decode import Entry
from ..examples import WHOLE, Names, ReaderOptions, reader_options
from ..federation import SPLIT_NAMES, Federation
from ..image_io import SUFFIXES

_LAYOUT = "expected folders site/class/image, site/{train,validation,test}/class/image or class/image"
_FOREIGN = {
    "__MACOSX", "@eaDir", "#recycle", "@Recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found", "__pycache__",
}  # fmt: skip
"""Folders that operating systems, network storage and archives make beside a user's own."""
_LEVELS = 5
"""Levels of folders that are read, as in SITE/images/train/CLASS."""
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
    entries, sites = _entries(_tree(root), common, faults, notes)
    if not entries and not faults and not common.sites:
        raise InputError(f"{root} is not an image folder: {_LAYOUT}, got no image")
    order: tuple[str, ...] = ()
    if lists != "off":
        where = expanded(lists) if lists else root
        found = [each for each in matching(where, "*.txt") if _LIST.fullmatch(each.name)]
        if lists and not found:
            raise InputError(f"{where} has no split lists; expected SITE_train.txt and SITE_test.txt")
        if found:
            entries, order = _listed(entries, found, set(sites), faults, notes)
    return finished(resolved(root).name, entries, common, faults, notes, order, sites)


def _root(path: str | Path) -> Path:
    root = expanded(path)
    if not is_folder(root):
        what = "is not a folder" if exists(root) else "does not exist"
        raise InputError(f"data folder {root} {what}; {_LAYOUT}")
    return root


@dataclass(frozen=True, eq=False)
class _Folder:
    """A folder: its folders and files, sorted by name, without hidden ones and those that operating systems make."""

    path: Path
    folders: tuple["_Folder", ...]
    files: tuple[Path, ...]

    @property
    def name(self) -> str:
        return self.path.name

    @cached_property
    def images(self) -> tuple[Path, ...]:
        """Pictures directly in the folder."""
        return tuple(file for file in self.files if file.suffix.lower() in SUFFIXES)

    @cached_property
    def deep(self) -> tuple["_Folder", ...]:
        """Folders that have pictures at any depth."""
        return tuple(each for each in self.folders if each.images or each.deep)


def _tree(path: Path, levels: int = _LEVELS) -> _Folder:
    """Return a folder and what is below it, so many levels deep."""
    folders: list[Path] = []
    files: list[Path] = []
    for each in children(path) if levels else ():
        if not each.name.startswith(".") and each.name not in _FOREIGN:
            (folders if is_folder(each) else files).append(each)
    return _Folder(path, tuple(_tree(each, levels - 1) for each in folders), tuple(files))


def _entries(root: _Folder, common: ReaderOptions, faults: list[str], notes: list[str]) -> tuple[list[Entry], list[str]]:
    """Return all pictures below a folder, and the names of all sites."""
    names = Names(notes)
    sites = {names(resolved(root.path).name): [root]} if _is_one_site(root) else {}
    for folder in root.folders if not sites else ():
        sites.setdefault(names(folder.name), []).append(folder)
    entries = []
    for name, folders in sites.items():
        if common.sites is None or name in common.sites:
            held = [entry for site in folders for entry in _site(root, name, site, names, faults)]
            if not held:
                faults.append(f"site {name!r} is empty; give it images or leave it out")
            entries += held
    return entries, list(sites)


def _is_one_site(root: _Folder) -> bool:
    """Return whether the folders below are classes (or splits) of one site, not sites.

    A folder that has both pictures and folders of pictures is a site with stray pictures if it has two such folders or more,
    and a class with a stray folder if it has one.

    Raises:
        InputError: Some folders look like sites and others like classes.
    """
    if {"train"} <= {each.name for each in root.folders} <= set(SPLIT_NAMES):
        return any(each.images for part in root.folders if part.name == "train" for each in part.folders)
    sites = [each for each in root.folders if len(each.deep) > 1 or (each.deep and not each.images)]
    classes = [each for each in root.folders if each.images and each not in sites]
    if sites and classes:
        raise InputError(
            f"cannot tell sites from classes in {root.path}: {classes[0].name!r} has images directly in it "
            f"({classes[0].images[0].name}), {sites[0].name!r} has them in folders ({sites[0].deep[0].name!r}); {_LAYOUT}"
        )
    return bool(classes)


def _site(root: _Folder, name: str, site: _Folder, names: Names, faults: list[str]) -> list[Entry]:
    if [each.name for each in site.folders] == ["images"] and site.folders[0].folders:  # the layout of Office-31
        site = site.folders[0]
    if not any(part.name in ("train", "training") and part.folders for part in site.folders):  # else it is a class
        return list(_members(root, name, site, WHOLE, names))
    splits = [SPLIT_NAMES.get(part.name, "") for part in site.folders]
    if "" in splits or len(set(splits)) < len(splits):
        found = ", ".join(part.name for part in site.folders)
        faults.append(f"site {name!r}: expected the folders train, validation and test, got {found}")
    _ignored(site, list(site.files), names.notes)
    parts = zip(splits, site.folders, strict=True)
    return [entry for split, part in parts if split for entry in _members(root, name, part, split, names)]


def _members(root: _Folder, site: str, part: _Folder, split: str, names: Names) -> Iterator[Entry]:
    other = list(part.files)
    for group in part.folders:
        for file in group.images:
            yield Entry(file.relative_to(root.path).as_posix(), file, names(group.name), site, split)
        held = set(group.images)
        other += [file for file in group.files if file not in held] + [each.path for each in group.folders]
    _ignored(part, other, names.notes)


def _ignored(place: _Folder, files: list[Path], notes: list[str]) -> None:
    files = [each for each in files if not _LIST.fullmatch(each.name)]
    if files:
        where = "/".join(place.path.parts[-2:])
        notes.append(f"{len(files)} entries in {where} are not images of a class and were ignored, {files[0].name} first")


def _path_in_list(text: str) -> str:
    """Return a path as the reader names it: with slashes, without ./, in Unicode's form NFC."""
    return unicodedata.normalize("NFC", posixpath.normpath(text.replace("\\", "/")))


def _listed(
    entries: list[Entry], lists: list[Path], sites: set[str], faults: list[str], notes: list[str]
) -> tuple[list[Entry], tuple[str, ...]]:
    """Return the pictures in the lists, with the lists' splits, and the classes in the order of the lists' labels.

    Args:
        entries: the pictures.
        lists: the files.
        sites: names of all sites in the folder.
        faults: list of faults, extended here.
        notes: list of remarks, extended here.
    """
    known = {_path_in_list(entry.name): entry for entry in entries}
    given: dict[str, str] = {}
    numbers: dict[str, set[int]] = {}
    here = {entry.site for entry in entries}
    used = []
    for path in lists:
        match = _LIST.fullmatch(path.name)
        assert match
        split, site = SPLIT_NAMES[match["split"]], plain_name(match["site"])
        if match["kfold"] and split == "test":
            continue  # PACS: all images of the site, the other two lists together
        if site not in here:
            if site not in sites:
                notes.append(f"{path.name} was ignored, since there is no site {site!r}")
            continue
        used.append(site)
        # names of files that are not UTF-8 keep their bytes, as in `Entry.name`
        text = read_bytes(path, "the split list").decode("utf-8-sig", "surrogateescape")
        for number, line in enumerate(text.splitlines(), 1):
            if not line.strip():
                continue
            # the label follows the last blank or tab; the path may have blanks
            words = line.strip().rsplit(maxsplit=1)
            if len(words) < 2 or not words[1].isdecimal() or len(words[1]) > 9:
                faults.append(f"{path.name}, line {number}: expected `path label`, got {line.strip()[:60]!r}")
                continue
            file, label = _path_in_list(words[0]), int(words[1])
            if file not in known:
                faults.append(f"{path.name}, line {number}: {file} is not in the folder")
            elif given.setdefault(file, split) != split:
                faults.append(f"{path.name}, line {number}: {file} is in the {given[file]} list as well")
            else:
                numbers.setdefault(known[file].label, set()).add(label)
    for name, found in sorted(numbers.items()):
        if len(found) > 1:
            faults.append(f"the lists give class {name!r} several labels, {', '.join(map(str, sorted(found)))}")
    kept = [
        replace(entry, split=given.get(file, entry.split))
        for file, entry in ((_path_in_list(entry.name), entry) for entry in entries)
        if file in given or entry.site not in used
    ]
    notes.append(f"{len(set(used))} sites are split by the lists in {lists[0].parent.name}")
    if len(kept) < len(entries):
        notes.append(f"{len(entries) - len(kept)} images were left out, since no list has them")
    first = {label: min(found) for label, found in numbers.items()}
    different = len(set(first.values())) == len(first)
    return kept, tuple(sorted(first, key=lambda label: first[label])) if different else ()
