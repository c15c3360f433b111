"""Comparisons of algorithms, settings, seeds and numbers of rounds: one run folder each, one table, paired tests.

Each cell is an ordinary run in DIR/cells/. A killed comparison resumes. If seeds or algorithms are added, only the new
cells are computed.
"""

import dataclasses
import os
import re
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, wait
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from .. import report
from ..algorithms import ALGORITHMS, entry
from ..config import Config, nested, read_toml, resolve, with_absolute_paths
from ..data import Federation
from ..runs.execute import execute, resume
from ..runs.folder import read_summary
from ..runs.prepare import load_data, prepare
from ..runs.progress import Clock, RunListener
from ..transports.process_pool import ProcessPool, tell
from ..utils.errors import InputError, suggest
from ..utils.files import PUBLIC, atomic_write, occupied, read_bytes, remove_partial_files, write_json
from ..utils.paths import exists, is_folder
from ..utils.settings import check_key
from ..utils.version import __version__
from .aggregate import aggregate


@dataclass(frozen=True, eq=False)
class Cell:
    """One run of a comparison."""

    arm: str
    rounds: int
    seed: int
    config: Config
    settings: Mapping[str, str] = field(default_factory=dict)
    """Settings that a sweep varies: values as text, by dotted key."""

    @property
    def holdout(self) -> str:
        """Return the held-out site; empty if there is none."""
        return self.config.holdout.site

    @property
    def name(self) -> str:
        """Return the name of the cell and of its folder."""
        without = f"-without-{self.holdout}" if self.holdout else ""
        return re.sub(r"[^\w.=,+-]", "_", f"{self.arm}-rounds{self.rounds}-seed{self.seed}{without}")


def plan(
    file: Path | None = None,
    settings: Mapping[str, Any] | None = None,
    algorithms: Sequence[str] = (),
    seeds: Sequence[int] = (),
    rounds: Sequence[int] = (),
    holdout: Sequence[str] = (),
    grid: Mapping[str, Sequence[Any]] | None = None,
) -> list[Cell]:
    """Return the checked cells, in the order of arms, rounds and seeds.

    A TOML file may hold a shared configuration and these tables: `[compare]` with algorithms, seeds, rounds and holdout;
    `[arms.NAME]` with settings of one arm, which override the shared ones; `[sweep]` with lists of values. Every arm runs
    with every combination of the lists. Shared settings of `[algorithm]` apply to the algorithms that have them.

    Args:
        file: the TOML file, or None.
        settings: overriding values by dotted key, also of one arm: arms.warmfed.algorithm.gate.
        algorithms: names of algorithms or arms. Default: the file's, or all its arms, or warmfed and fedavg.
        seeds: seeds. Default: the file's, or 0, 1, 2.
        rounds: numbers of rounds. Default: the file's, or each arm's own.
        holdout: held-out sites, one at a time. Default: the file's, or the configuration's.
        grid: values to try by dotted key. Default: the file's.

    Raises:
        InputError: A key, a name or a value is not valid.
    """
    held = read_toml(file) if file is not None else {}
    held.pop("pretraining", None)
    shared = _merged(held, nested(settings or {}))
    arms, asked, swept = (shared.pop(each, {}) for each in ("arms", "compare", "sweep"))
    tables = (asked, swept, *(arms.values() if isinstance(arms, dict) else [arms]))
    if not all(isinstance(table, dict) for table in tables):
        raise InputError("[compare], [sweep] and [arms.NAME] of a comparison must be tables")
    for key in asked:
        check_key(key, "compare", _ASKED, {"unseen": "holdout"})
    for name in arms:
        if not _ARM.fullmatch(name):
            raise InputError(
                f"expected an arm's name of at most 80 letters, digits, blanks and .=,+()-_, got {name!r}; rename it"
            )
    points = _points(grid or _flat(swept))
    names = _each("compare.algorithms", algorithms or asked.get("algorithms") or list(arms) or ["warmfed", "fedavg"], str)
    numbers = _each("compare.seeds", seeds or asked.get("seeds") or [0, 1, 2], int)
    lengths: Sequence[int | None] = _each("compare.rounds", rounds or asked.get("rounds") or [], int) or [None]
    left_out = _each("compare.holdout", holdout or asked.get("holdout") or [], str) or [None]
    found = []
    for name in names:
        if name not in arms and name not in ALGORITHMS:
            raise InputError(f"unknown algorithm or arm {name!r}{suggest(name, [*arms, *ALGORITHMS])}")
        for point, length, seed, site in product(points, lengths, numbers, left_out):
            own = [arms.get(name, {}), nested(point), {} if site is None else {"holdout": {"site": site}}]
            config = with_absolute_paths(_config(shared, name, _merged(*own), length, seed))
            settings = {key: _text(value) for key, value in point.items()}
            arm = " ".join([name] * (not settings or len(names) > 1) + _words(settings))
            found.append(Cell(arm, config.algorithm.rounds if length is None else length, seed, config, settings))
    return found


