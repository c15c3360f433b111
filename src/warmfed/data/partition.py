"""Partition one table of examples into sites. Each rule returns disjoint index arrays that together cover all examples.

`key` names the random stream: any tuple of plain values (seed, purpose). One key gives one partition, on every machine and
NumPy version.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from ..core.rng import random_state
from ..utils.errors import InputError, suggest
from ..utils.settings import check_seed
from .extras import partitioned

Ints = NDArray[np.int64]


def iid(labels: NDArray[Any], sites: int, *, key: Sequence[object]) -> list[Ints]:
    """Return equal shares, stratified by class: sizes and class counts differ by one at most."""
    order = _shuffled(labels, sites, key)
    return [order[start::sites] for start in range(sites)]


def dirichlet(
    labels: NDArray[Any], sites: int, alpha: float, *, key: Sequence[object], min_partition_size: int = 20, tries: int = 1000
) -> list[Ints]:
    """Return a partition with label skew: each class is split by shares from Dirichlet(alpha).

    The draw repeats until every site has at least `min_partition_size` examples of two or more classes.

    Args:
        labels: int [n].
        sites: number of sites.
        alpha: concentration; 0.1 is a strong skew, 10 a weak one.
        key: name of the random stream.
        min_partition_size: minimum number of examples of a site.
        tries: maximum number of draws.

    Raises:
        InputError: if alpha is not above 0, or no draw meets the condition.

    References:
        Hsu et al., 2019, arXiv:1909.06335.
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
            if not np.isfinite(shares).all():  # alpha is so small that every site's share was rounded to 0
                break
            cuts = np.rint(np.cumsum(shares)[:-1] * len(group)).astype(np.int64)
            for part, piece in zip(parts, np.split(group, cuts), strict=True):
                part.append(piece)
        else:
            merged = [np.concatenate(part) for part in parts]
            if all(len(part) >= min_partition_size and len(np.unique(labels[part])) >= 2 for part in merged):
                return merged
    raise InputError(
        f"{tries} draws with alpha {alpha:g} gave no partition of {len(labels)} examples into {sites} sites with at least "
        f"{min_partition_size} examples and two classes each; set a larger alpha or fewer sites"
    )


def shards(labels: NDArray[Any], sites: int, classes_per_site: int, *, key: Sequence[object]) -> list[Ints]:
    """Return a partition in which each site has `classes_per_site` classes, in equal shares of each.

    The sites take classes in turn from a repeated random order, so the numbers of sites per class differ by one at most.
    Departure from the paper: shards follow class boundaries, so the number of classes is exact.

    Raises:
        InputError: if the sites cannot hold every class, or there are fewer examples than sites.

    References:
        McMahan et al., 2017, arXiv:1602.05629.
    """
    values = np.unique(labels)
    if not 1 <= classes_per_site <= len(values) or sites * classes_per_site < len(values):
        raise InputError(
            f"expected classes_per_site from {max(1, -(-len(values) // max(1, sites)))} to {len(values)} "
            f"({len(values)} classes, {sites} sites), got {classes_per_site}"
        )
    order = _shuffled(labels, sites, key)
    deck = random_state(*key, "deck").permutation(values)
    names = random_state(*key, "sites").permutation(sites)
    holders: dict[int, list[int]] = {int(value): [] for value in values}
    for site, value in turns(names.tolist(), deck.tolist(), classes_per_site):
        holders[value].append(site)
    parts: list[list[Ints]] = [[] for _ in range(sites)]
    for value, held_by in holders.items():
        for turn, site in enumerate(held_by):
            parts[site].append(order[labels[order] == value][turn :: len(held_by)])
    return [np.concatenate(part) for part in parts]


