"""Several algorithms, settings, seeds and numbers of rounds: a run folder each, one table, paired tests.

Each cell of a comparison is an ordinary run in DIR/cells/; a comparison that was killed goes on where it was, and one
that is asked for more seeds or algorithms computes only these.
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
from ..config import Config, nested, read_toml, resolve
from ..data import Federation
from ..runs.execute import RunListener, execute, resume
from ..runs.folder import read_summary
from ..runs.prepare import load_data, prepare
from ..runs.progress import Clock
from ..transports.process_pool import ProcessPool, death_told, tell
from ..utils.errors import InputError, suggest
from ..utils.files import PUBLIC, atomic_write, occupied, read_bytes, remove_partial_files, write_json
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
    """What a sweep varies: dotted key -> value, as text."""

    @property
    def holdout(self) -> str:
        """The site that is left out; empty: none."""
        return self.config.holdout.site

    @property
    def name(self) -> str:
        """Also its folder's name."""
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
    """The cells, in the order of arms, rounds, seeds; all of them checked.

    A TOML file may hold, beside a configuration that all arms share, the tables `[compare]` (algorithms, seeds, rounds,
    holdout), `[arms.NAME]`: a configuration under a name of its own, over what is shared; and `[sweep]`: lists of values,
    of which every combination is tried in every arm. What is shared of `[algorithm]` goes to those algorithms that
    have such a setting.

    Args:
        settings: dotted keys over the file's; those of one arm too, as arms.warmfed.algorithm.gate.
        algorithms: names of algorithms or of arms; none: the file's, or all its arms, or warmfed and fedavg.
        seeds: none: the file's, or 0, 1, 2.
        rounds: none: the file's, or each arm's own.
        holdout: sites that are left out, one at a time; none: the file's, or the configuration's.
        grid: dotted keys and the values to try; none: the file's.
    """
    held = read_toml(file) if file is not None else {}
    held.pop("pretraining", None)
    shared = _merged(held, nested(settings or {}))
    arms, asked, swept = (shared.pop(each, {}) for each in ("arms", "compare", "sweep"))
    tables = (asked, swept, *(arms.values() if isinstance(arms, dict) else [arms]))
    if not all(isinstance(table, dict) for table in tables):
        raise InputError("[compare], [sweep] and [arms.NAME] of a comparison must be tables")
    for key in asked:
        if key == "unseen":
            raise InputError("compare.unseen is now called compare.holdout; rename it")
        if key not in _ASKED:
            raise InputError(f"unknown key 'compare.{key}'{suggest(key, list(_ASKED))}")
    for name in arms:
        if not _ARM.fullmatch(name):
            raise InputError(
                f"an arm's name of at most 80 letters, digits, blanks and .=,+()-_ was expected, got {name!r}; rename it"
            )
    points = _points(grid or _flat(swept))
    names = _each("compare.algorithms", algorithms or asked.get("algorithms") or list(arms) or ["warmfed", "fedavg"], str)
    numbers = _each("compare.seeds", seeds or asked.get("seeds") or [0, 1, 2], int)
    lengths: Sequence[int | None] = _each("compare.rounds", rounds or asked.get("rounds") or [], int) or [None]
    left_out = _each("compare.holdout", holdout or asked.get("holdout") or [], str) or [None]
    found = []
    for name in names:
        if name not in arms and name not in ALGORITHMS:
            raise InputError(f"there is no algorithm or arm {name!r}{suggest(name, [*arms, *ALGORITHMS])}")
        for point, length, seed, site in product(points, lengths, numbers, left_out):
            own = [arms.get(name, {}), nested(point), {} if site is None else {"holdout": {"site": site}}]
            config = _config(shared, name, _merged(*own), length, seed)
            settings = {key: _text(value) for key, value in point.items()}
            arm = " ".join([name] * (not settings or len(names) > 1) + _words(settings))
            found.append(Cell(arm, config.algorithm.rounds if length is None else length, seed, config, settings))
    return found


_ARM = re.compile(r"[\w.=,+()-][\w.=,+() -]{0,79}")
_ASKED = ("algorithms", "seeds", "rounds", "holdout")


