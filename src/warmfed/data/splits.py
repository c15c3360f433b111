"""Split examples into train, validation, test and public images; equal images always share one split."""

from collections import Counter
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from ..core.rng import random_state
from .examples import WHOLE, Examples, Texts

DROPPED = ""
PUBLIC = "public"
Ints = NDArray[np.int64]


def split(examples: Examples, shares: Mapping[str, float], seed: int) -> Texts:
    """Return the split of each image: train, validation, test, public, or "" if the image is dropped.

    Images without a split are split by `shares`, class by class. If a site has "train" but no "validation" or no "test",
    that share is taken from "train"; the public share always is. Images with equal pixels, or of one group, form one unit at
    all sites. A unit without a split goes to one split. If given splits overlap, only the copies in "test" (else in
    "validation") remain.

    Args:
        examples: the images.
        shares: shares of "test", "validation" and "public", drawn in their order.
        seed: seed of the split.
    """
    unit = units(examples)
    role: dict[int, str] = {}
    for given in ("validation", "test"):  # "test" overrides "validation"
        role.update(dict.fromkeys(unit[examples.split == given].tolist(), given))
    result = np.full(len(unit), DROPPED, dtype="<U10")
    for site in np.unique(examples.site).tolist():
        mine = np.flatnonzero(examples.site == site)
        mine = mine[np.argsort(examples.split[mine], kind="stable")]
        had, label = examples.split[mine], examples.label[mine]
        wanted = {each: share for each, share in shares.items() if each not in had}
        free = (had == WHOLE) | (had == "train")
        for value in np.unique(label).tolist():
            _claim(unit[mine[free & (label == value)]].tolist(), role, wanted, random_state("split", seed, site, value))
        now = np.array([role[each] for each in unit[mine].tolist()], dtype="<U10")
        carved = (had == "train") & np.isin(now, list(wanted))
        result[mine] = np.where((had == WHOLE) | carved | (now == had), now, DROPPED)
    return result


def units(examples: Examples) -> Ints:
    """Return the unit of each image, int64 [n]; images with equal pixels, or of one group, have the same unit."""
    if not len(examples.label):
        return np.zeros(0, np.int64)
    _, same = np.unique(np.ascontiguousarray(examples.digest).view("V32").ravel(), return_inverse=True)
    if examples.group is None:
        return same.astype(np.int64)
    # imported here: it takes a quarter of this package's import time, and only groups need it
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    names, group = np.unique(examples.group, return_inverse=True)
    held = examples.group != ""
    size = int(same.max()) + 1
    links = coo_array((np.ones(held.sum(), np.int8), (same[held], size + group[held])), shape=(size + len(names),) * 2)
    return connected_components(links, directed=False)[1][same].astype(np.int64)


def _claim(free: list[int], role: dict[int, str], wanted: Mapping[str, float], random: np.random.RandomState) -> None:
    """Assign a split to each unit of `free` without one, as near to the wanted shares as the units allow."""
    target: dict[str, int] = {split: round(part * len(free)) for split, part in wanted.items()}
    for unit in free:
        if role.get(unit) in target:
            target[role[unit]] -= 1
    unclaimed, count = [unit for unit in dict.fromkeys(free) if unit not in role], Counter(free)
    for at in random.permutation(len(unclaimed)).tolist():
        copies = count[unclaimed[at]]
        split = next((split for split, left in target.items() if 2 * left >= copies), "train")
        role[unclaimed[at]] = split
        if split in target:
            target[split] -= copies


def remarks(examples: Examples, splits: Texts) -> list[str]:
    """Return notes on repeated and dropped images."""
    digest = np.ascontiguousarray(examples.digest).view("V32").ravel()
    _, same, count = np.unique(digest, return_inverse=True, return_counts=True)
    held: dict[int, set[int]] = {}
    for unit, label in zip(same.tolist(), examples.label.tolist(), strict=True):
        if count[unit] > 1:
            held.setdefault(unit, set()).add(label)
    surplus, dropped = int((count - 1).sum()), int((splits == DROPPED).sum())
    torn = sum(len(labels) > 1 for labels in held.values())
    found = []
    if surplus:
        found.append(f"{surplus} images repeat others exactly; each stays on one side of the splits")
    if torn:
        found.append(f"{torn} images occur under several classes")
    if dropped:
        found.append(f"{dropped} images of the given splits were dropped, since they occur in a later split as well")
    return found
