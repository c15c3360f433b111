"""Output of the command line: progress with the time left, and tables."""

import json
import os
import re
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.table import Table
from rich.text import Text

from ..config import Config
from ..report.generators import quality_table
from ..report.parts import Table as Plain
from ..report.parts import duration, memory, number, size
from ..utils.errors import shown
from .progress import Clock, RunListener, spoken

WIDTH = 160
"""Width of tables in characters, if the output is not a terminal."""
MOST_SITES = 8
LINE_EVERY = 15.0


class _Plain(Console):
    """Console that prints text literally, without markup, emoji codes or control characters."""

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(shown(text), **options)


def console() -> Console:
    """Return a console for standard output."""
    # rich raises for some values of these variables, and draws nothing if they are 0
    sizes = ("COLUMNS", "LINES")
    known = {key: value for key, value in os.environ.items() if key not in sizes or re.fullmatch(r"[1-9][0-9]{0,4}", value)}
    plain: dict[str, Any] = {"markup": False, "emoji": False, "_environ": known}
    return _Plain(**plain) if sys.stdout.isatty() else _Plain(**plain, width=WIDTH, soft_wrap=True)


def one_line(text: str) -> str:
    """Return text as of `shown`, with blanks for line feeds: names from files or sites may have them."""
    return shown(text).replace("\n", " ")


def print_path(path: object) -> None:
    """Print a path: as it is for other programs, without control characters on a terminal."""
    print(one_line(str(path)) if sys.stdout.isatty() else path, flush=True)


class PlainTable(Table):
    """Table whose text cells are single lines without control characters."""

    def add_column(self, header: Any = "", *others: Any, **options: Any) -> None:
        super().add_column(_cell(header), *others, **options)

    def add_row(self, *cells: Any, **options: Any) -> None:
        super().add_row(*map(_cell, cells), **options)


def _cell(content: Any) -> Any:
    return one_line(content) if isinstance(content, str) else content


class ProgressReporter(RunListener, ABC):
    """Reports the progress of a run; use it as a context manager."""

    folder: Path | None = None

    def __init__(self) -> None:
        self.clock = Clock((), 1)
        self._lock = threading.Lock()

    def plan(self, folder: Path, config: Config, sites: tuple[str, ...], records: Sequence[Mapping[str, Any]]) -> None:
        self.folder = folder
        self.clock = Clock.of(config, len(sites), records, time.monotonic())
        self.begin(config, sites)

    def progress(self, site: str, what: str, done: int, total: int) -> None:
        with self._lock:
            self.clock.work(site, what, done, total)
            self.work(site, what, done, total)

    def round(self, record: Mapping[str, Any]) -> None:
        with self._lock:
            self.clock.finish(record["seconds"], time.monotonic())
            self.stage(record)

    def __enter__(self) -> "ProgressReporter":
        return self

    def __exit__(self, *error: object) -> None:
        """End all output."""

    @abstractmethod
    def begin(self, config: Config, sites: tuple[str, ...]) -> None: ...
    @abstractmethod
    def work(self, site: str, what: str, done: int, total: int) -> None: ...
    @abstractmethod
    def stage(self, record: Mapping[str, Any]) -> None: ...
    @abstractmethod
    def phase(self, what: str, done: int, total: int) -> None:
        """Report work outside a run: a phase of pre-training, the cells of a comparison."""

    @abstractmethod
    def say(self, text: str) -> None: ...


class SilentReporter(ProgressReporter):
    """Prints nothing."""

    def begin(self, config: Config, sites: tuple[str, ...]) -> None: ...
    def work(self, site: str, what: str, done: int, total: int) -> None: ...
    def stage(self, record: Mapping[str, Any]) -> None: ...
    def phase(self, what: str, done: int, total: int) -> None: ...
    def say(self, text: str) -> None: ...


