"""A run over Flower's simulation on Ray: the same bytes as in process. Skipped where Ray is not installed."""

from pathlib import Path
from typing import Any

import pytest
import tiny

pytest.importorskip("flwr")

from warmfed.cli import main
from warmfed.config import Config, parse
from warmfed.errors import InputError
from warmfed.files import read_lines
from warmfed.runs import Watcher, execute, read_summary, resume
from warmfed.simulation import simulate_on_ray
from warmfed.transports import flower

SETTINGS = {"algorithm.name": "scaffold", "algorithm.rounds": 2, "algorithm.local.epochs": 1, "model.name": "linear"}


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return parse(None, {**SETTINGS, "data.source": str(tiny.arrays(tmp_path / "toy.npz", "abcd"))})


class Crash(Watcher):
    def round(self, record: Any) -> None:
        raise ZeroDivisionError


@pytest.mark.filterwarnings("ignore")  # Ray's own, in its threads
def test_a_run_on_ray_is_the_run_in_process(config: Config, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("ray")
    here, there, broken = execute(config, tmp_path / "here"), tmp_path / "there", tmp_path / "broken"
    (tmp_path / "run.toml").write_text(config.toml())
    words = ["run", str(tmp_path / "run.toml"), "--transport", "flower-simulation", "--quiet", "--out", str(there)]
    assert main(words) == 0
    assert capfd.readouterr().out == f"{there}\n"
    found = read_summary(there)
    for key in ("history_sha256", "models_sha256", "data_sha256", "personal", "global"):
        assert found[key] == here[key], key
    lines = [
        [
            (m["site"], m["direction"], m["kind"], m["bytes"], m["sha256"])
            for m in read_lines(folder / "ledger.jsonl", "it")
            if "site" in m
        ]
        for folder in (there, tmp_path / "here")
    ]
    assert lines[0] == lines[1]
    with pytest.raises(ZeroDivisionError):
        simulate_on_ray(config, broken, Crash())
    assert len(read_lines(broken / "rounds.jsonl", "records")) == 1
    assert resume(broken)["history_sha256"] == here["history_sha256"]  # in process: the folder is the same


def test_ray_is_asked_for_by_name(config: Config, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(flower, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'warmfed\[simulation\]'"):
        simulate_on_ray(config, tmp_path / "x", Watcher())
    assert not (tmp_path / "x").exists()
