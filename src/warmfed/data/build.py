"""Build a federation from examples: partition, split and check them, and lay each table out in one block of memory."""

import hashlib
import json
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..core import SPLITS
from ..core.rng import random_state
from ..core.tensors import Table, rows
from ..utils.errors import InputError, suggest
from ..utils.files import read_json, write_json
from ..utils.names import lookalikes, plain_name
from ..utils.paths import expanded
from .decode import Entry, pictures
from .examples import WHOLE, Examples, ReaderOptions, Texts, absent_sites, digests, names_in_order, refuse, texts
from .federation import Federation, Site
from .image_cache import Cache, Mapped
from .partition import Partition, Rule
from .splits import DROPPED, PUBLIC, remarks, split

DARK = 31
"""Largest pixel value of a site whose images are called dark."""
HELD = 256 * 2**20
"""Bytes of images that are kept in memory; a larger set is memory-mapped from a file of the cache."""


def finished(
    name: str,
    entries: list[Entry],
    common: ReaderOptions,
    faults: list[str],
    notes: list[str],
    order: tuple[str, ...] = (),
    sites: Collection[str] = (),
) -> Federation:
    """Return the federation of encoded pictures, restricted to the sites and classes of the options.

    Args:
        name: the federation's name, unless the options set one.
        entries: the pictures.
        common: the reader's options.
        faults: faults that the reader found; this function adds its own.
        notes: remarks that the reader made; this function adds its own.
        order: class names in the source's order, used if they are exactly the classes found.
        sites: names of all sites of the source, if the reader gives only the pictures of `common.sites`.

    Raises:
        DataError: if there are faults.
    """
    if common.sites is not None:
        faults += absent_sites(common.sites, [*sites, *(entry.site for entry in entries)])
        entries = [entry for entry in entries if entry.site in common.sites]
    found = {entry.label for entry in entries}
    classes = order if order and set(order) == found else names_in_order(found)
    if common.classes is not None:
        faults += [f"there is no class {each!r}{suggest(each, sorted(found))}" for each in common.classes if each not in found]
        left = found - set(common.classes)
        if left:
            notes.append(f"the classes {', '.join(names_in_order(left))} were left out")
        classes, entries = tuple(common.classes), [entry for entry in entries if entry.label in common.classes]
    partitioning = None if common.partition is None else Partition(**common.partition)
    examples = pictures(entries, classes, common, faults, notes)
    options = replace(common, sites=None)
    return assemble(common.name or name, examples, classes, options, partitioning, faults=faults, notes=notes)


def assemble(
    name: str,
    examples: Examples,
    classes: Sequence[str],
    options: ReaderOptions,
    partitioning: Partition | None = None,
    *,
    faults: Sequence[str] = (),
    notes: Sequence[str] = (),
) -> Federation:
    """Return the federation of examples.

    Args:
        name: the federation's name.
        examples: the images; a label is an index in `classes`.
        classes: class names.
        options: the reader's options.
        partitioning: the rule that assigns the images to new sites; None keeps the sites.
        faults: faults that the reader found.
        notes: remarks that the reader made.

    Raises:
        DataError: with all faults, those of the reader included.
        InputError: if the partition cannot be made.
    """
    faults, notes = list(faults), list(notes)
    if options.sites is not None:
        faults += absent_sites(options.sites, examples.site.tolist())
        examples = _only(examples, np.isin(examples.site, list(options.sites)))
    examples = replace(examples, name=_numbered(examples.name))
    sound = _checked(examples, classes, partitioned=partitioning is not None, faults=faults, notes=notes)
    notes += lookalikes(classes, "classes", "if they are one class, give them one name")
    if partitioning is None:
        notes += lookalikes(sound, "sites", "if they are one site, give them one name")
    if not len(examples.label) and not faults:
        faults.append("expected at least one site, got none")
    if options.limit:
        examples = _limited(examples, options.limit, options.seed)
    if partitioning is not None:
        refuse(name, faults)
        if partitioning.rule == "file":
            if options.public:
                raise InputError("a saved partition has no public images; remove the option public")
            examples = _repartitioned(examples, expanded(partitioning.path))
        else:
            parts = partitioning.parts(examples.label, {"site": examples.site, "name": examples.name})
            site = np.full(len(examples.label), "", dtype=f"<U{5 + len(str(len(parts)))}")
            for turn, part in enumerate(parts):
                site[part] = f"site-{turn:0{len(str(len(parts) - 1))}}"
            examples = _only(replace(examples, site=site), site != "")
        sound = _checked(examples, classes, partitioned=True, faults=faults, notes=[])
        name = f"{name} partitioned into {len(np.unique(examples.site))} by {partitioning.rule}"

    good = _only(examples, np.isin(examples.site, sound))
    splits = split(good, {"test": options.test, "validation": options.validation, PUBLIC: options.public}, options.seed)
    faults += [
        f"site {site!r} has no {part} images; give it more images or change the shares"
        for site in sound for part in SPLITS if not ((good.site == site) & (splits == part)).any()
    ]  # fmt: skip
    refuse(name, faults)
    sites, origin, public = _laid_out(replace(good, split=splits), options.store)
    if public:
        notes.append(f"{rows(public)} images are public: no site has them, and a base may be pre-trained on them")
    notes += remarks(good, splits) + _dark(good)
    return Federation(name, tuple(classes), options.template, sites, tuple(notes), origin, examples.sides, public)


