"""Describe a federation before training: counts, sizes, notes and a plot."""

import io
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..core import SPLITS
from ..core.tensors import rows
from ..utils.errors import InputError, printable
from ..utils.files import PUBLIC, atomic_write
from ..utils.paths import expanded
from .federation import Federation
from .image_cache import Cache, usual

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


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
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn = io.BytesIO()
    # Names are text, not formulas, and may be in a script that the font lacks.
    with matplotlib.rc_context({"text.parse_math": False, "text.usetex": False}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from|Matplotlib currently does not support")
        figure = Figure(figsize=(11, max(2.5, 0.4 * len(federation.sites) + 1.5)), layout="constrained")
        FigureCanvasAgg(figure)
        _draw(figure, federation)
        try:
            figure.savefig(drawn, format=path.suffix.removeprefix(".").lower())
        except ValueError as error:
            raise InputError(f"cannot draw to {path}: {error}; set a file that ends in .png, .svg or .pdf") from error
    atomic_write(path, drawn.getvalue(), PUBLIC)


def _draw(figure: "Figure", federation: Federation) -> None:
    sites, classes = federation.sites, federation.classes
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=[3, 2])
    found = [counts(site.train["label"], len(classes)) for site in sites.values()]
    by_class = [(name, [each[i] for each in found]) for i, name in enumerate(classes)]
    by_split = [(split, [rows(site.splits[split]) for site in sites.values()]) for split in SPLITS]
    _bars(left, by_class, "tab20", "training images by class", legend=len(classes) <= 20)
    _bars(right, by_split, "tab10", "images by split", legend=True)
    left.set_yticks(range(len(sites)), [printable(name, 60) for name in sites])
    left.invert_yaxis()
    figure.suptitle(printable(federation.name))


def _bars(axes: "Axes", parts: Sequence[tuple[str, list[int]]], colours: str, title: str, *, legend: bool) -> None:
    import matplotlib

    start = [0] * len(parts[0][1])
    palette, bars = matplotlib.colormaps[colours], []
    for turn, (_, values) in enumerate(parts):
        bars.append(axes.barh(range(len(values)), values, left=start, color=palette(turn % palette.N)))
        start = [a + b for a, b in zip(start, values, strict=True)]
    axes.set_title(title, fontsize="medium")
    if legend:
        place = "outside lower left" if colours == "tab20" else "outside lower right"
        # matplotlib omits labels that begin with "_", so the names are set afterwards
        drawn = axes.figure.legend(bars, [str(turn) for turn in range(len(parts))], loc=place, ncols=5, fontsize="small")
        for text, (part, _) in zip(drawn.get_texts(), parts, strict=True):
            text.set_text(printable(part, 60))
