"""Several algorithms, seeds and numbers of rounds: a run folder each, one table, paired tests.

Each cell of a comparison is an ordinary run in DIR/cells/; a comparison that was killed goes on where it was, and one
that is asked for more seeds or algorithms computes only these.
"""

import dataclasses
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, wait
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from . import __version__, report
from .algorithms import ALGORITHMS, entry
from .config import Config, nested, read_toml, resolve
from .data import Federation
from .errors import InputError, suggest
from .files import read_bytes, sweep, write_json, write_whole
from .progress import Clock
from .runs import Watcher, execute, prepare, read_summary, resume
from .transports.pool import Pool, death_told, tell

METRICS = {
    "global": ("global", "union"),
    "global_worst": ("global", "site_worst"),
    "personal": ("personal", "mean"),
    "personal_worst": ("personal", "worst"),
}
"""Row keys by where the summaries hold the accuracy."""
TESTED = ("global", "personal")


@dataclass(frozen=True, eq=False)
class Cell:
    """One run of a comparison."""

    arm: str
    rounds: int
    seed: int
    config: Config

    @property
    def name(self) -> str:
        return f"{self.arm}-rounds{self.rounds}-seed{self.seed}"


def plan(
    file: Path | None = None,
    settings: Mapping[str, Any] | None = None,
    algorithms: Sequence[str] = (),
    seeds: Sequence[int] = (),
    rounds: Sequence[int] = (),
) -> list[Cell]:
    """The cells, in the order of arms, rounds, seeds; all of them checked.

    A TOML file may hold, beside a configuration that all arms share, the tables `[compare]` (algorithms, seeds, rounds)
    and `[arms.NAME]`: a configuration under a name of its own, over what is shared. What is shared of `[algorithm]`
    goes to those algorithms that have such a setting.

    Args:
        settings: dotted keys over the file's.
        algorithms: names of algorithms or of arms; none: the file's, or all its arms, or warmfed and fedavg.
        seeds: none: the file's, or 0, 1, 2.
        rounds: none: the file's, or each arm's own.
    """
    tables = read_toml(file) if file is not None else {}
    arms, asked = tables.pop("arms", {}), tables.pop("compare", {})
    if not isinstance(arms, dict) or not all(isinstance(arm, dict) for arm in arms.values()) or not isinstance(asked, dict):
        raise InputError(f"{file}: [compare] and [arms.NAME] must be tables")
    for key in asked:
        if key not in ("algorithms", "seeds", "rounds"):
            raise InputError(f"unknown key 'compare.{key}'{suggest(key, ['algorithms', 'seeds', 'rounds'])}")
    names = _each("compare.algorithms", algorithms or asked.get("algorithms") or list(arms) or ["warmfed", "fedavg"], str)
    numbers = _each("compare.seeds", seeds or asked.get("seeds") or [0, 1, 2], int)
    lengths: Sequence[int | None] = _each("compare.rounds", rounds or asked.get("rounds") or [], int) or [None]
    shared = _merged(tables, nested(settings or {}))
    found = []
    for name in names:
        if name not in arms and name not in ALGORITHMS:
            raise InputError(f"there is no algorithm or arm {name!r}{suggest(name, [*arms, *ALGORITHMS])}")
        for length in lengths:
            for seed in numbers:
                config = _config(shared, name, arms.get(name, {}), length, seed)
                found.append(Cell(name, getattr(config.algorithm, "rounds", 0) if length is None else length, seed, config))
    return found


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


def compare(cells: Sequence[Cell], folder: Path, workers: int = 0, watcher: Cells | None = None) -> dict[str, Any]:
    """Run what is missing of the cells, several at the same time, and write compare.json, compare.md and report.html.

    Args:
        workers: cells at the same time; 0: as many as there are processors (on a graphics card: one).

    Raises:
        InputError: before anything runs: a setting that does not work, or a folder that holds something else.
    """
    watcher = watcher or Cells()
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not (folder / "cells").is_dir())):
        raise InputError(f"{folder} is there already and is no comparison; choose another --out")
    known: dict[str, Federation] = {}
    for cell in {(cell.arm, cell.rounds): cell for cell in cells}.values():
        source = repr(cell.config.data)
        known[source] = prepare(cell.config, known.get(source)).federation
    data = {cell: known[repr(cell.config.data)].fingerprint for cell in cells}
    summaries = {cell: found for cell in cells if (found := _finished(cell, folder, data[cell])) is not None}
    todo = [cell for cell in cells if cell not in summaries]
    watcher.plan(folder, cells, len(summaries))
    if todo:
        busy = workers or (1 if any(cell.config.device != "cpu" for cell in todo) else processors())
        _run(todo, folder, min(busy, len(todo)), summaries, len(cells), watcher)
    table = tabulate(cells, [summaries[cell] for cell in cells])
    write_json(folder / "compare.json", table)
    write_whole(folder / "compare.md", report.markdown(table))
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

    pool = Pool(processes, _nothing, (), heard)
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