class JsonReporter(ProgressReporter):
    """Prints events as JSON lines; progress within a stage at most once a second."""

    _last = 0.0

    def begin(self, config: Config, sites: tuple[str, ...]) -> None:
        stages, done = list(self.clock.stages), self.clock.done
        emit(
            "plan",
            folder=str(self.folder),
            algorithm=config.name,
            seed=config.seed,
            sites=list(sites),
            stages=stages,
            done=done,
        )

    def work(self, site: str, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self._last >= 1:
            self._last = now
            left = round(self.clock.left(now), 1)
            emit("progress", stage=self.clock.stage, site=site, what=what, done=done, total=total, seconds_left=left)

    def stage(self, record: Mapping[str, Any]) -> None:
        emit("round", **record)

    def phase(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if done == total or now - self._last >= 1:
            self._last = now
            emit("progress", what=what, done=done, total=total)

    def say(self, text: str) -> None:
        emit("message", text=text)


def emit(event: str, **values: Any) -> None:
    print(json.dumps({"event": event, **values}), flush=True)


class LineReporter(ProgressReporter):
    """Prints plain lines, for files and pipes."""

    _last = 0.0

    def begin(self, config: Config, sites: tuple[str, ...]) -> None:
        self._last = time.monotonic()
        print(one_line(begun(config, sites, self.clock, self.folder)), flush=True)

    def work(self, site: str, what: str, done: int, total: int) -> None:
        self._print_rarely(f"  {percent(self.clock)}, {spoken(self.clock.left(time.monotonic()))}")

    def stage(self, record: Mapping[str, Any]) -> None:
        self._last = time.monotonic()
        print(one_line(line(record)), flush=True)

    def phase(self, what: str, done: int, total: int) -> None:
        if done == total:
            print(one_line(f"{what}: {done:,} of {total:,}"), flush=True)
        else:
            self._print_rarely(f"  {what}: {done:,} of {total:,}")

    def say(self, text: str) -> None:
        print(shown(text), flush=True)

    def _print_rarely(self, text: str) -> None:
        now = time.monotonic()
        if now - self._last >= LINE_EVERY:
            self._last = now
            print(one_line(text), flush=True)


class _Left(ProgressColumn):
    """Column of the time left; it is updated between reports, too."""

    def __init__(self, bars: "BarReporter") -> None:
        super().__init__()
        self._bars = bars

    def render(self, task: Task) -> Text:
        if task.id != self._bars.main:
            return Text(f"{task.completed:,.0f} of {task.total:,.0f}" if task.total else "waits", style="dim")
        return Text(self._bars.left(), style="bold")


class BarReporter(ProgressReporter):
    """Shows a bar for the whole run with the time left, and a bar for each working site."""

    def __init__(self) -> None:
        super().__init__()
        self._console = console()
        columns = (TextColumn("{task.description}", markup=False), BarColumn(30), _Left(self))
        self._progress = Progress(*columns, console=self._console, transient=True, refresh_per_second=5)
        self.main: TaskID | None = None
        self._sites: dict[str, TaskID] = {}
        self._drawn: dict[str, float] = {}
        self._spoken = ""

    def __enter__(self) -> "BarReporter":
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def left(self) -> str:
        if not self.clock.stages:
            return self._spoken
        if self.main is not None:
            self._progress.tasks[0].completed = self.clock.fraction(time.monotonic())
        return spoken(self.clock.left(time.monotonic()))

    def begin(self, config: Config, sites: tuple[str, ...]) -> None:
        self._console.print(one_line(begun(config, sites, self.clock, self.folder)), highlight=False)
        self.main = self._progress.add_task(one_line(percent(self.clock)), total=1.0)
        if len(sites) <= MOST_SITES:
            self._sites = {site: self._progress.add_task(f"  {one_line(site)}", total=None, visible=False) for site in sites}

    def work(self, site: str, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if done != total and now - self._drawn.get(site, 0.0) < 0.1:
            return
        self._drawn[site] = now
        if site in self._sites:
            self._progress.update(self._sites[site], completed=done, total=total, visible=True)
        if self.main is not None:
            doing = "" if site or what == "sites" else f": {what} {done:,} of {total:,}"
            self._progress.update(self.main, description=one_line(percent(self.clock) + doing))

    def stage(self, record: Mapping[str, Any]) -> None:
        self._console.print(one_line(line(record)), highlight=False)
        for task in self._sites.values():
            self._progress.update(task, completed=0, total=None, visible=False)
        if self.main is not None:
            self._progress.update(self.main, description=one_line(percent(self.clock)))

    def phase(self, what: str, done: int, total: int) -> None:
        what, _, self._spoken = one_line(what).partition(", ")
        if self.main is None:
            self.main = self._progress.add_task(what, total=total)
        self._spoken = self._spoken or f"{done:,} of {total:,}"
        self._progress.update(self.main, description=what, completed=done, total=total)

    def say(self, text: str) -> None:
        self._console.print(text, highlight=False)


def progress_reporter(*, quiet: bool, events: bool) -> ProgressReporter:
    if quiet:
        return SilentReporter()
    if events:
        return JsonReporter()
    return BarReporter() if sys.stdout.isatty() else LineReporter()


def begun(config: Config, sites: tuple[str, ...], clock: Clock, folder: Path | None) -> str:
    done = f", {clock.done} of {len(clock.stages)} stages are done" if clock.done else f", {len(clock.stages)} stages"
    return f"{config.name}, seed {config.seed}, {len(sites)} sites{done} -> {folder}"


def percent(clock: Clock) -> str:
    place = f"{min(clock.done + 1, len(clock.stages))}/{len(clock.stages)}"
    share = f" {100 * clock.share:.0f} %" if clock.share else ""
    return f"{clock.stage} ({place}){share}"


def line(record: Mapping[str, Any]) -> str:
    """Return a line about a finished stage: its name, seconds and test accuracies."""
    name = f"{record['stage']} {record['number'] + 1}" if record["stage"] in ("train", "alone", "gate") else record["stage"]
    shown = []
    union = (record["union"] or {}).get("global")
    if union and "accuracy" in union:
        shown.append(f"global {union['accuracy']:5.1f} %")
    elif union:
        shown.append(f"loss {union['loss']:.4f}")
    own = [views["test"] for views in record["personal"].values()]
    if own and "accuracy" in own[0]:
        shown.append(f"personal {sum(view['accuracy'] for view in own) / len(own):5.1f} %")
    elif own and not union:
        shown.append(f"personal loss {sum(view['loss'] for view in own) / len(own):.4f}")
    if "quality" in record:
        shown.append(f"FID {record['quality']['fid']:.2f}")
    if record["aggregate"].get("corrected"):
        shown.append("corrected")
    if "gate_kept" in record["aggregate"]:
        shown.append("fine-tuning kept" if record["aggregate"]["gate_kept"] else "fine-tuning undone")
    if aside := [key.removeprefix("set_aside/") for key in record["aggregate"] if key.startswith("set_aside/")]:
        shown.append(f"set aside: {', '.join(aside)}")
    if record["aggregate"].get("disputed"):
        shown.append("adapters disputed, none set aside")
    return f"  {name:<12} {duration(record['seconds']):>12}   {'   '.join(shown)}".rstrip()


_HOLDING = {"held": "classes held", "lacking": "classes lacked"}
"""Headers of accuracies on the classes that a site's training images have or lack."""


def run_table(summary: Mapping[str, Any]) -> Table:
    """Return a table of a finished run: accuracies in percent, or the quality of its samples."""
    if summary["task"] == "denoise":
        return rich_table(quality_table(summary["quality"] or {}))
    table = PlainTable("test accuracy, %", box=None, pad_edge=False)
    once = summary["one_shot"] or {}
    parts = (summary["global"], summary["personal"], once.get("global"), once.get("personal"))
    holding = [key for key in ("held", "lacking") if any(key in (values or {}) for values in parts)]
    for header in ("all images", "mean of sites", "worst site", *(_HOLDING[key] for key in holding)):
        table.add_column(header, justify="right")
    for name, values, keys in (
        ("global model", summary["global"], ("union", "site_mean", "site_worst", *holding)),
        ("personal models", summary["personal"], ("union", "mean", "worst", *holding)),
        ("one shot: global", once.get("global"), ("union", "site_mean", "site_worst", *holding)),
        ("one shot: personal", once.get("personal"), ("union", "mean", "worst", *holding)),
    ):
        if values:
            table.add_row(name, *(number(values.get(key)) for key in keys))
    return table


def run_facts(summary: Mapping[str, Any]) -> str:
    up, down = (size(summary[f"bytes_{way}_per_site"]) for way in ("up", "down"))
    return (
        f"per site {up} up, {down} down; {duration(summary['seconds'])}; "
        f"memory {memory(summary['peak_memory_mb'])}; history {summary['history_sha256'][:12]}"
    )


def rich_table(plain: Plain) -> Table:
    """Return a report's table for the terminal; the best cell of a column has a star."""
    table = PlainTable(title=one_line(plain.title), title_justify="left", box=None, pad_edge=False)
    for place, header in enumerate(plain.header):
        table.add_column(header, justify="right" if place and header not in plain.words else "left")
    for row in plain.rows:
        table.add_row(*(Text(f"★ {one_line(cell.text)}", "bold green") if cell.best else cell.text for cell in row))
    return table


MOST_CLASSES = 12
"""Most classes with a column each; with more, columns of the fewest and the most images of a class replace them."""


def data_counts(found: Mapping[str, Any]) -> Table:
    """Return the table of `warmfed data`: image counts by site, split and class."""
    classes = found["classes"]
    many = len(classes) > MOST_CLASSES
    table = PlainTable(box=None, pad_edge=False)
    for header in ("site", "split"):
        table.add_column(header)
    for header in ("images", *(("classes", "fewest of one", "most of one") if many else classes)):
        table.add_column(header, justify="right")
    for site, splits in found["sites"].items():
        for turn, (split, counts) in enumerate(splits.items()):
            held = [count for count in counts if count]
            shown = [len(held), min(held), max(held)] if many else counts
            table.add_row("" if turn else site, split, f"{sum(counts):,}", *(f"{count:,}" if count else "-" for count in shown))
    return table


def data_facts(found: Mapping[str, Any]) -> str:
    channels, height, width = found["image"]
    sides = [f"{w}x{h}" for w, h in found["pictures"]]
    was = f", of pictures of {' to '.join(dict.fromkeys(sides))}" if sides else ""
    sites = f"{len(found['sites'])} site{'s' * (len(found['sites']) != 1)}"
    lines = [
        f"{found['name']}: {sites}, {found['images']:,} images, {len(found['classes'])} classes",
        f"images: {width}x{height}, {'colour' if channels == 3 else 'grey'}, {size(found['bytes'])}{was}",
        f"fingerprint: {found['fingerprint']}",
        *([f"partition: {found['partition_sha256']}"] if "partition_sha256" in found else []),
        *(f"note: {note}" for note in found["notes"]),
        f"cache: {size(found['cache']['bytes'])} in {found['cache']['folder']}",
    ]
    return "\n".join(lines)
