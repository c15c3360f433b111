"""FedPer. Arivazhagan et al., 2019, arXiv:1912.00818, Algorithms 1 and 2.

Departures: the personal layers are the classifier's head (the paper varies their number); they are set by `private`.
"""

from dataclasses import dataclass
from typing import final

from ..core import Local, Reply, State
from ..fit import fit
from ..messages import Message
from .averaging import PartlyShared


@final
@dataclass(frozen=True)
class FedPer(PartlyShared):
    """Base and personal layers are trained together; only the base is averaged."""

    def train(self, down: Message, state: State, ctx: Local) -> Reply:
        model, metrics = fit(ctx, self.whole(down, state), self.local, ctx.data["train"])
        return self.split(model, ctx, metrics)
