"""Comparison of algorithms over seeds: its page, and its tables in Markdown, in LaTeX and on the console."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from warmfed.utils.errors import printable

from . import plots
from .accuracy import headline, mean, milestones
from .page import publish
from .parts import Cell, Figure, Picture, Section, Table, cells, duration, number, percent, signed, size
from .parts import markdown as escaped
from .record import read_comparison, read_report_images, read_rounds
from .sections import LOSSLESS, embed

Row = Mapping[str, Any]
Column = tuple[str, str, str | None, Callable[..., Any], Callable[[float | None], str]]
COLUMNS: tuple[Column, ...] = (
    # header, key, key of its standard deviation, function that selects the best value, formatter
    ("global, %", "global_mean", "global_std", max, number),
    ("global, worst site", "global_worst_mean", None, max, number),
    ("personal, %", "personal_mean", "personal_std", max, number),
    ("personal, worst site", "personal_worst_mean", None, max, number),
    ("held-out site, %", "holdout_mean", "holdout_std", max, number),
    ("held out, tuned there, %", "holdout_tuned_mean", "holdout_tuned_std", max, number),
    ("upload per site", "bytes_up", None, min, size),
    ("time", "seconds", None, min, duration),
)
EVEN: tuple[Column, ...] = tuple(
    (f"{model}, {title}, %", f"{model}_{key}_mean", f"{model}_{key}_std", max, number)
    for model in ("global", "personal")
    for key, title in (("balanced_accuracy", "balanced"), ("macro_f1", "macro-F1"))
)
"""Columns with equal weights of all classes."""
HOLDING: tuple[Column, ...] = tuple(
    (f"{model}, {title}, %", f"{model}_{key}_mean", f"{model}_{key}_std", max, number)
    for model in ("global", "personal")
    for key, title in (("held", "classes held"), ("lacking", "classes lacked"), ("lacking_worst", "classes lacked, worst site"))
)
"""Columns by the classes that a site's training images have or lack."""
DRAWING: tuple[Column, ...] = (
    ("Fréchet distance", "fid_mean", "fid_std", min, lambda value: number(value, 2)),
    ("CAS, %", "cas_mean", "cas_std", max, number),
    ("coverage, %", "coverage_mean", "coverage_std", max, number),
    ("loss", "global_mean", "global_std", min, lambda value: number(value, 4)),
    *(column for column in COLUMNS if column[1] in ("bytes_up", "seconds")),
)
"""Columns of diffusion models."""
KINDS = {
    "accuracy": (("global", "Global model", "test accuracy, %"), ("personal", "Personal models", "test accuracy, %")),
    "loss": (
        ("fid", "Fréchet distance", "Fréchet distance"),
        ("cas", "Classification accuracy score (CAS)", "test accuracy, %"),
    ),
}
"""Plots, by the task's main metric: (key, title, axis)."""
CHOSEN = (("validation, %", "validation_mean"), ("validation of personal models, %", "validation_personal_mean"))
"""Columns that select a sweep's best settings; the first one in its rows is used."""
AFTER = ("end",)  # labels of stages after the rounds
MOST_SITES = 12  # maximum sites of a grid of accuracies
CERTAIN = 0.05  # significance level
REFERENCES = ("local", "centralized")  # prefixes of the baselines' names
UNEVEN = 1.0  # percentage points between accuracy and balanced accuracy above which both are shown
CALL = f"at {CERTAIN:g}"


