"""The border: what a reply must be before anything touches it, whatever it came by."""

from dataclasses import dataclass
from math import inf

import torch

from .core import Absent, Central, Reply, Stage
from .errors import InputError
from .messages import Message, kind, tensors_of
from .tensors import finite, misfit


@dataclass(frozen=True)
class Border:
    """What the server takes from the sites."""

    deadline: float = 3600.0
    """Seconds that a stage may take, and as long for its evaluation; only where the sites are elsewhere."""
    least: int = 0
    """Sites that must have answered a stage, or the run stops at its last checkpoint; 0: all that were asked."""
    norm: float = 0.0
    """Largest L2 norm of a reply, or of its change where it answers a message of its own kind; 0: any finite one."""
    bytes: int = 0
    """Largest reply in bytes; 0: any that the wire takes. Only where the sites are elsewhere."""

    sites: tuple[str, ...] = ()
    """Who takes part; a run begins when all have come, or after the deadline with `least` of them. Empty: who is there
    when the run begins. Only where the sites are elsewhere."""

    def __post_init__(self) -> None:
        if not (0 < self.deadline < inf and 0 <= self.norm < inf and min(self.least, self.bytes) >= 0):
            raise InputError("deadline must be above 0, norm, least and bytes at least 0, and all finite; check [border]")

    def needed(self, asked: int) -> int:
        """How many of the sites that were asked must have answered."""
        return min(self.least, asked) if self.least else asked

    def admit(self, answer: Reply | Absent, site: str, down: Message, stage: Stage, ctx: Central) -> Reply | Absent:
        """The reply, or why it is refused.

        A reply of the message's own kind has the message's layout: names, shapes and types of its tensors, if it has any. What
        else a stage demands, its `check` says. Every floating-point tensor must be finite.
        """
        if isinstance(answer, Absent):
            return answer
        try:
            self._refuse(answer, down)
            if stage.check is not None:
                stage.check(answer, site, ctx)
        except InputError as error:
            return Absent(str(error))
        return answer

    def _refuse(self, reply: Reply, down: Message) -> None:
        if not 0 <= reply.weight < inf:
            raise InputError(f"its weight is {reply.weight}")
        came, sent = tensors_of(reply.message), tensors_of(down)
        alike = bool(sent) and kind(type(reply.message)) == kind(type(down))
        if wrong := misfit(came, sent) if alike else "":
            raise InputError(wrong)
        for name, tensor in sorted(came.items()):
            if not finite(tensor):
                raise InputError(f"tensor {name!r} is not finite")
        if self.norm:
            moved = (came[n].double() - sent[n].double() if alike else came[n].double() for n in sorted(came))
            norm = float(torch.stack([part.square().sum() for part in moved]).sum().sqrt()) if came else 0.0
            if norm > self.norm:
                raise InputError(f"its norm is {norm:.4g}, at most {self.norm:.4g} is taken")


STRICT = Border()
"""All that were asked must answer; nothing that is not finite is taken."""
