"""FedDDPM and FedDDPM+: federated diffusion models, corrected on an auxiliary set.

Peng, Wang, Chen, Rao, Shen, Jiang, "Federated Learning for Diffusion Models", IEEE TCCN 2025, arXiv:2503.06426.

The full text and code are not public; this reading follows the abstract and summaries. Each site trains its own diffusion
model to convergence and uploads it once. The server samples an auxiliary set from all of them, which approximates the global
distribution. Rounds of FedAvg on the diffusion loss follow. After each aggregation, the server trains the averaged model on
the auxiliary set. FedDDPM+ does so only if learning is slow, and then once.

Departures: the paper's trigger is unknown. Ours is the relative progress of the loss on a held-out tenth of the auxiliary
set, the relative size of an update, or the agreement of the sites' updates. `corrections` and `wait` offer both readings of
"one-shot". `decay` lowers the server's learning rate over the rounds. Without it, the last model is no better than the
auxiliary set.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Literal, final

import torch

from ..algorithms.shared.base import at_sites
from ..core import ClientContext, Empty, Metrics, Replies, Reply, ServerContext, Stage, Workload, denoiser
from ..core.messages import message
from ..core.rng import spawn
from ..core.tensors import Tensors, apportion, flat, rows, select, sub
from ..core.training import Training
from ..fit import fit
from ..utils.errors import InputError
from ..utils.settings import check_choices
from .shared.base import DRAWING, Combined, Model, count_fits, counted, expect, gathering, upload
from .shared.synthetic_data import keep_samples


@message("fedddpm.Server")
class Server:
    """The server's state between stages."""

    model: Tensors  # w_r
    locals: Mapping[str, Tensors]  # v_k, until D_aux is sampled
    labels: Tensors  # class counts, by site
    auxiliary: Tensors  # training part of D_aux
    held: Tensors  # held-out part of D_aux
    signals: tuple[float, ...]  # of all rounds so far
    corrected: tuple[int, ...]  # rounds after which the server has trained


@message("fedddpm.Drawing")
class Drawing:
    """A site's own diffusion model, and its class counts, which sampling needs."""

    model: Tensors
    labels: tuple[int, ...]


