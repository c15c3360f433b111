"""Resumption: a killed run ends with the same bytes; damaged files give an error and stay unchanged."""

import fcntl
import json
import os
import resource
import signal
import stat
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import tiny
import torch
from safetensors.torch import load_file

from warmfed.cli.parser import main
from warmfed.config import Config, parse
from warmfed.core.messages import decode, encode
from warmfed.core.rng import seeded, stream
from warmfed.diffusion import pipeline
from warmfed.evaluation.generators import Evaluation
from warmfed.runs.checkpoint import Checkpoint
from warmfed.runs.execute import execute, resume
from warmfed.runs.folder import read_summary
from warmfed.runs.prepare import prepare
from warmfed.runs.verify import DifferenceError, verify
from warmfed.utils.errors import InputError
from warmfed.utils.files import atomic_write, read_checksummed, remove_partial_files, write_checksummed

with warnings.catch_warnings():
    # diffusers and transformers import modules of their own that are deprecated
    warnings.simplefilter("ignore")
    from warmfed.pretraining.pretrain import Pretraining, build

pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"  # diffusers' schedulers, NumPy 2
)
MEMORIES = 2 + 1  # files written before the second site's first memory: configuration, checkpoint, first memory


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.arrays(tmp_path_factory.mktemp("data") / "toy.npz")


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    execute(tiny.config(data), folder)
    return folder


