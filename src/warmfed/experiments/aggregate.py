"""Aggregates runs by arm and number of rounds: means, standard deviations and paired tests."""

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean, stdev
from typing import Any, Protocol

Summary = Mapping[str, Any]

METRICS = {
    "global": ("global", "union"),
    "global_worst": ("global", "site_worst"),
    "personal": ("personal", "mean"),
    "personal_worst": ("personal", "worst"),
    **{
        f"{model}_{key}": (model, key)
        for model in ("global", "personal")
        for key in ("site_mean", "balanced_accuracy", "macro_f1", "held", "lacking", "lacking_worst")
    },
    "holdout": ("holdout", "global"),
    "holdout_tuned": ("holdout", "tuned"),
    "validation": ("validation", "global"),
    "validation_personal": ("validation", "personal"),
    "fid": ("quality", "fid"),
    "kid": ("quality", "kid"),
    "coverage": ("quality", "coverage"),
    "cas": ("quality", "cas"),
}
"""Path of each metric in a summary, by row key."""
TESTED_METRICS = {
    "accuracy": ("global", "personal", "holdout", "holdout_tuned", "global_lacking", "personal_lacking"),
    "loss": ("fid", "cas"),
}
"""Metrics of the paired tests, by the task's main metric: accuracy, or loss for diffusion models."""


class Cell(Protocol):
    """Part of a comparison's cell that the table uses."""

    @property
    def arm(self) -> str: ...
    @property
    def rounds(self) -> int: ...
    @property
    def seed(self) -> int: ...
    @property
    def holdout(self) -> str: ...
    @property
    def settings(self) -> Mapping[str, str]: ...
    @property
    def name(self) -> str: ...


Member = tuple[Cell, Summary]
Pairing = tuple[int, str]
"""Seed and held-out site; two runs with the same pairing form a pair of the tests."""


def aggregate(cells: Sequence[Cell], summaries: Sequence[Summary], reference: str = "") -> dict[str, Any]:
    """Return compare.json: a row for each arm and number of rounds, and paired tests over the seeds.

    The tests compare the arm `reference` with each other arm: Student's paired t-test, two-sided, over seeds and held-out
    sites. Holm's correction is applied over the arms, for each metric and number of rounds.

    Args:
        cells: the cells.
        summaries: summaries of the cells, in their order.
        reference: the reference arm. Default empty: warmfed, or the first arm.
    """
    groups: dict[tuple[int, str], list[Member]] = {}
    for cell, summary in zip(cells, summaries, strict=True):
        groups.setdefault((cell.rounds, cell.arm), []).append((cell, summary))
    rows = [_row(arm, rounds, members) for (rounds, arm), members in groups.items()]
    names = list(dict.fromkeys(cell.arm for cell in cells))
    measure = summaries[0].get("measure", "accuracy")
    first = reference or ("warmfed" if "warmfed" in names else names[0])
    tests = []
    for rounds in dict.fromkeys(cell.rounds for cell in cells):
        for metric in TESTED_METRICS[measure]:
            values = {arm: _values(members, metric) for (r, arm), members in groups.items() if r == rounds}
            tests += [{"rounds": rounds, **test} for test in _tests(metric, first, values)]
    return {
        "rows": rows,
        "tests": tests,
        "measure": measure,
        "federation": summaries[0]["federation"],
        "seeds": list(dict.fromkeys(cell.seed for cell in cells)),
        "rounds": max(cell.rounds for cell in cells),
        "swept": list(dict.fromkeys(key for cell in cells for key in cell.settings)),
        "holdout": [site for site in dict.fromkeys(cell.holdout for cell in cells) if site],
    }


def _row(arm: str, rounds: int, members: Sequence[Member]) -> dict[str, Any]:
    row: dict[str, Any] = {
        "algorithm": arm,
        "rounds": rounds,
        "settings": dict(members[0][0].settings),
        "cells": [{**summary, "seed": cell.seed, "folder": f"cells/{cell.name}"} for cell, summary in members],
        "bytes_up": fmean(summary["bytes_up_per_site"] for _, summary in members),
        "seconds": fmean(summary["seconds"] for _, summary in members),
    }
    for key in METRICS:
        values = [value for value in _values(members, key).values() if value is not None]
        row[f"{key}_mean"] = fmean(values) if values else None
        row[f"{key}_std"] = stdev(values) if len(values) > 1 else None
    return row


def _values(members: Iterable[Member], metric: str) -> dict[Pairing, float | None]:
    """Return the values of a metric by seed and held-out site; None if the algorithm has no such model."""
    model, key = METRICS[metric]
    return {(cell.seed, cell.holdout): (summary.get(model) or {}).get(key) for cell, summary in members}


def _tests(metric: str, first: str, values: Mapping[str, Mapping[Pairing, float | None]]) -> list[dict[str, Any]]:
    own = values.get(first, {})
    found: list[dict[str, Any]] = []
    for against, others in values.items():
        pairs = [
            (own[pairing], other) for pairing, other in others.items() if own.get(pairing) is not None and other is not None
        ]
        if against == first or len(pairs) < 2:
            continue
        differences = [a - b for a, b in pairs]  # type: ignore[operator]
        found.append({"metric": metric, "algorithm": first, "against": against, "difference": fmean(differences)})
        found[-1]["p_raw"] = paired(differences)
    corrected = holm([test["p_raw"] for test in found])
    return [{**test, "p": p} for test, p in zip(found, corrected, strict=True)]


def paired(differences: Sequence[float]) -> float | None:
    """Return p of Student's paired t-test, two-sided; None if the differences do not vary."""
    from scipy.stats import ttest_rel

    if max(differences) - min(differences) < 1e-9:
        return None
    return float(ttest_rel(differences, [0.0] * len(differences)).pvalue)


def holm(values: Sequence[float | None]) -> list[float | None]:
    """Return p values with Holm's step-down correction (Scandinavian Journal of Statistics 1979).

    None stays None and does not count as a test.
    """
    ranked = sorted((value, place) for place, value in enumerate(values) if value is not None)
    corrected: list[float | None] = [None] * len(values)
    highest = 0.0
    for rank, (value, place) in enumerate(ranked):
        highest = max(highest, min(1.0, value * (len(ranked) - rank)))
        corrected[place] = highest
    return corrected
