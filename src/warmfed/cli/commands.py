"""Commands of `warmfed.cli`; each takes the parsed arguments and returns the exit code."""

import json
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from itertools import count
from pathlib import Path
from shlex import quote
from typing import Any

from rich.text import Text

from .. import report as pages
from ..algorithms import ALGORITHMS
from ..config import Config, choices, data_table, parse, pretraining_tables, setting
from ..data import DataError, save_partition
from ..deploy.launch import launch
from ..experiments.compare import Cell, Cells
from ..experiments.compare import compare as compare_cells
from ..experiments.compare import plan as plan_cells
from ..report.parts import duration
from ..runs.console import (
    JsonReporter,
    PlainTable,
    ProgressReporter,
    SilentReporter,
    console,
    data_counts,
    data_facts,
    emit,
    print_path,
    progress_reporter,
    rich_table,
    run_facts,
    run_table,
)
from ..runs.execute import execute
from ..runs.execute import resume as resume_run
from ..runs.folder import claim_run_folder
from ..runs.predict import predict as predict_images
from ..runs.progress import RunListener, spoken
from ..runs.synthesize import synthesize as draw
from ..runs.verify import DifferenceError
from ..runs.verify import verify as verify_run
from ..utils.errors import InputError, demand_text, printable, shown
from ..utils.files import occupied
from ..utils.output import OutputError, output_fails
from ..utils.paths import children, exists, resolved
from ..utils.settings import construct
from .tables import dry_run_facts, dry_run_table, files_table


def run(asked: Namespace) -> int:
    settings = dict(setting(text) for text in asked.settings)
    own = {
        "algorithm.name": asked.algorithm,
        "seed": asked.seed,
        "algorithm.rounds": asked.rounds,
        "workers": asked.workers or None,
    }
    config = parse(asked.config, settings | {key: value for key, value in own.items() if value is not None})
    if asked.dry_run:
        return _dry_run(config, asked.json)
    if asked.transport == "inprocess":
        return _finished(asked, lambda reporter: execute(config, asked.out, reporter))
    folder = asked.out or claim_run_folder(config)
    try:
        return _finished(asked, lambda reporter: _over_flower(asked, config, folder, reporter))
    except InputError:
        if asked.out is None and not any(children(folder)):
            folder.rmdir()
        raise


def _over_flower(asked: Namespace, config: Config, folder: Path, reporter: RunListener) -> dict[str, Any]:
    demand_text(str(resolved(folder)), "the path of the run folder, which Flower stores,")
    if asked.transport == "flower":
        return launch(config, folder, asked.superlink, reporter)
    from ..deploy.ray_simulation import simulate_on_ray

    return simulate_on_ray(config, folder, reporter)


def _dry_run(config: Config, as_json: bool) -> int:
    from ..runs.dry_run import dry_run

    found = dry_run(config)
    if as_json:
        print(json.dumps(found, indent=1))
        return 0
    out = console()
    out.print(dry_run_table(found))
    out.print(dry_run_facts(found), highlight=False)
    return 0


def doctor(asked: Namespace) -> int:
    from ..runs.doctor import examine

    settings = dict(setting(text) for text in asked.settings)
    config = parse(asked.config, settings | ({"algorithm.name": asked.algorithm} if asked.algorithm else {}))
    files = examine(config)
    if asked.json:
        print(json.dumps([asdict(each) | {"there": each.there} for each in files], indent=1))
    else:
        out = console()
        out.print(files_table(files))
        missing = dict.fromkeys(each.note for each in files if not each.there)
        out.print("\n".join(missing or ["nothing is missing"]), highlight=False, markup=False)
    return 0 if all(each.there for each in files) else 2


def convert(asked: Namespace) -> int:
    from ..models.convert import converted

    count = converted(asked.weights, asked.out)
    print(f"{count} tensors -> {printable(str(asked.out))}")
    return 0