def _flat(table: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Dotted keys of nested tables."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        flat |= _flat(value, f"{path}{key}.") if isinstance(value, Mapping) else {f"{path}{key}": value}
    return flat


def _points(grid: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every combination of a grid's values; of an empty grid the one that changes nothing."""
    for key, values in grid.items():
        if not isinstance(values, Sequence) or isinstance(values, str) or not values:
            raise InputError(f"sweep.{key} must be a list of values to try; got {values!r}")
        if len({_text(value) for value in values}) < len(values):
            raise InputError(f"sweep.{key} names a value twice: {values!r}")
    return [dict(zip(grid, values, strict=True)) for values in product(*grid.values())]


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _words(settings: Mapping[str, str]) -> list[str]:
    """key=value of each setting, under the shortest ends of the keys that tell them apart."""
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
        # a key that no algorithm has stays, and is refused
        table = {k: v for k, v in table.items() if k != "name" and (k in fields or k not in everywhere)}
    length = {} if rounds is None else {"algorithm": {"rounds": rounds}}
    base = {**shared, "algorithm": table, "seed": seed, "workers": 1}
    return resolve(base, length, arm, {"algorithm": {"name": algorithm}})


def _fields(algorithm: str) -> set[str]:
    return {field.name for field in dataclasses.fields(entry(algorithm).cls)}


class Cells:
    """Is told how a comparison goes; this one keeps silent."""

    def plan(self, folder: Path, cells: Sequence[Cell], finished: int) -> None: ...
    def progress(self, running: Mapping[str, tuple[str, float]], seconds_left: float | None) -> None:
        """running: by cell, its stage and the share of it that is done."""

    def finished(self, cell: Cell, summary: Mapping[str, Any], done: int, total: int) -> None: ...


def compare(
    cells: Sequence[Cell], folder: Path, workers: int = 0, watcher: Cells | None = None, reference: str = ""
) -> dict[str, Any]:
    """Run what is missing of the cells, several at the same time, and write compare.json, compare.md and report.html.

    Args:
        workers: cells at the same time; 0: as many as there are processors (on a graphics card: one).
        tested: the arm that the tests compare with each other one; empty: warmfed, or the first.

    Raises:
        InputError: before anything runs: a setting that does not work, or a folder that holds something else.
    """
    watcher = watcher or Cells()
    if occupied(folder) and not (folder / "cells").is_dir():
        raise InputError(f"{folder} is there already and is no comparison; choose another --out")
    if len({cell.name for cell in cells}) < len(cells):
        raise InputError("two runs of this comparison have one name; give arms and swept values names that differ")
    arms = list(dict.fromkeys(cell.arm for cell in cells))
    if reference and reference not in arms:
        raise InputError(f"there is no arm {reference!r} to test{suggest(reference, arms)}")
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
    watcher.plan(folder, cells, len(summaries))
    if todo:
        busy = workers or (1 if any(cell.config.device != "cpu" for cell in todo) else processors())
        _run(todo, folder, min(busy, len(todo)), summaries, len(cells), watcher)
    table = aggregate(cells, [summaries[cell] for cell in cells], reference)
    write_json(folder / "compare.json", table)
    atomic_write(folder / "compare.md", report.markdown(table), PUBLIC)
    atomic_write(folder / "compare.tex", report.latex(table), PUBLIC)
    report.write_comparison(folder)
    return table


def processors() -> int:
    """How many this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on this system
        return os.cpu_count() or 1


def _finished(cell: Cell, folder: Path, data: str) -> dict[str, Any] | None:
    """The summary of a cell that has run; None where it has not, or not to its end."""
    place = folder / "cells" / cell.name
    path = place / "config.toml"
    if not path.exists():
        return None
    if read_bytes(path, "a cell's configuration").decode(errors="replace") != cell.config.toml():
        raise InputError(f"{place} was run with other settings than these; choose another --out for this comparison")
    if not (place / "summary.json").exists():
        return None
    summary = read_summary(place)
    if (summary.get("warmfed"), summary.get("data_sha256")) != (__version__, data):
        raise InputError(f"{place} was run by another version or on other data; choose another --out for this comparison")
    return summary


def _run(todo: Sequence[Cell], folder: Path, processes: int, summaries: dict[Cell, Any], total: int, watcher: Cells) -> None:
    running: dict[str, tuple[str, float]] = {}
    estimate = _Estimate(todo)

    def heard(index: int, stage: str, share: float) -> None:
        running[todo[index].name] = (stage, share)
        watcher.progress(dict(running), estimate.left(running))

    pool = ProcessPool(processes, _nothing, (), heard)
    at_once = True
    try:
        waiting = {pool.submit(_cell, i, cell.config, folder / "cells" / cell.name): cell for i, cell in enumerate(todo)}
        while waiting:
            for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                cell = waiting.pop(future)
                try:
                    with death_told():
                        summaries[cell] = future.result()
                except InputError as error:
                    raise InputError(f"cell {cell.name}: {error}") from error
                running.pop(cell.name, None)
                estimate.done(cell)
                watcher.finished(cell, summaries[cell], len(summaries), total)
        at_once = False
    finally:
        pool.close(at_once=at_once)


def _nothing() -> None:
    """Worker processes of a comparison need no start."""


class _Tells(RunListener):
    """In a worker process: says how far its cell is."""

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
    if (folder / "config.toml").exists():
        return resume(folder, _Tells(index), shared=shared)
    remove_partial_files(folder)
    return execute(config, folder, _Tells(index), shared)


class _Estimate:
    """The time left of a comparison: what is done of the expected work, at the pace so far."""

    def __init__(self, cells: Sequence[Cell]) -> None:
        self._work = {cell.name: Clock.of(cell.config, 1).total() for cell in cells}
        self._done: set[str] = set()
        self._began = time.monotonic()

    def done(self, cell: Cell) -> None:
        self._done.add(cell.name)

    def left(self, running: Mapping[str, tuple[str, float]]) -> float | None:
        """Seconds; None before there is anything to go by."""
        total = sum(self._work.values())
        done = sum(self._work[name] for name in self._done)
        done += sum(self._work[name] * share for name, (_, share) in running.items() if name not in self._done)
        return (time.monotonic() - self._began) * (total - done) / done if done > 0.02 * total / len(self._work) else None