@pytest.fixture(scope="module")
def begun(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was killed in its second stage, after the first site's answer."""
    return tiny.interrupted(tiny.config(data), tmp_path_factory.mktemp("runs") / "begun", 8)


def same(folder: Path, whole: Path) -> None:
    assert tiny.names(folder) == tiny.names(whole)
    assert tiny.models(folder) == tiny.models(whole)
    assert read_summary(folder)["history_sha256"] == read_summary(whole)["history_sha256"]
    assert (folder / "config.toml").read_bytes() == (whole / "config.toml").read_bytes()


def refused(folder: Path, capsys: pytest.CaptureFixture[str], *words: str) -> None:
    """Check that `warmfed resume` prints one line with these words, exits with 2 and does not change the folder."""
    before = tiny.digest(folder)
    capsys.readouterr()
    assert main(["resume", str(folder)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert all(word in error for word in words), error
    assert tiny.digest(folder) == before


def test_the_folder_of_a_run(whole: Path) -> None:
    assert tiny.names(whole) == [
        "config.toml", "ledger.jsonl", "models/global.safetensors", "models/personal/a.safetensors",
        "models/personal/b.safetensors", "report.html", "report_images/real-a.png", "report_images/real-b.png",
        "report_images/report_images.json", "rounds.jsonl", "summary.json",
    ]  # fmt: skip
    summary = read_summary(whole)
    assert summary["sites"]["a"] | {"global": 0, "personal": 0} == {
        "global": 0,
        "personal": 0,
        "train": 12,
        "validation": 3,
        "test": 6,
    }
    assert summary["models_sha256"]["global"] == tiny.models(whole)["models/global.safetensors"]
    assert summary["image"] == [3, 8, 8]
    lines = [json.loads(line) for line in (whole / "ledger.jsonl").read_text().splitlines()]
    assert all(line["seconds"] >= 0 for line in lines if line.get("direction") == "up")
    assert not any("seconds" in line for line in lines if line.get("direction") == "down")


def test_every_process_is_killed(data: Path, whole: Path, tmp_path: Path) -> None:
    assert tiny.harried(tiny.config(data), tmp_path / "run") == 8
    same(tmp_path / "run", whole)


@pytest.mark.parametrize("write", [1, 5, 18])
def test_killed_once(write: int, data: Path, whole: Path, tmp_path: Path) -> None:
    folder = tiny.interrupted(tiny.config(data), tmp_path / "run", write)
    resume(folder)
    same(folder, whole)


def test_a_kill_before_the_checkpoint_is_removed(begun: Path, whole: Path, tmp_path: Path) -> None:
    folder = tiny.copy(whole, tmp_path / "run")
    tiny.copy(begun / "checkpoint", folder / "checkpoint")
    resume(folder)
    same(folder, whole)


def test_resuming_a_finished_run_does_nothing(whole: Path) -> None:
    before = tiny.digest(whole)
    assert resume(whole) == read_summary(whole)
    assert tiny.digest(whole) == before


def test_a_site_that_was_never_asked_has_a_model(data: Path, tmp_path: Path) -> None:
    settings = {"algorithm.name": "fedper", "algorithm.rounds": 1, "algorithm.client_fraction": 0.5, "model.name": "linear"}
    execute(parse(None, settings | {"data.source": str(data), "workers": 1}), tmp_path / "run")
    assert len(tiny.models(tmp_path / "run")) == 2


@pytest.mark.parametrize(("evaluate", "measured"), [("never", 0), ("last", 1), ("every", 2)])
def test_how_often_models_are_measured(evaluate: str, measured: int, data: Path, tmp_path: Path) -> None:
    summary = execute(tiny.config(data, evaluate=evaluate), tmp_path / "run")
    records = [json.loads(line) for line in (tmp_path / "run" / "rounds.jsonl").read_text().splitlines()]
    assert sum(bool(record["global"]) for record in records) == measured
    assert (summary["global"] is None) == (summary["personal"] is None) == (measured == 0)
    assert len(tiny.models(tmp_path / "run")) == 3
    assert (tmp_path / "run" / "report.html").exists()


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """WarmFed in a second, on an untrained base."""
    folder = tmp_path_factory.mktemp("warm")
    with seeded(stream("tiny")):
        base = build(Pretraining(channels=4, decoder_width=8, widths=(16, 32), text_width=16, text_layers=1))
    pipeline.save(base, folder / "base")
    quick = {"rounds": 2, "synthesis__per_class": 4, "synthesis__subset": 12, "synthesis__filter": "none", "gate": False}
    quick |= {f"{name}__epochs": 1 for name in ("synthesis__training", "synthesis__filter_training", "local", "personal")}
    generator = {"base": str(folder / "base"), "rank": 2, "steps": 2, "training__epochs": 1}
    return tiny.config(
        tiny.arrays(folder / "toy.npz", side=32),
        algorithm__name="warmfed",
        **{f"algorithm__{key}": value for key, value in quick.items()},
        **{f"generator__{key}": value for key, value in generator.items()},
    )


def test_every_process_of_warmfed_is_killed(warm: Config, tmp_path: Path) -> None:
    execute(warm, tmp_path / "whole")
    assert {"adapters/a.safetensors", "synthetic/samples.safetensors", "report_images/synthetic-a.png"} <= set(
        tiny.names(tmp_path / "whole")
    )
    tiny.harried(warm, tmp_path / "run")
    same(tmp_path / "run", tmp_path / "whole")
    for name in ("adapters/a.safetensors", "synthetic/samples.safetensors", "synthetic/manifest.json"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    for name in ("adapters/a.safetensors", "synthetic/samples.safetensors"):
        assert verify(tmp_path / "run") == read_summary(tmp_path / "run")["history_sha256"]
        (tmp_path / "run" / name).write_bytes((tmp_path / "run" / "adapters/b.safetensors").read_bytes())
        with pytest.raises(DifferenceError, match=f"{name}: it is missing or differs"):
            verify(tmp_path / "run")
        (tmp_path / "run" / name).write_bytes((tmp_path / "whole" / name).read_bytes())


def test_the_samples_of_each_adapter_are_measured(warm: Config, tmp_path: Path) -> None:
    measured = replace(warm, evaluation=replace(warm.evaluation, adapters=True, features="global"))
    summary = execute(measured, tmp_path / "run")
    report_images = json.loads((tmp_path / "run" / "report_images" / "report_images.json").read_text())
    assert report_images["features_sha256"] == summary["models_sha256"]["global"]
    assert {"fid", "kid", "precision", "recall", "memorization_rate", "diversity", "nearest", "kept"} <= report_images[
        "adapters"
    ]["a"].keys()
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Quality of the adapters" in page
    assert report_images["features_sha256"][:12] in page
    with pytest.raises(InputError, match=r"classifier\.safetensors is not there; set features to global"):
        prepare(replace(warm, evaluation=replace(warm.evaluation, adapters=True)))


def test_samples_are_shown_and_measured_as_those_of_the_sites_whose_adapters_came(warm: Config, tmp_path: Path) -> None:
    """The first site's adapter is refused: what was drawn with the second's is still the second's."""
    warm = replace(warm, seed=1)  # whose first site has the larger norm
    execute(warm, tmp_path / "whole")
    norm: dict[str, float] = {}
    for site in "ab":
        files = (tmp_path / "whole" / "adapters" / f"{site}{kind}.safetensors" for kind in ("", ".prompts"))
        parts = [value.double().square().sum() for file in files for value in load_file(file).values()]
        norm[site] = float(torch.stack(parts).sum().sqrt())
    assert norm["b"] < norm["a"]
    limit = sum(norm.values()) / 2
    one = replace(
        warm,
        server=replace(warm.server, max_update_norm=limit, min_sites=1),
        evaluation=Evaluation(adapters=True, features="global"),
    )
    execute(one, tmp_path / "one")
    report_images = json.loads((tmp_path / "one" / "report_images" / "report_images.json").read_text())
    assert {site: bool(shown["synthetic"]) for site, shown in report_images["sites"].items()} == {"a": False, "b": True}
    assert report_images["adapters"].keys() == {"b"}


@pytest.mark.parametrize("name", ["warmfed", "feddeo"])
def test_a_run_whose_sites_learned_prompts_alone_draws_again(
    name: str, warm: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if name == "warmfed":
        config = replace(warm, generator=replace(warm.generator, target_modules="none"))
    else:
        quick = {f"algorithm.{each}.epochs": 1 for each in ("description", "local", "synthesis.training", "tune_training")}
        quick |= {"algorithm.rounds": 0, "algorithm.synthesis.per_class": 4, "algorithm.synthesis.filter": "none"}
        settings = {"data.source": warm.data.source, "generator.base": warm.generator.base, "generator.steps": 2}
        config = parse(None, settings | quick | {"algorithm.name": "feddeo", "workers": 1})
    execute(config, tmp_path / "run")
    out = tmp_path / "a.safetensors"
    assert main(["synthesize", str(tmp_path / "run"), "--site", "a", "--count", "2", "--out", str(out)]) == 0
    assert "by the adapter of a" in capsys.readouterr().out
    assert len(load_file(out)["image"])
    # of prompts that the base reads alike, only the learned ones can be told apart
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    summary["prompts"] = ["a photo of a 犬", "a photo of a 猫", *summary["prompts"][2:]]
    (tmp_path / "run" / "summary.json").write_text(json.dumps(summary))
    assert main(["synthesize", str(tmp_path / "run"), "--site", "a", "--count", "2", "--out", str(out)]) == 0
    assert main(["synthesize", str(tmp_path / "run"), "--count", "2", "--label", "1", "--out", str(out)]) == 0
    capsys.readouterr()
    assert main(["synthesize", str(tmp_path / "run"), "--count", "2", "--out", str(out)]) == 2
    assert "have the same prompt for the base" in capsys.readouterr().err


def test_a_base_that_draws_images_of_another_size(warm: Config, data: Path) -> None:
    with pytest.raises(InputError, match=r"generates images of 32×32 pixels, those of toy have 8×8"):
        prepare(replace(warm, data=replace(warm.data, source=str(data))))


def test_kill_9(data: Path, tmp_path: Path) -> None:
    config = tiny.config(data, algorithm__rounds=3, algorithm__local__epochs=30)
    execute(config, tmp_path / "whole")
    folder, toml = tmp_path / "run", tmp_path / "config.toml"
    toml.write_text(replace(config, workers=2).toml())
    command = ["run", str(toml), "--out", str(folder)]
    for awaited in ("checkpoint/sites/a.safetensors", "rounds.jsonl"):
        process = subprocess.Popen(
            [sys.executable, "-m", "warmfed", *command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        while not (folder / awaited).exists() and process.poll() is None:
            time.sleep(0.005)
        below = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        os.kill(process.pid, signal.SIGKILL)
        assert b"Traceback" not in process.communicate()[1]
        command = ["resume", str(folder)]
        assert psutil.wait_procs(below, timeout=20)[1] == []  # no worker outlives its parent
    assert not (folder / "summary.json").exists()
    resume(folder, workers=1)
    assert tiny.models(folder) == tiny.models(tmp_path / "whole")
    assert read_summary(folder)["history_sha256"] == read_summary(tmp_path / "whole")["history_sha256"]


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


@pytest.mark.parametrize(
    ("file", "damage", "words"),
    [
        ("checkpoint/server.safetensors", flip, ("checkpoint", "damaged")),
        ("checkpoint/server.safetensors", cut, ("checkpoint", "damaged")),
        ("checkpoint/server.safetensors", Path.unlink, ("missing",)),
        ("checkpoint/sites/b.safetensors", flip, ("client state of site 'b'", "damaged")),
        ("checkpoint/sites/a.safetensors", cut, ("client state of site 'a'", "damaged")),
        ("rounds.jsonl", cut, ("rounds.jsonl", "damaged")),
        ("rounds.jsonl", Path.unlink, ("rounds.jsonl",)),
        ("ledger.jsonl", cut, ("ledger.jsonl", "damaged")),
        ("config.toml", cut, ("config.toml",)),
        ("config.toml", Path.unlink, ("run folder",)),
    ],
)
def test_damage(
    file: str, damage: Callable[[Path], Any], words: tuple[str, ...], begun: Path, tmp_path: Path, capsys: Any
) -> None:
    folder = tiny.copy(begun, tmp_path / "run")
    damage(folder / file)
    refused(folder, capsys, *words)


@pytest.mark.parametrize(
    ("file", "old", "new", "words"),
    [
        ("rounds.jsonl", '"samples": 12', '"samples": 13', ("rounds.jsonl", "differs")),
        ("config.toml", "seed = 0", "seed = 1", ("other settings",)),
        ("config.toml", "seed = 0", "seeed = 0", ("'seeed'", "did you mean 'seed'")),
    ],
)
def test_changed_files(file: str, old: str, new: str, words: tuple[str, ...], begun: Path, tmp_path: Path, capsys: Any) -> None:
    folder = tiny.copy(begun, tmp_path / "run")
    text = (folder / file).read_text()
    assert old in text
    (folder / file).write_text(text.replace(old, new, 1))
    refused(folder, capsys, *words)


def test_a_run_is_resumed_from_any_folder(whole: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(data.parent)
    tiny.interrupted(replace(tiny.config(data), data=replace(tiny.config(data).data, source=data.name)), tmp_path / "run", 4)
    monkeypatch.chdir(tmp_path)
    resume(tmp_path / "run")
    same(tmp_path / "run", whole)


def test_changed_before_the_first_stage_is_done(data: Path, tmp_path: Path, capsys: Any) -> None:
    folder = tiny.interrupted(tiny.config(data), tmp_path / "run", MEMORIES)
    toml = folder / "config.toml"
    toml.write_text(toml.read_text().replace("seed = 0", "seed = 1"))
    refused(folder, capsys, "other settings")


def test_another_version(begun: Path, tmp_path: Path, capsys: Any) -> None:
    folder = tiny.copy(begun, tmp_path / "run")
    path = folder / "checkpoint" / "server.safetensors"
    kept = decode(read_checksummed(path, "the checkpoint"), Checkpoint)
    write_checksummed(path, encode(replace(kept, version="0.0.7")))
    refused(folder, capsys, "0.0.7", "finish it with that version")


def test_the_data_have_changed(data: Path, tmp_path: Path, capsys: Any) -> None:
    source = tiny.arrays(tmp_path / "toy.npz")
    folder = tiny.interrupted(tiny.config(source), tmp_path / "run", MEMORIES)
    tiny.arrays(source, sites="abc")
    refused(folder, capsys, "data")
    source.unlink()
    refused(folder, capsys, "toy.npz")


def test_two_processes_at_one_folder(begun: Path, tmp_path: Path, capsys: Any) -> None:
    folder = tiny.copy(begun, tmp_path / "run")
    with (folder / "config.toml").open("rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        refused(folder, capsys, "another process")


@contextmanager
def small_disk() -> Iterator[None]:
    """No file may be longer than 2,000 bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_what_is_no_file_is_not_replaced_by_one(tmp_path: Path) -> None:
    """Moved into place, a file would take the place of /dev/full or of a pipe that somebody reads."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "folder"):
        with pytest.raises(InputError, match="it exists and is not a regular file; choose another path"):
            atomic_write(tmp_path / name, "text")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "pipe"]
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


def test_a_full_disk_changes_nothing(begun: Path, whole: Path, tmp_path: Path, capsys: Any) -> None:
    folder = tiny.copy(begun, tmp_path / "run")
    remove_partial_files(folder)
    with small_disk():
        refused(folder, capsys, "cannot write", "free some space")
    resume(folder)
    same(folder, whole)
