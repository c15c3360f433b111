"""The report's plots, made with matplotlib. Each function takes plain numbers and returns an `<svg>` element.

Series differ in marker, colour and a label beside the data. A value None is a gap.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from .svg import ACCENT, CARD, GRID, INK, LABEL, MARKERS, MUTED, SERIES, axes, colour, markup

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Values = Sequence[float | None]
LONGEST = 16  # maximum letters of a name in a plot; tables show the full name
LINE = 14  # height of a label
ROW = 26  # height of a row of a plot by name


def short(name: str) -> str:
    """Return `name` without its middle if it is long: names often differ at their ends."""
    return name if len(name) <= LONGEST else f"{name[: LONGEST // 2 - 1]}…{name[-LONGEST // 2 :]}"


def _plain(values: Values) -> list[float]:
    """Return the values with NaN, which matplotlib omits, for gaps and values that are not finite."""
    return [math.nan if value is None or not math.isfinite(value) else float(value) for value in values]


def _apart(heights: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Return `heights`, moved as little as possible so that they are `gap` apart and between `low` and `high`."""
    order = sorted(range(len(heights)), key=lambda index: heights[index])
    placed = [0.0] * len(heights)
    floor = low
    for index in order:
        placed[index] = max(heights[index], floor)
        floor = placed[index] + gap
    ceiling = high
    for index in reversed(order):
        placed[index] = min(placed[index], ceiling)
        ceiling = placed[index] - gap
    return placed


def lines(
    key: str,
    alt: str,
    ticks: Sequence[str],
    series: Mapping[str, Values],
    *,
    unit: str = "",
    bold: tuple[str, Values] | None = None,
    xlabel: str = "round",
    order: Sequence[str] = (),
) -> str:
    """Draw one line per name of `series` over `ticks`; `bold` is the name of the summary, if there is one.

    With more names than colours and a bold line, the other lines are grey, and only the bold and the lowest line have
    labels. Without a bold line, colours repeat with broken lines. `order` has all names, so that plots share the colours.
    """
    order = list(order or series)
    crowd = len(series) > SERIES and bold is not None
    height = 230 if crowd else max(230, 60 + LINE * (len(series) + 1))
    with axes(height) as ax:
        places = range(len(ticks))
        ends: list[tuple[float, str, str]] = []
        last = {name: end for name, values in series.items() if (end := _last(values)) is not None}
        lowest = min(last, key=last.__getitem__, default=None)
        for name, values in series.items():
            index = order.index(name)
            tint = MUTED if crowd else colour(index)
            plain = crowd and name != lowest
            ax.plot(
                places,
                _plain(values),
                color=tint,
                marker="" if plain else MARKERS[index % SERIES],
                linestyle="-" if index < SERIES or crowd else "--",
                markeredgecolor=CARD,
                alpha=0.35 if plain else 1,
                linewidth=1 if plain else 1.8,
                clip_on=False,
            )
            if name in last and not plain:
                ends.append((last[name], short(name), INK if crowd else tint))
        if bold is not None:
            ax.plot(places, _plain(bold[1]), color=INK, linewidth=3, zorder=3, clip_on=False)
            if (end := _last(bold[1])) is not None:
                ends.append((end, bold[0], INK))
        _rounds(ax, ticks, xlabel)
        ax.set_ylabel(unit)
        _margins(ax)
        _name_ends(ax, ends, len(ticks) - 1, LINE / (height - 50), strong=bold[0] if bold else None)
        return markup(ax.figure, key, alt)


def _last(values: Values) -> float | None:
    return next((value for value in reversed(values) if value is not None and math.isfinite(value)), None)


def _rounds(ax: "Axes", ticks: Sequence[str], xlabel: str) -> None:
    step = math.ceil(len(ticks) / 8)
    shown = range(0, len(ticks), step)
    ax.set_xticks(list(shown), [ticks[index] for index in shown])
    ax.set_xlabel(xlabel)
    ax.grid(axis="x", visible=False)


def _margins(ax: "Axes") -> None:
    """Set margins above and below, and a range of at least one unit, so that noise does not resemble a trend."""
    low, high = ax.dataLim.intervaly
    if not (math.isfinite(low) and math.isfinite(high)):
        low, high = 0.0, 1.0
    room = max((high - low) * 0.08, (1.0 if high > 1.5 else 0.02) / 2)
    ax.set_ylim(low - room, high + room)


