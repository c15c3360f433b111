"""WarmFed. Feng, Zhang, Li, Huang, Liu, Wang, 2025, arXiv:2503.03110.

One adapter of a diffusion model from each site; the server samples from them and trains a classifier on the samples; a
few rounds follow with server fine-tuning on a small synthetic subset and dynamic self-distillation for the sites.
The paper's full text and code are not public: this is a reading of its abstract and of summaries.

Departures: samples are filtered (`synthesis.filter`), and a do-no-harm gate keeps a server fine-tuning step only where the
sites' validation accuracy does not fall (`gate`). One more local step from the last global model (`personalize`) ends the
run, is the whole of the personal branch in one-shot mode (`rounds` 0), and is kept as far as the site's own validation says
(`personal_gate`). With all three off it is the paper's. The selector's loss and the schedule of τ_t are ours. Where the
paper's sentences disagree on who fine-tunes before the aggregation, `before` offers both readings. A site that comes late
sends its adapter with its first model, and S_sub grows by samples of it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, cast, final

from ..core import ClientContext, Empty, GeneratorSpec, Metrics, Replies, Reply, ServerContext, Stage, classifier
from ..core.messages import message
from ..core.rng import spawn
from ..core.tensors import Tensors, join, mix, rows, select
from ..fit import Training, fit
from ..utils.errors import InputError, one_of
from .shared.adapter_screening import late_suspects
from .shared.base import Model, expect, gathering, upload
from .shared.distillation import Distillation, distilled, dynamic
from .shared.robust_aggregation import Robust
from .shared.synthetic_data import (
    Synthesis,
    check_adapter,
    classes_of,
    draw,
    gather,
    generator_of,
    labelled,
    likely,
    warm_start,
    without,
)


@message("warmfed.Server")
class Server:
    """What the server keeps between stages."""

    model: Tensors  # θ_g
    tuned: Tensors | None  # θ_g after fine-tuning, while the sites judge it
    subset: Tensors  # S_sub
    holders: tuple[str, ...]  # sites that have been sent S_sub
    classes: Tensors  # Y_n, by site
    adapters: Mapping[str, Tensors]  # A_n, B_n and prompt embeddings, until S is drawn


@message("warmfed.Adapter")
class Adapter:
    """All that a site sends before the warm start."""

    adapter: Tensors
    classes: tuple[int, ...]


@message("warmfed.Down")
class Down:
    """The global model, and once S_sub, where the sites fine-tune on it."""

    model: Tensors
    subset: Tensors | None


@message("warmfed.Late")
class LateJoinRequest:
    """What a site is sent that has sent no adapter yet: to train as the others do, and to send one too."""

    model: Tensors
    subset: Tensors | None


@message("warmfed.Joined")
class LateJoinReply:
    """A late site's model, with all that the others have sent before the warm start."""

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
    """A site's validation of each share of fine-tuning."""

    right: Mapping[str, float]
    loss: Mapping[str, float]
    count: int


@message("warmfed.Site")
class Site:
    """What a site keeps: its last two personal models, its selector and S_sub."""

    personal: Tensors | None  # θ_{p,n}^{t-1}
    older: Tensors | None  # θ_{p,n}^{t-2}
    selector: Tensors | None  # ψ
    subset: Tensors | None
    steps: int