_ARM = re.compile(r"[\w.=,+()-][\w.=,+() -]{0,79}")
_ASKED = ("algorithms", "seeds", "rounds", "holdout")


def _flat(table: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Return the values of nested tables by dotted key."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        flat |= _flat(value, f"{path}{key}.") if isinstance(value, Mapping) else {f"{path}{key}": value}
    return flat


def _points(grid: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return every combination of a grid's values; for an empty grid, one empty combination."""
    for key, values in grid.items():
        if not isinstance(values, Sequence) or isinstance(values, str) or not values:
            raise InputError(f"sweep.{key} must be a list of values to try; got {values!r}")
        if len({_text(value) for value in values}) < len(values):
            raise InputError(f"sweep.{key} has a value twice: {values!r}; remove one")
    return [dict(zip(grid, values, strict=True)) for values in product(*grid.values())]


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _words(settings: Mapping[str, str]) -> list[str]:
    """Return key=value of each setting, with the shortest distinct suffixes of the keys."""
    ends = {key: key.split(".") for key in settings}
    length = 1
    while len({tuple(end[-length:]) for end in ends.values()}) < len(ends):
        length += 1
    return [f"{'.'.join(ends[key][-length:])}={value}" for key, value in settings.items()]


def _each(where: str, values: Any, kind: type) -> list[Any]:
    if not isinstance(values, Sequence) or isinstance(values, str) or not all(type(value) is kind for value in values):
        raise InputError(f"{where} must be a list of {kind.__name__}; got {values!r}")
    return list(dict.fromkeys(values))


def _merged(*layers: Mapping[str, Any]) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            under = merged.get(key)
            both = isinstance(value, Mapping) and isinstance(under, Mapping)
            merged[key] = _merged(under, value) if both else value  # type: ignore[arg-type]
    return merged


def _config(shared: Mapping[str, Any], name: str, arm: Mapping[str, Any], rounds: int | None, seed: int) -> Config:
    own = arm.get("algorithm", {})
    algorithm = str(own.get("name", name)) if isinstance(own, Mapping) else name
    fields = _fields(algorithm)
    everywhere = set().union(*(_fields(each) for each in ALGORITHMS))
    table = shared.get("algorithm", {})
    if isinstance(table, Mapping):
        # unknown keys stay, so that `resolve` refuses them
        table = {k: v for k, v in table.items() if k != "name" and (k in fields or k not in everywhere)}
    length = {} if rounds is None else {"algorithm": {"rounds": rounds}}
    base = {**shared, "algorithm": table, "seed": seed, "workers": 1}
    return resolve(base, length, arm, {"algorithm": {"name": algorithm}})


def _fields(algorithm: str) -> set[str]:
    return {field.name for field in dataclasses.fields(entry(algorithm).cls)}


class Cells:
    """Callbacks of a comparison; the defaults do nothing."""

    def plan(self, folder: Path, cells: Sequence[Cell], finished: int) -> None: ...
    def progress(self, running: Mapping[str, tuple[str, float]], seconds_left: float | None) -> None:
        """Receive, by running cell, its stage and the share of its time that has passed, and the seconds left."""

    def finished(self, cell: Cell, summary: Mapping[str, Any], done: int, total: int) -> None: ...


def compare(
    cells: Sequence[Cell], folder: Path, workers: int = 0, listener: Cells | None = None, reference: str = ""
) -> dict[str, Any]:
    """Run the missing cells in parallel; write compare.json, compare.md, compare.tex and report.html; return the table.

    Args:
        cells: the cells.
        folder: folder of the comparison.
        workers: number of cells that run at the same time. Default 0: the number of CPUs (on a GPU: one).
        listener: callbacks of the comparison.
        reference: reference arm of the tests. Default empty: warmfed, or the first arm.

    Raises:
        InputError: A setting is not valid, or the folder holds something else; raised before any cell runs.
    """
    listener = listener or Cells()
    if occupied(folder) and not is_folder(folder / "cells"):
        raise InputError(f"{folder} exists already and is not a comparison; choose another --out")
    if len({cell.name for cell in cells}) < len(cells):
        raise InputError("two runs of this comparison have the same name; rename an arm or change a swept value")
    arms = list(dict.fromkeys(cell.arm for cell in cells))
    if reference and reference not in arms:
        raise InputError(f"unknown reference arm {reference!r}{suggest(reference, arms)}")
    known: dict[str, Federation] = {}
    data: dict[tuple[str, str], str] = {}
    for cell in {(cell.arm, cell.rounds, cell.holdout): cell for cell in cells}.values():
        source = repr(cell.config.data)
        if source not in known:
            known[source] = load_data(cell.config.data)
        data[source, cell.holdout] = prepare(cell.config, known[source]).federation.fingerprint
    summaries = {
        cell: found
        for cell in cells
        if (found := _finished(cell, folder, data[repr(cell.config.data), cell.holdout])) is not None
    }
    todo = [cell for cell in cells if cell not in summaries]
    listener.plan(folder, cells, len(summaries))
    if todo:
        busy = workers or (1 if any(cell.config.device != "cpu" for cell in todo) else processors())
        _run(todo, folder, min(busy, len(todo)), summaries, len(cells), listener)
    table = aggregate(cells, [summaries[cell] for cell in cells], reference)
    write_json(folder / "compare.json", table)
    atomic_write(folder / "compare.md", report.markdown(table), PUBLIC)
    atomic_write(folder / "compare.tex", report.latex(table), PUBLIC)
    report.write_comparison(folder)
    return table


def processors() -> int:
    """Return the number of CPUs that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on this system
        return os.cpu_count() or 1


def _finished(cell: Cell, folder: Path, data: str) -> dict[str, Any] | None:
    """Return the summary of a cell, or None if it has not finished."""
    cell_folder = folder / "cells" / cell.name
    path = cell_folder / "config.toml"
    if not exists(path):
        return None
    if read_bytes(path, "a cell's configuration").decode(errors="replace") != cell.config.toml():
        raise InputError(f"{cell_folder} was run with other settings than these; choose another --out for this comparison")
    if not exists(cell_folder / "summary.json"):
        return None
    summary = read_summary(cell_folder)
    if (summary.get("warmfed"), summary.get("data_sha256")) != (__version__, data):
        raise InputError(f"{cell_folder} was run by another version or on other data; choose another --out for this comparison")
    return summary


def _run(todo: Sequence[Cell], folder: Path, processes: int, summaries: dict[Cell, Any], total: int, listener: Cells) -> None:
    running: dict[str, tuple[str, float]] = {}
    estimate = _Estimate(todo)

    def report_progress(index: int, stage: str, share: float) -> None:
        running[todo[index].name] = (stage, share)
        listener.progress(dict(running), estimate.left(running))

    pool = ProcessPool(processes, _nothing, (), report_progress)
    at_once = True
    try:
        waiting = {pool.submit(_cell, i, cell.config, folder / "cells" / cell.name): cell for i, cell in enumerate(todo)}
        while waiting:
            for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                cell = waiting.pop(future)
                try:
                    with pool.death_told():
                        summaries[cell] = future.result()
                except InputError as error:
                    raise InputError(f"cell {cell.name}: {error}") from error
                running.pop(cell.name, None)
                estimate.done(cell)
                listener.finished(cell, summaries[cell], len(summaries), total)
        at_once = False
    finally:
        pool.close(at_once=at_once)


def _nothing() -> None:
    """Do nothing: worker processes of a comparison need no initialisation."""


class _ProgressSender(RunListener):
    """Sends the progress of a cell from a worker process."""

    def __init__(self, index: int) -> None:
        self._index, self._clock = index, Clock((), 1)

    def plan(self, folder: Path, config: Config, sites: tuple[str, ...], records: Sequence[Mapping[str, Any]]) -> None:
        self._clock = Clock.of(config, len(sites), records, time.monotonic())

    def progress(self, site: str, what: str, done: int, total: int) -> None:
        self._clock.work(site, what, done, total)
        tell(self._index, self._clock.stage, self._clock.fraction(time.monotonic()))

    def round(self, record: Mapping[str, Any]) -> None:
        self._clock.finish(record["seconds"], time.monotonic())


def _cell(index: int, config: Config, folder: Path) -> dict[str, Any]:
    shared = folder.parent.parent / "shared"
    if exists(folder / "config.toml"):
        return resume(folder, _ProgressSender(index), shared=shared)
    remove_partial_files(folder)
    return execute(config, folder, _ProgressSender(index), shared)


class _Estimate:
    """Estimate of a comparison's time left, from the share of the expected work that is done."""

    def __init__(self, cells: Sequence[Cell]) -> None:
        self._work = {cell.name: Clock.of(cell.config, 1).total() for cell in cells}
        self._done: set[str] = set()
        self._began = time.monotonic()

    def done(self, cell: Cell) -> None:
        self._done.add(cell.name)

    def left(self, running: Mapping[str, tuple[str, float]]) -> float | None:
        """Return the seconds left; None if too little work is done for an estimate."""
        total = sum(self._work.values())
        done = sum(self._work[name] for name in self._done)
        done += sum(self._work[name] * share for name, (_, share) in running.items() if name not in self._done)
        return (time.monotonic() - self._began) * (total - done) / done if done > 0.02 * total / len(self._work) else None
