"""Sites that lack classes: take classes away from the training and validation images of sites, and keep all test images."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from ..core.rng import random_state
from ..core.tensors import Table, rows, select
from ..utils.errors import InputError, suggest
from ..utils.names import plain_name, plain_names
from ..utils.settings import check_seed
from .federation import Federation, Site
from .partition import drawn_shares, turns


@dataclass(frozen=True)
class ClassSkew:
    """Settings of `data.options.held`: which classes each site's training and validation images have.

    Exactly one of `classes_per_site`, `alpha` and `classes` is set. The test images keep all classes, so that the test shows
    what a site's model does on classes that the site has never seen.
    """

    classes_per_site: int = 0
    """Number of classes of each site, at least 2. The sites take classes in turn from a repeated random order."""
    alpha: float = 0.0
    """Concentration of Dirichlet shares: each class's images remain at a site in proportion to its largest share."""
    classes: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Names of the classes by site; other sites keep all classes."""
    seed: int = 0
    """Seed of the choice."""

    def __post_init__(self) -> None:
        chosen = [name for name in ("classes_per_site", "alpha", "classes") if getattr(self, name)]
        if len(chosen) != 1:
            raise InputError(
                f"data.options.held needs one of classes_per_site, alpha and classes; got {', '.join(chosen) or 'none'}"
            )
        check_seed(self.seed, "data.options.held.seed")
        if self.classes_per_site < 0 or not 0 <= self.alpha < float("inf"):
            raise InputError(
                "data.options.held expects classes_per_site from 2 and a finite alpha above 0; "
                f"got {self.classes_per_site} and {self.alpha:g}"
            )

    def shares(self, federation: Federation) -> dict[str, list[float]]:
        """Return the share of each class's images that remains at each site, from 0 to 1.

        Raises:
            InputError: A site or a class is unknown, or there are too few classes.
        """
        names, count = list(federation.sites), len(federation.classes)
        if self.classes:
            return self._listed(federation)
        if self.alpha:
            random = random_state("held", "dirichlet", self.seed)
            drawn = np.stack([drawn_shares(random, len(names), self.alpha) for _ in range(count)])
            kept = drawn / drawn.max(axis=1, keepdims=True)
            return {name: kept[:, place].tolist() for place, name in enumerate(names)}
        if not 2 <= self.classes_per_site <= count:
            raise InputError(f"expected classes_per_site from 2 to {count}, got {self.classes_per_site}")
        deck = random_state("held", "deck", self.seed).permutation(count).tolist()
        order = random_state("held", "sites", self.seed).permutation(len(names)).tolist()
        found = {name: [0.0] * count for name in names}
        for site, label in turns(order, deck, self.classes_per_site):
            found[names[site]][label] = 1.0
        return found

    def _listed(self, federation: Federation) -> dict[str, list[float]]:
        found = {name: [1.0] * len(federation.classes) for name in federation.sites}
        for given, listed in self.classes.items():
            name = plain_name(given)
            if name not in found:
                raise InputError(f"data.options.held.classes names the site {name!r}{suggest(name, list(found))}")
            if isinstance(listed, str) or not isinstance(listed, Sequence):
                raise InputError(f"data.options.held.classes.{name} must be a list of classes; got {listed!r}")
            wanted = plain_names(listed, f"data.options.held.classes.{name}")
            for each in wanted:
                if each not in federation.classes:
                    raise InputError(f"there is no class {each!r}{suggest(each, list(federation.classes))}")
            if len(wanted) < 2:
                raise InputError(f"data.options.held.classes.{name} needs two classes to learn from; got {', '.join(wanted)}")
            found[name] = [float(each in wanted) for each in federation.classes]
        return found


def hold_classes(federation: Federation, **settings: Any) -> Federation:
    """Return the federation with fewer classes in the sites' training and validation images; the tests stay as they are.

    Args:
        federation: the federation.
        settings: the fields of `ClassSkew`.

    Raises:
        InputError: A setting is not valid, or a site would have fewer than two classes or no validation image.
    """
    skew = ClassSkew(**settings)
    sites: dict[str, Site] = {}
    notes = list(federation.notes)
    origin = {name: dict(parts) for name, parts in federation.origin.items()}
    for name, shares in skew.shares(federation).items():
        site = federation.sites[name]
        kept = {part: _kept(site.splits[part], shares, (skew.seed, name, part)) for part in ("train", "validation")}
        tables = {part: _selected(site.splits[part], at) for part, at in kept.items()}
        held = set(tables["train"]["label"].unique().tolist())
        if len(held) < 2 or not rows(tables["validation"]):
            raise InputError(
                f"data.options.held leaves site {name!r} with {len(held)} classes and {rows(tables['validation'])} validation "
                "images, expected two or more classes and one image or more; set more classes, a larger alpha or another seed"
            )
        sites[name] = replace(site, **tables)
        for part, at in kept.items():
            if name in origin and part in origin[name]:
                origin[name][part] = tuple(origin[name][part][row] for row in at.tolist())
        if lacking := [each for label, each in enumerate(federation.classes) if label not in held]:
            notes.append(f"site {name!r} holds {len(held)} classes; its test has also {', '.join(lacking)}")
    return replace(federation, sites=sites, notes=tuple(notes), origin=origin)


def _kept(table: Table, shares: Sequence[float], key: tuple[object, ...]) -> torch.Tensor:
    """Return the rows that remain, int64; of a class with a share between 0 and 1, a random part."""
    label = table["label"]
    order = torch.from_numpy(random_state("held", *key).permutation(len(label)).astype(np.int64))
    mask = torch.zeros(len(label), dtype=torch.bool)
    for each in label.unique().tolist():
        mine = order[label[order] == each]
        mask[mine[: round(shares[each] * len(mine))]] = True
    return mask.nonzero()[:, 0]


def _selected(table: Table, at: torch.Tensor) -> Table:
    return table if len(at) == rows(table) else select(table, at)
