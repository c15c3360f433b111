"""Snapshots of unfinished training: a killed process resumes from the last one, with the same results."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from ..utils.errors import InputError
from ..utils.files import read_checksummed, write_checksummed
from ..utils.paths import exists
from .tensors import Tensors, add_prefix, strip_prefix, to


@dataclass(frozen=True)
class Snapshots:
    """Snapshot file of one training, overwritten every `every` steps; the caller removes it when the result is saved."""

    path: Path
    every: int
    """Optimizer steps between two snapshots."""
    of: str = ""
    """Further inputs of the training, beside start, settings, data and random numbers: loss settings, frozen tensors."""

    def load(self, key: str) -> Callable[[str], dict[str, Tensor]] | None:
        """Return a function that returns a part's tensors by name, or None if the snapshot has another key.

        A damaged snapshot is ignored: the training restarts.
        """
        if not exists(self.path):
            return None
        try:
            content = read_checksummed(self.path, "the training snapshot")
        except InputError:
            return None
        name, _, tensors = content.partition(b"\n")
        if name.decode() != key:
            return None
        whole = load(tensors)
        return lambda part: strip_prefix(whole, f"{part}/")

    def save(self, key: str, **parts: Tensors) -> None:
        """Replace the snapshot atomically, with each part under its name; raise `InputError` if it cannot be written."""
        flat = {name: value for part, named in parts.items() for name, value in add_prefix(named, f"{part}/").items()}
        whole = {name: value.contiguous() for name, value in to(flat, "cpu").items()}
        write_checksummed(self.path, key.encode() + b"\n" + save(whole))


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the optimizer state by `parameter number/name`; integers become int64 tensors."""
    return {
        f"{number}/{name}": torch.as_tensor(value)
        for number, held in optimizer.state_dict()["state"].items()
        for name, value in held.items()
        if value is not None
    }


def load_optimizer_state(optimizer: torch.optim.Optimizer, saved: Tensors) -> None:
    """Load the state that `optimizer_state` returned."""
    state: dict[int, dict[str, Any]] = {}
    for key, value in saved.items():
        number, _, name = key.partition("/")
        whole = value.ndim == 0 and value.dtype == torch.int64
        state.setdefault(int(number), {})[name] = int(value) if whole else value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
