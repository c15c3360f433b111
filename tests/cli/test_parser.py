"""Tests of the command line."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import tiny
import toy
from PIL import Image

import warmfed
from warmfed.algorithms import ALGORITHMS
from warmfed.cli.parser import main
from warmfed.runs.execute import execute
from warmfed.runs.summary import history_sha256
from warmfed.utils.files import write_json, write_lines

QUICK = ["--workers", "1", "--rounds", "1", "--set", "model.name=linear", "algorithm.local.epochs=1"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.arrays(tmp_path_factory.mktemp("data") / "toy.npz")


@pytest.fixture(scope="module")
def folder(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a finished run."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    execute(tiny.config(data), folder)
    return folder


def said(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> str:
    """Return the output of the command, and check its exit code."""
    capsys.readouterr()
    assert main([str(a) for a in arguments]) == code
    out, error = capsys.readouterr()
    assert error == ""
    return out


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Return the single line of the command's error message."""
    capsys.readouterr()
    assert main([str(a) for a in arguments]) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert error.startswith("warmfed: ")
    assert error.count("\n") == 1
    return error


def test_help_imports_nothing_heavy() -> None:
    code = """if True:
        import sys
        from warmfed.cli import main
        try:
            main(["run", "--help"])
        except SystemExit:
            pass
        assert not {"torch", "numpy", "rich", "PIL"} & set(sys.modules), sorted(sys.modules)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "CONFIG.toml" in done.stdout


def test_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "warmfed", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"warmfed {warmfed.__version__}\n"


def test_without_a_command(capsys: Any) -> None:
    assert "verify" in said(capsys)


def test_run_shows_its_stages_and_its_end(data: Path, tmp_path: Path, capsys: Any) -> None:
    out = said(capsys, "run", "--algorithm", "fedavg", "--out", tmp_path / "x", *QUICK, f"data.source={data}")
    assert f"fedavg, seed 0, 2 sites, 1 stages -> {tmp_path / 'x'}" in out
    assert "  train 1" in out
    assert "global model" in out
    assert f"report: {tmp_path / 'x' / 'report.html'}" in out


def test_run_names_new_folders(data: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["run", "--algorithm", "fedavg", "--seed", "4", "--quiet", *QUICK, f"data.source={data}"]
    assert [said(capsys, *arguments) for _ in range(3)] == ["runs/fedavg-4\n", "runs/fedavg-4-2\n", "runs/fedavg-4-3\n"]
    config = tomllib.loads((tmp_path / "runs" / "fedavg-4" / "config.toml").read_text())
    assert (config["seed"], config["algorithm"]["rounds"], config["model"]["name"]) == (4, 1, "linear")


def test_run_tells_events(data: Path, tmp_path: Path, capsys: Any) -> None:
    out = said(capsys, "run", "--algorithm", "fedavg", "--json", "--out", tmp_path / "x", *QUICK, f"data.source={data}")
    events = [json.loads(line) for line in out.splitlines()]
    assert [event["event"] for event in events if event["event"] != "progress"] == ["plan", "round", "finished"]
    assert events[0]["stages"] == ["train"]
    assert (
        events[-1]["summary"]["history_sha256"] == json.loads((tmp_path / "x" / "summary.json").read_text())["history_sha256"]
    )


def test_interrupting_says_how_to_go_on(data: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        tiny.kill_at(patch, 3, KeyboardInterrupt)
        assert main(["run", "--algorithm", "fedavg", "--out", str(tmp_path / "x"), *QUICK, f"data.source={data}"]) == 130
    assert capsys.readouterr().err == f"warmfed: interrupted; resume with: warmfed resume {tmp_path / 'x'}\n"
    assert said(capsys, "resume", tmp_path / "x", "--quiet") == f"{tmp_path / 'x'}\n"


def test_sigterm_does_what_an_interrupt_does(data: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Schedulers and service managers send SIGTERM; some send it twice."""

    before, move = signal.getsignal(signal.SIGTERM), os.replace

    def stop(source: Any, target: Any) -> None:
        if Path(target).name == "rounds.jsonl":
            try:
                signal.raise_signal(signal.SIGTERM)
            finally:
                signal.raise_signal(signal.SIGTERM)
        move(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", stop)
        assert main(["run", "--algorithm", "fedavg", "--out", str(tmp_path / "x"), *QUICK, f"data.source={data}"]) == 143
    assert signal.getsignal(signal.SIGTERM) == before
    assert capsys.readouterr().err == f"warmfed: interrupted; resume with: warmfed resume {tmp_path / 'x'}\n"
    assert said(capsys, "resume", tmp_path / "x", "--quiet") == f"{tmp_path / 'x'}\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no device that is always full")
