"""Structured pruning of a denoiser: remove the hidden units of its blocks with the smallest norms.

A hidden unit is between two layers of one block: a channel between the convolutions of a residual block, or a unit of a
transformer's feed-forward layer. Its removal keeps the widths of the block's input and output, so each block is pruned
alone, and the pruned network is a smaller dense one. The importance of a unit is the norm of all weights that depend on it.

References:
    Norms: Li et al., ICLR 2017, arXiv:1608.08710. Groups of weights: Fang et al., CVPR 2023, arXiv:2301.12900.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..core.rng import seeded, stream
from ..core.tensors import Tensors

RESIDUAL = {"conv1.weight": 0, "conv1.bias": 0, "time_emb_proj.weight": 0, "time_emb_proj.bias": 0, "norm2.weight": 0,
            "norm2.bias": 0, "conv2.weight": 1}  # fmt: skip
FEED = {"net.0.proj.weight": 0, "net.0.proj.bias": 0, "net.2.weight": 1}
"""Tensors of a block with a dimension of hidden units, and that dimension."""


def blocks(names: Iterable[str]) -> dict[str, Mapping[str, int]]:
    """Return the blocks with hidden units, by the prefix of their tensors' names."""
    found: dict[str, Mapping[str, int]] = {}
    for name in sorted(names):
        for mark, kind in ((".conv1.weight", RESIDUAL), (".net.0.proj.weight", FEED)):
            if name.endswith(mark):
                found[name.removesuffix(mark)] = kind
    return found


def widths(model: Tensors) -> tuple[tuple[str, int], ...]:
    """Return the number of hidden units of each block, as (prefix, units)."""
    firsts = {prefix: model[f"{prefix}.{next(iter(kind))}"] for prefix, kind in blocks(model).items()}
    return tuple((prefix, first.shape[0]) for prefix, first in firsts.items() if first.dim())


def norms(model: Mapping[str, Tensor], prefix: str) -> Tensor:
    """Return the L2 norm of all weights of each hidden unit of a block, float [units]."""
    kind = blocks(model)[prefix]
    parts = [model[f"{prefix}.{name}"].movedim(axis, 0) for name, axis in kind.items()]
    return torch.cat([part.reshape(len(part), -1) for part in parts], 1).square().sum(1).sqrt()


def prune(model: Tensors, share: float, groups: int = 8) -> dict[str, Tensor]:
    """Return the model without the given share of each block's hidden units, those with the smallest norms.

    Args:
        model: weights of a denoiser.
        share: share of the units to remove, from 0 to below 1.
        groups: groups of the normalisation in a residual block; all groups keep equally many channels.
    """
    pruned = dict(model)
    for prefix, kind in blocks(model).items():
        norm = norms(model, prefix).double().view(groups if kind is RESIDUAL else 1, -1)
        kept = max(1, round((1 - share) * norm.shape[1]))
        places = norm.sort(dim=1, descending=True, stable=True).indices[:, :kept].sort(1).values
        index = (places + norm.shape[1] * torch.arange(len(norm))[:, None]).flatten()
        for name, axis in kind.items():
            pruned[f"{prefix}.{name}"] = model[f"{prefix}.{name}"].index_select(axis, index).contiguous()
    return pruned


def narrow(net: nn.Module, sizes: Mapping[str, int]) -> None:
    """Set the number of hidden units of blocks, in place; blocks that change get new random weights."""
    with seeded(stream("narrow")):  # later random numbers do not depend on the widths
        for prefix, units in sizes.items():
            _narrow(net, prefix, units)


def _narrow(net: nn.Module, prefix: str, units: int) -> None:
    block: Any = net.get_submodule(prefix)
    if isinstance(first := getattr(block, "conv1", None), nn.Conv2d):
        if first.out_channels != units:
            block.conv1 = nn.Conv2d(first.in_channels, units, 3, padding=1)
            block.time_emb_proj = nn.Linear(block.time_emb_proj.in_features, units)
            block.norm2 = nn.GroupNorm(block.norm2.num_groups, units, block.norm2.eps)
            block.conv2 = nn.Conv2d(units, block.conv2.out_channels, 3, padding=1)
    elif block.net[2].in_features != units:
        block.net[0].proj = nn.Linear(block.net[0].proj.in_features, units)
        block.net[2] = nn.Linear(units, block.net[2].out_features)
