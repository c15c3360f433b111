"""A moving average of the global model over the rounds, around any algorithm: the average is released, the rounds go on.

Ho et al., NeurIPS 2020, arXiv:2006.11239, release such an average of a diffusion model's weights over its steps. Sites train
from the last model, as without it, and a site's own model is what it was.
"""

from dataclasses import dataclass, replace
from typing import final

from ...core import Algorithm, ClientContext, ClientState, GeneratorSpec, Metrics, Replies, ServerContext, Stage
from ...core.messages import Message, message
from ...core.tensors import Tensors, mix
from ...utils.errors import InputError


@message("smoothed.Server")
class Server:
    """The algorithm's own state, the average, and of how many models."""

    inner: Message
    average: Tensors
    count: int


@final
@dataclass(frozen=True)
class Smoothed:
    """An algorithm whose global model is the moving average of its global models after each round."""

    algorithm: Algorithm
    """Any that has a global model from the start."""
    decay: float
    """Of the average, from 0 to below 1; at first it is (1 + n)/(10 + n) at the most, so that the start does not linger."""

    @property
    def needs_generator(self) -> GeneratorSpec | None:
        return self.algorithm.needs_generator

    def init(self, ctx: ServerContext) -> Server:
        inner = self.algorithm.init(ctx)
        model = self.algorithm.global_model(inner)
        if model is None:
            raise InputError("global_ema_decay needs an algorithm that has a global model from the start; set it to 0")
        return Server(inner, model, 0)

    def broadcast(self, server: Server, site: str) -> Message:
        return self.algorithm.broadcast(server.inner, site)

    def init_client_state(self, received: Message, ctx: ClientContext) -> ClientState:
        return self.algorithm.init_client_state(received, ctx)

    def stages(self) -> tuple[Stage, ...]:
        return tuple(self._around(stage) for stage in self.algorithm.stages())

    def _around(self, stage: Stage) -> Stage:
        def server(state: Server, replies: Replies[Message], ctx: ServerContext) -> tuple[Server, Metrics]:
            inner, metrics = stage.server(state.inner, replies, ctx)
            return (self._averaged(state, inner) if stage.evaluated else replace(state, inner=inner)), metrics

        broadcast = stage.broadcast
        wrapped = None if broadcast is None else lambda state, site: broadcast(state.inner, site)
        return replace(stage, server=server, broadcast=wrapped)

    def _averaged(self, state: Server, inner: Message) -> Server:
        model, n = self.algorithm.global_model(inner), state.count + 1
        if model is None or _layout(model) != _layout(state.average):  # of a network that was pruned, the average begins anew
            return Server(inner, model or state.average, n)
        return Server(inner, mix(model, state.average, min(self.decay, (1 + n) / (10 + n))), n)

    def global_model(self, server: Server) -> Tensors | None:
        return server.average

    def client_model(self, received: Message, state: ClientState) -> Tensors | None:
        return self.algorithm.client_model(received, state)


def _layout(model: Tensors) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in model.items()}
