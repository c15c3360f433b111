"""Convert a matplotlib figure to an SVG with the page's font and colours, in the light and the dark theme.

Plots use placeholder colours (`COLOURS`), which become CSS variables, so one plot serves both themes. Text remains text, so
it can be read aloud, searched and scaled.
"""

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING
from xml.sax.saxutils import escape, quoteattr

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 360  # width of a plot in its own units; on the page it is about as many pixels wide, so fonts keep their size
SERIES = 8  # number of colours (and markers) before they repeat
MARKERS = "os^DvPX*"
INK, MUTED, GRID, CARD, LABEL, ACCENT = (f"#00000{place}" for place in range(1, 7))
COLOURS = {INK: "ink", MUTED: "muted", GRID: "grid", CARD: "card", LABEL: "label", ACCENT: "accent"}
COLOURS |= {f"#00010{index}": f"s{index}" for index in range(SERIES)}

STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "warmfed",
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "font.size": 11,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.labelsize": 10.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "text.color": INK,
    "text.parse_math": False,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.labelsize": 10.5,
    "ytick.labelsize": 10.5,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "lines.linewidth": 1.8,
    "lines.markersize": 6,
    "lines.solid_capstyle": "round",
}


def colour(index: int) -> str:
    """Return the placeholder colour of series number `index`."""
    return f"#00010{index % SERIES}"


@contextmanager
def axes(height: float = 230, *, width: float = WIDTH) -> "Iterator[Axes]":
    """Return new axes in the report's style; `width` and `height` are in the plot's own units."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    # Names may be in any script; the browser has the letters that matplotlib's font lacks.
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure = Figure(figsize=(width / 72, height / 72), layout="constrained")
        FigureCanvasSVG(figure)
        yield figure.subplots()


def markup(figure: "Figure", key: str, alt: str) -> str:
    """Return `figure` as an `<svg>` element; `key` is the prefix of its ids, unique in the page."""
    target = io.StringIO()
    # print_svg, since savefig draws everything twice
    figure.canvas.print_svg(target, metadata={"Date": None, "Creator": None})
    svg = target.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    box = re.search(r'viewBox="([^"]*)"', svg)
    assert box is not None
    head = f'<svg viewBox="{box[1]}" role="img" aria-label={quoteattr(alt)}><title>{escape(alt)}</title>'
    svg = head + svg[svg.index(">") + 1 :]
    svg = _own_ids(svg, key)
    svg = re.sub(r"font-family: [^;\"]*;? ?| transform=\"rotate\(-0 [^\"]*\"", "", svg)
    svg = re.sub(r"#0000\d\d|#00010\d", lambda found: f"var(--{COLOURS.get(found[0], 'ink')})", svg)
    svg = svg.replace("fill: var(--label)", "fill: var(--ink); stroke: var(--card); stroke-width: 3; paint-order: stroke")
    svg = re.sub(r"\d+\.\d{3,}", lambda found: f"{float(found[0]):.2f}".rstrip("0").rstrip("."), svg)
    return re.sub(r"\s*\n\s*", " ", svg).strip()


def _own_ids(svg: str, key: str) -> str:
    """Remove the ids without references, and add the prefix `key` to the others."""
    used = set(re.findall(r"#([\w-]+)[\")]", svg))
    svg = re.sub(r' id="([^"]*)"', lambda found: f' id="{key}-{found[1]}"' if found[1] in used else "", svg)
    return re.sub(r"(href=\"#|url\(#)", rf"\g<1>{key}-", svg)
