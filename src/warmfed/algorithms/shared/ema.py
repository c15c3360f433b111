"""Moving average of the global model over the rounds, for any algorithm with a global model.

Ho et al., NeurIPS 2020, arXiv:2006.11239, release such an average of a diffusion model's weights over its steps. Here the
average is evaluated and released. Sites train from the last model; personal models are unchanged.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import final

from ...core import Algorithm, ClientContext, ClientState, GeneratorSpec, Metrics, Replies, ServerContext, Stage, Workload
from ...core.messages import Message, message
from ...core.tensors import Tensors, mix
from ...utils.errors import InputError


@message("smoothed.Server")
class Server:
    """The algorithm's own state, the average, and the number of averaged models."""

    inner: Message
    average: Tensors
    count: int


@final
@dataclass(frozen=True)
class Smoothed:
    """Wrap an algorithm: its global model becomes the moving average of its global models over the rounds."""

    algorithm: Algorithm
    """An algorithm with a global model from the start."""
    decay: float
    """Decay of the average, from 0 to below 1; after n models at most (1 + n)/(10 + n), so that early models fade."""

    @property
    def rounds(self) -> int:
        return self.algorithm.rounds

    @property
    def samples_per_class(self) -> int:
        return self.algorithm.samples_per_class

    def check_sites(self, count: int) -> None:
        self.algorithm.check_sites(count)

    def workload(self, rows: Mapping[str, int], pairs: int) -> tuple[Workload, ...]:
        return self.algorithm.workload(rows, pairs)

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
        if model is None or _layout(model) != _layout(state.average):  # the average restarts if the network was pruned
            return Server(inner, model or state.average, n)
        return Server(inner, mix(model, state.average, min(self.decay, (1 + n) / (10 + n))), n)

    def global_model(self, server: Server) -> Tensors | None:
        return server.average

    def client_model(self, received: Message, state: ClientState) -> Tensors | None:
        return self.algorithm.client_model(received, state)


def _layout(model: Tensors) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in model.items()}
