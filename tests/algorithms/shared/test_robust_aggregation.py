"""Robust aggregation against values computed by hand, and against Flower's implementations if Flower is installed."""

from dataclasses import replace

import pytest
import torch
import toy

from warmfed.algorithms.shared.base import Model, average
from warmfed.algorithms.shared.robust_aggregation import Robust
from warmfed.config import parse
from warmfed.core import Reply
from warmfed.core.rng import stream
from warmfed.runs.prepare import prepare
from warmfed.utils.errors import InputError

START = {"w": torch.tensor([0.0, 0.0]), "n": torch.tensor(7)}


def replies(*rows: tuple[list[float], float]) -> dict[str, Reply]:
    """Sites a, b, … with these values of w, and these weights."""
    sites = "abcdefghij"
    return {
        sites[i]: Reply(Model({"w": torch.tensor(values), "n": torch.tensor(7 + i)}), None, weight, {})
        for i, (values, weight) in enumerate(rows)
    }


FIVE = replies(([1.0, 10.0], 9), ([2.0, 20.0], 1), ([3.0, 30.0], 1), ([4.0, 0.0], 1), ([1000.0, -1000.0], 1))


@pytest.mark.parametrize(
    ("robust", "wanted"),
    [
        (Robust("median"), [3.0, 10.0]),
        (Robust("trimmed", trim=0.2), [3.0, 10.0]),  # (2+3+4)/3, (0+10+20)/3
        (Robust("trimmed", trim=0.19), [202.0, -188.0]),  # nothing of five is cut
        (Robust("krum", faulty=1), [2.0, 20.0]),  # squared distances to the two nearest: a 101 + 109, b 101 + 101, c 101 + 404
        (Robust("krum", faulty=1, chosen=2), [1.1, 11.0]),  # a and b, weighted 9 to 1
    ],
)
def test_by_hand(robust: Robust, wanted: list[float]) -> None:
    found = robust.combine(START, FIVE)
    assert found["w"].tolist() == pytest.approx(wanted, rel=1e-6)
    assert found["w"].dtype == torch.float32
    assert int(found["n"]) in (7, 8)  # integers have no mean: those of the first that counts


def test_the_median_of_an_even_number_is_the_middle() -> None:
    four = replies(([1.0, 4.0], 1), ([2.0, 3.0], 1), ([5.0, 2.0], 1), ([9.0, 1.0], 1))
    assert Robust("median").combine(START, four)["w"].tolist() == [3.5, 2.5]


def test_a_change_is_shortened_to_the_clip() -> None:
    start = {"w": torch.tensor([1.0, 1.0]), "n": torch.tensor(7)}
    two = replies(([4.0, 5.0], 1), ([1.0, 2.0], 1))  # changes (3, 4), of norm 5, and (0, 1)
    found = Robust(clip=1.0).combine(start, two)["w"]
    assert found.tolist() == pytest.approx([1 + 0.6 / 2, 1 + (0.8 + 1) / 2])


def test_the_default_is_the_weighted_mean_bit_for_bit() -> None:
    rng = stream("robust")
    some = replies(*((torch.randn(2, generator=rng).tolist(), float(i + 1)) for i in range(5)))
    assert toy.same(Robust().combine(START, some), average(some))


def test_a_poisoned_site_cannot_move_a_robust_model() -> None:
    for robust in (Robust("median"), Robust("trimmed"), Robust("krum")):
        assert robust.combine(START, FIVE)["w"].abs().max() <= 30
    assert average(FIVE)["w"].abs().max() > 70


@pytest.mark.parametrize(
    "settings", [{"rule": "mode"}, {"trim": 0.5}, {"trim": -0.1}, {"chosen": 0}, {"clip": -1.0}, {"faulty": -1}]
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(InputError, match="must be"):
        parse(None, {"algorithm.name": "fedavg", **{f"algorithm.robust.{key}": value for key, value in settings.items()}})


@pytest.mark.parametrize("name", ["feddyn", "fednova", "scaffold", "fedamp", "fedproto", "dense", "local"])
def test_a_method_that_does_not_average_has_no_such_setting(name: str) -> None:
    with pytest.raises(InputError, match=rf"{name} has no setting algorithm\.robust; .* fedavg, .*fedper"):
        parse(None, {"algorithm.name": name, "algorithm.robust.rule": "median"})


def test_krum_says_how_many_answers_it_needs() -> None:
    with pytest.raises(InputError, match="needs 5 answers or more, 4 sites are too few"):
        Robust("krum", faulty=1).combine(START, dict(list(FIVE.items())[:4]))
    settings = {"algorithm.name": "fedavg", "algorithm.robust.rule": "krum"}
    with pytest.raises(InputError, match="needs 5 answers or more, 4 sites are too few"):
        prepare(parse(None, settings))  # digits4 has four


@pytest.mark.parametrize("count", [5, 6, 9])
def test_as_flower_combines(count: int) -> None:
    pytest.importorskip("flwr")
    import numpy as np
    from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
    from flwr.serverapp.strategy.fedtrimmedavg import trim_mean
    from flwr.serverapp.strategy.multikrum import select_multikrum
    from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords

    rng = stream("flower", count)
    rows = [(torch.randn(2, generator=rng).tolist(), float(i % 3 + 1)) for i in range(count)]
    some, stacked = replies(*rows), np.array([row for row, _ in rows], np.float32)
    assert Robust("median").combine(START, some)["w"].numpy() == pytest.approx(np.median(stacked, 0), rel=1e-5)
    assert Robust("trimmed", trim=0.25).combine(START, some)["w"].numpy() == pytest.approx(trim_mean(stacked, 0.25), rel=1e-5)
    contents = [
        RecordDict({"arrays": ArrayRecord({"w": Array(row)}), "metrics": MetricRecord({"num-examples": weight})})
        for row, (_, weight) in zip(stacked, rows, strict=True)
    ]
    for chosen in (1, 3):
        kept = select_multikrum(contents, num_malicious_nodes=1, num_nodes_to_select=chosen)
        wanted = aggregate_arrayrecords(kept, "num-examples")["w"].numpy()
        found = Robust("krum", faulty=1, chosen=chosen).combine(START, some)["w"].numpy()
        assert found == pytest.approx(wanted, rel=1e-5)


def test_warmfed_combines_by_the_same_rules() -> None:
    algorithm = toy.quick("warmfed", tune=False, robust=Robust("median"))
    sent = algorithm.init(toy.central())
    back = {
        site: Reply(Model({name: value + change for name, value in sent.model.items()}), None, 1.0, {})
        for site, change in {"a": 1.0, "b": 2.0, "c": 3.0, "d": -1e30}.items()
    }
    known = replace(sent, classes={site: torch.tensor([0]) for site in back})
    merged = algorithm.aggregate(known, back, toy.central())[0].model
    assert toy.same(merged, Robust("median").combine(sent.model, back))
    assert merged["head.bias"].abs().max() < 3
    mean = replace(algorithm, robust=Robust()).aggregate(known, back, toy.central())[0].model
    assert toy.same(mean, average(back))


def test_warmfed_says_before_the_start_how_many_answers_krum_needs() -> None:
    with pytest.raises(InputError, match="needs 5 answers or more, 4 sites are too few"):
        prepare(parse(None, {"algorithm.name": "warmfed", "algorithm.robust.rule": "krum"}))
