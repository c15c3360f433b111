"""FedPer. Arivazhagan et al., 2019, arXiv:1912.00818, Algorithms 1 and 2.

Departures: the personal layers are the classifier's head (the paper varies their number); they are set by `private`.
"""

from dataclasses import dataclass
from typing import final

from .shared.base import SplitByName


@final
@dataclass(frozen=True)
class FedPer(SplitByName):
    """Base and personal layers are trained together; only the base is averaged."""
