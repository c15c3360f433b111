"""Dealing one table of examples to sites: every rule returns disjoint index arrays that together name each example once.

Randomness is named: `key` is any tuple of plain values (seed, purpose); the same key deals the same cards on every
machine and NumPy version.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from ..core.rng import random_state
from ..utils.errors import InputError, suggest
from .extras import partitioned

Ints = NDArray[np.int64]


def iid(labels: NDArray[Any], sites: int, *, key: Sequence[object]) -> list[Ints]:
    """Equal shares, stratified by class: sizes and class counts differ by one at most."""
    order = _shuffled(labels, sites, key)
    return [order[start::sites] for start in range(sites)]


def dirichlet(
    labels: NDArray[Any], sites: int, alpha: float, *, key: Sequence[object], min_partition_size: int = 20, tries: int = 1000
) -> list[Ints]:
    """Label skew (Hsu et al. 2019, arXiv 1909.06335): each class goes to the sites by shares drawn from Dirichlet(alpha).

    The draw is repeated until every site has at least `smallest` examples of two or more classes; InputError where
    `tries` draws do not bring that about.
    """
    if not 0 < alpha < float("inf"):
        raise InputError(f"expected alpha above 0, got {alpha}; 0.1 is a strong skew, 10 a weak one")
    order = _shuffled(labels, sites, key)
    groups = [order[labels[order] == value] for value in np.unique(labels)]
    random = random_state(*key, "dirichlet")
    for _ in range(tries):
        parts: list[list[Ints]] = [[] for _ in range(sites)]
        for group in groups:
            shares = random.dirichlet(np.full(sites, float(alpha)))
            cuts = np.rint(np.cumsum(shares)[:-1] * len(group)).astype(np.int64)
            for part, piece in zip(parts, np.split(group, cuts), strict=True):
                part.append(piece)
        dealt = [np.concatenate(part) for part in parts]
        if all(len(part) >= min_partition_size and len(np.unique(labels[part])) >= 2 for part in dealt):
            return dealt
    raise InputError(
        f"{sites} sites with at least {min_partition_size} of {len(labels)} examples and two classes each were expected, "
        f"{tries} draws with alpha {alpha:g} brought none; take a larger alpha or fewer sites"
    )


def shards(labels: NDArray[Any], sites: int, classes_per_site: int, *, key: Sequence[object]) -> list[Ints]:
    """Each site holds `classes_per_site` classes (after McMahan et al. 2017, arXiv 1602.05629), in equal shares of each.

    Classes are dealt like cards from a shuffled deck that is laid again and again, so that each is held by as many
    sites as any other, or by one more. Departure from the paper: shards follow class borders, so the number of
    classes is exact. InputError where there are too few sites to place every class or too few examples.
    """
    values = np.unique(labels)
    if not 1 <= classes_per_site <= len(values) or sites * classes_per_site < len(values):
        raise InputError(
            f"classes per site from {max(1, -(-len(values) // max(1, sites)))} to {len(values)} were expected "
            f"({len(values)} classes, {sites} sites), {classes_per_site} came"
        )
    order = _shuffled(labels, sites, key)
    deck = random_state(*key, "deck").permutation(values)
    names = random_state(*key, "sites").permutation(sites)
    holders: dict[int, list[int]] = {int(value): [] for value in values}
    for card in range(sites * classes_per_site):
        holders[int(deck[card % len(deck)])].append(int(names[card // classes_per_site]))
    parts: list[list[Ints]] = [[] for _ in range(sites)]
    for value, held_by in holders.items():
        for turn, site in enumerate(held_by):
            parts[site].append(order[labels[order] == value][turn :: len(held_by)])
    return [np.concatenate(part) for part in parts]


def quantity(
    labels: NDArray[Any], sites: int, alpha: float, *, key: Sequence[object], min_partition_size: int = 20
) -> list[Ints]:
    """Size skew: site sizes follow Dirichlet(alpha), each site has at least `smallest` examples, classes stay mixed."""
    if not 0 < alpha < float("inf"):
        raise InputError(f"expected alpha above 0, got {alpha}; 0.5 is a strong skew, 10 a weak one")
    order = random_state(*key, "quantity").permutation(_shuffled(labels, sites, key))
    free = len(labels) - sites * min_partition_size
    if free < 0:
        raise InputError(f"expected {sites * min_partition_size} examples or more, got {len(labels)}; take fewer sites")
    shares = random_state(*key, "sizes").dirichlet(np.full(sites, float(alpha)))
    cuts = np.rint(np.cumsum(shares)[:-1] * free).astype(np.int64) + min_partition_size * np.arange(1, sites)
    return list(np.split(order, cuts))


Rule = Literal["iid", "dirichlet", "shards", "quantity", "flwr", "file"]


@dataclass(frozen=True)
class Partition:
    """How all images of a source are pooled and dealt to other sites; each keeps its split where it has one."""

    RENAMED: ClassVar[Mapping[str, str]] = {"smallest": "min_partition_size"}

    sites: int = 0
    """How many new sites ("file" and "flwr" know by themselves)."""
    rule: Rule = "iid"
    """iid, dirichlet, shards, quantity; flwr: a partitioner of flwr-datasets; file: as `warmfed data --save` wrote it."""
    alpha: float = 0.5
    """Concentration of "dirichlet" and "quantity"."""
    classes_per_site: int = 2
    """Of "shards"."""
    min_partition_size: int = 20
    """Images of each site at least, of "dirichlet" and "quantity"."""
    seed: int = 0
    """Names the draw."""
    partitioner: str = "DirichletPartitioner"
    """Of "flwr": a class of `flwr_datasets.partitioner`."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Of "flwr": its arguments, such as {"num_partitions": 10, "partition_by": "label"}."""
    path: str = ""
    """Of "file"."""

    def __post_init__(self) -> None:
        rules = get_args(Rule)
        if self.rule not in rules:
            raise InputError(f"there is no rule {self.rule!r} to deal by{suggest(self.rule, rules)}")
        if not self.sites and self.rule not in ("flwr", "file"):
            raise InputError("data.options.partition needs sites: how many there shall be")
        if self.rule == "file" and not self.path:
            raise InputError("data.options.partition needs path: the file that `warmfed data --save` wrote")

    def parts(self, labels: NDArray[Any], columns: Mapping[str, NDArray[Any]] | None = None) -> list[Ints]:
        """Row numbers of each new site. `columns`: what a partitioner of flwr-datasets may go by, beside "label"."""
        key = ("deal", self.rule, self.seed)
        match self.rule:
            case "iid":
                return iid(labels, self.sites, key=key)
            case "dirichlet":
                return dirichlet(labels, self.sites, self.alpha, key=key, min_partition_size=self.min_partition_size)
            case "shards":
                return shards(labels, self.sites, self.classes_per_site, key=key)
            case "quantity":
                return quantity(labels, self.sites, self.alpha, key=key, min_partition_size=self.min_partition_size)
            case _:
                # shuffled: some partitioners cut a class into pieces as it comes, and sources come split by split
                order = random_state(*key, "order").permutation(len(labels))
                shown = {name: column[order] for name, column in {**(columns or {}), "label": labels}.items()}
                return [order[part] for part in partitioned(self.partitioner, self.options, shown)]


def _shuffled(labels: NDArray[Any], sites: int, key: Sequence[object]) -> Ints:
    """All indices sorted by class, shuffled within each."""
    if not 1 <= sites <= len(labels):
        raise InputError(f"1 to {len(labels)} sites were expected for {len(labels)} examples, {sites} came")
    order = random_state(*key, "order").permutation(len(labels))
    return order[np.argsort(labels[order], kind="stable")]
