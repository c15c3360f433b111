"""Structured pruning of a denoiser: the hidden units of its blocks, by the norm of all weights that belong to each.

A hidden unit lies between two layers of one block: a channel between the convolutions of a residual block, or a unit of a
transformer's feed-forward layer. Without it the block's input and output stay as wide as they were, so blocks are pruned one by
one, and a pruned network is a smaller dense one. What importance is: group norms, as in Li et al., ICLR 2017,
arXiv:1608.08710, over the whole group of dependent weights (Fang et al., CVPR 2023, arXiv:2301.12900).
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
"""The tensors of a block that have a dimension of hidden units, and which."""


def blocks(names: Iterable[str]) -> dict[str, Mapping[str, int]]:
    """The blocks that have hidden units, by the prefix of their tensors' names."""
    found: dict[str, Mapping[str, int]] = {}
    for name in sorted(names):
        for mark, kind in ((".conv1.weight", RESIDUAL), (".net.0.proj.weight", FEED)):
            if name.endswith(mark):
                found[name.removesuffix(mark)] = kind
    return found


def widths(model: Tensors) -> tuple[tuple[str, int], ...]:
    """How many hidden units each block has, by its prefix."""
    firsts = {prefix: model[f"{prefix}.{next(iter(kind))}"] for prefix, kind in blocks(model).items()}
    return tuple((prefix, first.shape[0]) for prefix, first in firsts.items() if first.dim())


def norms(model: Mapping[str, Tensor], prefix: str) -> Tensor:
    """The L2 norm of all weights of each hidden unit of a block, float [units]."""
    kind = blocks(model)[prefix]
    parts = [model[f"{prefix}.{name}"].movedim(axis, 0) for name, axis in kind.items()]
    return torch.cat([part.reshape(len(part), -1) for part in parts], 1).square().sum(1).sqrt()


def prune(model: Tensors, share: float, groups: int = 8) -> dict[str, Tensor]:
    """The model without that share of each block's hidden units, those of the smallest norm.

    Args:
        share: from 0 to below 1.
        groups: of the normalisation between a residual block's convolutions; each keeps as many channels as the others.
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
    """Give the blocks of a network so many hidden units, with fresh weights where they had another number."""
    with seeded(stream("narrow")):  # what is drawn after this does not depend on the widths
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
