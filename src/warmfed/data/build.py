"""From a pool of images to a federation: dealt, split, checked, and laid out so that each table is one piece of memory."""

import hashlib
import json
from collections.abc import Sequence
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
from .decode import Entry, pictures
from .examples import WHOLE, Examples, ReaderOptions, digests, names_in_order, refuse, texts
from .federation import Federation, Site
from .image_cache import Cache, Mapped
from .partition import Partition, Rule
from .splits import DROPPED, PUBLIC, remarks, split

HELD = 256 * 2**20
"""Bytes of images that are held in memory; more of them are laid out in a file of the cache, and mapped."""


def finished(
    name: str, entries: list[Entry], asked: ReaderOptions, faults: list[str], notes: list[str], order: tuple[str, ...] = ()
) -> Federation:
    """The federation of these pictures, of the sites and classes that are asked for."""
    if asked.sites is not None:
        here = sorted({entry.site for entry in entries})
        faults += [f"there is no site {site!r}{suggest(site, here)}" for site in asked.sites if site not in here]
        entries = [entry for entry in entries if entry.site in asked.sites]
    found = {entry.label for entry in entries}
    classes = order if order and set(order) == found else names_in_order(found)
    if asked.classes is not None:
        faults += [f"there is no class {each!r}{suggest(each, sorted(found))}" for each in asked.classes if each not in found]
        left = found - set(asked.classes)
        if left:
            notes.append(f"the classes {', '.join(names_in_order(left))} were left out")
        classes, entries = tuple(asked.classes), [entry for entry in entries if entry.label in asked.classes]
    deal = None if asked.partition is None else Partition(**asked.partition)
    pool = pictures(entries, classes, asked, faults)
    return assemble(asked.name or name, pool, classes, replace(asked, sites=None), deal, faults=faults, notes=notes)


def assemble(
    name: str,
    pool: Examples,
    classes: Sequence[str],
    options: ReaderOptions,
    deal: Partition | None = None,
    *,
    faults: Sequence[str] = (),
    notes: Sequence[str] = (),
) -> Federation:
    """The federation of a pool whose labels are places in `classes`.

    `faults` are those that the reader of the data has found; raises DataError with them and with all that are found here.
    """
    faults, notes = list(faults), list(notes)
    if options.sites is not None:
        here = set(pool.site.tolist())
        faults += [f"there is no site {site!r} among {', '.join(sorted(here))}" for site in options.sites if site not in here]
        pool = _only(pool, np.isin(pool.site, list(options.sites)))
    sound = _checked(pool, classes, dealt=deal is not None, faults=faults, notes=notes)
    if not len(pool.label) and not faults:
        faults.append("expected at least one site, got none")
    if options.limit:
        pool = _limited(pool, options.limit, options.seed)
    if deal is not None:
        refuse(name, faults)
        if deal.rule == "file":
            if options.public:
                raise InputError("a saved partition holds what the sites have and nothing public; take the option public out")
            pool = _redealt(pool, Path(deal.path).expanduser())
        else:
            parts = deal.parts(pool.label, {"site": pool.site, "name": pool.name})
            site = np.full(len(pool.label), "", dtype=f"<U{5 + len(str(len(parts)))}")
            for turn, part in enumerate(parts):
                site[part] = f"site-{turn:0{len(str(len(parts) - 1))}}"
            pool = _only(replace(pool, site=site), site != "")
        sound = _checked(pool, classes, dealt=True, faults=faults, notes=[])
        name = f"{name} dealt to {len(np.unique(pool.site))} by {deal.rule}"

    good = _only(pool, np.isin(pool.site, sound))
    splits = split(good, {"test": options.test, "validation": options.validation, PUBLIC: options.public}, options.seed)
    faults += [
        f"site {site!r} has no {part} images; give it more images or change the shares"
        for site in sound for part in SPLITS if not ((good.site == site) & (splits == part)).any()
    ]  # fmt: skip
    refuse(name, faults)
    sites, origin, public = _laid_out(replace(good, split=splits), options.store)
    if public:
        notes.append(f"{rows(public)} images are public: no site has them, and a base may be pre-trained on them")
    notes += remarks(good, splits)
    return Federation(name, tuple(classes), options.template, sites, tuple(notes), origin, pool.sides, public)


def _only(pool: Examples, mask: NDArray[np.bool_]) -> Examples:
    """The pool of some rows; its images stay where they are, as the rows' numbers say."""
    if mask.all():
        return pool
    at = pool.at if pool.at is not None else np.arange(len(pool.label))
    group = None if pool.group is None else pool.group[mask]
    return replace(pool, **pool.take(mask), digest=pool.digest[mask], group=group, at=at[mask])


def _limited(pool: Examples, limit: int, seed: int) -> Examples:
    """At most so many images of each site, class and split, in the pool's order."""
    order = random_state("limit", seed).permutation(len(pool.label))
    kinds = np.unique(np.stack([pool.site, pool.split, pool.label.astype(np.str_)]), axis=1, return_inverse=True)[1]
    chosen = np.zeros(len(order), dtype=np.bool_)
    for kind in np.unique(kinds):
        chosen[order[kinds[order] == kind][:limit]] = True
    return _only(pool, chosen)