def _name_ends(ax: "Axes", ends: list[tuple[float, str, str]], place: float, gap: float, strong: str | None) -> None:
    low, high = ax.get_ylim()
    heights = _apart([end for end, _, _ in ends], (high - low) * gap, low, high)
    for height, (_, name, tint) in zip(heights, ends, strict=True):
        ax.annotate(
            name,
            (place, height),
            xytext=(7, 0),
            textcoords="offset points",
            va="center",
            color=tint,
            fontsize=10.5,
            fontweight="bold" if name == strong else "normal",
            annotation_clip=False,
        )


def pairs(key: str, alt: str, names: Sequence[str], first: Values, second: Values, *, unit: str) -> str:
    """Draw one row per name: a hollow marker at `first` and a filled one at `second`, joined by a line."""
    with axes(64 + ROW * len(names)) as ax:
        rows = range(len(names))
        for row, start, end in zip(rows, _plain(first), _plain(second), strict=True):
            ax.plot([start, end], [row, row], color=MUTED, linewidth=2, alpha=0.6, zorder=1)
        ax.plot(_plain(first), rows, "o", color=CARD, markeredgecolor=INK, markeredgewidth=1.6, markersize=7)
        ax.plot(_plain(second), rows, "D", color=ACCENT, markeredgecolor=CARD, markersize=7.5)
        _rows(ax, names)
        low, high = ax.dataLim.intervalx
        if math.isfinite(low) and high - low < 1:
            ax.set_xlim((low + high) / 2 - 1, (low + high) / 2 + 1)
        ax.set_xlabel(unit)
        return markup(ax.figure, key, alt)


def bars(key: str, alt: str, names: Sequence[str], parts: Mapping[str, Sequence[float]], labels: Sequence[str], *,
         unit: str) -> str:  # fmt: skip
    """Draw one bar per name with `labels` at its end: one filled part, or a filled and a hollow part."""
    with axes(64 + ROW * len(names)) as ax:
        starts = [0.0] * len(names)
        for values, fill in zip(parts.values(), (ACCENT, CARD), strict=False):
            ax.barh(range(len(names)), values, left=starts, color=fill, edgecolor=ACCENT, linewidth=1.2, height=0.6)
            starts = [start + value for start, value in zip(starts, values, strict=True)]
        for row, (end, label) in enumerate(zip(starts, labels, strict=True)):
            ax.annotate(label, (end, row), xytext=(5, 0), textcoords="offset points", va="center", fontsize=10.5,
                        annotation_clip=False)  # fmt: skip
        _rows(ax, names)
        ax.set_xlim(0, max([*starts, 0.0]) or 1)
        ax.set_xlabel(unit)
        return markup(ax.figure, key, alt)


def _rows(ax: "Axes", names: Sequence[str]) -> None:
    ax.set_yticks(range(len(names)), [short(name) for name in names])
    ax.tick_params(axis="y", labelcolor=INK)
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.grid(axis="y", visible=False)
    ax.spines["left"].set_visible(False)


def heat(key: str, alt: str, rows: Sequence[str], columns: Sequence[str], values: Sequence[Values]) -> str:
    """Draw a grid of numbers with darker colours for higher values; gaps are empty."""
    known = [value for line in map(_plain, values) for value in line if not math.isnan(value)]
    low, span = min(known, default=0.0), (max(known, default=1.0) - min(known, default=0.0)) or 1.0
    with axes(44 + ROW * len(rows)) as ax:
        for row, line in enumerate(map(_plain, values)):
            for column, value in enumerate(line):
                if math.isnan(value):
                    continue
                ax.barh(row, 0.96, left=column - 0.48, height=0.92, color=ACCENT, alpha=0.05 + 0.55 * (value - low) / span)
                ax.annotate(f"{value:.1f}", (column, row), ha="center", va="center", fontsize=10)
        _rows(ax, rows)
        ax.set_xticks(range(len(columns)), [short(name) for name in columns])
        ax.set_xlim(-0.55, len(columns) - 0.45)
        ax.xaxis.tick_top()
        ax.grid(visible=False)
        ax.spines[:].set_visible(False)
        return markup(ax.figure, key, alt)


def decisions(key: str, alt: str, ticks: Sequence[str], before: Values, after: Values, kept: Sequence[bool]) -> str:
    """Draw one arrow per round from `before` to `after`: solid if the step was kept, else dashed and hollow."""
    with axes() as ax:
        for place, (start, end, keep) in enumerate(zip(_plain(before), _plain(after), kept, strict=True)):
            tint = colour(2) if keep else colour(1)
            ax.plot([place, place], [start, end], color=tint, linewidth=2.4, linestyle="-" if keep else (0, (1.5, 1.5)))
            ax.plot(place, start, "_", color=MUTED, markersize=12, markeredgewidth=2)
            ax.plot(place, end, "o", color=tint if keep else CARD, markeredgecolor=tint, markeredgewidth=2, markersize=8)
        _rounds(ax, ticks, "round")
        ax.set_xlim(-0.6, len(ticks) - 0.4)
        _margins(ax)
        ax.set_ylabel("validation accuracy, %")
        return markup(ax.figure, key, alt)


