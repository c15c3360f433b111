"""A whole run with a network of a user's own: worker processes, the frozen part, prediction and verification."""

import os
from pathlib import Path

import pytest
import tiny
from PIL import Image

from warmfed.runs.execute import execute
from warmfed.runs.folder import read_summary
from warmfed.runs.predict import predict
from warmfed.runs.prepare import prepare
from warmfed.runs.verify import verify


@pytest.mark.parametrize("trainable", ["all", "head"])
def test_a_run_predicts_verifies_and_is_equal_with_workers(
    trainable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # worker processes import the network, too
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent.parent), prepend=os.pathsep)
    data = tiny.arrays(tmp_path / "toy.npz")
    settings = {"model__name": "python:own_networks:pretrained", "model__trainable": trainable}
    one, two = (execute(tiny.config(data, workers=n, **settings), tmp_path / str(n)) for n in (1, 2))
    assert one["history_sha256"] == two["history_sha256"]
    assert verify(tmp_path / "1") == one["history_sha256"]
    Image.new("RGB", (20, 20), (250, 10, 10)).save(tmp_path / "red.png")
    found = predict(tmp_path / "1", [tmp_path / "red.png"], site="a")[0]
    assert sum(found["probabilities"].values()) == pytest.approx(1)
    size = (tmp_path / "1" / "models" / "global.safetensors").stat().st_size
    assert (size < 1000) == (trainable == "head")
    assert read_summary(tmp_path / "2")["models_sha256"] == read_summary(tmp_path / "1")["models_sha256"]


def test_the_frozen_part_is_part_of_a_runs_identity(tmp_path: Path) -> None:
    data = tiny.arrays(tmp_path / "toy.npz")
    runs = [
        prepare(tiny.config(data, model__name=f"python:own_networks:{name}", model__trainable=trainable))
        for name, trainable in (("pretrained", "all"), ("pretrained", "head"), ("batch_norm", "head"))
    ]
    assert runs[0].start == ""
    assert len({run.start for run in runs}) == 3