def resume(asked: Namespace) -> int:
    return _finished(asked, lambda reporter: resume_run(asked.folder, reporter, asked.workers))


def _finished(asked: Namespace, work: Callable[[ProgressReporter], dict[str, Any]]) -> int:
    """Run `work` with a progress reporter and print its result; return the exit code."""
    with (
        progress_reporter(quiet=asked.quiet, events=asked.json) as reporter,
        _resumable(lambda: f"resume with: warmfed resume {quote(str(reporter.folder))}" if reporter.folder else ""),
    ):
        summary = work(reporter)
    folder = reporter.folder or asked.folder
    if isinstance(reporter, JsonReporter):
        emit("finished", folder=str(folder), summary=summary)
    elif isinstance(reporter, SilentReporter):
        print_path(folder)
    else:
        out = console()
        out.print()
        out.print(run_table(summary))
        out.print(run_facts(summary), highlight=False)
        out.print(f"report: {folder / 'report.html'}", highlight=False)
    return 0


@contextmanager
def _resumable(advice: Callable[[], str]) -> Iterator[None]:
    """Add how to finish the work to an interrupt, and to the error of an output that cannot be written."""
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(*filter(None, [advice()])) from None
    except BrokenPipeError:
        raise
    except OSError as error:
        if output_fails() is None:
            raise
        raise OutputError(advice()) from error


def compare(asked: Namespace) -> int:
    settings = dict(setting(text) for text in asked.settings)
    return _study(asked, plan_cells(asked.config, settings, asked.algorithms, asked.seeds, asked.rounds, asked.holdout_site))


def sweep(asked: Namespace) -> int:
    settings, grid = dict(setting(text) for text in asked.settings), dict(choices(text) for text in asked.grid)
    names = asked.algorithms or ["warmfed"] * (asked.config is None)
    cells = plan_cells(asked.config, settings, names, asked.seeds, asked.rounds, asked.holdout_site, grid)
    if not cells[0].settings:
        raise InputError("a sweep needs settings to vary; set them: --grid algorithm.local.lr=0.01,0.02")
    return _study(asked, cells)


def _study(asked: Namespace, cells: Sequence[Cell]) -> int:
    """Run the cells and print their table; return the exit code."""
    folder = asked.out or next(
        path for n in count(1) if not exists(path := Path("runs") / (asked.command + (f"-{n}" if n > 1 else "")))
    )
    with (
        progress_reporter(quiet=asked.quiet, events=asked.json) as reporter,
        _resumable(lambda: f"resume with the same command and --out {quote(str(folder))}"),
    ):
        table = compare_cells(cells, folder, asked.workers, _ForwardProgress(reporter), asked.reference)
    if isinstance(reporter, JsonReporter):
        emit("finished", folder=str(folder), comparison=table)
    elif isinstance(reporter, SilentReporter):
        print_path(folder)
    else:
        out = console()
        for part in pages.by_rounds(table):
            out.print()
            out.print(rich_table(pages.table(part)))
            paired = pages.tests(part)
            if paired is not None:
                out.print()
                out.print(rich_table(paired))
        out.print(f"report: {folder / 'report.html'}", highlight=False)
    return 0


class _ForwardProgress(Cells):
    """Forwards the progress of a comparison to a progress reporter."""

    def __init__(self, reporter: ProgressReporter) -> None:
        self._reporter, self._finished, self._total = reporter, 0, 0

    def plan(self, folder: Path, cells: Sequence[Cell], finished: int) -> None:
        self._finished, self._total = finished, len(cells)
        done = f", {finished} of them done" if finished else ""
        self._reporter.say(f"{len(cells)} runs{done} -> {folder}")
        self._reporter.phase("runs", finished, self._total)

    def progress(self, running: Mapping[str, tuple[str, float]], seconds_left: float | None) -> None:
        at_work = " | ".join(f"{name} {stage} {100 * share:.0f} %" for name, (stage, share) in running.items())
        left = f", {spoken(seconds_left)}" if seconds_left is not None else ""
        self._reporter.phase(f"{at_work}{left}", self._finished, self._total)

    def finished(self, cell: Cell, summary: Mapping[str, Any], done: int, total: int) -> None:
        self._finished = done
        shown = [
            f"{model} {summary[model][key]:.1f} %"
            for model, key in (("global", "union"), ("personal", "mean"))
            if summary[model] and summary["measure"] == "accuracy"
        ]
        if summary["quality"]:
            shown.append(f"FID {summary['quality']['fid']:.2f}")
        self._reporter.say(f"  {cell.name}: {', '.join([*shown, duration(summary['seconds'])])}")
        self._reporter.phase("runs", done, total)


