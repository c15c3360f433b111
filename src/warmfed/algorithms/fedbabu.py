"""FedBABU. Oh et al., ICLR 2022, arXiv:2106.06042, Algorithm 1.

Departures: the head is drawn by the server and travels down with the body, so that all sites have one. Fine-tuning trains the
whole model, which the paper found best.
"""

from dataclasses import dataclass
from typing import ClassVar, final

from ..core import ClientContext, Metrics, Reply, ServerContext
from ..core.messages import message
from ..core.tensors import Tensors, only, rows
from ..fit import Training, fit
from .shared.base import Model, Personalized, expect


@message("fedbabu.Body")
class Body:
    """All of a model but its head."""

    model: Tensors


@final
@dataclass(frozen=True)
class FedBABU(Personalized[Body]):
    """Only the body is trained and averaged, under a head that stays as it was drawn; the sites fine-tune both at the end."""

    head: str = "head."
    """How the names of the tensors begin that stay as they were drawn until then."""
    personal: Training = Training(lr=0.02, epochs=5, max_grad_norm=1.0)
    """That fine-tuning."""
    replies: ClassVar[tuple[type, ...]] = (Body,)

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
