"""WarmFed: a warm start from diffusion adapters, server fine-tuning and dynamic self-distillation.

Feng, Zhang, Li, Huang, Liu, Wang, "WarmFed: Federated Learning with Warm-Start for Globalization and Personalization", 2025,
arXiv:2503.03110.

The full text and code are not public; this reading follows the abstract and summaries. Each site sends one adapter of a
diffusion model. The server samples from the adapters and trains a classifier on the samples. A few rounds follow, with server
fine-tuning on a small synthetic subset and dynamic self-distillation at the sites.

Departures: samples are filtered (`synthesis.filter`). A do-no-harm gate keeps a server fine-tuning step only if the sites'
validation accuracy does not fall (`gate`). One more local step from the last global model (`personalize`) ends the run; with
`rounds` 0 it is the whole personal branch. The site's validation sets how much of that step is kept (`personal_gate`). With
all three off, the method is the paper's. The selector's loss and the schedule of τ_t are ours. The paper's sentences disagree
on who fine-tunes before the aggregation; `before` offers both readings. A late site sends its adapter with its first model,
and S_sub grows by samples of that adapter.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, cast, final

import torch
from torch import Tensor

from ..core import ClientContext, Empty, GeneratorSpec, Metrics, Replies, Reply, ServerContext, Stage, Workload, classifier
from ..core.messages import message
from ..core.rng import spawn
from ..core.tensors import Tensors, join, mix, rows, select
from ..core.training import Training
from ..fit import fit
from ..metrics.classification import measure
from ..utils.errors import InputError
from ..utils.settings import check_choices
from .shared.adapter_screening import late_suspects
from .shared.base import Model, at_sites, expect, gathering, upload
from .shared.distillation import Distillation, distilled, dynamic
from .shared.robust_aggregation import Robust
from .shared.synthetic_data import (
    Synthesis,
    check_adapter,
    classes_of,
    draw,
    gather,
    generator_of,
    held_only,
    labelled,
    likely,
    of_lacking,
    planned,
    warm_start,
    without,
)


@message("warmfed.Server")
class Server:
    """The server's state between stages."""

    model: Tensors  # θ_g
    tuned: Tensors | None  # θ_g after fine-tuning, until the gate decides
    subset: Tensors  # S_sub
    holders: tuple[str, ...]  # sites that have received S_sub and their replay
    classes: Tensors  # Y_n, by site
    adapters: Mapping[str, Tensors]  # A_n, B_n and prompt embeddings, until S is sampled
    replay: Mapping[str, Tensors]  # by site, samples of the classes that it lacks, until it has them


@message("warmfed.Adapter")
class Adapter:
    """All that a site sends before the warm start: its adapter and its classes."""

    adapter: Tensors
    classes: tuple[int, ...]


@message("warmfed.Down")
class Down:
    """The global model; once also S_sub, if the sites fine-tune on it."""

    model: Tensors
    subset: Tensors | None


@message("warmfed.Replay")
class Replay:
    """As `Down`, to a site that lacks classes; with samples of them in the site's own style."""

    model: Tensors
    subset: Tensors | None
    samples: Tensors


@message("warmfed.Late")
class LateJoinRequest:
    """A training request to a site without an adapter yet: it must also send one."""

    model: Tensors
    subset: Tensors | None


@message("warmfed.Joined")
class LateJoinReply:
    """A late site's model, with its adapter and its classes."""

    model: Tensors
    adapter: Tensors
    classes: tuple[int, ...]


@message("warmfed.Candidates")
class Candidates:
    """The global model before and after the server's fine-tuning."""

    average: Tensors
    tuned: Tensors


@message("warmfed.Verdict")
class ValidationVote:
    """A site's validation result for each share of the fine-tuning; 0 for classes that it lacks."""

    right: Tensors  # by share, right answers of each class, float64 [classes]
    loss: Mapping[str, float]  # by share, sum over the images
    counts: tuple[int, ...]  # images of each class


@message("warmfed.Site")
class Site:
    """A site's state: its last two personal models, its selector and S_sub."""

    personal: Tensors | None  # θ_{p,n}^{t-1}
    older: Tensors | None  # θ_{p,n}^{t-2}
    selector: Tensors | None  # ψ
    subset: Tensors | None
    steps: int
    replay: Tensors | None  # samples of the classes that the site lacks


