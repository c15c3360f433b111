"""The federation: named sites, each with train, validation and test tables, and one tuple of class names."""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch

from ..core import SPLITS, prompt, prompts_of
from ..core.tensors import Table, rows, sha256
from ..utils.errors import InputError, suggest
from ..utils.names import fault_of_name

SPLIT_NAMES = {
    "train": "train", "training": "train",
    "validation": "validation", "val": "validation", "valid": "validation", "crossval": "validation",
    "test": "test", "testing": "test",
}  # fmt: skip
"""Common names of the splits, and warmfed's name for each."""
_PLAIN = re.compile(r'[^/\\:*?"<>|\x00-\x1f]*')


@dataclass(frozen=True, eq=False)
class Site:
    """One organisation's data: three tables {"image": uint8 [n, c, height, width], "label": int64 [n]}."""

    train: Table
    validation: Table
    test: Table

    @property
    def splits(self) -> dict[str, Table]:
        """Tables by name: "train", "validation", "test"."""
        return {"train": self.train, "validation": self.validation, "test": self.test}


@dataclass(frozen=True, eq=False)
class Federation:
    """Sites with the same classes and image size. No table is empty.

    `name`, `notes`, `origin`, `sides` and `public` do not enter the fingerprint.

    Raises:
        InputError: with all faults, if a table has another shape, type or label than expected.
    """

    name: str
    """Name in reports."""
    classes: tuple[str, ...]
    """Class names: label i is `classes[i]`, its prompt `prompts[i]`."""
    template: str
    """Prompt with one `{}` for the class name (or `{class}` for its words); may have `{site}` (`core.prompts_of`)."""
    sites: Mapping[str, Site] = field(repr=False)
    """Sites, sorted by name."""
    notes: tuple[str, ...] = ()
    """Remarks of the reader, such as missing classes and duplicates."""
    origin: Mapping[str, Mapping[str, tuple[str, ...]]] = field(default_factory=dict, repr=False)
    """Name of each image in the source, by site and split."""
    sides: tuple[tuple[int, int], ...] = ()
    """Original width and height of the smallest and of the largest picture."""
    public: Table | None = field(default=None, repr=False)
    """Public images: no site has them, and a base may be pre-trained on them."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "classes", tuple(self.classes))
        object.__setattr__(self, "sites", dict(sorted(self.sites.items())))
        faults = _faults(self)
        if faults:
            raise InputError(f"federation {self.name!r} is not usable: " + "; ".join(faults))

    @property
    def prompts(self) -> tuple[str, ...]:
        """One prompt per class, in the order of the labels."""
        return tuple(prompt(self.template, name) for name in self.classes)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of an image; 3 channels are colour, 1 is grey."""
        first = next(iter(self.sites.values())).train["image"]
        return (int(first.shape[1]), int(first.shape[2]), int(first.shape[3]))

    @property
    def present(self) -> dict[str, tuple[str, ...]]:
        """Classes in each site's training table."""
        return {
            name: tuple(self.classes[label] for label in site.train["label"].unique().tolist())
            for name, site in self.sites.items()
        }

    def without(self, name: str) -> "Federation":
        """Return the federation without this site; raise `InputError` if it is unknown or the only one."""
        if name not in self.sites or len(self.sites) < 2:
            raise InputError(
                f"{self.name} has the sites {', '.join(self.sites)}: {name!r} cannot be left out"
                f"{suggest(name, list(self.sites)) if name not in self.sites else '; more than one is needed'}"
            )
        return replace(self, sites={key: site for key, site in self.sites.items() if key != name})

    @property
    def rows(self) -> dict[str, dict[str, int]]:
        """Number of rows of each table of each site."""
        return {name: {split: rows(table) for split, table in site.splits.items()} for name, site in self.sites.items()}

    @property
    def digests(self) -> dict[str, dict[str, str]]:
        """SHA-256 of each table of each site."""
        return {name: {split: sha256(table) for split, table in site.splits.items()} for name, site in self.sites.items()}

    @cached_property
    def fingerprint(self) -> str:
        """Hexadecimal SHA-256 of the site names, the classes, the template and every byte of every table.

        It excludes the federation's name and notes, so the same data in another folder have the same fingerprint.
        """
        return _fingerprint(self.classes, self.template, self.digests)