def report(asked: Namespace) -> int:
    comparison = exists(asked.folder / "compare.json")
    print_path(pages.write_comparison(asked.folder) if comparison else pages.write(asked.folder))
    return 0


def data(asked: Namespace) -> int:
    from ..data.describe import describe, plot
    from ..runs.prepare import load_data

    chosen = data_table(asked.config, dict(setting(text) for text in asked.settings))
    try:
        federation = load_data(chosen)
    except DataError as error:
        if asked.json:
            print(json.dumps({"usable": False, "name": error.name, "faults": list(error.faults)}, indent=1))
        else:
            console().print("\n".join(error.faults), highlight=False, markup=False)
        many = "1 fault" if len(error.faults) == 1 else f"{len(error.faults)} faults"
        raise InputError(f"{error.name} is not usable: {many}, listed above") from error
    found = describe(federation, chosen.cache)
    if asked.plot:
        plot(federation, asked.plot)
    if asked.save:
        found["partition_sha256"] = save_partition(federation, asked.save)
    if asked.json:
        print(json.dumps({"usable": True, **found}, indent=1))
        return 0
    out = console()
    out.print(data_counts(found))
    out.print()
    out.print(data_facts(found), highlight=False, markup=False)
    return 0


def predict(asked: Namespace) -> int:
    found = predict_images(asked.folder, asked.images, asked.site)
    if asked.json:
        print(json.dumps(found, indent=1))
        return 0
    table = PlainTable(box=None, pad_edge=False)
    for header in ("image", "class", "probability"):
        table.add_column(header, justify="right" if header == "probability" else "left")
    for each in found:
        table.add_row(each["image"], each["class"], f"{100 * each['probability']:.1f} %")
    console().print(table)
    return 0


def personalize(asked: Namespace) -> int:
    from ..deploy.personalize import personalize as tune
    from ..deploy.site import read_site

    found = tune(asked.folder, read_site(asked.site), asked.out)
    if asked.json:
        print(json.dumps(found, indent=1))
        return 0
    for name in ("global", "personal"):
        told = ", ".join(f"{split} {metrics['accuracy']:.1f} %" for split, metrics in found[name].items())
        print(shown(f"{name} model at site {found['site']}: {told}"))
    print_path(found["folder"])
    return 0


def synthesize(asked: Namespace) -> int:
    with progress_reporter(quiet=asked.quiet, events=asked.json) as reporter:
        made = draw(
            asked.folder,
            site=asked.site,
            labels=asked.labels,
            count=asked.count,
            seed=asked.seed,
            picture=asked.picture,
            out=asked.out,
            progress=reporter.phase,
        )
    if isinstance(reporter, JsonReporter):
        emit("finished", **made)
    elif isinstance(reporter, SilentReporter):
        print_path(made.get("grid") or made["out"])
    else:
        places = ", ".join(made[key] for key in ("grid", "out") if key in made)
        print(shown(f"{made['images']} images by {made['by']}: {places}"))
    return 0


