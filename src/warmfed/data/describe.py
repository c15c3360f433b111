"""Describe a federation before training: counts, sizes, notes and a plot."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..core import SPLITS
from ..core.tensors import rows
from ..utils.errors import InputError
from ..utils.files import PUBLIC, atomic_write
from ..utils.paths import expanded
from .federation import Federation
from .image_cache import Cache, usual

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def describe(federation: Federation, cache: str = "") -> dict[str, Any]:
    """Return the output of `warmfed data --json`; counts are images by site, split and class."""
    store = Cache(expanded(cache) if cache else usual())
    return {
        "name": federation.name,
        "classes": list(federation.classes),
        "prompts": list(federation.prompts),
        "image": list(federation.shape),
        "pictures": [list(side) for side in federation.sides],
        "sites": {
            name: {split: counts(table["label"], len(federation.classes)) for split, table in site.splits.items()}
            for name, site in federation.sites.items()
        },
        "images": sum(rows(table) for site in federation.sites.values() for table in site.splits.values()),
        "bytes": sum(table["image"].nbytes for site in federation.sites.values() for table in site.splits.values()),
        "fingerprint": federation.fingerprint,
        "notes": list(federation.notes),
        "cache": {"folder": str(store.folder), "bytes": store.size()},
    }


def counts(label: torch.Tensor, classes: int) -> list[int]:
    """Return the number of images of each class."""
    return label.bincount(minlength=classes).tolist()


def plot(federation: Federation, path: Path) -> None:
    """Write a bar chart with one bar per site: training images by class, and images by split.

    The file holds only counts, so other users may read it.

    Raises:
        InputError: if the file cannot be written, or matplotlib has no format for its suffix.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names, classes = list(federation.sites), federation.classes
    height = max(2.5, 0.4 * len(names) + 1.5)
    figure = Figure(figsize=(11, height), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=[3, 2])
    by_class = {
        name: [counts(site.train["label"], len(classes))[i] for site in federation.sites.values()]
        for i, name in enumerate(classes)
    }
    by_split = {split: [rows(site.splits[split]) for site in federation.sites.values()] for split in SPLITS}
    _bars(left, names, by_class, "tab20", "training images by class", legend=len(classes) <= 20)
    _bars(right, names, by_split, "tab10", "images by split", legend=True)
    left.invert_yaxis()
    figure.suptitle(federation.name)
    drawn = io.BytesIO()
    try:
        figure.savefig(drawn, format=path.suffix.removeprefix(".").lower())
    except ValueError as error:
        raise InputError(f"cannot draw to {path}: {error}; set a file that ends in .png, .svg or .pdf") from error
    atomic_write(path, drawn.getvalue(), PUBLIC)


def _bars(axes: "Axes", names: list[str], parts: Mapping[str, list[int]], colours: str, title: str, *, legend: bool) -> None:
    import matplotlib

    start = [0] * len(names)
    palette = matplotlib.colormaps[colours]
    for turn, (part, values) in enumerate(parts.items()):
        axes.barh(names, values, left=start, label=part, color=palette(turn % palette.N))
        start = [a + b for a, b in zip(start, values, strict=True)]
    axes.set_title(title, fontsize="medium")
    if legend:
        place = "outside lower left" if colours == "tab20" else "outside lower right"
        axes.figure.legend(*axes.get_legend_handles_labels(), loc=place, ncols=5, fontsize="small")
