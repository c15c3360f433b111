"""The in-process transport: results do not depend on the processes; client states protect against repeated requests."""

import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import toy

from warmfed.algorithms.fedavg import FedAvg
from warmfed.core import ServerContext
from warmfed.core.messages import encode
from warmfed.core.rng import stream
from warmfed.core.training import Training
from warmfed.run import run
from warmfed.transports.client import Client
from warmfed.transports.in_process import InProcess
from warmfed.utils.errors import InputError

ALGORITHM = toy.quick("ditto")


def step(transport: InProcess, number: int) -> dict[str, bytes]:
    server = ALGORITHM.init(toy.central())
    sent = transport.send(number, "train", number, dict.fromkeys(transport.sites, server))
    return {site: encode(reply) for site, reply, _ in sent}


@pytest.mark.parametrize("name", ["warmfed", "centralized"])
def test_worker_processes_change_no_byte(name: str, tmp_path: Path) -> None:
    algorithm = toy.quick(name)
    serial = toy.play(algorithm, artefacts=tmp_path / "serial")
    with InProcess(toy.workers(algorithm), processes=2, folder=tmp_path / "memory") as transport:
        server = toy.central(folder=tmp_path / "two", map_jobs=transport.map_jobs)
        records = list(run(algorithm, server, transport))
        assert [r.results() for r in records] == serial.results
        assert [r.exchanges for r in records] == [r.exchanges for r in serial.rounds]
        assert encode(records[-1].server) == encode(serial.server)
        for site in transport.sites:
            kept = [t.state(site) for t in (transport, serial.transport)]
            assert kept == [None, None] or encode(kept[0]) == encode(kept[1])
    for path in (tmp_path / "serial").rglob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "two" / path.relative_to(tmp_path / "serial")).read_bytes()


def test_more_sites_than_a_process_may_get_descriptors_change_no_byte() -> None:
    algorithm, found = FedAvg(rounds=1, local=Training(batch_size=8)), []
    tables = {f"s{i:03d}": {"train": toy.table(i, "train", 4 + i % 3)} for i in range(150)}  # 300 tensors; 256 are too many
    for processes in (1, 2):
        workers = {site: Client(site, algorithm, toy.TASK, data) for site, data in tables.items()}
        with InProcess(workers, processes) as transport:
            last = list(run(algorithm, ServerContext(toy.TASK, stream(0)), transport, evaluate="never"))[-1]
        found.append((encode(last.server), last.results()))
    assert found[0] == found[1]


def test_jobs_are_spread_in_order() -> None:
    jobs = [(a, b) for a in range(3) for b in (2, 5)]
    with InProcess(toy.workers(ALGORITHM), processes=2) as transport:
        assert transport.map_jobs(divmod, [(7, 2), (9, 4)]) == [(3, 1), (2, 1)]
        assert transport.map_jobs(pow, jobs) == [a**b for a, b in jobs]
        assert os.getpid() not in transport.map_jobs(os.getpid, [()])


def test_worker_processes_are_not_reached_by_an_interrupt() -> None:
    """Ctrl-C goes to all processes of a terminal; this one ends the others, and they say nothing meanwhile."""
    with InProcess(toy.workers(ALGORITHM), processes=2) as transport:
        assert signal.SIGINT in transport.map_jobs(signal.pthread_sigmask, [(signal.SIG_BLOCK, ())])[0]
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_an_error_in_a_worker_process_arrives_as_it_was() -> None:
    algorithm = toy.quick("warmfed")
    transport = InProcess(toy.workers(algorithm, generator=None), processes=2)
    with transport, pytest.raises(InputError, match="needs a generator"):
        list(run(algorithm, toy.central(), transport))


def test_a_site_that_has_answered_repeats_its_answer(tmp_path: Path) -> None:
    first = step(InProcess(toy.workers(ALGORITHM), folder=tmp_path), 0)
    blind = {name: replace(worker, data={}) for name, worker in toy.workers(ALGORITHM).items()}
    assert step(InProcess(blind, folder=tmp_path), 0) == first
    with pytest.raises(KeyError):
        step(InProcess(blind, folder=tmp_path), 1)


def test_without_a_folder_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    step(InProcess(toy.workers(ALGORITHM)), 0)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("damage", [lambda data: data[:-7], lambda data: b"", lambda data: data[:200] + b"?" + data[201:]])
def test_a_damaged_memory_names_its_site(damage: object, tmp_path: Path) -> None:
    step(InProcess(toy.workers(ALGORITHM), folder=tmp_path), 0)
    path = tmp_path / "b.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(InputError, match="client state of site 'b'"):
        step(InProcess(toy.workers(ALGORITHM), folder=tmp_path), 1)


def test_the_memory_of_another_run_is_refused(tmp_path: Path) -> None:
    step(InProcess(toy.workers(ALGORITHM), folder=tmp_path), 3)
    with pytest.raises(InputError, match="site 'a' has replied to step 3, but the server is at step 1"):
        step(InProcess(toy.workers(ALGORITHM), folder=tmp_path), 1)


def test_an_unknown_stage_is_refused() -> None:
    transport = InProcess(toy.workers(ALGORITHM))
    with pytest.raises(InputError, match="request for stage 'distil'"):
        list(transport.send(0, "distil", 0, {"a": ALGORITHM.init(toy.central())}))


def test_progress_names_the_site() -> None:
    told = []
    transport = InProcess(toy.workers(ALGORITHM), progress=lambda *what: told.append(what))
    step(transport, 0)
    assert ("b", "train", 1, 3) in told
    assert {site for site, what, *_ in told if what == "train"} == set("abcd")