def test_a_run_whose_output_is_full_can_be_resumed(data: Path, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    with open("/dev/full", "w") as full, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", full)
        assert main(["run", "--algorithm", "fedavg", "--out", str(tmp_path / "x"), *QUICK, f"data.source={data}"]) == 2
    told = f"cannot write the output: No space left on device; resume with: warmfed resume {tmp_path / 'x'}"
    assert capsys.readouterr().err == f"warmfed: {told}\n"
    assert said(capsys, "resume", tmp_path / "x", "--quiet") == f"{tmp_path / 'x'}\n"
    for arguments in (["--version"], ["run", "--help"], ["algorithms"], ["algorithms", "--json"]):
        with open("/dev/full", "w") as full, monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", full)
            assert main(arguments) == 2
        assert capsys.readouterr().err == "warmfed: cannot write the output: No space left on device\n"


def test_a_run_folder_whose_name_is_not_utf8(data: Path, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    with (tmp_path / "out").open("w", encoding="ascii") as out, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", out)
        words = ["--algorithm", "fedavg", "--out", "caf\udce9", *QUICK, f"data.source={data}"]
        assert main(["run", *words]) == 0
        picture(tmp_path / "\udce9.png", 0)
        assert main(["report", "caf\udce9"]) == 0
        assert main(["predict", "caf\udce9", "\udce9.png"]) == 0
    assert capsys.readouterr().err == ""
    printed = (tmp_path / "out").read_bytes()
    assert b"1 stages -> caf\\xe9\n" in printed
    assert b"caf\xe9/report.html\n" in printed


def test_closed_outputs(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    try:
        assert main(["run", "--algorithm", "fedavg", "--out", str(tmp_path / "x"), *QUICK, f"data.source={data}"]) == 0
        assert main(["runn"]) == 2
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.close()


def test_resume_of_a_finished_run(folder: Path, capsys: Any) -> None:
    before = tiny.digest(folder)
    assert "report.html" in said(capsys, "resume", folder)
    assert tiny.digest(folder) == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("runn", "invalid choice: 'runn'"),
        ("run --seed x", "invalid int value: 'x'"),
        ("run --workers 0", "whole number of at least 1"),
        ("run --set seed", "--set takes key=value; got 'seed'"),
        ("run --set sead=1", "did you mean 'seed'"),
        ("run --set seed=x", "seed must be of type int"),
        ("run --algorithm fedavgg", "did you mean 'fedavg'"),
        ("run none.toml", "none.toml"),
        ("run --set data.source=none.npz", "none.npz"),
        ("run --set data.source=empty", "is not an image folder"),
        ("run --set data.source=flat", "has one class only"),
        ("run --set data.source=broken", "b/1/0.png does not decode"),
        ("run --set data.source=lonely", "'b'"),
        ("run --set data.source=void", "'b'"),
        ("run --algorithm fedavg --set data.source=good --out good", "good exists already"),
        ("run --algorithm fedavg --set data.source=good --out file", "file exists already"),
        ("resume nowhere", "is this a run folder?"),
        ("report nowhere", "is not a folder"),
        ("report good", "not a run folder"),
        ("verify good", "is this a run folder?"),
        ("predict good x.png", "is this a run folder?"),
        ("compare --algorithms fedavg fedavgg", "did you mean 'fedavg'"),
        ("compare --algorithms fedavg fedprox --reference fedprx", "did you mean 'fedprox'"),
        ("compare --algorithms fedavg --unseen ink", "--unseen is now called --holdout-site"),
        ("compare --algorithms fedavg --tested fedavg", "--tested is now called --reference"),
        ("compare --out good --algorithms fedavg --set data.source=good", "is not a comparison"),
        ("pretrain --out good", "good exists already"),
        ("pretrain --out x --set stepz=1", "did you mean 'steps'"),
        ("pretrain", "--out"),
        ("run --seed -1", "expected a seed from 0 to 2**63 - 1, got -1"),
        ("run --seed 9223372036854775808", "expected a seed from 0 to 2**63 - 1"),
        ("run --set seed=-1", "seed must be from 0 to 2**63 - 1; got -1"),
        ("run --set data.source=good data.options.seed=-1", "must be from 0 to 2**63 - 1; got -1"),
        ("run --set data.source=good data.options.partition={sites=2,seed=-1}", "must be from 0 to 2**63 - 1; got -1"),
        ("data --set data.options.seed=-1", "must be from 0 to 2**63 - 1; got -1"),
        ("compare --seeds 0 -1", "expected a seed from 0 to 2**63 - 1, got -1"),
        ("synthesize good --seed -1 --grid x.png", "expected a seed from 0 to 2**63 - 1, got -1"),
        ("pretrain --out x --set seed=-1", "seed must be from 0 to 2**63 - 1; got -1"),
        ("run --set data.path=caf\udce9", "an argument is not UTF-8: data.path=caf\\xe9;"),
        ("run caf\udce9.toml", "caf\\xe9.toml"),
        ("run --algorithm caf\udce9", "is not UTF-8"),
        ("predict caf\udce9 \udce9.png", "caf\\xe9"),
    ],
)
def test_bad_input_changes_nothing(arguments: str, words: str, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    tiny.pictures(tmp_path / "good", {"a": {"0": 9, "1": 9}})
    tiny.pictures(tmp_path / "flat", {"0": {}, "1": {}})
    for i in range(4):
        Image.new("RGB", (8, 8)).save(tmp_path / "flat" / "0" / f"{i}.png")
    (tiny.pictures(tmp_path / "broken", {"a": {"0": 9, "1": 9}, "b": {"0": 9, "1": 9}}) / "b/1/0.png").write_bytes(
        b"no picture"
    )
    tiny.pictures(tmp_path / "lonely", {"a": {"0": 9, "1": 9}, "b": {"0": 9}})
    tiny.pictures(tmp_path / "void", {"a": {"0": 9, "1": 9}, "b": {}})
    before = tiny.digest(tmp_path)
    assert words in refused(capsys, *arguments.split())
    assert tiny.digest(tmp_path) == before


def test_an_unfinished_run_has_no_report_and_no_predictions(data: Path, tmp_path: Path, capsys: Any) -> None:
    unfinished = tiny.interrupted(tiny.config(data), tmp_path / "run", 8)
    for command in ("report", "verify", "predict"):
        assert "resume" in refused(capsys, command, unfinished, *(["x.png"] if command == "predict" else []))


def test_report_makes_the_page_again(folder: Path, tmp_path: Path, capsys: Any) -> None:
    copy = tiny.copy(folder, tmp_path / "run")
    (copy / "report.html").unlink()
    assert said(capsys, "report", copy) == f"{copy / 'report.html'}\n"
    assert (copy / "report.html").read_bytes() == (folder / "report.html").read_bytes()


def picture(path: Path, label: int) -> Path:
    pixels = (60 + 100 * toy.pattern(label)).permute(1, 2, 0).numpy().astype("uint8")
    Image.fromarray(pixels).resize((24, 24), Image.Resampling.NEAREST).save(path)
    return path


def test_predict(data: Path, tmp_path: Path, capsys: Any) -> None:
    config = tiny.config(data, algorithm__local__epochs=40, algorithm__personal__epochs=20)
    execute(config, tmp_path / "run")
    images = [picture(tmp_path / f"{label}.bmp", label) for label in (2, 0, 1)]
    for site in ([], ["--site", "b"]):
        found = json.loads(said(capsys, "predict", tmp_path / "run", *images, "--json", *site))
        assert [each["class"] for each in found] == ["2", "0", "1"]
        assert all(sum(each["probabilities"].values()) == pytest.approx(1) for each in found)
        assert all(each["probability"] == max(each["probabilities"].values()) for each in found)
    assert "2.bmp" in said(capsys, "predict", tmp_path / "run", images[0])


def test_predict_refuses(folder: Path, tmp_path: Path, capsys: Any) -> None:
    good = picture(tmp_path / "0.png", 0)
    (tmp_path / "bad.png").write_bytes(b"no picture")
    assert "does not decode" in refused(capsys, "predict", folder, good, tmp_path / "bad.png")
    assert "is not a file" in refused(capsys, "predict", folder, tmp_path / "none.png")
    assert "known: a, b" in refused(capsys, "predict", folder, good, "--site", "paper")
    damaged = tiny.copy(folder, tmp_path / "run")
    path = damaged / "models" / "global.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert "has changed since the run" in refused(capsys, "predict", damaged, good)
    path.write_bytes(content[:-1])
    assert "damaged" in refused(capsys, "predict", damaged, good)


def test_predict_without_a_global_model(data: Path, tmp_path: Path, capsys: Any) -> None:
    said(capsys, "run", "--algorithm", "local", "--out", tmp_path / "x", "--quiet", *QUICK, f"data.source={data}")
    image = picture(tmp_path / "0.png", 0)
    assert "local has no global model; choose a site with --site: a, b" in refused(capsys, "predict", tmp_path / "x", image)
    assert "0.png" in said(capsys, "predict", tmp_path / "x", image, "--site", "a")


def test_without_flower_no_folder_is_left(data: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    words = refused(capsys, "run", "--transport", "flower", "--algorithm", "fedavg", "--set", f"data.source={data}")
    assert "Flower is not installed here" in words
    assert list((tmp_path / "runs").iterdir()) == []


def test_algorithms(capsys: Any) -> None:
    rows = json.loads(said(capsys, "algorithms", "--json"))
    assert [row["name"] for row in rows] == list(ALGORITHMS)
    scaffold = next(row for row in rows if row["name"] == "scaffold")
    assert (scaffold["paper"], scaffold["private"]) == ("Karimireddy et al. 2020", "control variate")
    table = said(capsys, "algorithms")
    assert all(name in table for name in ALGORITHMS)


def test_verify_of_an_honest_run(folder: Path, capsys: Any) -> None:
    history = json.loads((folder / "summary.json").read_text())["history_sha256"]
    assert said(capsys, "verify", folder, "--quiet") == f"identical: history {history}\n"
    before = hashlib.sha256((folder / "summary.json").read_bytes()).hexdigest()
    events = said(capsys, "verify", folder, "--json").splitlines()
    assert json.loads(events[-1]) == {"event": "verified", "identical": True, "history_sha256": history, "difference": None}
    assert hashlib.sha256((folder / "summary.json").read_bytes()).hexdigest() == before


def test_verify_names_the_first_difference(folder: Path, tmp_path: Path, capsys: Any) -> None:
    forged = tiny.copy(folder, tmp_path / "run")
    records = [json.loads(line) for line in (forged / "rounds.jsonl").read_text().splitlines()]
    was = records[1]["personal"]["b"]["test"]["accuracy"]
    records[1]["personal"]["b"]["test"]["accuracy"] = 99.0
    write_lines(forged / "rounds.jsonl", records)
    assert "rounds.jsonl: its hash" in said(capsys, "verify", forged, "--quiet", code=1)
    summary = json.loads((forged / "summary.json").read_text())
    write_json(forged / "summary.json", summary | {"history_sha256": history_sha256(records)})
    told = said(capsys, "verify", forged, "--quiet", code=1)
    assert told == f"different: step 1 (personalize 1), personal/b/test/accuracy: 99.0 in the folder, {was} now\n"


def test_verify_looks_at_the_models_and_the_version(folder: Path, tmp_path: Path, capsys: Any) -> None:
    forged = tiny.copy(folder, tmp_path / "run")
    (forged / "models" / "personal" / "a.safetensors").write_bytes(
        (forged / "models" / "personal" / "b.safetensors").read_bytes()
    )
    assert "models/personal/a.safetensors" in said(capsys, "verify", forged, "--quiet", code=1)
    summary = json.loads((forged / "summary.json").read_text())
    write_json(forged / "summary.json", summary | {"warmfed": "0.0.7"})
    assert "made with warmfed 0.0.7" in refused(capsys, "verify", forged)
    del summary["history_sha256"], summary["seed"]
    write_json(forged / "summary.json", summary)
    assert "it lacks seed, history_sha256" in refused(capsys, "verify", forged)


def test_verify_looks_at_what_was_sent(folder: Path, tmp_path: Path, capsys: Any) -> None:
    forged = tiny.copy(folder, tmp_path / "run")
    ledger = [json.loads(line) for line in (forged / "ledger.jsonl").read_text().splitlines()]
    number, line = next((i, line) for i, line in enumerate(ledger) if line.get("direction") == "up")
    was, line["bytes"], line["seconds"] = line["bytes"], 1, line["seconds"] + 1  # seconds are never the same
    write_lines(forged / "ledger.jsonl", ledger)
    told = said(capsys, "verify", forged, "--quiet", code=1)
    assert told == f"different: ledger.jsonl, message {number + 1}, bytes: 1 in the folder, {was} now\n"
    write_lines(forged / "ledger.jsonl", ledger[:-2])
    assert "ledger.jsonl, message" in said(capsys, "verify", forged, "--quiet", code=1)


def test_a_damaged_configuration_of_a_run_is_named(folder: Path, tmp_path: Path, capsys: Any) -> None:
    forged = tiny.copy(folder, tmp_path / "run")
    (forged / "config.toml").write_text("sead = 1\n")
    assert f"{forged / 'config.toml'}: unknown key 'sead'" in refused(capsys, "verify", forged)