@dataclass(frozen=True)
class FederationInfo:
    """Description of a federation without its images, as a server has it: rows and digests of each site's tables."""

    name: str
    classes: tuple[str, ...]
    template: str
    shape: tuple[int, int, int]
    rows: Mapping[str, Mapping[str, int]]
    digests: Mapping[str, Mapping[str, str]]

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the sites, sorted."""
        return tuple(sorted(self.rows))

    @property
    def prompts(self) -> tuple[str, ...]:
        """One prompt per class, in the order of the labels."""
        return tuple(prompt(self.template, name) for name in self.classes)

    @cached_property
    def fingerprint(self) -> str:
        """Fingerprint of the federation with these tables (`Federation.fingerprint`)."""
        return _fingerprint(self.classes, self.template, self.digests)


def describe_names(template: str) -> bool:
    """Return whether a template has exactly one placeholder for the class and no unknown one."""
    rest = prompts_of("", [prompt(template, "")])[0]
    return template.replace("{class}", "{}").count("{}") == 1 and not {"{", "}"} & set(rest)


def _fingerprint(classes: tuple[str, ...], template: str, digests: Mapping[str, Mapping[str, str]]) -> str:
    tables = {f"{name}/{split}": digests[name][split] for name in sorted(digests) for split in SPLITS}
    return hashlib.sha256(json.dumps([classes, template, tables]).encode()).hexdigest()


def _faults(federation: Federation) -> list[str]:
    faults = []
    count = len(federation.classes)
    if count < 2 or len(set(federation.classes)) != count:
        faults.append(f"expected two or more different class names, got {federation.classes}")
    faults += [f"class {name!r} {why}" for name in federation.classes if (why := fault_of_name(name))]
    faults += [f"site {name!r} {why}" for name in federation.sites if name and (why := fault_of_name(name))]
    if not describe_names(federation.template):
        faults.append(f"expected a template with one {{}} for the class name, got {federation.template!r}")
    if not federation.sites:
        faults.append("expected at least one site, got none")
    faults += [
        f"site {name!r}: expected a name that is valid as a file name"
        for name in federation.sites if not name or name.startswith(".") or len(name) > 100 or not _PLAIN.fullmatch(name)
    ]  # fmt: skip
    shapes = set()
    for name, site in federation.sites.items():
        for split, table in site.splits.items():
            where = f"site {name!r}, {split}"
            if set(table) != {"image", "label"}:
                faults.append(f"{where}: expected the columns image and label, got {sorted(table)}")
                continue
            image, label = table["image"], table["label"]
            if image.dtype != torch.uint8 or image.dim() != 4 or image.shape[1] not in (1, 3):
                faults.append(f"{where}: expected uint8 images [n, 1 or 3, height, width], got {_kind(image)}")
                continue
            shapes.add(tuple(image.shape[1:]))
            if label.dtype != torch.int64 or tuple(label.shape) != (len(image),):
                faults.append(f"{where}: expected int64 labels [{len(image)}], got {_kind(label)}")
            elif len(label) and not 0 <= int(label.min()) <= int(label.max()) < count:
                span = f"{int(label.min())} to {int(label.max())}"
                faults.append(f"{where}: expected labels 0 to {count - 1}, got {span}")
            if not len(image):
                faults.append(f"{where}: no images; give the site more images or leave it out")
    if len(shapes) > 1:
        faults.append(f"expected images of one size, got {sorted(shapes)}; resize them to one")
    return faults


def _kind(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
