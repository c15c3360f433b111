"""FedBN: FedAvg with private normalisation layers.

Li et al., "FedBN: Federated Learning on Non-IID Features via Local Batch Normalization", ICLR 2021, arXiv:2102.07623,
Algorithm 1.

Departures: the paper keeps batch normalisation at the sites, running statistics included. Here, normalisation layers of every
kind are private. The built-in networks use GroupNorm, which has no running statistics; its scales and shifts are private.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from ..core import Task
from ..utils.errors import InputError
from .shared.base import PartlyShared

NORMALISATION = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)


@final
@dataclass(frozen=True)
class FedBN(PartlyShared):
    """Run FedAvg; the normalisation layers are private to each site."""

    def mine(self, task: Task) -> Callable[[str], bool]:
        with torch.device("meta"):  # build names only, without weights or random draws
            modules = task.build().named_modules()
        layers = [(path, layer) for path, layer in modules if isinstance(layer, NORMALISATION)]
        if not layers:
            raise InputError("fedbn keeps normalisation layers at the sites, but this model has none; choose one that has: cnn")
        return {f"{path}.{name}" for path, layer in layers for name in layer.state_dict()}.__contains__