@final
@dataclass(frozen=True)
class WarmFed:
    """Warm-start from the sites' adapters, then run rounds with server fine-tuning and dynamic self-distillation."""

    RENAMED: ClassVar[Mapping[str, str]] = {"sample": "client_fraction"}

    rounds: int = 5
    """Rounds R after the warm start; 0: one-shot."""
    client_fraction: float = 1.0
    """Share of the sites that train in each round."""
    warm: bool = True
    """Whether the run has a warm start; otherwise the initial weights are random and nothing is sampled."""
    synthesis: Synthesis = Synthesis(classes="all")
    """Sampling and filtering of S, and training on it."""
    local: Training = Training(lr=0.04, epochs=5, max_grad_norm=1.0)
    """Local training in one round, for the global model."""
    personal: Training = Training(lr=0.005, epochs=5, max_grad_norm=1.0)
    """Local training in one round, for the personal model."""
    before: Literal["client", "server", "none"] = "none"
    """Fine-tuning on S_sub before the aggregation: client, server or none."""
    before_training: Training = Training(lr=0.01, epochs=1, max_grad_norm=1.0)
    """Training of the fine-tuning before the aggregation."""
    tune: bool = True
    """Whether the server fine-tunes the aggregated model on S_sub."""
    tune_training: Training = Training(lr=0.005, epochs=1, max_grad_norm=1.0)
    """Training of the server's fine-tuning."""
    gate: bool = True
    """Whether the sites' validation sets how much of the fine-tuning is kept: all, half or none."""
    personal_gate: bool = True
    """Whether a site's validation sets how much of its last personal step is kept: all, half or none."""
    replay: int = 40
    """Samples of each class that a site lacks, in its own style, which its training adds; the server sends them once.
    There are none with `replay` 0, with `synthesis.classes` held, or without a warm start."""
    distill: Literal["dynamic", "static", "none"] = "none"
    """Teacher of the personal models: dynamic (selected per image from the last two), static (the last one) or none."""
    distillation: Distillation = Distillation()
    """Self-distillation."""
    upload: Literal["local", "personal"] = "local"
    """Model that is averaged: local (trained for it) or personal (reading B: the distilled one)."""
    robust: Robust = Robust()
    """Aggregation rule; the default is the weighted mean."""

    def __post_init__(self) -> None:
        check_choices(self)
        if self.replay < 0:
            raise InputError(f"replay must be at least 0; got {self.replay}")

    @property
    def tunes(self) -> bool:
        return self.warm and self.tune

    @property
    def needs_generator(self) -> GeneratorSpec | None:
        return GeneratorSpec() if self.warm else None

    @property
    def samples_per_class(self) -> int:
        return self.synthesis.per_class if self.warm else 0

    def check_sites(self, count: int) -> None:
        self.robust.enough(count)

    def workload(self, rows: Mapping[str, int], pairs: int) -> tuple[Workload, ...]:
        tuning = self.rounds * self.tune_training.count(self.synthesis.subset) if self.tunes else 0
        before = self.rounds * self.before_training.count(self.synthesis.subset) if self.warm else 0
        personal = self.rounds + 1  # one more step from the last global model
        return (
            at_sites("local training", self.local, rows, self.rounds if self.upload == "local" else 0),
            at_sites("personal models", self.personal, rows, personal),
            Workload("fine-tuning", "server", tuning, self.tune_training),
            Workload(
                "fine-tuning before the aggregation",
                "server" if self.before == "server" else "sites",
                before * len(rows) if self.before != "none" else 0,
                self.before_training,
            ),
            *(self.synthesis.workload(pairs) if self.warm else ()),
        )

    def stages(self) -> tuple[Stage, ...]:
        adapt = gathering("adapt", self.collect, self.adapt, replies=(Adapter,), check=self.check, images=False)
        warm = Stage("warm", self.start)
        train = Stage(
            "train",
            self.aggregate,
            self.train,
            self.invite,
            client_fraction=self.client_fraction,
            evaluated=not (self.tunes and self.gate),
            replies=(Model, LateJoinReply),
            check=self.check,
            images=False,
        )
        gate = Stage(
            "gate",
            self.decide,
            self.judge,
            self.candidates,
            replies=(ValidationVote,),
            check=self.judged,
            weight_split="validation",
            images=False,
        )
        personalize = Stage("personalize", self.done, self.personalize, self.send, replies=(Empty,), images=False)
        one_round = (train, gate) if self.tunes and self.gate else (train,)
        return ((adapt, warm) if self.warm else ()) + one_round * self.rounds + (personalize,)

    def init(self, ctx: ServerContext) -> Server:
        return Server(ctx.task.init(ctx.rng), tuned=None, subset={}, holders=(), classes={}, adapters={}, replay={})

    def broadcast(self, server: Server, site: str) -> Down:
        needed = self.warm and self.before == "client" and site not in server.holders
        return Down(server.model, server.subset if needed else None)

    def init_client_state(self, received: Down, ctx: ClientContext) -> Site:
        return Site(None, None, None, None, 0, None)

    def global_model(self, server: Server) -> Tensors | None:
        return server.model

    def client_model(self, received: Down, state: Site) -> Tensors | None:
        return received.model if state.personal is None else state.personal

    # adapt: each site trains its adapter, step 0a

    def adapt(self, received: Empty, state: Site, ctx: ClientContext) -> Reply[Adapter]:
        tensors, metrics = generator_of(ctx).adapt(ctx)
        # No state: the site's state is initialised after the warm start.
        return Reply(Adapter(tensors, classes_of(ctx)), None, float(rows(ctx.data["train"])), metrics)

    def check(self, reply: Reply[Adapter | Model | LateJoinReply], site: str, ctx: ServerContext) -> None:
        if isinstance(reply.message, Adapter | LateJoinReply):
            check_adapter(generator_of(ctx), reply, site, ctx)
        if isinstance(reply.message, Model | LateJoinReply):
            expect(reply.message.model, ctx)

    def collect(self, server: Server, replies: Replies[Adapter], ctx: ServerContext) -> tuple[Server, Metrics]:
        adapters, classes = gather(ctx, generator_of(ctx), replies)
        return replace(server, adapters=adapters, classes=classes), {}

    # warm: the server samples, filters and trains, steps 0b and 0c

    def start(self, server: Server, replies: Replies[Empty], ctx: ServerContext) -> tuple[Server, Metrics]:
        classes = {site: tuple(held.tolist()) for site, held in server.classes.items()}
        warm = warm_start(ctx, server.adapters, classes, self.synthesis)
        replay = of_lacking(warm.kept, warm.sites, classes, self.replay)
        # S_sub has none of its classes; a late site's share is computed from S_sub.
        held = {site: y[:0] if f"set_aside/{site}" in warm.metrics else y for site, y in server.classes.items()}
        server = replace(server, model=warm.model, subset=warm.subset, classes=held, adapters={}, replay=replay)
        return server, warm.metrics

    # train: rounds t = 1..R

    def invite(self, server: Server, site: str) -> Down | Replay | LateJoinRequest:
        received = self.send(server, site)
        late = self.warm and (self.tune or self.before == "server") and site not in server.classes
        return LateJoinRequest(received.model, received.subset) if late else received

    def send(self, server: Server, site: str) -> Down | Replay:
        received = self.broadcast(server, site)
        if site in server.holders or site not in server.replay:
            return received
        return Replay(received.model, received.subset, server.replay[site])

    def train(self, received: Down | Replay | LateJoinRequest, state: Site, ctx: ClientContext) -> Reply[Model | LateJoinReply]:
        state = _with_samples(state, received)
        if received.subset is not None:
            state = replace(state, subset=received.subset)
        start = received.model
        if state.subset is not None:
            start, _ = fit(ctx, start, self.before_training, state.subset)  # e_s epochs, reading R2
        model, metrics = dict(start), dict[str, float]()
        if self.upload == "local":
            model, metrics = fit(ctx, start, self.local, _with_replay(ctx, state).data["train"])  # θ_n^t
        state, info = self.personal_step(start, state, ctx)  # θ_{p,n}^t
        uploaded = state.personal if self.upload == "personal" and state.personal is not None else model
        reply = upload(uploaded, state, ctx, {**metrics, **info})
        if isinstance(received, LateJoinRequest):
            adapter, _ = generator_of(ctx).adapt(replace(ctx, rng=spawn(ctx.rng)))
            return Reply(LateJoinReply(uploaded, adapter, classes_of(ctx)), state, reply.weight, reply.metrics)
        return reply

    def personal_step(self, start: Tensors, state: Site, ctx: ClientContext) -> tuple[Site, dict[str, float]]:
        """Train the personal model for one round from the global model, distilled from the site's last two models."""
        ctx = _with_replay(ctx, state)
        count = self.personal.count(rows(ctx.data["train"]))
        selector = state.selector
        if self.distill == "dynamic" and state.personal is not None and state.older is not None:
            pool = (state.personal, state.older)
            planned = count * max(self.rounds - 1, 1)
            model, selector, info = dynamic(ctx, start, self.personal, pool, selector, self.distillation, state.steps, planned)
            state = replace(state, steps=state.steps + count)
        else:
            teacher = None if self.distill == "none" else state.personal
            model, info = distilled(ctx, start, self.personal, teacher, self.distillation)
        info = {
            ("personal_loss" if name == "loss" else name): info[name] for name in info if name == "loss" or "select" in name
        }
        return replace(state, personal=model, older=state.personal, selector=selector), info

    def aggregate(self, server: Server, replies: Replies[Model | LateJoinReply], ctx: ServerContext) -> tuple[Server, Metrics]:
        server = replace(server, holders=tuple(sorted({*server.holders, *replies})))
        joined = {s: r for s, r in replies.items() if isinstance(r.message, LateJoinReply) and s not in server.classes}
        late = cast("Replies[LateJoinReply]", joined)
        server, added = self.welcome(server, late, ctx) if late else (server, {})
        if self.before == "server" and self.warm:
            # Reading R1: fine-tune each uploaded model before the average.
            replies = {
                site: replace(r, message=Model(fit(ctx, r.message.model, self.before_training, server.subset)[0]))
                for site, r in replies.items()
            }
        merged = self.robust.combine(server.model, replies)
        if not self.tunes:
            return replace(server, model=merged), added
        tuned, info = fit(ctx, merged, self.tune_training, server.subset)  # e_f epochs
        metrics = {"tune_loss": info["loss"], **added}
        if self.gate:
            return replace(server, model=merged, tuned=tuned), metrics
        return replace(server, model=tuned), {**metrics, "gate_kept": 1.0, "gate_strength": 1.0}

    def welcome(self, server: Server, replies: Replies[LateJoinReply], ctx: ServerContext) -> tuple[Server, Metrics]:
        """Sample from the late sites' adapters and add the samples to S_sub.

        Each class of a late site gets as many samples as the others' classes have in S_sub. Samples that S_sub contradicts are
        not added.
        """
        adapters, classes = gather(ctx, generator_of(ctx), replies)
        held = {site: tuple(labels.tolist()) for site, labels in classes.items()}
        share = round(rows(server.subset) / max(sum(len(labels) for labels in server.classes.values()), 1))
        samples = draw(ctx, adapters, *planned(held, len(ctx.prompts), max(share, 1), self.synthesis))
        judged = held_only(samples, tuple(adapters), held)
        aside, told = late_suspects(judged, tuple(adapters), server.subset, self.synthesis.contradicted)
        samples = without(samples, tuple(adapters), aside)
        # The present global model replaces the two cross-predicting classifiers of the warm start.
        belief = classifier(ctx).predict(server.model, samples, device=ctx.device).softmax(-1)
        table = labelled(samples, belief, self.synthesis.soft_label_weight)
        if self.synthesis.filter == "cross":
            table = select(table, likely(belief, samples["label"]) >= self.synthesis.min_class_probability)
        classes = {site: held[:0] if site in aside else held for site, held in classes.items()}
        server = replace(server, subset=join([server.subset, table]), classes={**server.classes, **classes})
        return server, {"joined_samples": float(rows(table)), **told}

    # gate: the sites validate the fine-tuning

    def candidates(self, server: Server, site: str) -> Candidates:
        assert server.tuned is not None, "the stage before has tuned it"
        return Candidates(server.model, server.tuned)

    def judge(self, received: Candidates, state: Site, ctx: ClientContext) -> Reply[ValidationVote]:
        verdict = _verdict(ctx, received.average, received.tuned)
        return Reply(verdict, state, float(sum(verdict.counts)), {})

    def judged(self, reply: Reply[ValidationVote], site: str, ctx: ServerContext) -> None:
        """Raise `InputError` if a vote lacks a share of the fine-tuning or holds impossible numbers."""
        right, loss, counts = reply.message.right, reply.message.loss, torch.tensor(reply.message.counts)
        known = right.keys() == loss.keys() == set(_SHARES) and counts.shape == (len(ctx.prompts),)
        known = known and bool((counts >= 0).all()) and int(counts.sum()) == reply.weight
        fits = known and all(r.shape == counts.shape and ((r >= 0) & (r <= counts)).all() for r in right.values())
        if not fits or not all(0 <= loss[s] < math.inf for s in _SHARES):
            raise InputError(
                f"expected right answers and losses of {', '.join(_SHARES)}, got {reply.message.right} and {loss} "
                f"with {counts.tolist()} images of the classes"
            )

    def decide(self, server: Server, replies: Replies[ValidationVote], ctx: ServerContext) -> tuple[Server, Metrics]:
        """Keep the share of the fine-tuning with the best balanced accuracy; the lower loss breaks ties.

        A class counts the same however many images of it the sites have; a site has no vote on a class that it lacks.
        """
        # below 1 if the admission policy cut the weight
        heard = [(r.message, r.weight / sum(r.message.counts)) for r in replies.values()]
        counts = torch.stack([torch.tensor(v.counts).double() * part for v, part in heard]).sum(0)
        judged = counts > 0
        right, loss = dict[str, float](), dict[str, float]()
        for share in _SHARES:
            answers = torch.stack([v.right[share].double() * part for v, part in heard]).sum(0)
            right[share] = 100 * float((answers[judged] / counts[judged]).mean())
            loss[share] = sum(v.loss[share] * part for v, part in heard)
        best = _best(right, loss)
        metrics = {
            "gate_kept": float(best != _SHARES[0]),
            "gate_strength": float(best),
            "validation_before": right[_SHARES[0]],
            "validation_after": right[best],
            "validation_tuned": right[_SHARES[-1]],
        }
        assert server.tuned is not None, "the stage train has tuned it"
        return replace(server, model=mix(server.model, server.tuned, float(best)), tuned=None), metrics

    # personalize: the sites' last personal step, from the last global model

    def personalize(self, received: Down | Replay, state: Site, ctx: ClientContext) -> Reply[Empty]:
        state, info = self.personal_step(received.model, _with_samples(state, received), ctx)
        if self.personal_gate and state.personal is not None:
            share = self.kept_share(received.model, state.personal, state, ctx)
            state = replace(state, personal=mix(received.model, state.personal, share))
            info = {**info, "personal_strength": share}
        return Reply(Empty(), state, float(rows(ctx.data["train"])), info)

    def kept_share(self, before: Tensors, after: Tensors, state: Site, ctx: ClientContext) -> float:
        """Return the share of the personal step that is best for the classes that the site holds and for those it lacks.

        Held classes are judged by the site's validation images, lacking ones by samples that were not trained on. Every class
        counts the same if the site lacks one.
        """
        if state.replay is None:
            verdict, count = _verdict(ctx, before, after), rows(ctx.data["validation"])
            return float(_best({share: 100 * float(r.sum()) / count for share, r in verdict.right.items()}, verdict.loss))
        table = join([ctx.data["validation"], _parts(state.replay)[1]])
        found = {share: ctx.task.metrics(mix(before, after, float(share)), table, ctx.device) for share in _SHARES}
        right = {share: m["balanced_accuracy"] for share, m in found.items()}
        return float(_best(right, {share: m["loss"] for share, m in found.items()}))

    def done(self, server: Server, replies: Replies[Empty], ctx: ServerContext) -> tuple[Server, Metrics]:
        return server, {}


