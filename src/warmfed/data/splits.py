"""Who trains, who validates, who tests: one rule for all sources, under which exact duplicates never straddle a split."""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from ..errors import InputError
from .federation import SPLITS, Federation, Site
from .images import Pixels
from .partition import stream

WHOLE = "all"
"""Key of images that no split has claimed yet, beside "train", "validation" and "test"."""


@dataclass(frozen=True)
class Pile:
    """Images of one site under one key: uint8 [n, 3, h, w], int64 labels [n]."""

    images: Pixels
    labels: NDArray[np.int64]


@dataclass(frozen=True)
class Share:
    """Which shares of unclaimed images validate and test, and the name of the draw."""

    validation: float
    test: float
    seed: int

    def __post_init__(self) -> None:
        if not (self.validation > 0 and self.test > 0 and self.validation + self.test < 1):
            raise InputError(
                "validation and test shares above 0, together below 1, were expected, "
                f"{self.validation:g} and {self.test:g} came; 0.2 and 0.2 are usual"
            )


def assemble(
    name: str,
    piles: Mapping[str, Mapping[str, Pile]],
    classes: Sequence[str],
    template: str,
    share: Share,
    *,
    faults: Sequence[str] = (),
    notes: Sequence[str] = (),
) -> Federation:
    """The federation of these piles, {site: {"all" | "train" | "validation" | "test": pile}}.

    Pile "all" is split by `share`, class by class. Where a site has "train" but no "validation" or no "test", its
    share comes out of "train". Images with equal bytes are one thing, wherever they lie: in unclaimed piles they go
    to one split together; where given splits overlap, the copies outside of "test" (then "validation") are dropped.
    `faults` are those that the reader of the data has found; raises InputError with them and with all found here.
    """
    faults, notes = list(faults), list(notes)
    piles = {
        site: {key: part for key, part in sorted(parts.items()) if len(part.labels)} for site, parts in sorted(piles.items())
    }
    for site, parts in piles.items():
        held = np.concatenate([part.labels for part in parts.values()]) if parts else np.zeros(0, np.int64)
        found = sorted(set(held.tolist()))
        if not found:
            faults.append(f"site {site!r} is empty; give it images or leave it out")
        elif found[0] < 0 or found[-1] >= len(classes):
            faults.append(f"site {site!r}: labels 0 to {len(classes) - 1} were expected, {found[0]} to {found[-1]} came")
        elif len(found) < 2:
            faults.append(f"site {site!r} has one class only, {classes[found[0]]!r}; at least two are needed to learn from")
        elif missing := [label for i, label in enumerate(classes) if i not in found]:
            notes.append(f"site {site!r} has no images of {', '.join(missing)}")
    if len({part.images.shape[1:] for parts in piles.values() for part in parts.values()}) > 1:
        faults.append("images of one size were expected, several came; give an image_size")
    if not piles:
        faults.append("at least one site was expected, none came")
    refuse(name, faults)

    sites, remarks = _split(piles, share)
    refuse(name, [
        f"site {site!r} has no {split} images; give it more images or change the shares"
        for site, tables in sites.items() for split in SPLITS if not len(tables[split].labels)
    ])  # fmt: skip
    made = {site: Site(**{split: _table(pile) for split, pile in tables.items()}) for site, tables in sites.items()}
    return Federation(name, tuple(classes), template, made, (*notes, *remarks))


def refuse(name: str, faults: Sequence[str], most: int = 12) -> None:
    """InputError of one line where there are faults, all of them up to `most`."""
    if faults:
        more = f"; and {len(faults) - most} more" if len(faults) > most else ""
        raise InputError(f"{name} is not usable: {'; '.join(faults[:most])}{more}")


def _table(pile: Pile) -> dict[str, torch.Tensor]:
    return {"image": torch.from_numpy(np.ascontiguousarray(pile.images)), "label": torch.from_numpy(pile.labels)}


def _split(piles: Mapping[str, Mapping[str, Pile]], share: Share) -> tuple[dict[str, dict[str, Pile]], list[str]]:
    digests = {
        site: {key: [hashlib.sha256(image.tobytes()).digest() for image in pile.images] for key, pile in parts.items()}
        for site, parts in piles.items()
    }
    role: dict[bytes, str] = {}  # of each different image
    for split in ("validation", "test"):  # the later one wins
        for keys in digests.values():
            role.update(dict.fromkeys(keys.get(split, ()), split))

    sites, dropped = {}, 0
    for site, parts in piles.items():
        pile = Pile(*(np.concatenate([getattr(p, column) for p in parts.values()]) for column in ("images", "labels")))
        origin = [key for key, part in parts.items() for _ in part.labels]
        digest = [d for keys in digests[site].values() for d in keys]
        shares = {"test": share.test, "validation": share.validation}
        wanted = {split: part for split, part in shares.items() if split not in parts}
        for label in np.unique(pile.labels).tolist():
            free = [i for i in np.flatnonzero(pile.labels == label).tolist() if origin[i] in (WHOLE, "train")]
            _claim([digest[i] for i in free], role, wanted, stream("split", share.seed, site, label))
        picked: dict[str, list[int]] = {split: [] for split in SPLITS}
        for i, key in enumerate(origin):
            carved = key == "train" and role[digest[i]] in wanted
            if key == WHOLE or carved or role[digest[i]] == key:
                picked[role[digest[i]]].append(i)
            else:
                dropped += 1
        sites[site] = {split: Pile(pile.images[rows], pile.labels[rows]) for split, rows in picked.items()}
    return sites, _remarks(piles, digests, dropped)


def _claim(free: list[bytes], role: dict[bytes, str], wanted: Mapping[str, float], random: np.random.RandomState) -> None:
    """Give each image of `free` that has none a role, so that the splits reach their wanted shares."""
    target = {split: round(part * len(free)) for split, part in wanted.items()}
    for digest in free:
        if role.get(digest) in target:
            target[role[digest]] -= 1
    unclaimed, count = [digest for digest in dict.fromkeys(free) if digest not in role], Counter(free)
    for at in random.permutation(len(unclaimed)).tolist():
        copies = count[unclaimed[at]]
        split = next((split for split, left in target.items() if left >= copies), "train")
        role[unclaimed[at]] = split
        if split in target:
            target[split] -= copies


def _remarks(
    piles: Mapping[str, Mapping[str, Pile]], digests: Mapping[str, Mapping[str, list[bytes]]], dropped: int
) -> list[str]:
    labels: dict[bytes, list[int]] = {}
    for site, parts in piles.items():
        for key, pile in parts.items():
            for digest, label in zip(digests[site][key], pile.labels.tolist(), strict=True):
                labels.setdefault(digest, []).append(label)
    surplus = sum(len(held) - 1 for held in labels.values())
    torn = sum(len(set(held)) > 1 for held in labels.values())
    remarks = []
    if surplus:
        remarks.append(f"{surplus} images repeat others exactly; each stays on one side of the splits")
    if torn:
        remarks.append(f"{torn} images occur under several classes")
    if dropped:
        remarks.append(f"{dropped} images of the given splits were dropped, since they occur in a later split as well")
    return remarks
