"""Progress of a run and estimate of the time left: expected times, corrected by measured ones."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..config import Config


class RunListener:
    """Callbacks of a run, which other threads may also call; the defaults do nothing."""

    def plan(self, folder: Path, config: Config, sites: tuple[str, ...], records: Sequence[Mapping[str, Any]]) -> None:
        """Receive the run folder and the records of stages that are already done, before the first stage."""

    def progress(self, site: str, what: str, done: int, total: int) -> None:
        """Receive progress within a stage: at a site or, with site "", of the server's work or of finished sites."""

    def round(self, record: Mapping[str, Any]) -> None:
        """Receive the record of a finished stage, as in rounds.jsonl."""


EXPECTED = {
    "adapt": 35.0, "collect": 1.0, "warm": 50.0, "train": 2.5, "gate": 0.5, "personalize": 2.5,
    "local": 40.0, "auxiliary": 2.5, "alone": 2.5, "start": 0.5, "enrol": 0.5,
}  # fmt: skip
"""Expected seconds of a stage with its evaluation, for WarmFed on digits4 with two workers.

Stages of other algorithms are in proportion to their `train`. Once a stage is measured, only the proportions count."""
ONE_TRAINING = ("adapt", "local")
"""Stages in which a site trains once; in other stages, several trainings may follow each other."""
OTHER = 10.0
"""Expected seconds of a stage with another name."""
END = 5.0
"""Expected seconds of models, images and report."""
SERVER = {"draw": (0.0, 0.75), "recognise": (0.75, 0.9), "train": (0.9, 1.0)}
"""Start and end of the server's jobs, as shares of the warm start."""


class Clock:
    """Time estimate of one run. Times are seconds of a monotonic clock."""

    def __init__(self, stages: Sequence[str], sites: int, workers: int = 1, now: float = 0.0) -> None:
        self.stages, self.done = tuple(stages), 0
        self._sites, self._slow = max(sites, 1), 2 / max(1, min(workers, sites))
        self._measured: dict[str, list[float]] = {}
        self._began = self._since = now
        self._parts: dict[str, float] = {}
        self._share = 0.0

    @classmethod
    def of(cls, config: Config, sites: int, records: Sequence[Mapping[str, Any]] = (), now: float = 0.0) -> "Clock":
        """Return the clock of a run whose stages with these records are done."""
        clock = cls([stage.name for stage in config.algorithm.stages()], sites, config.workers, now)
        for record in records:
            clock.finish(record["seconds"], now)
        return clock

    @property
    def stage(self) -> str:
        """Return the current stage; "report" after the last one."""
        return self.stages[self.done] if self.done < len(self.stages) else "report"

    @property
    def share(self) -> float:
        """Return the reported share of the current stage that is done, from 0 to 1."""
        return self._share

    def work(self, site: str, what: str, done: int, total: int) -> None:
        """Record progress within the stage; arguments as of `RunListener.progress`."""
        part = done / total if total else 0.0
        if site:
            self._parts[site] = part
            share = sum(self._parts.values()) / self._sites if self.stage in ONE_TRAINING else 0.0
        elif what == "sites":
            share = part
        elif self.stage == "warm" and what in SERVER:
            start, end = SERVER[what]
            share = start + part * (end - start)
        else:
            share = 0.0
        self._share = max(self._share, share)

    def finish(self, seconds: float, now: float) -> None:
        """Record the end of the current stage and its seconds."""
        self._measured.setdefault(self.stage, []).append(seconds)
        self.done += 1
        self._since, self._share, self._parts = now, 0.0, {}

    def total(self) -> float:
        """Return the expected seconds of the whole run, before it starts."""
        return sum(self._prior(stage) for stage in self.stages) + END

    def left(self, now: float) -> float:
        """Return the expected seconds until the end of the run."""
        elapsed = now - self._since
        if self.done >= len(self.stages):
            return max(END - elapsed, 0.0)
        pace = self._pace()
        expected = self._expected(self.stage, pace)
        # the measured pace counts more as the stage advances; a late stage is expected to be later
        current = max((1 - self._share) * expected + elapsed if self._share else expected, 1.2 * elapsed * (1 - self._share))
        if self.stage not in self._measured:
            pace = max(current, elapsed) / self._prior(self.stage)  # later stages are scaled by the same factor
        rest = sum(self._expected(stage, pace) for stage in self.stages[self.done + 1 :])
        return max(current - elapsed, 0.0) + rest + END

    def fraction(self, now: float) -> float:
        """Return the share of the run's time that has passed, from 0 to 1."""
        passed = now - self._began
        return passed / (passed + self.left(now)) if passed > 0 else 0.0

    def _prior(self, stage: str) -> float:
        return EXPECTED.get(stage, OTHER) * self._slow

    def _pace(self) -> float:
        """Return the ratio of measured to expected seconds."""
        expected = sum(self._prior(stage) * len(times) for stage, times in self._measured.items())
        return sum(sum(times) for times in self._measured.values()) / expected if expected else 1.0

    def _expected(self, stage: str, pace: float) -> float:
        times = self._measured.get(stage)
        return sum(times) / len(times) if times else pace * self._prior(stage)


def spoken(seconds: float) -> str:
    """Return a rounded text of the time left: "about 2 min 20 s left"."""
    if seconds < 8:
        return "a few seconds left"
    if seconds < 57:
        return f"about {5 * round(seconds / 5)} s left"
    tens = 10 * round(seconds / 10)
    if tens < 600:
        return f"about {tens // 60} min {tens % 60:02d} s left"
    minutes = round(seconds / 60)
    return f"about {minutes} min left" if minutes < 120 else f"about {minutes // 60} h {minutes % 60:02d} min left"
