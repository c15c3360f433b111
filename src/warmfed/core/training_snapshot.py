"""Unfinished training on disk: a process that was killed goes on from its last snapshot, with the same bytes."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from ..utils.errors import InputError
from ..utils.files import read_checksummed, write_checksummed
from .tensors import Tensors, add_prefix, strip_prefix, to


@dataclass(frozen=True)
class Snapshots:
    """One file, overwritten every so many steps; who asks for the training removes it when the result is safe."""

    path: Path
    every: int
    """Optimizer steps between two snapshots."""
    of: str = ""
    """What the training is of beside its start, settings, data and random numbers: the loss's settings, a frozen part."""

    def load(self, key: str) -> Callable[[str], dict[str, Tensor]] | None:
        """The last snapshot, as a function that gives a part's tensors; None: none is of the training that `key` names.

        A damaged one is of no training: it begins anew, and only time is lost.
        """
        if not self.path.exists():
            return None
        try:
            content = read_checksummed(self.path, "the unfinished training")
        except InputError:
            return None
        name, _, tensors = content.partition(b"\n")
        if name.decode() != key:
            return None
        whole = load(tensors)
        return lambda part: strip_prefix(whole, f"{part}/")

    def save(self, key: str, **parts: Tensors) -> None:
        """Replace the snapshot, each part's names under its own; raises `InputError` where the disk is full."""
        flat = {name: value for part, named in parts.items() for name, value in add_prefix(named, f"{part}/").items()}
        whole = {name: value.contiguous() for name, value in to(flat, "cpu").items()}
        write_checksummed(self.path, key.encode() + b"\n" + save(whole))


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What an optimizer remembers, by the number of the parameter and its own names; whole numbers become int64."""
    return {
        f"{number}/{name}": torch.as_tensor(value)
        for number, held in optimizer.state_dict()["state"].items()
        for name, value in held.items()
        if value is not None
    }


def load_optimizer_state(optimizer: torch.optim.Optimizer, remembered: Tensors) -> None:
    """Give an optimizer what `moments` told."""
    state: dict[int, dict[str, Any]] = {}
    for key, value in remembered.items():
        number, _, name = key.partition("/")
        whole = value.ndim == 0 and value.dtype == torch.int64
        state.setdefault(int(number), {})[name] = int(value) if whole else value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
