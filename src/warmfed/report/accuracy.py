"""Sections on accuracy: the headline, accuracy by round and by site, and the table of final numbers."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from . import plots
from .parts import Figure, Section, Table, cells, number, percent
from .record import Run

Record = Mapping[str, Any]
OF_A_ROUND = ("train", "gate")  # stages that make up a round
NAMES = {"personalize": "end"}  # short names of stages, for an axis
MEANINGS = {"warm": "the warm start, before any round", "end": "after every site’s last step on its own model"}
MOST_ROWS = 24  # maximum rows of the plot by site


def milestones(rounds: Sequence[Record]) -> dict[str, Record]:
    """Return the last evaluated record of each label.

    The label of a round's stages is its number, so the gate's value replaces the one before it. The label of a stage before
    or after the rounds is its name ("warm", or "end" for the last personal step).
    """

    def label(record: Record) -> str:
        stage: str = record["stage"]
        return str(record["number"] + 1) if stage in OF_A_ROUND else NAMES.get(stage, stage)

    return {label(record): record for record in rounds if record.get("global") or record.get("personal")}


def last(rounds: Sequence[Record], kind: str) -> Record:
    """Return the last evaluation of `kind` ("global" or "personal"), {site: {split: metrics}}; empty if there is none."""
    return next((record[kind] for record in reversed(rounds) if record.get(kind)), {})


def by_round(records: Mapping[str, Record], sites: Sequence[str], kind: str) -> dict[str, list[float | None]]:
    """Return each site's test accuracy at each of `records`; None if it was not evaluated."""

    def at(record: Record, site: str) -> float | None:
        evaluation = (record.get(kind) or {}).get(site)
        return None if evaluation is None else evaluation["test"]["accuracy"]

    return {site: [at(record, site) for record in records.values()] for site in sites}


def mean(values: Sequence[float | None]) -> float | None:
    """Return the mean of the known values, or None if there are none."""
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def headline(records: Mapping[str, Record], sites: Sequence[str], kind: str) -> list[float | None]:
    """Return the main accuracy of `kind` by round: on the union of the test sets if known, else the mean over sites."""
    if kind == "global":
        unions = [(record.get("union") or {}).get("global") for record in records.values()]
        if any(unions):
            return [None if union is None else union["accuracy"] for union in unions]
    return [mean(column) for column in zip(*by_round(records, sites, kind).values(), strict=True)]


def progress(run: Run) -> Section | None:
    """Return the section on accuracy by round and by site, of the global and the personal models."""
    records = milestones(run.rounds)
    figures = []
    tables = []
    for kind, title, total in (
        ("global", "Global model by round", "all sites"),
        ("personal", "Personal models by round", "mean"),
    ):
        shown = {label: record for label, record in records.items() if record.get(kind)}
        if not shown:
            continue
        series = by_round(shown, run.sites, kind)
        bold = headline(shown, run.sites, kind)
        if len(shown) > 1:
            alt = f"{title}: {total} from {percent(bold[0])} at {next(iter(shown))} to {percent(bold[-1])} at the end."
            svg = plots.lines(f"{kind}-rounds", alt, list(shown), series, unit="test accuracy, %", bold=(total, bold))
            figures.append(Figure(title, svg, alt))
        columns = (total, *run.sites)
        tables.append(
            Table(
                f"{title}: test accuracy in percent",
                ("round", *columns),
                tuple(
                    cells(label, *(number(line[place]) for line in (bold, *series.values())))
                    for place, label in enumerate(shown)
                ),
                folded=True,
            )
        )
    figures += _by_site(run)
    if not tables:
        return None
    how = (
        "Accuracy on test images that no model was trained on or chosen by; the thick line sums up the sites. "
        "Results are read at the end, never at the best round."
    )
    for label, meaning in MEANINGS.items():
        if label in records:
            how += f" “{label}”: {meaning}."
    return Section("accuracy", "Accuracy by round and by site", how, figures, tables=tables)