class _Tells(Watcher):
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
    sweep(folder)
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


def tabulate(cells: Sequence[Cell], summaries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """compare.json: a row for each arm and number of rounds, and paired tests over the seeds.

    The tests compare the first arm (warmfed, where it is there) with each other one, over the seeds (Student's paired
    t-test, two-sided), with Holm's correction over the arms for each metric and number of rounds.
    """
    groups: dict[tuple[int, str], list[tuple[Cell, Mapping[str, Any]]]] = {}
    for cell, summary in zip(cells, summaries, strict=True):
        groups.setdefault((cell.rounds, cell.arm), []).append((cell, summary))
    rows = [_row(arm, rounds, members) for (rounds, arm), members in groups.items()]
    names = list(dict.fromkeys(cell.arm for cell in cells))
    first = "warmfed" if "warmfed" in names else names[0]
    tests = []
    for rounds in dict.fromkeys(cell.rounds for cell in cells):
        for metric in TESTED:
            values = {arm: _values(members, metric) for (r, arm), members in groups.items() if r == rounds}
            tests += [{"rounds": rounds, **test} for test in _tests(metric, first, values)]
    return {
        "rows": rows,
        "tests": tests,
        "federation": summaries[0]["federation"],
        "seeds": list(dict.fromkeys(cell.seed for cell in cells)),
        "rounds": max(cell.rounds for cell in cells),
    }


def _row(arm: str, rounds: int, members: Sequence[tuple[Cell, Mapping[str, Any]]]) -> dict[str, Any]:
    row: dict[str, Any] = {
        "algorithm": arm,
        "rounds": rounds,
        "cells": [{**summary, "seed": cell.seed, "folder": f"cells/{cell.name}"} for cell, summary in members],
        "bytes_up": fmean(summary["bytes_up_per_site"] for _, summary in members),
        "seconds": fmean(summary["seconds"] for _, summary in members),
    }
    for key in METRICS:
        values = [value for value in _values(members, key).values() if value is not None]
        row[f"{key}_mean"] = fmean(values) if values else None
        row[f"{key}_std"] = stdev(values) if len(values) > 1 else None
    return row


def _values(members: Iterable[tuple[Cell, Mapping[str, Any]]], metric: str) -> dict[int, float | None]:
    """By seed, the accuracy of this name; None where the algorithm has no such model."""
    model, key = METRICS[metric]
    return {cell.seed: (summary.get(model) or {}).get(key) for cell, summary in members}


def _tests(metric: str, first: str, values: Mapping[str, Mapping[int, float | None]]) -> list[dict[str, Any]]:
    own = values.get(first, {})
    found: list[dict[str, Any]] = []
    for against, others in values.items():
        pairs = [(own[seed], other) for seed, other in others.items() if own.get(seed) is not None and other is not None]
        if against == first or len(pairs) < 2:
            continue
        differences = [a - b for a, b in pairs]  # type: ignore[operator]
        found.append({"metric": metric, "algorithm": first, "against": against, "difference": fmean(differences)})
        found[-1]["p_raw"] = paired(differences)
    corrected = holm([test["p_raw"] for test in found])
    return [{**test, "p": p} for test, p in zip(found, corrected, strict=True)]


def paired(differences: Sequence[float]) -> float | None:
    """p of Student's paired t-test, two-sided; None where the differences do not vary."""
    from scipy.stats import ttest_rel

    if max(differences) - min(differences) < 1e-9:
        return None
    return float(ttest_rel(differences, [0.0] * len(differences)).pvalue)


def holm(values: Sequence[float | None]) -> list[float | None]:
    """Holm's step-down correction (Scandinavian Journal of Statistics 1979); None stays, and counts as no test."""
    ranked = sorted((value, place) for place, value in enumerate(values) if value is not None)
    corrected: list[float | None] = [None] * len(values)
    highest = 0.0
    for rank, (value, place) in enumerate(ranked):
        highest = max(highest, min(1.0, value * (len(ranked) - rank)))
        corrected[place] = highest
    return corrected
