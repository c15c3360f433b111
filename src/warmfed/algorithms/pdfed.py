"""PDFed. Balan, Gilbert, Collomosse, CVMP 2024, arXiv:2409.18245: sites choose among each other's diffusion models.

No model is averaged. In each round a site draws from every model on the board, scores the images by its own private ones, votes
for the best, trains that one further on its own images and submits it.

Departures: the board is the server's memory, not a chain, and rounds are synchronous. The paper's score adds the Fréchet
distance of DINOv2 features and the share of samples that a fingerprint finds among the private images (Q-N); without these
networks ours adds the Fréchet distance of latents and the share of samples nearer to a training image than held-out ones are.
As in the paper there is no global model: each site has its own.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, final

from ..core import ClientContext, Metrics, Replies, Reply, ServerContext, denoiser
from ..core.messages import message
from ..core.rng import fork, spawn
from ..core.tensors import Tensors, rows
from ..fit import Training, fit
from ..utils.errors import InputError
from .shared.base import DRAWING, Combined, Personal, expect


@message("pdfed.Board")
class Board:
    """The last submission of each site, and what a site begins with where there is none; what a site is sent."""

    models: Mapping[str, Tensors]
    start: Tensors | None


@message("pdfed.Submission")
class Submission:
    """A site's model, and the site whose last one it voted for (empty: there was none)."""

    model: Tensors
    vote: str


@final
@dataclass(frozen=True)
class PDFed(Combined[Board, Board, Personal, Submission]):
    """Each site goes on from whichever site's model draws best by its own images."""

    local: Training = DRAWING
    """A site's training in one round."""
    samples: int = 100
    """Images that a site draws from each model to score it; the paper has 1,000."""
    novelty: float = 1.0
    """Weight of the share of copies (in percent) in the score, beside the Fréchet distance."""
    replies: ClassVar[tuple[type, ...]] = (Submission,)

    def __post_init__(self) -> None:
        if self.samples < 2 or self.novelty < 0:
            raise InputError("samples must be at least 2 and novelty at least 0; check [algorithm]")

    def init(self, ctx: ServerContext) -> Board:
        return Board({}, ctx.task.init(ctx.rng))

    def init_client_state(self, received: Board, ctx: ClientContext) -> Personal:
        return Personal(None)

    def train(self, received: Board, state: Personal, ctx: ClientContext) -> Reply[Submission]:
        scores = self.scores(received, ctx)
        best = min(sorted(scores), key=lambda site: scores[site], default="")
        start = received.models[best] if best else received.start or {}
        model, metrics = fit(ctx, start, self.local, ctx.data["train"])
        chosen = {"score": scores[best], "own": float(best == ctx.site)} if best else {}
        return Reply(Submission(model, best), Personal(model), float(rows(ctx.data["train"])), {**metrics, **chosen})

    def scores(self, received: Board, ctx: ClientContext) -> dict[str, float]:
        """By site, how far its model's images are from the private ones; lower is better. All models get the same noise."""
        rng, found = fork(ctx.rng, "scores"), {}
        key = rng.get_state()
        for site, model in sorted(received.models.items()):
            like = denoiser(ctx).fidelity(model, ctx.data, self.samples, spawn(rng.set_state(key)), ctx.device)
            found[site] = (like["fid"] + self.novelty * like["memorization_rate"]) / 2
        return found

    def check(self, reply: Reply[Submission], site: str, ctx: ServerContext) -> None:
        expect(reply.message.model, ctx)

    def aggregate(self, server: Board, replies: Replies[Submission], ctx: ServerContext) -> tuple[Board, Metrics]:
        votes = Counter(reply.message.vote for reply in replies.values() if reply.message.vote in server.models)
        models = {**server.models, **{site: reply.message.model for site, reply in replies.items()}}
        board = replace(server, models=dict(sorted(models.items())))
        return board, {f"votes/{site}": float(n) for site, n in sorted(votes.items())}

    def broadcast(self, server: Board, site: str) -> Board:
        return Board(server.models, None if server.models else server.start)

    def global_model(self, server: Board) -> Tensors | None:
        return None

    def client_model(self, received: Board, state: Personal) -> Tensors | None:
        return state.model if state.model is not None else received.start