@final
@dataclass(frozen=True)
class FedDDPM(Combined[Server, Model, None, Model]):
    """Train diffusion models at the sites, sample an auxiliary set from them, and correct each round on it."""

    rounds: int = 10
    """Training rounds R."""
    local: Training = DRAWING
    """Local training in one round."""
    first: Training = Training(
        optimizer="adam", lr=1e-3, epochs=60, batch_size=32, schedule="cosine", warmup=20, max_grad_norm=1.0, ema_decay=0.99
    )
    """Training E_0 of a site's own model, before the rounds."""
    share: float = 0.1
    """Size M of the auxiliary set, as a share of the sites' images; above 0."""
    server: Training = Training(optimizer="adam", lr=2e-4, epochs=1, batch_size=32, max_grad_norm=1.0)
    """Training E_s of the server on the auxiliary set after an aggregation."""
    decay: float = 1.0
    """Factor on the learning rate of `server` from one round to the next, above 0 and at most 1. Below 1, the auxiliary set
    dominates the first rounds and the sites' images the last ones."""
    correct: Literal["every", "slow", "never", "only"] = "every"
    """Rounds with a correction: every (FedDDPM), slow (FedDDPM+: only if learning is slow), never, or only. With only, no site
    trains; the server trains on the auxiliary set by `local` in each round."""
    correction: Training = Training(optimizer="adam", lr=2e-4, epochs=5, batch_size=32, max_grad_norm=1.0)
    """Training E_c of the server if learning was slow."""
    signal: Literal["progress", "update", "dispersion"] = "progress"
    """Signal of slow learning: progress (relative, of the held-out auxiliary loss), update (‖w̄ - w‖/‖w‖) or dispersion (mean
    cosine between the sites' updates and their mean). Learning is slow if the signal is below `slow`."""
    slow: float = 0.005
    """Threshold ε_slow of the signal."""
    window: int = 5
    """Window q in rounds: progress compares the mean of the last q rounds with the mean of the q before; at least 1."""
    corrections: int = 1
    """Maximum number of corrections in a run; 0: no limit."""
    wait: int = 5
    """Rounds after a correction without another."""

    def workload(self, rows: Mapping[str, int], pairs: int) -> tuple[Workload, ...]:
        images = round(self.share * sum(rows.values()))
        rounds = 0 if self.correct == "only" else self.rounds
        corrections = {"every": self.rounds, "slow": self.corrections, "never": 0, "only": self.rounds}[self.correct]
        return (
            at_sites("models of the sites alone", self.first, rows, 1),
            at_sites("local training", self.local, rows, rounds),
            Workload("correction", "server", corrections * self.correction.count(images), self.correction),
        )

    def __post_init__(self) -> None:
        check_choices(self)
        if not self.share > 0 or not 0 < self.decay <= 1 or self.window < 1 or self.corrections < 0:
            raise InputError(
                "share must be above 0, decay above 0 and at most 1, window at least 1 and corrections at least 0; "
                "check [algorithm]"
            )

    def stages(self) -> tuple[Stage, ...]:
        local = gathering("local", self.collect, self.draw, replies=(Drawing,), check=self.check_drawing, images=False)
        auxiliary = Stage("auxiliary", self.auxiliary, evaluated=False)
        train = Stage("train", self.aggregate, self.train, client_fraction=self.client_fraction, images=False)
        alone = Stage("alone", self.alone)
        return (local, auxiliary, *(alone if self.correct == "only" else train,) * self.rounds)

    def init(self, ctx: ServerContext) -> Server:
        return Server(ctx.task.init(ctx.rng), {}, {}, {}, {}, (), ())

    def broadcast(self, server: Server, site: str) -> Model:
        return Model(server.model)

    # local: each site trains its own model

    def draw(self, received: Empty, state: None, ctx: ClientContext) -> Reply[Drawing]:
        data = ctx.data["train"]
        model, metrics = denoiser(ctx).learned_alone(ctx, self.first)  # v_k
        counts = tuple(data["label"].bincount(minlength=ctx.task.classes).tolist())
        return Reply(Drawing(model, counts), None, float(rows(data)), metrics)

    def check_drawing(self, reply: Reply[Drawing], site: str, ctx: ServerContext) -> None:
        expect(reply.message.model, ctx)
        count_fits(reply.message.labels, ctx.task.classes, reply.weight)

    def collect(self, server: Server, replies: Replies[Drawing], ctx: ServerContext) -> tuple[Server, Metrics]:
        labels = {site: counted(torch.tensor(reply.message.labels), reply.weight) for site, reply in replies.items()}
        return replace(server, locals={site: r.message.model for site, r in replies.items()}, labels=labels), {}

    # auxiliary: the server samples all models, in proportion to the sites' images

    def auxiliary(self, server: Server, replies: Replies[Empty], ctx: ServerContext) -> tuple[Server, Metrics]:
        drawn: list[dict[str, torch.Tensor]] = []
        for site, model in server.locals.items():
            counts = server.labels[site]
            wanted = max(1, round(self.share * int(counts.sum())))
            label = apportion(counts, wanted)
            latent = denoiser(ctx).sample_alone(model, label, replace(ctx, rng=spawn(ctx.rng)))
            drawn.append({"latent": latent, "label": label, "site": torch.full((wanted,), len(drawn))})
        table = {name: torch.cat([part[name] for part in drawn]) for name in drawn[0]}
        images = {"image": denoiser(ctx).decoded(table["latent"]), "label": table["label"], "site": table["site"]}
        everything = torch.ones(rows(table), dtype=torch.bool)
        keep_samples(ctx, tuple(server.locals), {**images, "kept": everything}, {"share": self.share})
        order, tenth = torch.randperm(rows(table), generator=ctx.rng), max(1, rows(table) // 10)
        table = {name: table[name] for name in ("latent", "label")}
        held, trained = (select(table, part.sort().values) for part in (order[:tenth], order[tenth:]))
        metrics = {f"samples/{site}": float(rows(part)) for site, part in zip(server.locals, drawn, strict=True)}
        metrics["samples"] = float(rows(table))
        return replace(server, locals={}, auxiliary=trained, held=held), metrics

    # train: FedAvg and the server's correction

    def train(self, received: Model, state: None, ctx: ClientContext) -> Reply[Model]:
        model, metrics = fit(ctx, received.model, self.local, ctx.data["train"])  # w_{r+1}^k
        return upload(model, state, ctx, metrics)

    def aggregate(self, server: Server, replies: Replies[Model], ctx: ServerContext) -> tuple[Server, Metrics]:
        merged = {**server.model, **self.robust.combine(server.model, replies)}  # w̄_{r+1}
        held = ctx.task.metrics(merged, server.held, ctx.device)["loss"]
        signals = (*server.signals, self._signal(server, replies, merged, held))
        slow = self._slow(server, signals)
        server = replace(server, model=merged, signals=signals)
        metrics = {"auxiliary_loss": held, "slow": float(slow), "corrected": 0.0}
        if self.signal != "progress":
            metrics[self.signal] = signals[-1]
        every = replace(self.server, lr=self.server.lr * self.decay ** (len(signals) - 1))
        training = {"every": every, "slow": self.correction if slow else None, "never": None}[self.correct]
        if training is None:
            return server, metrics
        model, info = fit(ctx, merged, training, server.auxiliary)
        server = replace(server, model=model, corrected=(*server.corrected, len(signals) - 1))
        return server, {**metrics, "corrected": 1.0, "correction_loss": info["loss"], "correction_steps": info["steps"]}

    def alone(self, server: Server, replies: Replies[Empty], ctx: ServerContext) -> tuple[Server, Metrics]:
        model, metrics = fit(ctx, server.model, self.local, server.auxiliary)
        return replace(server, model=model), metrics

    def _signal(self, server: Server, replies: Replies[Model], merged: Tensors, held: float) -> float:
        match self.signal:
            case "update":
                return _norm(sub(merged, server.model)) / max(_norm(server.model), 1e-12)
            case "dispersion":
                moves = [flat(sub(reply.message.model, server.model)) for reply in replies.values()]
                middle = torch.stack(moves).mean(0)
                return fmean(torch.cosine_similarity(move, middle, 0).item() for move in moves)
            case _:
                return held

    def _slow(self, server: Server, signals: tuple[float, ...]) -> bool:
        """Return whether learning is slow and a correction is due."""
        spent = self.corrections and len(server.corrected) >= self.corrections
        waiting = bool(server.corrected) and len(signals) - 1 - server.corrected[-1] <= self.wait
        if self.correct != "slow" or spent or waiting:
            return False
        if self.signal != "progress":
            return len(signals) > 1 and signals[-1] < self.slow
        q = self.window
        since = signals[server.corrected[-1] + 1 :] if server.corrected else signals
        if len(since) < 2 * q:
            return False
        before, now = fmean(since[-2 * q : -q]), fmean(since[-q:])
        return (before - now) / before < self.slow


def _norm(tensors: Tensors) -> float:
    found: float = flat(tensors).norm().item()
    return found