_SHARES = ("0.0", "0.5", "1.0")


def _with_samples(state: Site, received: Down | Replay | LateJoinRequest) -> Site:
    return replace(state, replay=received.samples) if isinstance(received, Replay) else state


def _with_replay(ctx: ClientContext, state: Site) -> ClientContext:
    """Return the context with the site's samples of classes that it lacks among its training images."""
    if state.replay is None:
        return ctx
    own, _ = _parts(state.replay)
    return replace(ctx, data={**ctx.data, "train": join([ctx.data["train"], own])})


def _parts(samples: Tensors) -> tuple[Tensors, Tensors]:
    """Return three quarters of the samples, for training, and the rest, for the gate; one of the rest for each class."""
    turn = torch.zeros(rows(samples), dtype=torch.int64)
    for label in samples["label"].unique().tolist():
        mine = samples["label"] == label
        turn[mine] = torch.arange(int(mine.sum()))
    return select(samples, turn % 4 != 0), select(samples, turn % 4 == 0)


def _verdict(ctx: ClientContext, before: Tensors, after: Tensors) -> ValidationVote:
    """Return the validation result of each share of the way from one model to the other."""
    table = ctx.data["validation"]
    label, classes = table["label"], len(ctx.prompts)
    right, loss = dict[str, Tensor](), dict[str, float]()
    for share in _SHARES:
        logits = classifier(ctx).predict(mix(before, after, float(share)), table, device=ctx.device)
        found = measure(logits, label)
        right[share] = label[logits.argmax(-1) == label].bincount(minlength=classes).double()
        loss[share] = found["loss"] * found["count"]
    return ValidationVote(right, loss, tuple(label.bincount(minlength=classes).tolist()))


def _best(right: Mapping[str, float], loss: Mapping[str, float]) -> str:
    """Return the share with the highest accuracy, in percent; the lower loss breaks ties."""
    return max(_SHARES, key=lambda share: (round(right[share], 6), -loss[share]))
