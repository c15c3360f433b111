"""Tests of every registered algorithm; a new algorithm needs a line in `ALGORITHMS` and no change here."""

import functools
import math
from dataclasses import FrozenInstanceError, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import toy
from safetensors.torch import save_file

from warmfed.algorithms import ALGORITHMS, entry
from warmfed.algorithms.shared.base import PartlyShared
from warmfed.core.messages import Message, decode, encode, tensors_of
from warmfed.core.rng import stream
from warmfed.core.tensors import join, sha256
from warmfed.core.training import Training
from warmfed.fit import fit
from warmfed.run import run
from warmfed.tasks import Classify
from warmfed.transports.in_process import InProcess
from warmfed.utils.errors import InputError

NAMES = sorted(ALGORITHMS)
every = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(scope="module")
def public(tmp_path_factory: pytest.TempPathFactory) -> Classify:
    """A task that starts from a classifier trained on public images."""
    task, path = toy.LAYERED, tmp_path_factory.mktemp("public") / "classifier.safetensors"
    table = toy.table(9, "public", 30)
    model, _ = fit(toy.central(task=task), task.init(stream("public")), Training(lr=0.01), table)
    save_file(dict(model), path)
    return replace(task, start=str(path))


@functools.cache
def finished(name: str, task: Any) -> toy.Outcome:
    return toy.play(toy.quick(name), task=task)


@pytest.fixture
def task(name: str, public: Classify) -> Any:
    return public if entry(name).settings.get("model.start") == "public" else toy.task_of(name)


@pytest.fixture
def outcome(name: str, task: Any) -> toy.Outcome:
    return finished(name, task)


def score(algorithm: Any, server: Any, states: Any, task: Any) -> float:
    """Return the mean accuracy (or loss) over the sites, each with the model that it would use."""
    found = []
    for site, data in toy.SITES.items():
        down = algorithm.broadcast(server, site)
        state = states(site)
        worker = toy.workers(algorithm, task=task)[site]
        entered = algorithm.init_client_state(down, worker.local("enter", 0)) if state is None else state
        found.append(task.metrics(algorithm.client_model(down, entered), task.tables(data)["test"])[task.measure])
    return sum(found) / len(found)


@every
def test_improves(name: str, outcome: toy.Outcome, task: Any) -> None:
    algorithm = outcome.algorithm
    before = score(algorithm, algorithm.init(toy.central(task=task)), lambda site: None, task)
    after = toy.mean(outcome.rounds[-1], "personal", task.measure)
    assert after > max(before + 10, 65) if task.measure == "accuracy" else after < 0.9 * before
    assert after == pytest.approx(score(algorithm, outcome.server, outcome.transport.state, task))
    model = algorithm.global_model(outcome.server)
    if model is not None and task.measure == "accuracy":
        union = join(data["test"] for data in toy.SITES.values())
        assert task.metrics(model, union)["accuracy"] == pytest.approx(outcome.results[-1]["union"]["global"]["accuracy"])
        assert toy.accuracy(outcome.rounds[-1], "global") > 65


@every
def test_two_runs_are_equal(name: str, outcome: toy.Outcome, task: Any) -> None:
    again = toy.play(toy.quick(name), task=task)
    assert again.results == outcome.results
    assert [r.exchanges for r in again.rounds] == [r.exchanges for r in outcome.rounds]
    assert encode(again.server) == encode(outcome.server)


def wire(value: Message) -> bytes | None:
    """Return the bytes of a message or of a state, which may be None."""
    return None if value is None else encode(value)