def pretrain(asked: Namespace) -> int:
    from ..pretraining.captions import pictures
    from ..pretraining.pretrain import Pretraining, resumable
    from ..pretraining.pretrain import pretrain as make
    from ..runs.prepare import load_data

    data, made = pretraining_tables(asked.config, dict(setting(text) for text in asked.settings))
    settings = construct(Pretraining, made, "pretraining")
    if occupied(asked.out) and not (asked.work and resumable(asked.out, settings)):
        raise InputError(f"{asked.out} exists already; choose another --out")
    images = pictures(load_data(data), settings.side) if data else None
    with (
        progress_reporter(quiet=asked.quiet, events=asked.json) as reporter,
        _resumable(lambda: f"resume with the same command from {asked.work}" if asked.work else ""),
    ):
        record = make(settings, asked.out, reporter.phase, asked.work, asked.device, images)
    if isinstance(reporter, JsonReporter):
        emit("finished", folder=str(asked.out), record=record)
    else:
        print_path(asked.out)
    return 0


def algorithms(asked: Namespace) -> int:
    if asked.json:
        rows = [
            {"name": name, "paper": e.paper, "about": e.about, "shared": e.shared, "private": e.private}
            for name, e in ALGORITHMS.items()
        ]
        print(json.dumps(rows, indent=1))
        return 0
    table = PlainTable(box=None, pad_edge=False)
    for header in ("name", "paper", "what it does", "a site sends", "and keeps"):
        table.add_column(header)
    for name, each in ALGORITHMS.items():
        table.add_row(name, each.paper, each.about, each.shared, each.private or "–")
    console().print(table)
    return 0


def verify(asked: Namespace) -> int:
    with progress_reporter(quiet=asked.quiet, events=asked.json) as reporter:
        try:
            history, difference = verify_run(asked.folder, reporter, asked.workers), None
        except DifferenceError as error:
            history, difference = None, str(error)
    if isinstance(reporter, JsonReporter):
        emit("verified", identical=difference is None, history_sha256=history, difference=difference)
    else:
        print(f"identical: history {history}" if difference is None else shown(f"different: {difference}"))
    return 0 if difference is None else 1


def deploy_init(asked: Namespace) -> int:
    from ..deploy.project import init

    classes = tuple(asked.classes.split(",")) if asked.classes else ()
    init(asked.folder, asked.sites.split(","), asked.host, asked.port, asked.config, classes, asked.prompts)
    print_path(asked.folder / "README.md")
    return 0


def deploy_add_site(asked: Namespace) -> int:
    from ..deploy.project import add_site

    print_path(add_site(asked.folder, asked.name))
    return 0


def deploy_renew(asked: Namespace) -> int:
    from ..deploy.project import renew

    print_path(renew(asked.folder))
    return 0


def deploy_register(asked: Namespace) -> int:
    from ..deploy.register import register

    for line in register(asked.folder):
        print(shown(line), flush=True)
    return 0


def deploy_check(asked: Namespace) -> int:
    from ..deploy.check import check

    rows = check(asked.folder)
    if asked.json:
        print(json.dumps([{"check": row.check, "ok": row.ok, "found": row.found} for row in rows], indent=1))
    else:
        table = PlainTable(box=None, pad_edge=False)
        for header in ("check", "", "found"):
            table.add_column(header)
        marks = {True: Text("ok", "green"), False: Text("fails", "bold red"), None: Text("open", "yellow")}
        for row in rows:
            table.add_row(row.check, marks[row.ok], row.found)
        console().print(table)
    return 2 if any(row.ok is False for row in rows) else 0


def site_report(asked: Namespace) -> int:
    from ..deploy.ledger import read, tables, write

    ledger = read(asked.folder, asked.site)
    if asked.html is not None:
        print_path(write(ledger, asked.html))
    elif asked.json:
        policy = {} if ledger.policy is None else {"policy": asdict(ledger.policy)}
        print(json.dumps({"site": ledger.site, "bytes": ledger.bytes, "messages": ledger.lines, **policy}, indent=1))
    else:
        for table in tables(ledger):
            console().print(rich_table(table))
            console().print()
    return 0
