"""FedBABU: a shared body under a fixed head, then fine-tuning at each site.

Oh et al., "FedBABU: Toward Enhanced Representation for Federated Image Classification", ICLR 2022, arXiv:2106.06042,
Algorithm 1.

Fine-tuning trains the whole model, which the paper found best.

Departures: the server initialises the head and broadcasts it with the body, so that all sites have the same one.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, final

from ..algorithms.shared.base import at_sites
from ..core import ClientContext, Metrics, Reply, ServerContext, Workload
from ..core.messages import message
from ..core.tensors import Tensors, only, rows
from ..core.training import Training
from ..fit import fit
from .shared.base import Model, Personalized, expect


@message("fedbabu.Body")
class Body:
    """A model without its head."""

    model: Tensors


@final
@dataclass(frozen=True)
class FedBABU(Personalized[Body]):
    """Train and average the body under a fixed random head; at the end, each site fine-tunes both."""

    head: str = "head."
    """Prefix of the names of the tensors that stay fixed until the fine-tuning."""
    personal: Training = Training(lr=0.02, epochs=5, max_grad_norm=1.0)
    """Fine-tuning at the end."""
    replies: ClassVar[tuple[type, ...]] = (Body,)

    def further_work(self, rows: Mapping[str, int], pairs: int) -> tuple[Workload, ...]:
        return (at_sites("personal models", self.personal, rows, 1),)

    def train(self, received: Model, state: Model | None, ctx: ClientContext) -> Reply[Body]:
        model, metrics = fit(ctx, received.model, self.local, ctx.data["train"], trainable=self.body)
        return Reply(Body(only(model, self.body)), state, float(rows(ctx.data["train"])), metrics)

    def check(self, reply: Reply[Body], site: str, ctx: ServerContext) -> None:
        expect(reply.message.model, ctx, self.body)

    def body(self, name: str) -> bool:
        return not name.startswith(self.head)

    def own(self, model: Tensors, ctx: ClientContext) -> tuple[Tensors, Metrics]:
        tuned, info = fit(ctx, model, self.personal, ctx.data["train"])
        return tuned, {"personal_loss": info["loss"]}
