"""FedPer: a shared body and a private head.

Arivazhagan et al., "Federated Learning with Personalization Layers", 2019, arXiv:1912.00818, Algorithms 1 and 2.

Departures: the personalization layers are the classifier's head; the paper varies their number. `private` sets them.
"""

from dataclasses import dataclass
from typing import final

from .shared.base import SplitByName


@final
@dataclass(frozen=True)
class FedPer(SplitByName):
    """Train body and head together; average the body only."""
