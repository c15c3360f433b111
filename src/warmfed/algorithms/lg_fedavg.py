"""LG-FedAvg: a private body and a shared head.

Liang et al., "Think Locally, Act Globally: Federated Learning with Local and Global Representations", 2020,
arXiv:2001.01523, Algorithm 1.

Departures: the paper starts from the representations of a finished FedAvg run. Here each site starts from random weights,
or from `model.start`.
"""

from dataclasses import dataclass
from typing import final

from .shared.base import SplitByName


@final
@dataclass(frozen=True)
class LGFedAvg(SplitByName):
    """Train body and head together; average the head only."""

    private: str = "body."
    """Prefix of the names of the tensors that stay at the site."""
