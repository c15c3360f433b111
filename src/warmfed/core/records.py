"""Records of a run: what a stage yields, what crossed, and why a site is missing."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..utils.errors import printable
from .messages import Message

Metrics = Mapping[str, float]


LARGEST = 1e30
"""Largest recorded number; sums and squares of such numbers are finite."""


@dataclass(frozen=True)
class Exchange:
    """One message, as the ledger records it."""

    site: str
    direction: str
    kind: str
    bytes: int
    tensors: int
    sha256: str
    seconds: float | None = field(default=None, compare=False)
    """Seconds of work at the site; replies (up) only."""


@dataclass(frozen=True)
class Failure:
    """Reason why a site's reply is missing or discarded in this round, as one printable line."""

    reason: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "reason", printable(self.reason))


@dataclass(frozen=True)
class Round:
    """Record yielded after each stage; stored as JSON lines, from which reports are made."""

    step: int
    """Stages done before this one."""
    stage: str
    number: int
    """Earlier runs of this stage."""
    server: Message = field(repr=False)
    """New state of the server, for the checkpoint; not part of the record."""
    cohort: tuple[str, ...]
    train: Mapping[str, Metrics]
    aggregate: Metrics
    evaluation: Mapping[str, Mapping[str, Metrics]]
    exchanges: tuple[Exchange, ...]
    seconds: float
    absent: Mapping[str, str] = field(default_factory=dict)
    """Reasons by site that failed in the stage or in its evaluation."""
    share: float = 1.0
    """Largest share of one site in the union of test sets."""

    def results(self) -> dict[str, Any]:
        """Return the part of the record that is equal in every rerun (no times); numbers that are not finite become None."""
        return {
            "step": self.step,
            "stage": self.stage,
            "number": self.number,
            "cohort": list(self.cohort),
            "train": {site: _numbers(m) for site, m in self.train.items()},
            "aggregate": _numbers(self.aggregate),
            "global": _view(self.evaluation, "global"),
            "personal": _view(self.evaluation, "personal"),
            "union": _union(self.evaluation, self.share),
            "bytes_up": _traffic(self.exchanges, "up"),
            "bytes_down": _traffic(self.exchanges, "down"),
        } | ({"absent": dict(self.absent)} if self.absent else {})


def cap_weights(weights: Mapping[str, float], share: float) -> dict[str, float]:
    """Return the weights, reduced so that none exceeds `share` of their sum.

    If `share` is below one divided by their number, all weights become equal to the smallest.
    """
    most, heavy = math.inf, sorted(weights.values(), reverse=True)
    for reduced in range(len(heavy) if share < 1 else 0):
        most = max(heavy[-1], share * sum(heavy[reduced:]) / (1 - share * reduced) if share * reduced < 1 else 0.0)
        if heavy[reduced] <= most:
            break
    return {name: min(weight, most) for name, weight in weights.items()}


def _numbers(metrics: Metrics) -> dict[str, float | None]:
    return {name: value if abs(value) <= LARGEST else None for name, value in metrics.items()}


def _view(evaluation: Mapping[str, Mapping[str, Metrics]], model: str) -> dict[str, dict[str, dict[str, float]]]:
    views = {
        site: {key.removeprefix(f"{model}/"): _counted(m) for key, m in views.items() if key.startswith(f"{model}/")}
        for site, views in evaluation.items()
    }
    return {site: view for site, view in views.items() if view}


def _counted(metrics: Metrics) -> dict[str, float]:
    # metrics are floats on the wire; a count is recorded as an integer
    return {name: int(value) if name == "count" else value for name, value in metrics.items() if abs(value) <= LARGEST}


def _union(evaluation: Mapping[str, Mapping[str, Metrics]], share: float) -> dict[str, dict[str, float]]:
    """Return the global model's metrics on the union of test sets: means weighted by the sites' counts."""
    tests = {site: _counted(views["global/test"]) for site, views in evaluation.items() if "global/test" in views}
    weights = cap_weights({site: m["count"] for site, m in tests.items()}, share)
    total = sum(weights.values())
    if not total:
        return {}
    names = [name for name in ("accuracy", "loss") if all(name in m for m in tests.values())]
    joined = {name: sum(m[name] * weights[site] for site, m in tests.items()) / total for name in names}
    return {"global": joined | {"count": sum(int(m["count"]) for m in tests.values())}}


def _traffic(exchanges: Iterable[Exchange], direction: str) -> dict[str, int]:
    total: dict[str, int] = {}
    for exchange in exchanges:
        if exchange.direction == direction:
            total[exchange.site] = total.get(exchange.site, 0) + exchange.bytes
    return total
