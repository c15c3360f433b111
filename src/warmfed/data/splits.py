"""Who trains, who validates, who tests: one rule for all sources, under which equal images never straddle a split."""

from collections import Counter
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from ..core.rng import random_state
from .examples import WHOLE, Examples, Texts

DROPPED = ""
PUBLIC = "public"
Ints = NDArray[np.int64]


def split(pool: Examples, shares: Mapping[str, float], seed: int) -> Texts:
    """The split of each image of the pool: train, validation, test, public, or "" where it is dropped.

    Images that no split has claimed are split by `shares` (of "test", "validation" and "public", drawn in their order),
    class by class. Where a site has "train" but no "validation" or no "test", its share comes out of "train", as the public
    one always does. Images with equal pixels, or of one group, are one thing, wherever they lie: unclaimed, they go to one
    split together; where given splits overlap, the copies outside of "test" (then "validation") are dropped.
    """
    unit = units(pool)
    role: dict[int, str] = {}
    for given in ("validation", "test"):  # the later one wins
        role.update(dict.fromkeys(unit[pool.split == given].tolist(), given))
    result = np.full(len(unit), DROPPED, dtype="<U10")
    for site in np.unique(pool.site).tolist():
        mine = np.flatnonzero(pool.site == site)
        mine = mine[np.argsort(pool.split[mine], kind="stable")]
        had, label = pool.split[mine], pool.label[mine]
        wanted = {each: share for each, share in shares.items() if each not in had}
        free = (had == WHOLE) | (had == "train")
        for value in np.unique(label).tolist():
            _claim(unit[mine[free & (label == value)]].tolist(), role, wanted, random_state("split", seed, site, value))
        now = np.array([role[each] for each in unit[mine].tolist()], dtype="<U10")
        carved = (had == "train") & np.isin(now, list(wanted))
        result[mine] = np.where((had == WHOLE) | carved | (now == had), now, DROPPED)
    return result


def units(pool: Examples) -> Ints:
    """A number for each image [n]; those that must not be parted (equal pixels, one group) have the same."""
    if not len(pool.label):
        return np.zeros(0, np.int64)
    _, same = np.unique(np.ascontiguousarray(pool.digest).view("V32").ravel(), return_inverse=True)
    if pool.group is None:
        return same.astype(np.int64)
    # a quarter of a light import of this package, and only groups need it
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    names, group = np.unique(pool.group, return_inverse=True)
    held = pool.group != ""
    size = int(same.max()) + 1
    links = coo_array((np.ones(held.sum(), np.int8), (same[held], size + group[held])), shape=(size + len(names),) * 2)
    return connected_components(links, directed=False)[1][same].astype(np.int64)


def _claim(free: list[int], role: dict[int, str], wanted: Mapping[str, float], random: np.random.RandomState) -> None:
    """Give each unit of `free` that has none a role, so that the splits come as near to their wanted shares as units allow."""
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


def remarks(pool: Examples, splits: Texts) -> list[str]:
    """What there is to say of repeated and dropped images."""
    _, same, count = np.unique(np.ascontiguousarray(pool.digest).view("V32").ravel(), return_inverse=True, return_counts=True)
    held: dict[int, set[int]] = {}
    for unit, label in zip(same.tolist(), pool.label.tolist(), strict=True):
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