def _by_site(run: Run) -> list[Figure]:
    both = [last(run.rounds, kind) for kind in ("global", "personal")]
    if not all(both):
        return []
    values = [[(each.get(site) or {"test": {"accuracy": None}})["test"]["accuracy"] for site in run.sites] for each in both]
    gains = [b - a for a, b in zip(*values, strict=True) if a is not None and b is not None]
    shown = sorted(range(len(run.sites)), key=lambda place: (values[1][place] is None, values[1][place] or 0.0))
    title = "Global and personal, by site"
    if len(shown) > MOST_ROWS:
        shown = shown[:MOST_ROWS]
        title += f" (the lowest {MOST_ROWS} of {len(run.sites)})"
    else:
        shown = sorted(shown)
    alt = f"{title}, last round: the personal model is better at {sum(gain > 0 for gain in gains)} of {len(gains)} sites."
    svg = plots.pairs(
        "by-site",
        alt,
        [run.sites[place] for place in shown],
        *([column[place] for place in shown] for column in values),
        unit="test accuracy at the last round, %",
    )
    return [Figure(title, svg, alt, key=(("○", "global model"), ("◆", "personal model")))]


MEASURES = (
    ("accuracy", "accuracy"),
    ("balanced_accuracy", "balanced"),
    ("macro_f1", "macro-F1"),
    ("ece", "ECE"),
    ("held_accuracy", "classes held"),
    ("lacking_accuracy", "classes lacked"),
)


def final(run: Run) -> Section | None:
    """Return the section with each site's numbers at the last round, for the global and the personal models."""
    found = {kind: last(run.rounds, kind) for kind in ("global", "personal")}
    kinds = [kind for kind, evaluation in found.items() if evaluation]
    if not kinds:
        return None
    known = [
        (key, name)
        for key, name in MEASURES
        if any(key in evaluation["test"] for kind in kinds for evaluation in found[kind].values())
    ]
    rows = []
    for site in run.sites:
        images = run.summary["sites"][site]
        measures = [number((found[kind].get(site) or {"test": {}})["test"].get(key)) for key, _ in known for kind in kinds]
        rows.append(cells(site, *measures, f"{images['train']:,}", f"{images['test']:,}"))
    header = ("site", *(kind for _ in known for kind in kinds), "train", "test")
    groups = (("", 1), *((f"{name}, %", len(kinds)) for _, name in known), ("images", 2))
    table = Table("Test measures at the last round, in percent", header, tuple(rows), groups=groups)
    how = (
        "Test results at the last round: the global model and each site’s personal model on that site’s own test images. "
        "Balanced accuracy and macro-F1 weigh every class alike; ECE is how far confidence lies from accuracy "
        "(lower is better)."
    )
    return Section("final", "Final numbers by site", how, tables=[table])


def tiles(run: Run) -> list[dict[str, Any]]:
    """Return the main numbers, {"kind", "title", "what", "value", "facts"}, for each kind of model of the algorithm."""
    once = run.summary.get("one_shot") or {}
    shown = []
    for kind, title, key, what in (
        ("global", "Global model", "union", "test images of all sites, last round"),
        ("personal", "Personal models", "mean", "each on its site’s test images, mean, last round"),
    ):
        values = run.summary.get(kind) or {}
        if values.get(key) is None:
            continue
        before = (once.get(kind) or {}).get(key) if run.summary["rounds"] else None
        facts: list[tuple[str, str]] = []
        if kind == "global":
            facts = [("site mean", percent(values.get("site_mean"))), ("worst site", percent(values.get("site_worst")))]
        else:
            facts = [
                ("worst site", percent(values.get("worst"))),
                ("spread over sites", f"± {number(values.get('std'))}"),
                ("on all sites’ tests", percent(values.get("union"))),
            ]
        shown.append(
            {
                "kind": kind,
                "title": title,
                "what": what,
                "value": number(values[key]),
                "facts": facts if before is None else [("after one shot", percent(before)), *facts],
            }
        )
    return shown