@every
def test_stages_are_pure_and_what_they_exchange_survives_the_codec(name: str, outcome: toy.Outcome, task: Any) -> None:
    """Servers, messages, states and data are never modified in place."""
    algorithm = toy.quick(name)
    tap = toy.Tap(InProcess(toy.workers(algorithm, task=task)))
    data = [sha256(table) for tables in toy.SITES.values() for table in tables.values()]
    made: list[tuple[Message, bytes]] = []
    for record in run(algorithm, toy.central(task=task), tap, evaluate="never"):
        crossed = [part for _, _, *parts in tap.taken() for part in parts if part is not None]
        made += [(value, encode(value)) for value in (record.server, *crossed)]
    for value, before in made:
        assert encode(value) == before
        assert encode(decode(before, type(value))) == before
    assert encode(record.server) == encode(outcome.server)
    assert [sha256(table) for tables in toy.SITES.values() for table in tables.values()] == data


@every
def test_stopped_and_resumed_is_uninterrupted(name: str, outcome: toy.Outcome, task: Any, tmp_path: Path) -> None:
    algorithm, border = toy.quick(name), len(outcome.rounds) // 2
    workers = toy.workers(algorithm, task=task)
    first = run(algorithm, toy.central(task=task), InProcess(workers, folder=tmp_path))
    head = [next(first) for _ in range(border)]
    first.close()
    start = (border, decode(encode(head[-1].server))) if head else None
    rest = toy.play(algorithm, task=task, folder=tmp_path, start=start)
    assert [r.results() for r in head] + rest.results == outcome.results
    assert encode(rest.server) == encode(outcome.server)
    for site in rest.transport.sites:
        assert wire(rest.transport.state(site)) == wire(outcome.transport.state(site))


@every
def test_some_of_the_sites_suffice(name: str, task: Any) -> None:
    algorithm = toy.quick(name)
    if "client_fraction" not in {f.name for f in fields(algorithm)}:
        pytest.skip("it has no share of sites")
    half = toy.play(toy.quick(name, client_fraction=0.5), task=task)
    asked = [r.cohort for r in half.rounds if r.stage == "train"]
    assert all(len(cohort) == 2 for cohort in asked)
    assert half.rounds[-1].evaluation.keys() == toy.SITES.keys()
    assert task.measure != "accuracy" or toy.accuracy(half.rounds[-1], "personal") > 45


@every
def test_nothing_private_crosses(name: str, task: Any) -> None:
    algorithm = toy.quick(name)
    tap = toy.Tap(InProcess(toy.workers(algorithm, task=task)))
    list(run(algorithm, toy.central(task=task), tap, evaluate="never"))
    for _, _, down, _, reply in tap.seen:
        crossing = [*tensors_of(down), *tensors_of(reply.message)]
        if isinstance(algorithm, PartlyShared):
            mine = algorithm.mine(task)
            assert not [path for path in crossing if mine(path.split("/")[-1])]
            assert {name for name in task.init(stream("names")) if mine(name)} <= reply.state.model.keys()
        if not name.startswith("centralized"):
            assert not [path for path in crossing if path.endswith(("/image", "/label")) and not path.startswith("subset/")]
    assert entry(name).shared
    assert bool(entry(name).private) == any(reply.state is not None for *_, reply in tap.seen)


@every
def test_metrics_are_finite_floats(name: str, outcome: toy.Outcome) -> None:
    for record in outcome.rounds:
        groups = [record.aggregate, *record.train.values(), *(m for v in record.evaluation.values() for m in v.values())]
        for metrics in groups:
            assert all(type(key) is str and type(value) is float for key, value in metrics.items())
            assert all(math.isfinite(value) for value in metrics.values())


@every
def test_is_a_frozen_dataclass_that_is_documented(name: str) -> None:
    algorithm = toy.quick(name)
    assert is_dataclass(algorithm)
    assert algorithm.__doc__
    assert entry(name).about
    with pytest.raises(FrozenInstanceError):
        algorithm.rounds = 9
    assert algorithm == toy.quick(name)
    assert hash(algorithm) == hash(toy.quick(name))


def test_an_unknown_name_gets_the_nearest_one() -> None:
    with pytest.raises(InputError, match="no algorithm 'fedprocs'; did you mean 'fedprox'"):
        entry("fedprocs")
