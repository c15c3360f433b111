"""WarmFed where sites lack classes: class completion, replay of the site's own style, and what stays as it was."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import toy

from warmfed.algorithms.fedbip import FedBiP
from warmfed.algorithms.feddeo import FedDEO
from warmfed.algorithms.shared.synthetic_data import Synthesis, held_only, of_lacking, planned
from warmfed.algorithms.warmfed import Replay, WarmFed
from warmfed.core.tensors import Table, select
from warmfed.utils.errors import InputError

LACKING = {"a": 2, "c": 0}
"""The class that each of these sites lacks."""


def without(table: Table, label: int) -> Table:
    return select(table, table["label"] != label)


SKEWED = {
    site: {
        part: without(table, LACKING[site]) if site in LACKING and part != "test" else table for part, table in tables.items()
    }
    for site, tables in toy.SITES.items()
}


def warmfed(classes: str = "all", **changes: Any) -> WarmFed:
    algorithm: WarmFed = toy.quick("warmfed")
    return replace(algorithm, synthesis=replace(algorithm.synthesis, classes=classes), **changes)


def records(outcome: Any) -> list[dict[str, Any]]:
    return [{key: value for key, value in result.items() if key != "seconds"} for result in outcome.results]


def test_with_all_classes_held_nothing_changes() -> None:
    usual, whole = toy.play(warmfed("held")), toy.play(warmfed("all", replay=4))
    assert records(usual) == records(whole)
    assert all(torch.equal(usual.model[name], whole.model[name]) for name in usual.model)
    for site in toy.SITES:
        assert all(torch.equal(usual.personal(site)[name], whole.personal(site)[name]) for name in usual.model)


def test_the_number_of_samples_stays_and_every_class_is_drawn() -> None:
    held = {"a": (0, 1), "b": (0, 1, 2), "c": (1, 2), "d": (0, 1, 2)}
    settings = Synthesis(per_class=12)
    assert planned(held, 3, 12, settings) == (held, 12)
    wanted, each = planned(held, 3, 12, replace(settings, classes="all"))
    assert (wanted, each) == (dict.fromkeys(held, (0, 1, 2)), 10)
    assert each * 3 * 4 == 12 * 10
    everything = dict.fromkeys(held, (0, 1, 2))
    assert planned(everything, 3, 12, replace(settings, classes="all")) == (everything, 12)


def test_the_record_tells_of_lacking_classes() -> None:
    outcome = toy.play(warmfed(), sites=SKEWED)
    warm = next(result["aggregate"] for result in outcome.results if result["stage"] == "warm")
    assert {name for name in warm if name.startswith("recognised_lacking/")} == {"recognised_lacking/a", "recognised_lacking/c"}
    test = outcome.results[-1]["personal"]["a"]["test"]
    images = toy.SITES["a"]["test"]["label"]
    count = int((images == 2).sum())
    assert test["lacking_count"] == count
    both = test["held_accuracy"] * (len(images) - count) + test["lacking_accuracy"] * count
    assert both / len(images) == pytest.approx(test["accuracy"])
    assert "lacking_accuracy" not in outcome.results[-1]["personal"]["b"]["test"]


def test_the_server_keeps_samples_for_the_sites_that_lack_classes() -> None:
    server = toy.play(warmfed(replay=3), sites=SKEWED).after("warm", 0).server
    assert {site: set(samples["label"].tolist()) for site, samples in server.replay.items()} == {
        site: {label} for site, label in LACKING.items()
    }
    assert all(1 <= len(samples["label"]) <= 3 for samples in server.replay.values())


@pytest.mark.parametrize("rounds", [0, 2])
def test_replay_joins_the_training_of_sites_that_lack_classes(rounds: int) -> None:
    plain, replayed = (toy.play(warmfed(replay=n, rounds=rounds, tune=False), sites=SKEWED) for n in (0, 4))
    assert all(torch.equal(plain.model[name], replayed.model[name]) for name in plain.model) == (rounds == 0)
    for site in toy.SITES:
        same = all(torch.equal(plain.personal(site)[name], replayed.personal(site)[name]) for name in plain.model)
        assert same or site in LACKING or rounds
    kinds = [line.kind for record in replayed.rounds for line in record.exchanges if line.direction == "down"]
    assert kinds.count("warmfed.Replay") == len(LACKING)
    assert "warmfed.Replay" not in [line.kind for record in plain.rounds for line in record.exchanges]


def test_sites_are_judged_by_the_classes_that_they_hold() -> None:
    label = torch.tensor([0, 1, 2, 0, 2])
    samples = {"image": torch.arange(5)[:, None], "label": label, "site": torch.tensor([0, 0, 0, 1, 1])}
    assert held_only(samples, ("a", "b"), {"a": (0, 1), "b": (0, 2)})["image"][:, 0].tolist() == [0, 1, 3, 4]
    assert held_only(samples, ("a", "b"), {"a": (0, 1, 2), "b": (0, 2)}) is samples


def test_samples_are_the_sites_own_and_of_the_classes_that_it_lacks() -> None:
    label = torch.tensor([0, 1, 2, 2, 2, 0, 1, 2])
    kept = {"image": torch.arange(8)[:, None], "label": label, "site": torch.tensor([0, 0, 0, 0, 0, 1, 1, 1])}
    found = of_lacking(kept, ("a", "b"), {"a": (0, 1), "b": (0, 1, 2)}, 2)
    assert list(found) == ["a"]
    assert found["a"]["image"][:, 0].tolist() == [2, 3]
    assert of_lacking(kept, ("a", "b"), {"a": (0, 1), "b": (0, 1, 2)}, 0) == {}


def test_settings_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InputError, match="replay must be at least 0"):
        warmfed(replay=-1)
    for method in (FedBiP, FedDEO):
        with pytest.raises(InputError, match="learns only the classes that a site holds"):
            method(synthesis=Synthesis(classes="all"))
    assert Replay({}, None, {}).subset is None
