"""Identities of FedDDPM: without corrections, and with one."""

from dataclasses import replace
from typing import Any

import pytest
import toy
from safetensors.torch import load_file

from warmfed.algorithms.fedavg import FedAvg
from warmfed.algorithms.fedddpm import FedDDPM
from warmfed.core.training import Training
from warmfed.utils.errors import InputError

QUICK: dict[str, Any] = {
    "rounds": 3,
    "local": toy.LEARNING,
    "first": toy.LEARNING,
    "server": toy.LEARNING,
    "correction": toy.LEARNING,
}


def play(**changes: Any) -> toy.Outcome:
    return toy.play(FedDDPM(**{**QUICK, **changes}), task=toy.DRAWING)


@pytest.fixture(scope="module")
def plain() -> toy.Outcome:
    return toy.play(FedAvg(rounds=3, local=toy.LEARNING), task=toy.DRAWING)


def models(outcome: toy.Outcome) -> list[Any]:
    return [outcome.algorithm.global_model(r.server) for r in outcome.rounds if r.stage == "train"]


def test_without_corrections_it_is_fedavg_bit_for_bit(plain: toy.Outcome) -> None:
    assert all(toy.same(a, b) for a, b in zip(models(play(correct="never")), models(plain), strict=True))


def test_plus_that_never_stalls_is_fedavg_bit_for_bit(plain: toy.Outcome) -> None:
    outcome = play(correct="slow", slow=-1e9, window=1)
    assert all(toy.same(a, b) for a, b in zip(models(outcome), models(plain), strict=True))
    assert not any(r.aggregate["corrected"] for r in outcome.rounds if r.stage == "train")


def test_a_stall_is_corrected_once_and_as_fedddpm_would(plain: toy.Outcome) -> None:
    """Everything counts as slow, so the first round that can be judged, the second, is corrected, and no other."""
    plus = play(correct="slow", slow=1e9, window=1)
    assert [r.aggregate["corrected"] for r in plus.rounds if r.stage == "train"] == [0.0, 1.0, 0.0]
    assert toy.same(models(plus)[0], models(plain)[0])
    # from FedAvg's first round on, FedDDPM's step in the second one
    state = next(r for r in plus.rounds if (r.stage, r.number) == ("train", 0)).server
    every = toy.play(FedDDPM(**{**QUICK, "correct": "every"}), task=toy.DRAWING, start=(3, state))
    assert toy.same(models(every)[0], models(plus)[1])


def test_the_server_s_rate_decays_over_the_rounds() -> None:
    """The first round is as without; the second is a round at half the rate."""
    every, fading = play(), play(decay=0.5)
    assert toy.same(models(fading)[0], models(every)[0])
    assert not toy.same(models(fading)[1], models(every)[1])
    state = next(r for r in every.rounds if (r.stage, r.number) == ("train", 0)).server
    half = {**QUICK, "server": replace(toy.LEARNING, lr=toy.LEARNING.lr / 2)}
    assert toy.same(
        models(toy.play(FedDDPM(**half), task=toy.DRAWING, start=(3, state)))[0],
        models(fading)[1],
    )


def test_corrections_recur_where_they_may() -> None:
    outcome = play(correct="slow", slow=1e9, signal="update", corrections=0, wait=0, rounds=4)
    assert [r.aggregate["corrected"] for r in outcome.rounds if r.stage == "train"] == [0.0, 1.0, 1.0, 1.0]
    waits = play(correct="slow", slow=1e9, signal="dispersion", corrections=0, wait=1, rounds=4)
    assert [r.aggregate["corrected"] for r in waits.rounds if r.stage == "train"] == [0.0, 1.0, 0.0, 1.0]
    assert all(-1 <= r.aggregate["dispersion"] <= 1 for r in waits.rounds if r.stage == "train")


def test_the_auxiliary_set_is_in_proportion_and_kept(tmp_path: Any) -> None:
    outcome = toy.play(FedDDPM(**{**QUICK, "rounds": 1, "share": 0.5}), task=toy.DRAWING, artefacts=tmp_path)
    record = outcome.after("auxiliary", 0)
    sizes = {site: len(data["train"]["label"]) for site, data in toy.SITES.items()}
    assert {site: record.aggregate[f"samples/{site}"] for site in sizes} == {site: n // 2 for site, n in sizes.items()}
    kept = load_file(tmp_path / "synthetic" / "samples.safetensors")
    assert len(kept["image"]) == record.aggregate["samples"]
    assert len(record.server.held["label"]) == len(kept["label"]) // 10
    assert len(record.server.auxiliary["label"]) + len(record.server.held["label"]) == len(kept["label"])
    assert record.server.locals == {}


def test_one_upload_of_a_site_s_own_model_and_then_the_rounds() -> None:
    outcome = play(rounds=2)
    kinds = [(r.stage, e.kind) for r in outcome.rounds for e in r.exchanges if e.site == "a" and e.direction == "up"]
    assert kinds == [("local", "fedddpm.Drawing"), ("train", "averaging.Model"), ("train", "averaging.Model")]


def test_the_correction_learns_the_auxiliary_set() -> None:
    strong = Training(optimizer="adamw", lr=3e-3, batch_size=12, epochs=20)
    before, after = play(rounds=1, correct="never"), play(rounds=1, server=strong, share=1.0)
    table = after.server.auxiliary
    assert toy.DRAWING.metrics(after.model, table)["loss"] < toy.DRAWING.metrics(before.model, table)["loss"]


@pytest.mark.parametrize("changes", [{"correct": "often"}, {"signal": "luck"}, {"share": 0.0}, {"decay": 1.5}, {"window": 0}])
def test_bad_settings(changes: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        FedDDPM(**changes)
