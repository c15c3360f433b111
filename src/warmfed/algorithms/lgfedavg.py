"""LG-FedAvg. Liang et al., 2020, arXiv:2001.01523, "Think Locally, Act Globally", Algorithm 1.

FedPer the other way round: each site keeps its own representation, and one classifier on top of all of them is averaged.
Departures: the paper begins with representations of a finished FedAvg; here all sites begin at random, or at `model.start`.
"""

from dataclasses import dataclass
from typing import final

from .shared.base import SplitByName


@final
@dataclass(frozen=True)
class LGFedAvg(SplitByName):
    """Local representations under a global head; both are trained together, and only the head is averaged."""

    private: str = "body."
    """How the names of the tensors begin that stay with the site."""
