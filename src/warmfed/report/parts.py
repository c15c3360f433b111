"""Elements of a page (sections, figures, tables), and formats of numbers."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from warmfed.utils.errors import printable

MISSING = "–"


@dataclass(frozen=True)
class Cell:
    """A table cell. `best` marks the winner of its column; `bar`, from 0 to 1, draws a bar behind the text."""

    text: str
    best: bool = False
    bar: float | None = None


@dataclass(frozen=True)
class Table:
    """A table; each row is as long as the header, and the first column names the row."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    folded: bool = False
    """Whether the table is collapsed at first."""
    groups: tuple[tuple[str, int], ...] = ()
    """(title, number of columns) for a line above the header; together they cover all columns."""
    words: tuple[str, ...] = ()
    """Columns with text instead of numbers."""


@dataclass(frozen=True)
class Figure:
    """A plot: the page contains `svg` unescaped; `alt` describes it in words."""

    title: str
    svg: str
    alt: str
    key: tuple[tuple[str, str], ...] = ()  # (symbol, meaning): the legend, as text


@dataclass(frozen=True)
class Picture:
    """Grids of images of a site or an algorithm with one row per class: (caption, data URI, images per row)."""

    title: str
    columns: tuple[tuple[str, str, int], ...]


@dataclass(frozen=True)
class Section:
    """A section of the page; `how` explains it in one or two sentences."""

    key: str
    title: str
    how: str
    figures: Sequence[Figure] = ()
    pictures: Sequence[Picture] = ()
    classes: Sequence[str] = ()  # row names of the pictures
    tables: Sequence[Table] = ()
    small: bool = False  # four plots per row instead of three
    text: str = ""  # preformatted, collapsed at first

    @property
    def names_fit(self) -> bool:
        """Whether the class names fit beside the rows of the pictures; otherwise the rows have numbers."""
        return max((len(name) for name in self.classes), default=0) <= 8


def number(value: float | None, digits: int = 1) -> str:
    if value is None:
        return MISSING
    if not math.isfinite(value):
        return "not finite"
    return f"{value:,.{digits}f}".replace("-", "−")


def signed(value: float | None, digits: int = 1) -> str:
    text = number(value, digits)
    return f"+{text}" if value is not None and math.isfinite(value) and value > 0 else text


def percent(value: float | None) -> str:
    """Return a value, already in percent, as text."""
    return number(value) + (" %" if value is not None and math.isfinite(value) else "")


def size(count: float | None) -> str:
    """Return bytes as text, in decimal units."""
    if count is None or not math.isfinite(count):
        return number(count)
    for unit, scale, digits in (("GB", 1e9, 2), ("MB", 1e6, 2), ("kB", 1e3, 1)):
        if abs(count) >= scale * 0.1:
            return f"{number(count / scale, digits)} {unit}"
    return f"{number(count, 0)} B"


def duration(seconds: float | None) -> str:
    if seconds is None or not math.isfinite(seconds):
        return number(seconds)
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def memory(megabytes: float | None) -> str:
    return size(None if megabytes is None else megabytes * 1e6)


def without_gaps(title: str, header: tuple[str, ...], rows: Sequence[tuple[Cell, ...]], words: tuple[str, ...] = ()) -> Table:
    """Return a table without the columns that have no value."""
    kept = [place for place in range(len(header)) if any(row[place].text != MISSING for row in rows)]
    return Table(
        title,
        tuple(header[place] for place in kept),
        tuple(tuple(row[place] for place in kept) for row in rows),
        words=words,
    )


_TAG = re.compile(r"<(?=[A-Za-z/!?])|&(?=#?\w+;)|[\\`|\[\]*~]")


def markdown(text: str) -> str:
    """Return text as one line of Markdown that renders unchanged: HTML, links, code and table cells are escaped."""
    return _TAG.sub(lambda found: f"\\{found[0]}", printable(text, 1000))


def cells(*values: str | Cell) -> tuple[Cell, ...]:
    return tuple(value if isinstance(value, Cell) else Cell(value) for value in values)