@final
@dataclass(frozen=True)
class WarmFed:
    """Warm start from the sites' adapters, then rounds with server fine-tuning and dynamic self-distillation."""

    RENAMED: ClassVar[Mapping[str, str]] = {"sample": "client_fraction"}

    rounds: int = 5
    """R, rounds after the warm start; 0: one-shot."""
    client_fraction: float = 1.0
    """Share of the sites asked in each round."""
    warm: bool = True
    """Whether there is a warm start at all; without it the start is random, and nothing is synthesised."""
    synthesis: Synthesis = Synthesis()
    """How S is drawn and learned."""
    local: Training = Training(lr=0.02, epochs=5, max_grad_norm=1.0)
    """A site's training in one round, for the global model."""
    personal: Training = Training(lr=0.005, epochs=5, max_grad_norm=1.0)
    """A site's training in one round, for its own model."""
    before: str = "none"
    """Who fine-tunes on S_sub before the aggregation: client, server or none."""
    before_training: Training = Training(lr=0.01, epochs=1, max_grad_norm=1.0)
    """That fine-tuning."""
    tune: bool = True
    """Whether the server fine-tunes the aggregated model on S_sub."""
    tune_training: Training = Training(lr=0.005, epochs=1, max_grad_norm=1.0)
    """That fine-tuning."""
    gate: bool = True
    """Whether the sites' validation decides how much of the fine-tuning is kept: all, half or none of it."""
    personal_gate: bool = True
    """Whether a site's validation decides how much of its last personal step is kept: all, half or none of it."""
    distill: str = "dynamic"
    """Teacher of the personal models: dynamic (chosen per image from the last two), static (the last one) or none."""
    distillation: Distillation = Distillation()
    """How the teacher teaches."""
    upload: str = "local"
    """Which model is averaged: local (trained for it), or personal (reading B: the distilled one)."""
    robust: Robust = Robust()
    """How the models that come back are combined; the default is the weighted mean."""

    def __post_init__(self) -> None:
        one_of(self, before=("client", "server", "none"), distill=("dynamic", "static", "none"), upload=("local", "personal"))

    @property
    def tunes(self) -> bool:
        return self.warm and self.tune

    @property
    def needs_generator(self) -> GeneratorSpec | None:
        return GeneratorSpec() if self.warm else None

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
        personalize = Stage("personalize", self.done, self.personalize, replies=(Empty,), images=False)
        one_round = (train, gate) if self.tunes and self.gate else (train,)
        return ((adapt, warm) if self.warm else ()) + one_round * self.rounds + (personalize,)

    def init(self, ctx: ServerContext) -> Server:
        return Server(ctx.task.init(ctx.rng), tuned=None, subset={}, holders=(), classes={}, adapters={})

    def broadcast(self, server: Server, site: str) -> Down:
        needed = self.warm and self.before == "client" and site not in server.holders
        return Down(server.model, server.subset if needed else None)

    def init_client_state(self, received: Down, ctx: ClientContext) -> Site:
        return Site(None, None, None, None, 0)

    def global_model(self, server: Server) -> Tensors | None:
        return server.model

    def client_model(self, received: Down, state: Site) -> Tensors | None:
        return received.model if state.personal is None else state.personal

    # adapt: each site tunes its adapter, step 0a

    def adapt(self, received: Empty, state: Site, ctx: ClientContext) -> Reply[Adapter]:
        tensors, metrics = generator_of(ctx).adapt(ctx)
        # no state: a site enters anew after the warm start
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
        model, subset, metrics = warm_start(ctx, server.adapters, classes, self.synthesis)
        # none of its classes is in S_sub, from which a late site's share is counted
        held = {site: y[:0] if f"set_aside/{site}" in metrics else y for site, y in server.classes.items()}
        return replace(server, model=model, subset=subset, classes=held, adapters={}), metrics

    # train: rounds t = 1..R

    def invite(self, server: Server, site: str) -> Down | LateJoinRequest:
        received = self.broadcast(server, site)
        late = self.warm and (self.tune or self.before == "server") and site not in server.classes
        return LateJoinRequest(received.model, received.subset) if late else received

    def train(self, received: Down | LateJoinRequest, state: Site, ctx: ClientContext) -> Reply[Model | LateJoinReply]:
        if received.subset is not None:
            state = replace(state, subset=received.subset)
        start = received.model
        if state.subset is not None:
            start, _ = fit(ctx, start, self.before_training, state.subset)  # e_s epochs, reading R2
        model, metrics = dict(start), dict[str, float]()
        if self.upload == "local":
            model, metrics = fit(ctx, start, self.local, ctx.data["train"])  # θ_n^t
        state, info = self.personal_step(start, state, ctx)  # θ_{p,n}^t
        uploaded = state.personal if self.upload == "personal" and state.personal is not None else model
        reply = upload(uploaded, state, ctx, {**metrics, **info})
        if isinstance(received, LateJoinRequest):
            adapter, _ = generator_of(ctx).adapt(replace(ctx, rng=spawn(ctx.rng)))
            return Reply(LateJoinReply(uploaded, adapter, classes_of(ctx)), state, reply.weight, reply.metrics)
        return reply

    def personal_step(self, start: Tensors, state: Site, ctx: ClientContext) -> tuple[Site, dict[str, float]]:
        """One round of the personal branch: from the global model, taught by the site's own last two models."""
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
            # reading R1: each uploaded model, before they are averaged
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
        """Draw from the adapters that came late, and add to S_sub as much of each as the others have in it.

        Samples that S_sub contradicts are not added.
        """
        adapters, classes = gather(ctx, generator_of(ctx), replies)
        share = round(rows(server.subset) / max(sum(len(held) for held in server.classes.values()), 1))
        samples = draw(ctx, adapters, {site: tuple(held.tolist()) for site, held in classes.items()}, max(share, 1))
        aside, told = late_suspects(samples, tuple(adapters), server.subset, self.synthesis.contradicted)
        samples = without(samples, tuple(adapters), aside)
        # the model that there is by now does what the two halves of S did for each other
        belief = classifier(ctx).predict(server.model, samples, device=ctx.device).softmax(-1)
        table = labelled(samples, belief, self.synthesis.soft_label_weight)
        if self.synthesis.filter == "cross":
            table = select(table, likely(belief, samples["label"]) >= self.synthesis.min_class_probability)
        classes = {site: held[:0] if site in aside else held for site, held in classes.items()}
        server = replace(server, subset=join([server.subset, table]), classes={**server.classes, **classes})
        return server, {"joined_samples": float(rows(table)), **told}

    # gate: the sites judge the fine-tuning

    def candidates(self, server: Server, site: str) -> Candidates:
        assert server.tuned is not None, "the stage before has tuned it"
        return Candidates(server.model, server.tuned)

    def judge(self, received: Candidates, state: Site, ctx: ClientContext) -> Reply[ValidationVote]:
        verdict = _verdict(ctx, received.average, received.tuned)
        return Reply(verdict, state, float(verdict.count), {})

    def judged(self, reply: Reply[ValidationVote], site: str, ctx: ServerContext) -> None:
        """Raise `InputError` where a verdict lacks a share of the fine-tuning, or holds numbers that cannot be."""
        right, loss, count = reply.message.right, reply.message.loss, reply.message.count
        known = right.keys() == loss.keys() == set(_SHARES) and count == reply.weight
        if not known or not all(0 <= right[s] < count + 0.5 and 0 <= loss[s] < math.inf for s in _SHARES):
            raise InputError(f"right answers and losses of {', '.join(_SHARES)} were expected, {reply.message} came")

    def decide(self, server: Server, replies: Replies[ValidationVote], ctx: ServerContext) -> tuple[Server, Metrics]:
        """Keep the share of the fine-tuning with most right answers; of equal ones the lower loss."""
        heard = [(r.message, r.weight / r.message.count) for r in replies.values()]  # below 1 if the border reduced its weight
        right = {share: sum(verdict.right[share] * part for verdict, part in heard) for share in _SHARES}
        loss = {share: sum(verdict.loss[share] * part for verdict, part in heard) for share in _SHARES}
        count = sum(reply.weight for reply in replies.values())
        best = _best(right, loss)
        metrics = {
            "gate_kept": float(best != _SHARES[0]),
            "gate_strength": float(best),
            "validation_before": 100 * right[_SHARES[0]] / count,
            "validation_after": 100 * right[best] / count,
            "validation_tuned": 100 * right[_SHARES[-1]] / count,
        }
        assert server.tuned is not None, "the stage train has tuned it"
        return replace(server, model=mix(server.model, server.tuned, float(best)), tuned=None), metrics

    # personalize: the sites' last step, from the last global model

    def personalize(self, received: Down, state: Site, ctx: ClientContext) -> Reply[Empty]:
        state, info = self.personal_step(received.model, state, ctx)
        if self.personal_gate and state.personal is not None:
            verdict = _verdict(ctx, received.model, state.personal)
            share = float(_best(verdict.right, verdict.loss))
            state = replace(state, personal=mix(received.model, state.personal, share))
            info = {**info, "personal_strength": share}
        return Reply(Empty(), state, float(rows(ctx.data["train"])), info)

    def done(self, server: Server, replies: Replies[Empty], ctx: ServerContext) -> tuple[Server, Metrics]:
        return server, {}


_SHARES = ("0.0", "0.5", "1.0")


def _verdict(ctx: ClientContext, before: Tensors, after: Tensors) -> ValidationVote:
    """What the site's validation says of each share of the way from one model to the other."""
    table = ctx.data["validation"]
    found = {share: ctx.task.metrics(mix(before, after, float(share)), table, ctx.device) for share in _SHARES}
    right = {share: m["accuracy"] * m["count"] / 100 for share, m in found.items()}
    return ValidationVote(right, {share: m["loss"] * m["count"] for share, m in found.items()}, rows(table))


def _best(right: Mapping[str, float], loss: Mapping[str, float]) -> str:
    """The share with most right answers; of equal ones the lower loss."""
    return max(_SHARES, key=lambda share: (round(right[share]), -loss[share]))
