"""The remaining time: first an estimate, later from measurements."""

import pytest

from warmfed.config import parse
from warmfed.runs.progress import END, EXPECTED, Clock, spoken


def test_before_anything_is_known() -> None:
    clock = Clock(("adapt", "warm", "train"), sites=4, workers=2)
    assert clock.left(0.0) == clock.total() == EXPECTED["adapt"] + EXPECTED["warm"] + EXPECTED["train"] + END


def test_more_workers_take_less_time_and_no_more_than_there_are_sites_help() -> None:
    assert Clock(("train",), sites=4, workers=4).total() - END == EXPECTED["train"] / 2
    assert Clock(("train",), sites=1, workers=4).total() - END == EXPECTED["train"] * 2


def test_a_stage_that_has_run_is_expected_to_take_as_long_again() -> None:
    clock = Clock(("train", "train", "train"), sites=2, workers=2)
    clock.finish(30.0, now=30.0)
    assert clock.left(40.0) == pytest.approx(20.0 + 30.0 + END)
    assert clock.fraction(40.0) == pytest.approx(40 / (40 + 50 + END))


def test_other_stages_scale_with_what_was_measured() -> None:
    clock = Clock(("adapt", "warm"), sites=2, workers=2)
    clock.finish(2 * EXPECTED["adapt"], now=0.0)
    assert clock.left(0.0) == pytest.approx(2 * EXPECTED["warm"] + END)


@pytest.mark.parametrize("stage", ["adapt", "local"])
def test_the_further_a_stage_is_the_more_its_own_pace_counts(stage: str) -> None:
    clock = Clock((stage,), sites=2, workers=2)
    clock.work("a", "train", 50, 100)
    clock.work("b", "train", 50, 100)
    assert clock.share == 0.5
    assert clock.left(200.0) == pytest.approx(0.5 * EXPECTED[stage] + END)
    clock.work("", "sites", 1, 1)
    assert clock.left(200.0) == pytest.approx(END)


def test_what_is_late_already_slows_the_rest() -> None:
    clock = Clock(("warm", "adapt"), sites=2, workers=2)
    late = 2 * EXPECTED["warm"]
    assert clock.left(late) == pytest.approx(0.2 * late + 2.4 * EXPECTED["adapt"] + END)


def test_a_short_stage_does_not_hide_that_the_next_kind_is_late() -> None:
    clock = Clock(("collect", "train", "train", "train"), sites=2, workers=2)
    clock.finish(0.01 * EXPECTED["collect"], now=0.0)
    late = 10 * EXPECTED["train"]
    assert clock.left(late) == pytest.approx(0.2 * late + 2 * 1.2 * late + END)


def test_a_share_never_falls_back() -> None:
    clock = Clock(("adapt",), sites=1)
    clock.work("a", "train", 9, 10)
    clock.work("a", "train", 1, 10)
    assert clock.share == 0.9


def test_a_site_that_may_train_again_says_nothing_of_the_stage() -> None:
    clock = Clock(("train",), sites=2)
    clock.work("a", "train", 9, 10)
    assert clock.share == 0.0
    clock.work("", "sites", 1, 2)
    assert clock.share == 0.5


def test_the_server_at_the_warm_start() -> None:
    clock = Clock(("warm",), sites=4)
    shares = []
    for what, done, total in (("draw", 2, 4), ("draw", 4, 4), ("recognise", 2, 2), ("train", 5, 10)):
        clock.work("", what, done, total)
        shares.append(clock.share)
    assert shares == pytest.approx([0.375, 0.75, 0.9, 0.95])


def test_a_resumed_run_knows_what_its_stages_took() -> None:
    config = parse(None, {"algorithm.name": "fedavg", "algorithm.rounds": 3, "workers": 1})
    clock = Clock.of(config, 4, [{"stage": "train", "seconds": 50.0}], now=7.0)
    assert (clock.stage, clock.left(7.0)) == ("train", 100.0 + END)
    assert clock.fraction(7.0) == 0.0


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (3, "a few seconds left"), (41, "about 40 s left"), (58, "about 1 min 00 s left"), (84, "about 1 min 20 s left"),
        (599, "about 10 min left"), (3300, "about 55 min left"), (9000, "about 2 h 30 min left"),
    ],
)  # fmt: skip
def test_words(seconds: float, words: str) -> None:
    assert spoken(seconds) == words