def _numbered(names: Texts) -> Texts:
    """Return the names, with " (2)", " (3)", … after repeated ones: a saved partition tells the rows of a table apart."""
    if len(np.unique(names)) == len(names):
        return names
    seen: set[str] = set()
    last: dict[str, int] = {}
    found = []
    for name in names.tolist():
        new, turn = name, last.get(name, 1)
        while new in seen:
            turn += 1
            new = f"{name} ({turn})"
        last[name] = turn
        seen.add(new)
        found.append(new)
    return texts(found)


def _dark(examples: Examples) -> list[str]:
    """Return a note for each site whose images are nearly black, such as masks and class indices saved as pixels."""
    found = []
    for site in np.unique(examples.site).tolist():
        rows = np.flatnonzero(examples.site == site)
        rows = rows if examples.at is None else examples.at[rows]
        top = 0
        for start in range(0, len(rows), 256):  # the first ones suffice, unless all are dark
            top = max(top, int(examples.images[rows[start : start + 256]].max(initial=0)))
            if top > DARK:
                break
        else:
            found.append(f"no pixel of site {site!r} is above {top} of 255: its images look black; check how they were saved")
    return found


def _only(examples: Examples, mask: NDArray[np.bool_]) -> Examples:
    """Return the examples of the rows in `mask`, without a copy of the images (`Examples.at`)."""
    if mask.all():
        return examples
    at = examples.at if examples.at is not None else np.arange(len(examples.label))
    group = None if examples.group is None else examples.group[mask]
    return replace(examples, **examples.take(mask), digest=examples.digest[mask], group=group, at=at[mask])


def _limited(examples: Examples, limit: int, seed: int) -> Examples:
    """Return at most `limit` images of each site, class and split, in the same order."""
    order = random_state("limit", seed).permutation(len(examples.label))
    kinds = np.unique(np.stack([examples.site, examples.split, examples.label.astype(np.str_)]), axis=1, return_inverse=True)[1]
    chosen = np.zeros(len(order), dtype=np.bool_)
    for kind in np.unique(kinds):
        chosen[order[kinds[order] == kind][:limit]] = True
    return _only(examples, chosen)


def _checked(examples: Examples, classes: Sequence[str], partitioned: bool, faults: list[str], notes: list[str]) -> list[str]:
    """Return the sites with usable labels; add the faults of the others and notes on missing classes to the lists."""
    sound = []
    for site in np.unique(examples.site).tolist():
        found = np.unique(examples.label[examples.site == site]).tolist()
        if found[0] < 0 or found[-1] >= len(classes):
            faults.append(f"site {site!r}: expected labels 0 to {len(classes) - 1}, got {found[0]} to {found[-1]}")
        elif len(found) < 2 and not partitioned:
            faults.append(f"site {site!r} has one class only, {classes[found[0]]!r}; at least two are needed to learn from")
        else:
            sound.append(site)
            if missing := [label for i, label in enumerate(classes) if i not in found]:
                notes.append(
                    f"site {site!r} has no images of {_some(missing)}; its test does not show how a model does on them"
                )
    return sound


def _some(names: Sequence[str], most: int = 12) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more classes" if len(names) > most else "")


