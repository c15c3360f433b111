"""FedAvg + local fine-tuning: the usual strong baseline of personalised federated learning.

K. Wang et al., 2019, arXiv:1910.10252; shown to be hard to beat by Matsuda et al., 2022, arXiv:2206.02471.
Departures: none.
"""

from dataclasses import dataclass
from typing import final

from ..core import Central, Local, Metrics, Nothing, Replies, Reply, ServerState, Stage, State
from ..fit import Training, fit
from ..messages import Message
from ..tensors import Tensors, rows
from .averaging import Averaging, Model, upload


@final
@dataclass(frozen=True)
class FedAvgFineTune(Averaging):
    """FedAvg; then each site trains the last global model once more for itself."""

    personal: Training = Training(lr=0.005, epochs=5, clip=1.0)
    """That last training."""

    def stages(self) -> tuple[Stage, ...]:
        train = Stage("train", self.merge, self.train, sample=self.sample)
        return (train,) * self.rounds + (Stage("personalize", self.done, self.personalize),)

    def train(self, down: Message, state: State, ctx: Local) -> Reply:
        model, metrics = fit(ctx, down.model, self.local, ctx.data["train"])
        return upload(model, state, ctx, metrics)

    def personalize(self, down: Message, state: State, ctx: Local) -> Reply:
        model, info = fit(ctx, down.model, self.personal, ctx.data["train"])
        return Reply(Nothing(), Model(model), float(rows(ctx.data["train"])), {"personal_loss": info["loss"]})

    def done(self, server: ServerState, replies: Replies, ctx: Central) -> tuple[ServerState, Metrics]:
        return server, {}

    def client_model(self, down: Message, state: State) -> Tensors | None:
        return down.model if state is None else state.model
