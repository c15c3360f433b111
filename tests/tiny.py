"""A federation on disk that runs in a second, and helpers to interrupt, damage and compare run folders."""

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import toy
from PIL import Image
from safetensors.torch import load

from warmfed.config import Config, parse
from warmfed.core.rng import seeded, stream
from warmfed.core.tensors import sha256
from warmfed.models import FEATURE_EXTRACTORS
from warmfed.runs.execute import execute, resume

SETTINGS = {
    "algorithm.name": "fedavg-finetune",
    "algorithm.rounds": 1,
    "algorithm.local.epochs": 1,
    "algorithm.personal.epochs": 1,
    "model.name": "linear",
    "workers": 1,
}


def arrays(path: Path, sites: str = "ab", side: int = 8) -> Path:
    """An .npz file of the toy federation's images, 12 / 3 / 6 of a site, at `side` pixels."""
    content: dict[str, Any] = {}
    for i, site in enumerate(sites):
        for split, count in (("train", 12), ("validation", 3), ("test", 6)):
            table = toy.table(i, split, count)
            image = table["image"].repeat_interleave(side // 8, 2).repeat_interleave(side // 8, 3)
            content[f"{site}_x_{split}"] = image.numpy()
            content[f"{site}_y_{split}"] = table["label"].numpy()
    np.savez(path, **content)
    return path


def feature_extractor(path: Path) -> Path:
    """Write a LeNet with random weights to an .npz file, as the feature extractor of tests."""
    with seeded(stream("eyes")):
        weights = FEATURE_EXTRACTORS["lenet"]().state_dict()
    np.savez(path, **{name: value.numpy() for name, value in weights.items()})
    return path


def pictures(folder: Path, sites: dict[str, dict[str, int]]) -> Path:
    """Write a data folder with this number of pictures for each class of each site."""
    for site, classes in sites.items():
        (folder / site).mkdir(parents=True)
        for name, count in classes.items():
            (folder / site / name).mkdir()
            for i in range(count):
                pixels = torch.randint(256, (8, 8, 3), generator=stream(site, name, i), dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(folder / site / name / f"{i}.png")
    return folder


def config(data: Path, **changes: Any) -> Config:
    """A run of a second; `changes` with __ for the dots."""
    return parse(None, SETTINGS | {"data.source": str(data)} | {k.replace("__", "."): v for k, v in changes.items()})


def digest(folder: Path) -> str:
    """Return a digest of the names and bytes of all files in a folder."""
    found = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        found.update(str(path.relative_to(folder)).encode() + b"\0" + (path.read_bytes() if path.is_file() else b"/"))
    return found.hexdigest()


def models(folder: Path) -> dict[str, str]:
    """Return the digest of each model in a run folder."""
    return {
        str(path.relative_to(folder)): sha256(load(path.read_bytes()))
        for path in sorted(folder.glob("models/**/*.safetensors"))
    }


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


class Killed(BaseException):
    """End the process with as little cleanup as after kill -9."""


def kill_at(monkeypatch: pytest.MonkeyPatch, write: int, error: type[BaseException] = Killed) -> None:
    """End the process at the `write`-th atomic write (from 0)."""
    move, seen = os.replace, []

    def stop(source: Any, target: Any) -> None:
        if Path(target).suffix != ".u8":  # decoded data are cached once a machine, and are no file of the run
            seen.append(target)
        if len(seen) > write:
            raise error
        move(source, target)

    monkeypatch.setattr(os, "replace", stop)


def interrupted(config: Config, folder: Path, write: int) -> Path:
    """Return the folder of a run that was killed at its `write`-th file."""
    assert killed(lambda: execute(config, folder), write)
    return folder


def killed(work: Callable[[], object], write: int) -> bool:
    """Return whether the work was killed at its `write`-th file; otherwise it finished."""
    with pytest.MonkeyPatch.context() as patch:
        kill_at(patch, write)
        try:
            work()
        except Killed:
            return True
    return False


def harried(config: Config, folder: Path) -> int:
    """Run and resume, with the n-th process killed at its n-th file; return the number of processes."""
    processes = 1
    again = killed(lambda: execute(config, folder), processes)
    while again:
        processes += 1
        again = killed(lambda: resume(folder), processes)
    return processes


def copy(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to)
    return to
