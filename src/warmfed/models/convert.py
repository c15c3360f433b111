"""Converts weights that torch has saved to safetensors. Only tensors and their containers are read, never code."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from ..utils.errors import InputError
from ..utils.files import atomic_write, read_bytes
from ..utils.paths import exists

_INSIDE = ("state_dict", "model_state_dict", "model", "net")
"""Keys under which training programs keep the weights."""


def converted(path: Path, out: Path) -> int:
    """Write the tensors of a file of torch to a safetensors file and return their number.

    Args:
        path: a state dict, or a checkpoint that holds one under a usual key; prefixes "module." are removed.
        out: the new file.

    Raises:
        InputError: The file holds anything but tensors, or no tensors, or `out` exists.
    """
    if exists(out):
        raise InputError(f"{out} exists already; choose another file")
    data = read_bytes(path, "the weights")
    try:
        found: Any = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file raises errors of many kinds; all of them mean that it cannot be used
        raise InputError(
            f"{path} is no file of plain tensors ({str(error).splitlines()[0]}); save the state dict of the network alone"
        ) from error
    for key in _INSIDE:
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    if not isinstance(found, Mapping) or not found or not all(isinstance(value, Tensor) for value in found.values()):
        raise InputError(f"{path} holds no tensors by name; save the state dict of the network alone")
    plain = {str(name).removeprefix("module."): value.detach().clone().contiguous() for name, value in found.items()}
    if len(plain) < len(found):
        raise InputError(f"{path} has two tensors of one name; save the state dict of the network alone")
    atomic_write(out, save(plain, {"format": "pt"}))
    return len(plain)
