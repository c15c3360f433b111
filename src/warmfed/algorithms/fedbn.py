"""FedBN. Li et al., ICLR 2021, arXiv:2102.07623, Algorithm 1.

Departures: the paper keeps batch normalisation at the sites, its statistics included. Any normalisation layer is kept here;
the house's networks have GroupNorm, which has no statistics to keep: what stays is its scales and shifts.
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
    """FedAvg, except that the normalisation layers are each site's own."""

    def mine(self, task: Task) -> Callable[[str], bool]:
        with torch.device("meta"):  # only names are needed: no weights, and nothing drawn for them
            modules = task.build().named_modules()
        layers = [(path, layer) for path, layer in modules if isinstance(layer, NORMALISATION)]
        if not layers:
            raise InputError("fedbn keeps normalisation layers at the sites, but this model has none; choose one that has: cnn")
        return {f"{path}.{name}" for path, layer in layers for name in layer.state_dict()}.__contains__
