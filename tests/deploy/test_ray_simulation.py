"""A run over Flower's simulation on Ray gives the same bytes as in process. Skipped if Ray is not installed."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny

pytest.importorskip("flwr")

from warmfed.config import Config, parse
from warmfed.deploy.ray_simulation import simulate_on_ray
from warmfed.runs.execute import execute, resume
from warmfed.runs.folder import read_summary
from warmfed.runs.progress import RunListener
from warmfed.transports import flower
from warmfed.utils.errors import InputError
from warmfed.utils.files import read_lines

SETTINGS = {"algorithm.name": "scaffold", "algorithm.rounds": 40, "algorithm.local.epochs": 1, "model.name": "linear"}


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    monkeypatch.chdir(tmp_path)  # a relative path must be found by Ray's processes too
    return parse(None, {**SETTINGS, "data.source": tiny.arrays(tmp_path / "toy.npz", "abcd").name})


def test_a_run_on_ray_is_the_run_in_process(config: Config, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    here, there, broken = execute(config, tmp_path / "here"), tmp_path / "there", tmp_path / "broken"
    (tmp_path / "run.toml").write_text(config.toml())
    # in a process of its own: Ray leaves files open
    # which heeds Ctrl-C also where the tests run in the background
    code = "import signal, sys; from warmfed.cli import main; signal.signal(2, signal.default_int_handler); sys.exit(main())"
    words = [sys.executable, "-c", code, "run", "run.toml", "--transport", "flower-simulation", "--quiet", "--out"]
    done = subprocess.run([*words, "there"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "there\n"), done.stderr
    found = read_summary(there)
    for key in ("history_sha256", "models_sha256", "data_sha256", "personal", "global"):
        assert found[key] == here[key], key
    lines = [
        [
            (m["site"], m["direction"], m["kind"], m["bytes"], m["sha256"])
            for m in read_lines(path / "ledger.jsonl", "it")
            if "site" in m
        ]
        for path in (there, tmp_path / "here")
    ]
    assert lines[0] == lines[1]

    stopped = subprocess.Popen([*words, "broken"], cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while not (broken / "rounds.jsonl").exists() and stopped.poll() is None:
        time.sleep(0.02)
    stopped.send_signal(signal.SIGINT)
    told = stopped.communicate(timeout=60)[1]
    assert stopped.returncode == 130, told
    assert "resume" in told
    assert 0 < len(read_lines(broken / "rounds.jsonl", "records")) < config.algorithm.rounds
    assert resume(broken)["history_sha256"] == here["history_sha256"]  # in process: the folder is the same


def test_ray_is_asked_for_by_name(config: Config, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(flower, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'warmfed\[simulation\]'"):
        simulate_on_ray(config, tmp_path / "x", RunListener())
    assert not (tmp_path / "x").exists()
