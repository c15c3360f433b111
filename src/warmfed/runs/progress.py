"""How far a run is and how much time is left: an expectation, corrected by what has been measured."""

from collections.abc import Mapping, Sequence
from typing import Any

from ..config import Config

EXPECTED = {
    "adapt": 35.0, "collect": 1.0, "warm": 50.0, "train": 2.5, "gate": 0.5, "personalize": 2.5,
    "local": 40.0, "auxiliary": 2.5, "alone": 2.5, "start": 0.5, "enrol": 0.5,
}  # fmt: skip
"""Seconds of a stage with its evaluation, for WarmFed on digits4 with two workers, and the stages of other methods beside a
`train` of theirs: only proportions matter once something has been measured."""
ONE_TRAINING = ("adapt", "local")
"""Stages in which a site trains once; elsewhere it may start another training after the one that it reports."""
OTHER = 10.0
"""A stage of another name."""
END = 5.0
"""Models, images and report."""
SERVER = {"draw": (0.0, 0.75), "recognise": (0.75, 0.9), "train": (0.9, 1.0)}
"""Which part of the warm start the server's jobs are."""


class Clock:
    """The time of one run. Times are seconds on any clock that does not go back."""

    def __init__(self, stages: Sequence[str], sites: int, workers: int = 1, now: float = 0.0) -> None:
        self.stages, self.done = tuple(stages), 0
        self._sites, self._slow = max(sites, 1), 2 / max(1, min(workers, sites))
        self._measured: dict[str, list[float]] = {}
        self._began = self._since = now
        self._parts: dict[str, float] = {}
        self._share = 0.0

    @classmethod
    def of(cls, config: Config, sites: int, records: Sequence[Mapping[str, Any]] = (), now: float = 0.0) -> "Clock":
        """The clock of a run of which these records are there already."""
        clock = cls([stage.name for stage in config.algorithm.stages()], sites, config.workers, now)
        for record in records:
            clock.finish(record["seconds"], now)
        return clock

    @property
    def stage(self) -> str:
        """The stage at work; "report" after the last one."""
        return self.stages[self.done] if self.done < len(self.stages) else "report"

    @property
    def share(self) -> float:
        """How much of the stage at work is done, as far as its reports tell; 0 to 1."""
        return self._share

    def work(self, site: str, what: str, done: int, total: int) -> None:
        """A report from within the stage, as `RunListener.progress` gets it."""
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
        """The stage at work is done and took this long."""
        self._measured.setdefault(self.stage, []).append(seconds)
        self.done += 1
        self._since, self._share, self._parts = now, 0.0, {}

    def total(self) -> float:
        """Expected seconds of the whole run, before it starts."""
        return sum(self._prior(stage) for stage in self.stages) + END

    def left(self, now: float) -> float:
        """Expected seconds until the run's end."""
        elapsed = now - self._since
        if self.done >= len(self.stages):
            return max(END - elapsed, 0.0)
        pace = self._pace()
        expected = self._expected(self.stage, pace)
        # the further it is, the more its own pace counts; and what is late already will be later
        current = max((1 - self._share) * expected + elapsed if self._share else expected, 1.2 * elapsed * (1 - self._share))
        if self.stage not in self._measured:
            pace = max(current, elapsed) / self._prior(self.stage)  # so much longer than expected may the next ones take
        rest = sum(self._expected(stage, pace) for stage in self.stages[self.done + 1 :])
        return max(current - elapsed, 0.0) + rest + END

    def fraction(self, now: float) -> float:
        """The share of the run's time that has passed; 0 to 1."""
        passed = now - self._began
        return passed / (passed + self.left(now)) if passed > 0 else 0.0

    def _prior(self, stage: str) -> float:
        return EXPECTED.get(stage, OTHER) * self._slow

    def _pace(self) -> float:
        """How much longer than expected stages take."""
        expected = sum(self._prior(stage) * len(times) for stage, times in self._measured.items())
        return sum(sum(times) for times in self._measured.values()) / expected if expected else 1.0

    def _expected(self, stage: str, pace: float) -> float:
        times = self._measured.get(stage)
        return sum(times) / len(times) if times else pace * self._prior(stage)


def spoken(seconds: float) -> str:
    """ "about 2 min 20 s left": as exact as it can be."""
    if seconds < 8:
        return "a few seconds left"
    if seconds < 57:
        return f"about {5 * round(seconds / 5)} s left"
    tens = 10 * round(seconds / 10)
    if tens < 600:
        return f"about {tens // 60} min {tens % 60:02d} s left"
    minutes = round(seconds / 60)
    return f"about {minutes} min left" if minutes < 120 else f"about {minutes // 60} h {minutes % 60:02d} min left"
