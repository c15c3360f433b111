"""PDFed: sites select among each other's diffusion models.

Balan, Gilbert, Collomosse, "PDFed: Privacy-Preserving and Decentralized Asynchronous Federated Learning for Diffusion
Models", CVMP 2024, arXiv:2409.18245.

No model is averaged. In each round, a site samples from every submitted model and scores the samples against its own images.
It votes for the best model, trains that one further on its own images and submits the result. As in the paper, there is no
global model: each site has its own.

Departures: the server stores the submissions, not a blockchain, and rounds are synchronous. The paper's score (Q-N) adds the
Fréchet distance of DINOv2 features and the share of samples that a fingerprint network finds among the private images. The
score here needs no such networks: it adds the Fréchet distance of latents and the memorization rate.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, final

from ..core import ClientContext, Metrics, Replies, Reply, ServerContext, denoiser
from ..core.messages import message
from ..core.rng import fork, spawn
from ..core.tensors import Tensors, rows
from ..core.training import Training
from ..fit import fit
from ..utils.errors import InputError
from .shared.base import DRAWING, Combined, Personal, expect


@message("pdfed.Board")
class Board:
    """The last submission of each site, and the initial model if there is none yet; this is what a site receives."""

    models: Mapping[str, Tensors]
    start: Tensors | None


@message("pdfed.Submission")
class Submission:
    """A site's model, and the site it voted for; the vote is empty if there was no model to vote for."""

    model: Tensors
    vote: str


@final
@dataclass(frozen=True)
class PDFed(Combined[Board, Board, Personal, Submission]):
    """Let each site continue from the submitted model that scores best on the site's own images."""

    local: Training = DRAWING
    """Local training in one round."""
    samples: int = 100
    """Samples per model for its score; at least 2 (the paper: 1,000)."""
    novelty: float = 1.0
    """Weight of the memorization rate (in percent) in the score, besides the Fréchet distance; at least 0."""
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
        """Return the score of each site's model on the private images; lower is better.

        All models are sampled from the same noise.
        """
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