def features(
    key: str,
    alt: str,
    everything: Sequence[tuple[float, float]],
    real: Sequence[tuple[float, float]],
    synthetic: Sequence[tuple[float, float]],
    names: Mapping[str, tuple[float, float]],
    index: int,
) -> str:
    """Draw one site's points in the map of all sites: filled for real, crosses for synthetic, grey for other sites.

    `names` are labels at their positions, such as the classes; `index` is the number of the site's colour.
    """
    with axes(270, width=270) as ax:
        for points, style in (
            (everything, {"marker": "o", "color": MUTED, "s": 5, "linewidths": 0, "alpha": 0.4}),
            (real, {"marker": "o", "color": colour(index), "s": 17, "linewidths": 0, "alpha": 0.75}),
            (synthetic, {"marker": "x", "color": colour(index), "s": 17, "linewidths": 1.1, "alpha": 0.8}),
        ):
            if points:
                ax.scatter(*zip(*points, strict=True), **style)
        xs, ys = zip(*everything, *real, *synthetic, strict=True)
        for set_limits, values in ((ax.set_xlim, xs), (ax.set_ylim, ys)):
            room = (max(values) - min(values)) * 0.04 or 1.0
            set_limits(min(values) - room, max(values) + room)
        _name_places(ax, names)
        ax.set_xticks([])
        ax.set_yticks([])
        ax.spines[:].set_visible(True)
        return markup(ax.figure, key, alt)


def _name_places(ax: "Axes", names: Mapping[str, tuple[float, float]]) -> None:
    """Write each name at its position, or one or two lines above or below it; omit it if there is no room."""
    (left, right), (low, high) = ax.get_xlim(), ax.get_ylim()
    letter, line = (right - left) * 0.031, (high - low) * 0.058  # of the bold font below, in a plot of this size
    taken: list[tuple[float, float, float]] = []
    for name, (x, y) in sorted(names.items(), key=lambda item: item[1][1]):
        half = letter * len(name) / 2
        x = min(max(x, left + half), right - half)
        for shift in (0, 1, -1, 2, -2):
            place = min(max(y + shift * line, low + line / 2), high - line / 2)
            if all(abs(x - a) > half + b or abs(place - c) > line * 0.95 for a, b, c in taken):
                text = ax.annotate(name, (x, place), ha="center", va="center", color=LABEL, fontweight="bold", fontsize=11)
                text.set_in_layout(False)  # the plots of all sites have one size
                taken.append((x, half, place))
                break


def frontier(
    key: str, alt: str, points: Mapping[str, tuple[float, float, float]], *, xlabel: str, unit: str, order: Sequence[str]
) -> str:
    """Draw named points (x, y, standard deviation of y), with labels that do not overlap."""
    height = max(300, 60 + LINE * len(points))
    with axes(height) as ax:
        for name, (x, y, spread) in points.items():
            index = order.index(name)
            ax.errorbar(x, y, yerr=spread or None, color=colour(index), fmt=MARKERS[index % SERIES], markersize=7,
                        markeredgecolor=CARD, elinewidth=1.4)  # fmt: skip
        ax.set_xlabel(xlabel)
        ax.set_ylabel(unit)
        _margins(ax)
        right = max(x for x, _, _ in points.values())
        ax.set_xlim(-0.06 * (right or 1.0), (right or 1.0) * 1.06)
        _name_points(ax, points, right * 1.06, LINE / (height - 50), order)
        return markup(ax.figure, key, alt)


def _name_points(
    ax: "Axes", points: Mapping[str, tuple[float, float, float]], place: float, gap: float, order: Sequence[str]
) -> None:
    """Write the names in a column at the right, each joined to its point by a thin line, without overlaps."""
    low, high = ax.get_ylim()
    heights = _apart([y for _, y, _ in points.values()], (high - low) * gap, low, high)
    for (name, (x, y, _)), height in zip(points.items(), heights, strict=True):
        ax.annotate(short(name), (place, height), xytext=(9, 0), textcoords="offset points", va="center",
                    color=colour(order.index(name)), fontsize=10.5, annotation_clip=False)  # fmt: skip
        ax.annotate("", (x, y), (place, height), arrowprops={"arrowstyle": "-", "color": GRID, "linewidth": 1,
                    "shrinkA": 0, "shrinkB": 5}, annotation_clip=False)  # fmt: skip