def turns(sites: Sequence[int], classes: Sequence[int], each: int) -> Iterator[tuple[int, int]]:
    """Yield (site, class): in this order, each site takes the next `each` classes, which begin anew after the last one."""
    for card in range(len(sites) * each):
        yield sites[card // each], classes[card % len(classes)]


def drawn_shares(random: np.random.RandomState, sites: int, alpha: float) -> NDArray[np.float64]:
    """Return shares from Dirichlet(alpha), float [sites]; raise `InputError` if alpha is so small that they are not numbers."""
    shares = random.dirichlet(np.full(sites, float(alpha)))
    if not np.isfinite(shares).all():
        raise InputError(f"alpha {alpha:g} is too small to draw shares of {sites} sites; 0.5 is a strong skew, 10 a weak one")
    return shares


def quantity(
    labels: NDArray[Any], sites: int, alpha: float, *, key: Sequence[object], min_partition_size: int = 20
) -> list[Ints]:
    """Return a partition with size skew: sizes follow Dirichlet(alpha), and the classes stay mixed.

    Each site has `min_partition_size` examples (1 or more); the shares partition the rest.

    Raises:
        InputError: if alpha is not above 0, or there are too few examples for `min_partition_size` per site.
    """
    if not 0 < alpha < float("inf"):
        raise InputError(f"expected alpha above 0, got {alpha}; 0.5 is a strong skew, 10 a weak one")
    order = random_state(*key, "quantity").permutation(_shuffled(labels, sites, key))
    free = len(labels) - sites * min_partition_size
    if free < 0:
        raise InputError(f"expected {sites * min_partition_size} examples or more, got {len(labels)}; set fewer sites")
    shares = drawn_shares(random_state(*key, "sizes"), sites, alpha)
    cuts = np.rint(np.cumsum(shares)[:-1] * free).astype(np.int64) + min_partition_size * np.arange(1, sites)
    return list(np.split(order, cuts))


Rule = Literal["iid", "dirichlet", "shards", "quantity", "flwr", "file"]


@dataclass(frozen=True)
class Partition:
    """Partition of all images of a source into new sites; an image with a split keeps it."""

    RENAMED: ClassVar[Mapping[str, str]] = {"smallest": "min_partition_size"}

    sites: int = 0
    """Number of new sites; "file" and "flwr" do not use it."""
    rule: Rule = "iid"
    """Rule: iid, dirichlet, shards or quantity; flwr: a partitioner of flwr-datasets; file: a file of `warmfed data --save`."""
    alpha: float = 0.5
    """Concentration of "dirichlet" and "quantity", above 0."""
    classes_per_site: int = 2
    """Number of classes at each site, for "shards"."""
    min_partition_size: int = 20
    """Minimum number of images at each site, for "dirichlet" and "quantity"."""
    seed: int = 0
    """Seed of the partition."""
    partitioner: str = "DirichletPartitioner"
    """Class of `flwr_datasets.partitioner`, for "flwr"."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of the partitioner, for "flwr", such as {"num_partitions": 10, "partition_by": "label"}."""
    path: str = ""
    """File of `warmfed data --save`, for "file"."""

    def __post_init__(self) -> None:
        rules = get_args(Rule)
        if self.rule not in rules:
            raise InputError(f"there is no partition rule {self.rule!r}{suggest(self.rule, rules)}")
        if not self.sites and self.rule not in ("flwr", "file"):
            raise InputError("data.options.partition needs sites; set the number of sites")
        check_seed(self.seed, "data.options.partition.seed")
        if self.min_partition_size < 1:
            raise InputError(f"expected a min_partition_size of 1 image or more, got {self.min_partition_size}")
        if self.rule == "file" and not self.path:
            raise InputError("data.options.partition needs path; set the file that `warmfed data --save` wrote")

    def parts(self, labels: NDArray[Any], columns: Mapping[str, NDArray[Any]] | None = None) -> list[Ints]:
        """Return the row numbers of each new site.

        Args:
            labels: int [n].
            columns: columns that a partitioner of flwr-datasets may use, beside "label".
        """
        parts = self._parts(labels, columns)
        if empty := sum(not len(part) for part in parts):
            raise InputError(
                f"the partition by {self.rule} leaves {empty} of {len(parts)} sites without images; set fewer sites, "
                "or a larger alpha or min_partition_size"
            )
        return parts

    def _parts(self, labels: NDArray[Any], columns: Mapping[str, NDArray[Any]] | None) -> list[Ints]:
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
                # shuffled, since some partitioners cut a class in its order, and sources are ordered by split
                order = random_state(*key, "order").permutation(len(labels))
                shown = {name: column[order] for name, column in {**(columns or {}), "label": labels}.items()}
                return [order[part] for part in partitioned(self.partitioner, self.options, shown)]


def _shuffled(labels: NDArray[Any], sites: int, key: Sequence[object]) -> Ints:
    """Return all indices sorted by class, shuffled within each class."""
    if not 1 <= sites <= len(labels):
        raise InputError(f"expected 1 to {len(labels)} sites for {len(labels)} examples, got {sites}")
    order = random_state(*key, "order").permutation(len(labels))
    return order[np.argsort(labels[order], kind="stable")]