def table(compare: Mapping[str, Any], columns: tuple[Column, ...] = ()) -> Table:
    """Return the comparison's table; `Cell.best` marks the best value of each column, or several equal ones.

    Local and centralized training are baselines: they come last and are never marked. A single algorithm is not marked
    either. Columns without any value are omitted. In a sweep only the settings with the best validation accuracy are marked.

    Args:
        compare: content of compare.json.
        columns: the columns; None: those of the task.
    """
    rivals, references = _sides(compare)
    rows = [*rivals, *references]
    chosen = _chosen(compare)
    drawing = compare.get("measure") == "loss"
    columns = columns or (DRAWING if drawing else COLUMNS)
    if chosen:
        columns = ((*chosen, None, min if drawing else max, DRAWING[3][4] if drawing else number), *columns)
    shown = [column for column in columns if any(_known(row.get(column[1])) for row in rows)]
    best = {
        key: better((row[key] for row in rivals if _known(row.get(key))), default=None)
        if len(rows) > 1 and (not chosen or key == chosen[1])
        else None
        for _, key, _, better, _ in shown
    }

    def cell(row: Row, key: str, spread: str | None, write: Callable[[float | None], str]) -> Cell:
        value = row.get(key)
        text = write(value)
        if spread is not None and _known(value) and _known(row.get(spread)):
            text += f" ± {write(row[spread])}"
        return Cell(text, best=row in rivals and _known(value) and value == best[key])

    return Table(
        f"{_length(compare)}, {_seeds(compare)}: mean ± standard deviation at the last round",
        ("algorithm", *(header for header, *_ in shown)),
        tuple(
            (
                Cell(row["algorithm"] + " (reference)" * (row in references)),
                *(cell(row, key, spread, write) for _, key, spread, _, write in shown),
            )
            for row in rows
        ),
    )


def even(compare: Mapping[str, Any]) -> Table | None:
    """Return the table of balanced accuracy and macro-F1, means over the sites; None if they are close to the accuracy."""
    pairs = [
        (row.get(f"{model}_balanced_accuracy_mean"), row.get(mean_of))
        for row in compare["rows"]
        for model, mean_of in (("global", "global_site_mean_mean"), ("personal", "personal_mean"))
    ]
    if not any(_known(a) and _known(b) and abs(a - b) > UNEVEN for a, b in pairs):
        return None
    found = table(compare, EVEN)
    return replace(found, title=f"{_length(compare)}: every class weighs the same, means over the sites")


def holding(compare: Mapping[str, Any]) -> Table | None:
    """Return the table of accuracies on the classes that a site holds and lacks; None if no site lacks a tested class."""
    if not any(_known(row.get(f"{model}_lacking_mean")) for row in compare["rows"] for model in ("global", "personal")):
        return None
    found = table(compare, HOLDING)
    return replace(found, title=f"{_length(compare)}: classes that a site's training images have or lack, means over the sites")


def _chosen(compare: Mapping[str, Any]) -> tuple[str, str] | None:
    """Return the title and key of the column that selects a sweep's best settings, or None if this is not a sweep."""
    if not compare.get("swept"):
        return None
    return next((each for each in CHOSEN if any(_known(row.get(each[1])) for row in compare["rows"])), None)


