"""Conversion of torch's files to safetensors: tensors only, never code."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from warmfed.models.convert import converted
from warmfed.utils.errors import InputError

STATE = {"conv.weight": torch.arange(6.0).view(2, 3), "conv.count": torch.tensor(3)}


class Evil:
    """Runs code where it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("evil"),)


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": s}, lambda s: {f"module.{k}": v for k, v in s.items()}])
def test_weights_come_through(wrap: Any, tmp_path: Path) -> None:
    torch.save(wrap(STATE), tmp_path / "a.pth")
    assert converted(tmp_path / "a.pth", tmp_path / "a.safetensors") == 2
    found = load_file(tmp_path / "a.safetensors")
    assert found.keys() == STATE.keys()
    assert all(torch.equal(found[name], value) for name, value in STATE.items())
    with pytest.raises(InputError, match="exists already"):
        converted(tmp_path / "a.pth", tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (Evil(), "no file of plain tensors"),
        ({"a": 3}, "holds no tensors by name"),
        ([STATE], "holds no tensors by name"),
        ({}, "holds no tensors by name"),
        ({"a": torch.ones(1), "module.a": torch.ones(1)}, "two tensors of one name"),
    ],
)
def test_anything_else_is_refused(content: Any, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(InputError, match=words) as error:
        converted(tmp_path / "a.pth", tmp_path / "a.safetensors")
    assert "\n" not in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pth"]


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.pth").write_bytes(b"PK no archive")
    with pytest.raises(InputError, match="no file of plain tensors"):
        converted(tmp_path / "a.pth", tmp_path / "a.safetensors")
