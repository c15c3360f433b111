"""The round loop: cohorts, names of stages, and interruptions at any point."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import toy

from warmfed.core import Empty, Exchange, Metrics, Reply, Stage
from warmfed.core.messages import Message, decode, encode
from warmfed.core.rng import stream
from warmfed.core.tensors import Tensors
from warmfed.run import cohort, run
from warmfed.transports.in_process import InProcess

SITES = tuple("abcdef")


def asked(share: float, seed: int = 0) -> list[str]:
    stage = Stage("train", lambda *_: (None, {}), lambda *_: Reply(None, None, 1.0, {}), client_fraction=share)
    return cohort(stage, SITES, stream(seed, "cohort"))


@pytest.mark.parametrize(("share", "count"), [(1.0, 6), (0.5, 3), (0.34, 2), (0.01, 1)])
def test_a_cohort_is_a_share_of_the_sites_sorted_by_name(share: float, count: int) -> None:
    assert len(asked(share)) == len(set(asked(share))) == count
    assert asked(share) == sorted(asked(share))


def test_every_site_is_asked_as_often() -> None:
    drawn = [site for seed in range(200) for site in asked(0.5, seed)]
    assert all(75 <= drawn.count(site) <= 125 for site in SITES)


def test_a_stage_without_a_client_asks_nobody() -> None:
    assert cohort(Stage("warm", lambda *_: (None, {})), SITES, stream(0)) == []


def test_stages_are_numbered_by_name() -> None:
    records = toy.play(toy.quick("warmfed")).rounds
    assert [(r.step, r.stage, r.number) for r in records] == [
        (0, "adapt", 0),
        (1, "warm", 0),
        (2, "train", 0),
        (3, "gate", 0),
        (4, "train", 1),
        (5, "gate", 1),
        (6, "personalize", 0),
    ]
    assert [bool(r.evaluation) for r in records] == [False, True, False, True, False, True, True]
    assert records[1].cohort == ()
    assert records[0].cohort == tuple("abcd")


def test_another_seed_is_another_run() -> None:
    algorithm = toy.quick("fedavg")
    assert toy.play(algorithm, seed=1).results != toy.play(algorithm, seed=2).results


@pytest.mark.parametrize(
    ("evaluate", "measured"), [("every", [True, True]), ("last", [False, True]), ("never", [False, False])]
)
def test_when_models_are_measured(evaluate: str, measured: list[bool]) -> None:
    records = toy.play(toy.quick("fedavg"), evaluate=evaluate).rounds
    assert [bool(r.evaluation) for r in records] == measured
    assert records[-1].server.model.keys() == {"head.weight", "head.bias"}


@dataclass
class Reversed:
    """A transport with the replies in reverse order."""

    inner: InProcess

    @property
    def sites(self) -> tuple[str, ...]:
        return self.inner.sites

    def send(
        self, step: int, stage: str, number: int, down: Mapping[str, Message]
    ) -> Iterator[tuple[str, Reply, tuple[Exchange, ...]]]:
        yield from self.inner.send(step, stage, number, dict(reversed(down.items())))

    def evaluate(self, down: Mapping[str, Message], model: Tensors | None) -> Mapping[str, Mapping[str, Metrics]]:
        return self.inner.evaluate(down, model)


@pytest.mark.parametrize("name", ["warmfed", "fedavg", "ditto"])
def test_the_order_of_answers_does_not_matter(name: str) -> None:
    algorithm = toy.quick(name)
    forward = toy.play(algorithm)
    backward = list(run(algorithm, toy.central(), Reversed(InProcess(toy.workers(algorithm)))))
    assert [r.results() for r in backward] == forward.results
    assert encode(backward[-1].server) == encode(forward.server)


def test_the_record_unites_the_test_sets_by_their_sizes() -> None:
    sites = {**toy.SITES, "a": {**toy.SITES["a"], "test": toy.table(0, "test", 6)}}
    record = toy.play(toy.quick("fedavg"), sites=sites).results[-1]
    counts = {site: record["global"][site]["test"]["count"] for site in sites}
    assert counts == {"a": 6, "b": 48, "c": 48, "d": 48}
    right = sum(record["global"][site]["test"]["accuracy"] * counts[site] for site in sites)
    assert record["union"]["global"]["accuracy"] == pytest.approx(right / 150)
    assert record["union"]["global"]["count"] == 150


@pytest.mark.parametrize("sample", [1.0, 0.5])
def test_a_run_may_stop_at_any_border(sample: float, tmp_path: Path) -> None:
    """All that a resumed run has is the server's bytes and the sites' folder."""
    algorithm = toy.quick("warmfed", client_fraction=sample)
    whole = toy.play(algorithm)
    for border in range(1, 7):
        folder = tmp_path / str(border)
        first = run(algorithm, toy.central(), InProcess(toy.workers(algorithm), folder=folder))
        head = [next(first) for _ in range(border)]
        first.close()
        server = decode(encode(head[-1].server))
        rest = toy.play(algorithm, folder=folder, start=(border, server))
        assert [r.results() for r in head] + rest.results == whole.results
        assert encode(rest.server) == encode(whole.server)
        assert all(toy.same(rest.personal(site), whole.personal(site)) for site in rest.transport.sites)


def test_a_run_killed_in_the_middle_of_a_round_asks_the_others_only(tmp_path: Path) -> None:
    algorithm = toy.quick("ditto")
    whole = toy.play(algorithm)
    transport = InProcess(toy.workers(algorithm), folder=tmp_path)
    first = next(run(algorithm, toy.central(), transport))
    sent = transport.send(1, "train", 1, dict.fromkeys(transport.sites, first.server))
    assert [next(sent)[0], next(sent)[0]] == ["a", "b"]  # and here the power fails
    sent.close()
    broken = {name: replace(w, data={}) if name in "ab" else w for name, w in toy.workers(algorithm).items()}
    again = InProcess(broken, folder=tmp_path)
    # a and b have no data any more: they can only repeat their answers
    rest = list(run(algorithm, toy.central(), again, start=(1, first.server), evaluate="never"))
    assert encode(rest[-1].server) == encode(whole.server)
    assert all(encode(again.state(site)) == encode(whole.transport.state(site)) for site in "abcd")


def test_a_ledger_of_all_that_crossed() -> None:
    record = toy.play(toy.quick("fedavg")).rounds[0]
    size = len(encode(record.server))
    assert [(e.site, e.direction, e.kind, e.bytes, e.tensors) for e in record.exchanges] == [
        (site, direction, "averaging.Model", size, 2) for direction in ("down", "up") for site in "abcd"
    ]
    assert len({e.sha256 for e in record.exchanges}) == 5  # one model down to all, four different ones up
    assert record.results()["bytes_up"] == dict.fromkeys("abcd", size)
    silence = toy.play(toy.quick("local")).rounds[0]
    assert silence.results()["bytes_up"] == dict.fromkeys("abcd", len(encode(Empty())))