def _laid_out(examples: Examples, cache: Cache) -> tuple[dict[str, Site], dict[str, dict[str, tuple[str, ...]]], Table | None]:
    """Return the sites, the names of their images by site and split, and the public table.

    The tables are contiguous, ordered by split and then by site.
    """
    parts = (*SPLITS, PUBLIC, DROPPED)
    rank = np.array([parts.index(part) for part in examples.split.tolist()])
    order = np.lexsort((examples.site, rank))[: int((rank < len(parts) - 1).sum())]
    kept, at = examples.take(order), order if examples.at is None else examples.at[order]
    shape = (len(order), *examples.images.shape[1:])

    def fill(into: NDArray[np.uint8]) -> None:
        for start in range(0, len(at), 1024):
            into[start : start + 1024] = examples.images[at[start : start + 1024]]

    path, images = None, np.zeros(0, np.uint8)
    if examples.key and np.prod(shape, dtype=np.int64) > HELD:
        name = hashlib.sha256(examples.key.encode() + at.astype("<i8").tobytes()).hexdigest()
        images, path = cache.array(name, shape, fill), cache.path(name)
    else:
        images = np.empty(shape, np.uint8)
        fill(images)
    whole, label = torch.from_numpy(images), torch.from_numpy(kept["label"])

    def table(found: NDArray[np.bool_]) -> tuple[Table, tuple[str, ...]]:
        """Return the table of these rows, which are contiguous, and their names in the source."""
        at = np.flatnonzero(found)
        start, stop = int(at[0]), int(at[-1]) + 1
        mapped = path and Mapped(path, shape, start, stop, label[start:stop])
        held = mapped or {"image": whole[start:stop], "label": label[start:stop]}
        return held, tuple(kept["name"][start:stop].tolist())

    tables: dict[str, dict[str, Table]] = {}
    origin: dict[str, dict[str, tuple[str, ...]]] = {}
    for site in np.unique(kept["site"]).tolist():
        for part in SPLITS:
            held, names = table((kept["site"] == site) & (kept["split"] == part))
            tables.setdefault(site, {})[part] = held
            origin.setdefault(site, {})[part] = names
    public = kept["split"] == PUBLIC
    return {site: Site(**each) for site, each in tables.items()}, origin, table(public)[0] if public.any() else None


def partition(federation: Federation, sites: int = 0, rule: Rule = "iid", **options: Any) -> Federation:
    """Return a federation with the images of `federation` on `sites` new sites. Each image keeps its split.

    Args:
        federation: the images.
        sites: number of new sites.
        rule: a rule of `partition.Partition`.
        options: the other fields of `Partition`.

    Raises:
        InputError: if the partition cannot be made, or a site would have an empty split.
    """
    partitioning = Partition(sites, rule, **options)
    tables = [(site, part, table) for site, each in federation.sites.items() for part, table in each.splits.items()]
    images = torch.cat([table["image"] for _, _, table in tables]).numpy()
    found = np.empty((len(images), 32), np.uint8)
    digests(images, found)
    examples = Examples(
        images,
        torch.cat([table["label"] for _, _, table in tables]).numpy(),
        texts(site for site, _, table in tables for _ in range(rows(table))),
        texts(part for _, part, table in tables for _ in range(rows(table))),
        texts(f"{site}/{part}/{i}" for site, part, table in tables for i in range(rows(table))),
        found,
    )
    common = ReaderOptions(template=federation.template)
    return assemble(federation.name, examples, federation.classes, common, partitioning, notes=federation.notes)


def save_partition(federation: Federation, path: Path) -> str:
    """Write the site and split of each image, by its name in the source, and return the SHA-256 of this assignment.

    partition={"rule": "file", "path": …} reads the file.

    Raises:
        InputError: if the images of the federation have no names in a source.
    """
    if not federation.origin:
        raise InputError(f"{federation.name} has no names of its images in a source; load it from files to save its partition")
    named = {site: {part: list(names) for part, names in parts.items()} for site, parts in federation.origin.items()}
    digest = _digest(named)
    write_json(path, {"format": 1, "sha256": digest, "data_sha256": federation.fingerprint, "sites": named})
    return digest


def _digest(named: Any) -> str:
    return hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()


def _repartitioned(examples: Examples, path: Path) -> Examples:
    """Return the examples of a saved partition, with its sites and splits."""
    saved = read_json(path, "the partition")
    if not isinstance(saved, dict) or saved.get("format") != 1 or saved.get("sha256") != _digest(saved.get("sites")):
        raise InputError(f"the partition {path} is damaged or of another kind; write it again with `warmfed data --save`")
    row = {name: i for i, name in enumerate(examples.name.tolist())}
    named = [
        (plain_name(site), part, name)
        for site, parts in saved["sites"].items()
        for part, names in parts.items()
        for name in names
    ]
    absent = [name for _, _, name in named if name not in row]
    refuse(f"the partition {path}", [f"{name} is not in the data" for name in absent])
    rows = np.array([row[name] for _, _, name in named])
    if len(set(rows.tolist())) < len(rows):
        raise InputError(f"the partition {path} names an image twice; write it again with `warmfed data --save`")
    site, parts = np.full(len(row), "", dtype=object), np.full(len(row), WHOLE, dtype=object)
    site[rows], parts[rows] = [site for site, _, _ in named], [part for _, part, _ in named]
    mask = site != ""
    return _only(replace(examples, site=texts(site), split=texts(parts)), mask.astype(bool))
