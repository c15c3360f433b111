"""FedNova: FedAvg of updates normalised by local steps.

J. Wang et al., "Tackling the Objective Inconsistency Problem in Heterogeneous Federated Optimization", NeurIPS 2020,
arXiv:2007.07481, Algorithm 1.

Sites with more local steps bias a plain average. Here each site sends its mean gradient. The server moves the mean length in
their mean direction. With momentum, ‖a_i‖₁ is that of the paper's section 4; without it, the number of steps.

Departures: none. There is no server momentum.
"""

from dataclasses import dataclass
from typing import ClassVar, final

from ..core import ClientContext, Metrics, Replies, Reply, ServerContext
from ..core.messages import message
from ..core.tensors import Tensors, add, learned, mean, rows, scale, statistics, sub
from ..fit import fit
from ..utils.errors import InputError
from .shared.base import Model, Rounds, expect


@message("fednova.Normalized")
class Normalized:
    """A site's change per accumulated gradient, and the number of accumulated gradients; running statistics: their change."""

    direction: Tensors  # -η·d_i = (y_i - x)/‖a_i‖₁
    accumulated: float  # ‖a_i‖₁


@final
@dataclass(frozen=True)
class FedNova(Rounds[Model, Model, None, Normalized]):
    """Average normalised updates, so that a site's number of local steps does not set its weight."""

    replies: ClassVar[tuple[type, ...]] = (Normalized,)

    def __post_init__(self) -> None:
        self.local.accumulated(1)  # raises unless the steps are a sum of gradients

    def train(self, received: Model, state: None, ctx: ClientContext) -> Reply[Normalized]:
        data = ctx.data["train"]
        model, metrics = fit(ctx, received.model, self.local, data)
        accumulated = self.local.accumulated(rows(data))
        change = sub(model, received.model)
        direction = {**scale(learned(change), 1 / accumulated), **statistics(change)}
        return Reply(Normalized(direction, accumulated), state, float(rows(data)), metrics)

    def check(self, reply: Reply[Normalized], site: str, ctx: ServerContext) -> None:
        expect(reply.message.direction, ctx)
        # The admission policy has bounded the weight by the rows that the site declared.
        most = self.local.accumulated(int(reply.weight))
        if not 0 < reply.message.accumulated <= most:
            raise InputError(f"it accumulated {reply.message.accumulated} gradients, expected at most {most}")

    def change(self, message: Normalized, received: Model) -> Tensors:
        change = {**scale(learned(message.direction), message.accumulated), **statistics(message.direction)}
        return {f"model/{name}": value.double() for name, value in change.items()}

    def aggregate(self, server: Model, replies: Replies[Normalized], ctx: ServerContext) -> tuple[Model, Metrics]:
        direction = mean((reply.message.direction, reply.weight) for reply in replies.values())
        total = sum(reply.weight for reply in replies.values())
        length = sum(reply.message.accumulated * reply.weight for reply in replies.values()) / total  # τ_eff = Σ p_i·‖a_i‖₁
        step = {**scale(learned(direction), length), **statistics(direction)}
        return Model(add(server.model, step)), {"effective_steps": length}