def by_rounds(compare: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return one comparison per number of rounds, largest number first: only rows of equal length are compared."""
    lengths = sorted({row.get("rounds", compare["rounds"]) for row in compare["rows"]}, reverse=True)

    def of(length: int, key: str) -> list[Row]:
        return [row for row in compare.get(key) or () if row.get("rounds", compare["rounds"]) == length]

    return [{**compare, "rounds": length, "rows": of(length, "rows"), "tests": of(length, "tests")} for length in lengths]


def _length(compare: Mapping[str, Any]) -> str:
    rounds = compare["rounds"]
    return "one-shot" if not rounds else f"{rounds} round{'s' * (rounds != 1)}"


def _sides(compare: Mapping[str, Any]) -> tuple[list[Row], list[Row]]:
    """Return the algorithms and the baselines; without algorithms, the baselines are compared with each other."""
    swept = compare.get("swept")
    references = [] if swept else [row for row in compare["rows"] if row["algorithm"].startswith(REFERENCES)]
    rivals = [row for row in compare["rows"] if row not in references]
    return (rivals, references) if rivals else (references, [])


def _known(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _seeds(compare: Mapping[str, Any]) -> str:
    count = len(compare["seeds"])
    return f"{count} seed{'s' * (count != 1)}"


def tests(compare: Mapping[str, Any]) -> Table | None:
    """Return the table of the paired tests, or None if there are none."""
    rows = tuple(
        cells(
            test["metric"],
            f"{test['algorithm']} − {test['against']}",
            signed(test["difference"], 2),
            _chance(test["p"]),
            "significant" if _known(test["p"]) and test["p"] < CERTAIN else "not significant",
        )
        for test in compare.get("tests") or ()
    )
    if not rows:
        return None
    title, header = f"{_length(compare)}: paired tests over the seeds", ("metric", "difference of", "points", "p", CALL)
    return Table(title, header, rows, words=("difference of", CALL))


def _chance(p: float | None) -> str:
    return "< 0.001" if p is not None and p < 0.001 else number(p, 3)


def markdown(compare: Mapping[str, Any]) -> str:
    """Return the tables and any paired tests as Markdown; the best values are bold."""
    parts = by_rounds(compare)
    titled = len(parts) > 1 or any(even(part) or holding(part) for part in parts)
    return "\n".join(f"## {escaped(each.title)}\n\n" * titled + _markdown(each) for each in _tables(compare))


def latex(compare: Mapping[str, Any]) -> str:
    """Return the same tables for LaTeX (package booktabs); the best values are bold."""
    return "\n".join(map(_latex, _tables(compare)))


_TEX = {"\\": r"\textbackslash{}", "±": r"$\pm$", "−": "$-$", "–": "--", "<": "$<$", ">": "$>$", "~": r"\textasciitilde{}"}
_TEX |= {each: f"\\{each}" for each in "&%$#_{}"} | {"^": r"\textasciicircum{}"}


def _latex(each: Table) -> str:
    def text(words: str) -> str:
        return "".join(_TEX.get(letter, letter) for letter in printable(words, 1000))

    def line(texts: Iterable[str]) -> str:
        return f"{' & '.join(texts)} \\\\\n"

    rows = ([rf"\textbf{{{text(cell.text)}}}" if cell.best else text(cell.text) for cell in row] for row in each.rows)
    columns = "".join("l" if not place or name in each.words else "r" for place, name in enumerate(each.header))
    return (
        f"% {printable(each.title)}\n\\begin{{tabular}}{{{columns}}}\n\\toprule\n{line(map(text, each.header))}\\midrule\n"
        f"{''.join(map(line, rows))}\\bottomrule\n\\end{{tabular}}\n"
    )


def _tables(compare: Mapping[str, Any]) -> list[Table]:
    both = [each for part in by_rounds(compare) for each in (table(part), even(part), holding(part), tests(part))]
    return [each for each in both if each is not None]


def _markdown(each: Table) -> str:
    def line(texts: list[str]) -> str:
        return f"| {' | '.join(texts)} |\n"

    def text(cell: Cell) -> str:
        return f"**{escaped(cell.text)}**" if cell.best else escaped(cell.text)

    rule = ["---", *["---:"] * (len(each.header) - 1)]
    return "".join(
        line(row) for row in (list(map(escaped, each.header)), rule, *([text(cell) for cell in row] for row in each.rows))
    )


def write_comparison(folder: Path) -> Path:
    """Write `folder`/report.html from `folder`/compare.json, atomically, and return its path.

    The page shows the accuracy by round if the cells name their run folders ("folder", relative to `folder`).

    Raises:
        InputError: if a file is missing or damaged.
    """
    compare = read_comparison(folder)
    longest = by_rounds(compare)[0]
    drawing = compare.get("measure") == "loss"
    found = (
        [_results(compare), _drawn(longest, folder), _costs(longest)]
        if drawing
        else [_results(compare), _effects(longest), _sites(longest), _costs(longest), _rounds(longest, folder)]
    )
    return publish(
        folder / "report.html",
        title=f"{len(longest['rows'])} {'settings' if longest.get('swept') else 'algorithms'} on {compare['federation']}",
        subtitle=f"{' and '.join(map(_length, by_rounds(compare)))} · seeds {', '.join(map(str, compare['seeds']))}",
        tiles=[] if longest.get("swept") or drawing else _leaders(longest),
        sections=[section for section in found if section is not None],
    )


def _leaders(compare: Mapping[str, Any]) -> list[dict[str, Any]]:
    rivals, references = _sides(compare)
    shown = []
    for kind, title, what in (
        ("global", "Best global model", "test images of all sites, last round, mean over seeds"),
        ("personal", "Best personal models", "each on its site’s test images, mean over sites and seeds"),
    ):
        key = f"{kind}_mean"
        ranked = sorted((row for row in rivals if _known(row.get(key))), key=lambda row: -row[key])
        if not ranked:
            continue
        best = ranked[0]
        facts = [("worst site", percent(best.get(f"{kind}_worst_mean")))]
        if len(ranked) > 1:
            ahead, second = number(best[key] - ranked[1][key]), ranked[1]["algorithm"]
            facts.append((f"ahead of {second} by", f"{ahead} points") if ahead != number(0.0) else ("level with", second))
        facts += [(f"{row['algorithm']} (reference)", percent(row[key])) for row in references if _known(row.get(key))]
        shown.append(
            {"kind": kind, "title": f"{title}: {best['algorithm']}", "what": what, "value": number(best[key]), "facts": facts}
        )
    return shown


def _results(compare: Mapping[str, Any]) -> Section:
    drawing = compare.get("measure") == "loss"
    how = (
        "At the last round, never the best one. Fréchet distance: of samples to training images, lower is better. Taught: "
        "test accuracy of a classifier trained on samples alone. Coverage: training images with a sample as a neighbour. "
        if drawing
        else "Test accuracy in percent at the last round, never the best one. Global: one model on all sites’ test images. "
        "Personal: each site’s own model on its own test images. "
    ) + (
        "★ marks the best settings on validation; the test columns have no marks, so that they select no settings."
        if compare.get("swept")
        else "The winner of every column is marked ★; local and centralized training, which share nothing and "
        "everything, are references and win none."
    )
    if compare.get("tests"):
        corrected = all("p_raw" in test for test in compare["tests"])
        how += (
            " The paired tests ask whether two algorithms differ over the same seeds; their p values are "
            f"{'' if corrected else 'not '}corrected for the number of tests{' (Holm)' * corrected}."
        )
    return Section("results", "Results", how, tables=_tables(compare))


def _drawn(compare: Mapping[str, Any], folder: Path) -> Section | None:
    """Return the section with a grid of samples for each algorithm, from its first run with a known folder."""
    grids: dict[str, bytes] = {}
    classes: tuple[str, ...] = ()
    for row in compare["rows"]:
        folders = (folder / cell["folder"] / "report_images" for cell in row["cells"] if cell.get("folder") is not None)
        if found := next((images for images in map(read_report_images, folders) if images and images.drawn), None):
            grids[row["algorithm"]], classes = found.drawn, found.classes
    if not grids:
        return None
    small = sum(map(len, grids.values())) > LOSSLESS
    shown = [
        Picture(name, (("drawn", *embed(grid, f"images drawn by {name}", len(classes), small=small)),))
        for name, grid in grids.items()
    ]
    how = (
        "Samples of the last models, of one seed; a row per class, equal noise in all. None was chosen by hand. Where every "
        "site has a model of its own, the first site’s draws: classes that it never saw are noise."
    )
    return Section("samples", "What they draw", how, pictures=shown, classes=classes)


EFFECTS = {"validation": "validation_mean", "global, test": "global_mean", "personal, test": "personal_mean"}


def _effects(compare: Mapping[str, Any]) -> Section | None:
    """Return the section on the effect of each setting of a sweep, averaged over the other settings."""
    figures = []
    for key in compare.get("swept") or ():
        groups: dict[str, list[Row]] = {}
        for row in compare["rows"]:
            groups.setdefault(row["settings"][key], []).append(row)
        lines = {name: [mean([row.get(of) for row in rows]) for rows in groups.values()] for name, of in EFFECTS.items()}
        lines = {name: line for name, line in lines.items() if any(map(_known, line))}
        if len(groups) < 2 or not lines:
            continue
        alt = f"Accuracy by {key}: " + "; ".join(
            f"{name} {', '.join(f'{number(value)} % at {at}' for at, value in zip(groups, line, strict=True))}"
            for name, line in lines.items()
        )
        place, label = f"effect-{key.replace('.', '-')}", key.rpartition(".")[2]
        figures.append(Figure(key, plots.lines(place, alt, list(groups), lines, unit="accuracy, %", xlabel=label), alt))
    if not figures:
        return None
    how = "Mean accuracy at each value of a setting, over all values of the others and all seeds. Choose by validation."
    return Section("effects", "What each setting does", how, figures)


def _sites(compare: Mapping[str, Any]) -> Section | None:
    """Return the section on accuracy by site, with one row per algorithm."""
    figures = []
    for kind, title in (("global", "Global model"), ("personal", "Personal models")):
        grids = {row["algorithm"]: _by_site(row, kind) for row in compare["rows"]}
        grids = {name: grid for name, grid in grids.items() if grid}
        sites = sorted({site for grid in grids.values() for site in grid})
        if not grids or len(sites) > MOST_SITES:
            continue
        values = [[grid.get(site) for site in sites] for grid in grids.values()]
        alt = f"{title}, test accuracy in percent by site: " + "; ".join(
            f"{name} {', '.join(f'{site} {number(value)}' for site, value in zip(sites, line, strict=True))}"
            for name, line in zip(grids, values, strict=True)
        )
        figures.append(Figure(title, plots.heat(f"sites-{kind}", alt, list(grids), sites, values), alt))
    if not figures:
        return None
    return Section("sites", "Accuracy by site", "Test accuracy at the last round, mean over seeds; darker is better.", figures)


def _by_site(row: Row, kind: str) -> dict[str, float | None]:
    sites = [cell.get("sites") or {} for cell in row["cells"]]
    found = {name: mean([each.get(name, {}).get(kind) for each in sites]) for each in sites for name in each}
    return found if any(_known(value) for value in found.values()) else {}


def _costs(compare: Mapping[str, Any]) -> Section | None:
    figures = []
    names = [row["algorithm"] for row in compare["rows"]]
    for kind, title, unit in KINDS[compare.get("measure", "accuracy")]:
        points = {
            row["algorithm"]: (row["bytes_up"] / 1e6, row[f"{kind}_mean"], row.get(f"{kind}_std") or 0.0)
            for row in compare["rows"]
            if _known(row.get(f"{kind}_mean")) and _known(row.get("bytes_up"))
        }
        if points:
            alt = f"{title}, {unit} against upload: " + "; ".join(
                f"{name} {number(y)} for {number(x, 2)} MB" for name, (x, y, _) in points.items()
            )
            svg = plots.frontier(f"cost-{kind}", alt, points, xlabel="upload per site, MB", unit=unit, order=names)
            figures.append(Figure(title, svg, alt))
    if not figures:
        return None
    how = "More to the left is better: fewer bytes sent. Bars are one standard deviation over seeds."
    return Section(
        "megabytes",
        "Accuracy against megabytes" if compare.get("measure") != "loss" else "Quality against megabytes",
        how,
        figures,
    )


def _rounds(compare: Mapping[str, Any], folder: Path) -> Section | None:
    figures = []
    for kind, title in (("global", "Global model"), ("personal", "Personal models")):
        curves = {row["algorithm"]: _curve(row, folder, kind) for row in compare["rows"]}
        ticks = _in_order(curves.values())
        if len(ticks) < 2:
            continue
        series = {name: [curve.get(tick) for tick in ticks] for name, curve in curves.items() if curve}
        alt = f"{title}: test accuracy by round, mean over seeds, of {', '.join(series)}."
        svg = plots.lines(f"rounds-{kind}", alt, ticks, series, unit="test accuracy, %", order=list(curves))
        figures.append(Figure(title, svg, alt))
    if not figures:
        return None
    how = (
        "Test accuracy after every round, mean over seeds. “warm” is the warm start of the algorithms that have one; "
        "“end” is after every site’s last step on its own model."
    )
    return Section("rounds", "Accuracy against rounds", how, figures)


def _curve(row: Row, folder: Path, kind: str) -> dict[str, float | None]:
    """Return the accuracy by label of the round, a mean over the cells with a known run folder."""
    lines: list[dict[str, float | None]] = []
    for cell in row["cells"]:
        if cell.get("folder") is None:
            continue
        records = milestones(read_rounds(folder / cell["folder"]))
        records = {label: record for label, record in records.items() if record.get(kind)}
        sites = sorted({site for record in records.values() for site in record[kind]})
        if records:
            lines.append(dict(zip(records, headline(records, sites, kind), strict=True)))
    return {label: mean([line.get(label) for line in lines]) for label in _in_order(lines)}


def _in_order(lines: Iterable[Iterable[str]]) -> list[str]:
    """Return all labels of `lines`: rounds by number, other stages before them, or after them if in `AFTER`."""

    def place(label: str) -> tuple[int, int]:
        return (1, int(label)) if label.isdecimal() else (2 if label in AFTER else 0, 0)

    return sorted({label for line in lines for label in line}, key=lambda label: (place(label), label))
