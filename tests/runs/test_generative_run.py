"""A diffusion model from the command line: run, resume, verify, synthesize, compare."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
from PIL import Image
from safetensors.torch import load_file

from warmfed.cli.parser import main

QUICK = [
    "denoising.width=32", "denoising.depth=1", "denoising.latent=", "denoising.steps=2", "denoising.times=20",
    "evaluation.samples=20", "evaluation.when=every", "algorithm.local.epochs=1", "algorithm.first.epochs=1",
]  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.arrays(tmp_path_factory.mktemp("data") / "toy.npz")


@pytest.fixture(scope="module")
def folder(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("runs") / "x"
    arguments = ["run", "--algorithm", "fedddpm", "--rounds", "2", "--workers", "1", "--out", str(place), "--quiet"]
    features = tiny.feature_extractor(place.parent / "features.npz")
    assert main([*arguments, "--set", f"data.source={data}", f"evaluation.features={features}", *QUICK]) == 0
    return place


def test_a_run_measures_draws_and_says_so(folder: Path) -> None:
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["task"], summary["measure"]) == ("denoise", "loss")
    records = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    assert ["quality" in record for record in records] == [False, False, True, True]
    assert summary["quality"] == records[-1]["quality"]
    assert summary["quality"]["samples"] == 20
    page = (folder / "report.html").read_text()
    for words in ("Quality of the samples", "Corrections on the auxiliary set", "Denoising loss by site", "drawn by the model"):
        assert words in page


def test_another_worker_count_gives_the_same_bytes(folder: Path, capsys: Any) -> None:
    assert main(["verify", str(folder), "--workers", "2"]) == 0
    assert "identical" in capsys.readouterr().out


def test_sites_that_share_no_generator_are_measured_by_their_own(data: Path, folder: Path, tmp_path: Path) -> None:
    """Each of the two sites draws half of the samples; the whole network averaged over rounds is one model again."""
    features = folder.parent / "features.npz"
    models = {}
    for name, more in (("feddiffuse-udec", []), ("fedavg", ["global_ema_decay=0.5"])):
        out = tmp_path / name
        arguments = ["run", "--algorithm", name, "--rounds", "1", "--workers", "1", "--out", str(out), "--quiet", "--set"]
        assert (
            main([*arguments, "task=denoise", f"data.source={data}", f"evaluation.features={features}", *QUICK[:-1], *more])
            == 0
        )
        models[name] = json.loads((out / "summary.json").read_text())["quality"]["models"]
        assert main(["verify", str(out), "--workers", "2"]) == 0
    assert models == {"feddiffuse-udec": 2, "fedavg": 1}


def test_synthesize(folder: Path, tmp_path: Path, capsys: Any) -> None:
    classes = json.loads((folder / "summary.json").read_text())["classes"]
    both = ["--grid", str(tmp_path / "a.png"), "--out", str(tmp_path / "a.safetensors"), "--count", "3"]
    assert main(["synthesize", str(folder), "--label", classes[1], "0", *both]) == 0
    assert "6 images by the global model" in capsys.readouterr().out
    drawn = load_file(tmp_path / "a.safetensors")
    assert drawn["label"].tolist() == [1, 1, 1, 0, 0, 0]
    side = drawn["image"].shape[-1]
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.size == (3 * side, 2 * side)
    assert main(["synthesize", str(folder), "--label", "nothing", *both]) == 2
    assert "unknown class 'nothing'" in capsys.readouterr().err
    for option, place, words in (
        ("--grid", "a.jpg", "--grid must end in .png"),
        ("--out", "", "it exists and is not a regular file"),
        ("--out", "a.png/b.safetensors", "Not a directory"),
    ):
        assert main(["synthesize", str(folder), option, str(tmp_path / place)]) == 2
        assert words in capsys.readouterr().err
    assert main(["synthesize", str(folder)]) == 2
    assert "--grid or --out" in capsys.readouterr().err
    assert main(["predict", str(folder), str(tmp_path / "a.png")]) == 2
    assert "has no classifier" in capsys.readouterr().err


def test_a_comparison_of_diffusion_models(data: Path, folder: Path, tmp_path: Path, capsys: Any) -> None:
    features = folder.parent / "features.npz"
    arguments = [
        "compare",
        "--algorithms",
        "fedddpm",
        "fedavg",
        "--seeds",
        "0",
        "1",
        "--rounds",
        "1",
        "--out",
        str(tmp_path / "x"),
    ]
    arguments += ["--set", "task=denoise", f"data.source={data}", f"evaluation.features={features}", *QUICK]
    assert main(arguments) == 0
    assert "Fréchet distance" in capsys.readouterr().out
    table = json.loads((tmp_path / "x" / "compare.json").read_text())
    assert {test["metric"] for test in table["tests"]} == {"fid", "cas"}
    best = min(table["rows"], key=lambda row: row["fid_mean"])
    line = next(
        line for line in (tmp_path / "x" / "compare.md").read_text().splitlines() if line.startswith(f"| {best['algorithm']} |")
    )
    assert line.split(" | ")[1].startswith("**")


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--algorithm", "warmfed", "--set", "task=denoise"], "warmfed cannot learn the task denoise; choose one of"),
        (["--algorithm", "fedddpm", "--set", "task=classify"], "fedddpm cannot learn the task classify"),
        (["--algorithm", "fedddpm", "--set", "model.start=public"], "cannot start from the public classifier"),
        (["--algorithm", "fedddpm", "--set", "task=draw"], "task must be one of classify, denoise"),
    ],
)
def test_what_does_not_go_together(more: list[str], words: str, data: Path, tmp_path: Path, capsys: Any) -> None:
    assert main(["run", *more, f"data.source={data}", "--out", str(tmp_path / "x")]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