def _checked(pool: Examples, classes: Sequence[str], dealt: bool, faults: list[str], notes: list[str]) -> list[str]:
    """The sites whose labels can be used; what is wrong with the others, and what is missing, is added to the lists."""
    sound = []
    for site in np.unique(pool.site).tolist():
        found = np.unique(pool.label[pool.site == site]).tolist()
        if found[0] < 0 or found[-1] >= len(classes):
            faults.append(f"site {site!r}: expected labels 0 to {len(classes) - 1}, got {found[0]} to {found[-1]}")
        elif len(found) < 2 and not dealt:
            faults.append(f"site {site!r} has one class only, {classes[found[0]]!r}; at least two are needed to learn from")
        else:
            sound.append(site)
            if missing := [label for i, label in enumerate(classes) if i not in found]:
                notes.append(f"site {site!r} has no images of {_some(missing)}")
    return sound


def _some(names: Sequence[str], most: int = 12) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more classes" if len(names) > most else "")


def _laid_out(pool: Examples, cache: Cache) -> tuple[dict[str, Site], dict[str, dict[str, tuple[str, ...]]], Table | None]:
    """The sites, their tables one after another by split and site: all of one split are one piece, too. And what is public."""
    parts = (*SPLITS, PUBLIC, DROPPED)
    rank = np.array([parts.index(part) for part in pool.split.tolist()])
    order = np.lexsort((pool.site, rank))[: int((rank < len(parts) - 1).sum())]
    kept, at = pool.take(order), order if pool.at is None else pool.at[order]
    shape = (len(order), *pool.images.shape[1:])

    def fill(into: NDArray[np.uint8]) -> None:
        for start in range(0, len(at), 1024):
            into[start : start + 1024] = pool.images[at[start : start + 1024]]

    path, images = None, np.zeros(0, np.uint8)
    if pool.key and np.prod(shape, dtype=np.int64) > HELD:
        name = hashlib.sha256(pool.key.encode() + at.astype("<i8").tobytes()).hexdigest()
        images, path = cache.array(name, shape, fill), cache.path(name)
    else:
        images = np.empty(shape, np.uint8)
        fill(images)
    whole, label = torch.from_numpy(images), torch.from_numpy(kept["label"])

    def table(found: NDArray[np.bool_]) -> tuple[Table, tuple[str, ...]]:
        """These rows, which lie one after another, and what their source calls them."""
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
    """All images of `federation`, dealt to `sites` new ones by a rule of `partition.Partition`, whose fields are the options.

    Each image keeps its split: what was for testing stays for testing. InputError where a site would be left without one.
    """
    dealing = Partition(sites, rule, **options)
    tables = [(site, part, table) for site, each in federation.sites.items() for part, table in each.splits.items()]
    images = torch.cat([table["image"] for _, _, table in tables]).numpy()
    found = np.empty((len(images), 32), np.uint8)
    digests(images, found)
    pool = Examples(
        images,
        torch.cat([table["label"] for _, _, table in tables]).numpy(),
        texts(site for site, _, table in tables for _ in range(rows(table))),
        texts(part for _, part, table in tables for _ in range(rows(table))),
        texts(f"{site}/{part}/{i}" for site, part, table in tables for i in range(rows(table))),
        found,
    )
    common = ReaderOptions(template=federation.template)
    return assemble(federation.name, pool, federation.classes, common, dealing, notes=federation.notes)


def save_partition(federation: Federation, path: Path) -> str:
    """Write which image lies at which site and in which split, by the names of its source; returns the SHA-256 of that.

    Read again by partition={"rule": "file", "path": …}.
    """
    if not federation.origin:
        raise InputError(
            f"{federation.name} does not know where its images came from; load it from files to save its partition"
        )
    named = {site: {part: list(names) for part, names in parts.items()} for site, parts in federation.origin.items()}
    digest = _digest(named)
    write_json(path, {"format": 1, "sha256": digest, "data_sha256": federation.fingerprint, "sites": named})
    return digest


def _digest(named: Any) -> str:
    return hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()


def _redealt(pool: Examples, path: Path) -> Examples:
    """The pool as a saved partition has it: its sites, its splits, its images."""
    saved = read_json(path, "the partition")
    if not isinstance(saved, dict) or saved.get("format") != 1 or saved.get("sha256") != _digest(saved.get("sites")):
        raise InputError(f"the partition {path} is damaged or of another kind; write it anew by `warmfed data --save`")
    row = {name: i for i, name in enumerate(pool.name.tolist())}
    named = [(site, part, name) for site, parts in saved["sites"].items() for part, names in parts.items() for name in names]
    absent = [name for _, _, name in named if name not in row]
    refuse(f"the partition {path}", [f"{name} is not in the data" for name in absent])
    rows = np.array([row[name] for _, _, name in named])
    if len(set(rows.tolist())) < len(rows):
        raise InputError(f"the partition {path} names an image twice; write it anew by `warmfed data --save`")
    site, parts = np.full(len(row), "", dtype=object), np.full(len(row), WHOLE, dtype=object)
    site[rows], parts[rows] = [site for site, _, _ in named], [part for _, part, _ in named]
    mask = site != ""
    return _only(replace(pool, site=texts(site), split=texts(parts)), mask.astype(bool))
