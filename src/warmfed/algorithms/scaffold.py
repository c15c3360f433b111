"""SCAFFOLD: local steps corrected by control variates.

Karimireddy et al., "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning", ICML 2020, arXiv:1910.06378,
Algorithm 1, option II.

K counts optimizer steps. With momentum, each gradient moves the weights more than once. K·η is then the total factor of the
gradients (‖a‖₁·η in FedNova's terms), so that c_i remains their mean.

Departures: none if `local.momentum` and `local.max_grad_norm` are 0. Clipping bounds the corrected gradient; c_i is the mean
of the clipped gradients.
"""

from dataclasses import dataclass
from typing import ClassVar, final

from ..core import ClientContext, Metrics, Replies, Reply, ServerContext
from ..core.messages import message, tensors_of
from ..core.tensors import Tensors, add, is_statistic, learned, mean, rows, scale, statistics, sub, to, zeros
from ..fit import fit
from .shared.base import Rounds, expect


@message("scaffold.Server")
class Server:
    """The global model and the server's control variate; this is what a site receives."""

    model: Tensors  # x
    control: Tensors  # c


@message("scaffold.Control")
class Control:
    """A site's control variate."""

    control: Tensors  # c_i


@message("scaffold.Change")
class Change:
    """The changes of a site's model and control variate."""

    model: Tensors  # y_i - x
    control: Tensors  # c_i⁺ - c_i


@final
@dataclass(frozen=True)
class Scaffold(Rounds[Server, Server, Control, Change]):
    """Correct local steps by c - c_i, the difference of the server's and the site's control variates."""

    server_lr: float = 1.0
    """Server learning rate η_g, the factor of the mean change of the models."""
    replies: ClassVar[tuple[type, ...]] = (Change,)

    def __post_init__(self) -> None:
        self.local.accumulated(1)  # raises unless the steps are a sum of gradients

    def init(self, ctx: ServerContext) -> Server:
        model = ctx.task.init(ctx.rng)
        return Server(model, zeros(learned(model)))

    def init_client_state(self, received: Server, ctx: ClientContext) -> Control:
        return Control(zeros(received.control))

    def train(self, received: Server, state: Control, ctx: ClientContext) -> Reply[Change]:
        data, shift = ctx.data["train"], sub(received.control, state.control)
        there = to(shift, ctx.device)
        model, metrics = fit(ctx, received.model, self.local, data, correct=lambda name, gradient: gradient + there[name])
        change = sub(model, received.model)
        reach = self.local.accumulated(rows(data)) * self.local.lr  # K·η
        control = sub(scale(learned(change), -1 / reach), shift)  # c_i⁺ = c_i - c + (x - y_i)/(K·η)
        return Reply(Change(change, sub(control, state.control)), Control(control), float(rows(data)), metrics)

    def check(self, reply: Reply[Change], site: str, ctx: ServerContext) -> None:
        expect(reply.message.model, ctx)
        expect(reply.message.control, ctx, lambda name: not is_statistic(name))

    def change(self, message: Change, received: Server) -> Tensors:
        return tensors_of(message)

    def aggregate(self, server: Server, replies: Replies[Change], ctx: ServerContext) -> tuple[Server, Metrics]:
        model = mean((reply.message.model, 1.0) for reply in replies.values())
        control = mean((reply.message.control, 1.0) for reply in replies.values())
        share = len(replies) / len(ctx.sites)  # |S|/N
        step = {**scale(learned(model), self.server_lr), **statistics(model)}
        return Server(add(server.model, step), add(server.control, scale(control, share))), {}
