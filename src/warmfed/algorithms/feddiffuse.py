"""FedDiffuse: FedAvg of a diffusion model of which only a part is exchanged.

De Goede, Cox, Decouchant, "Training Diffusion Models with Federated Learning", 2024, arXiv:2406.12575: FULL, USPLIT, ULATDEC
and UDEC.

The network has three parts: encoder, bottleneck, decoder. The server averages each part over the sites that returned it.
A part that is not exchanged is private to its site. All sites start from one model: the first message holds all of it.

Departures: USPLIT pairs all sites, before the cohort of a round is drawn. A part that no site returns stays unchanged. Time and
class embeddings belong to the encoder, output layers to the decoder; the paper does not say. A transformer has no bottleneck;
its one or two middle blocks take that role.
"""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal, final

import torch

from ..core import ClientContext, Empty, Metrics, Replies, Reply, ServerContext, Stage, denoiser
from ..core.messages import message
from ..core.tensors import Tensors, only, rows
from ..core.training import Training
from ..fit import fit
from ..utils.settings import check_choices
from .shared.base import DRAWING, Combined, Model, expect

PARTS = ("encoder", "bottleneck", "decoder")
TRAVELS = {"full": PARTS, "usplit": PARTS, "ulatdec": PARTS[1:], "udec": PARTS[2:]}


@message("feddiffuse.Server")
class Server:
    """The exchanged parts (at first the whole model), and the sites that return each part in the next round."""

    model: Tensors
    encoder: tuple[str, ...]
    bottleneck: tuple[str, ...]
    decoder: tuple[str, ...]


@message("feddiffuse.Asked")
class Asked:
    """The model that a site trains from, and the parts that it must return."""

    model: Tensors
    parts: tuple[str, ...]


@message("feddiffuse.Returned")
class Returned:
    """The parts that a site was asked to return."""

    model: Tensors


@final
@dataclass(frozen=True)
class FedDiffuse(Combined[Server, Asked, Model | None, Returned]):
    """Run FedAvg on some parts of the network; keep the others at the sites."""

    local: Training = DRAWING
    """Local training in one round."""
    exchange: Literal["full", "usplit", "ulatdec", "udec"] = "full"
    """Exchanged parts: full (the whole network both ways), usplit (the whole network down; of each pair, one site returns the
    decoder and the other the encoder), ulatdec (bottleneck and decoder) or udec (the decoder)."""
    replies: ClassVar[tuple[type, ...]] = (Returned,)

    def __post_init__(self) -> None:
        check_choices(self)

    def stages(self) -> tuple[Stage, ...]:
        start = Stage("start", self.started, self.keep, evaluated=False, replies=(Empty,), images=False)
        return ((start,) if self.private else ()) + (self.round,) * self.rounds

    @property
    def private(self) -> tuple[str, ...]:
        """The parts that stay at the sites."""
        return tuple(part for part in PARTS if part not in TRAVELS[self.exchange])

    def init(self, ctx: ServerContext) -> Server:
        return self.turn(ctx.task.init(ctx.rng), ctx)

    def turn(self, model: Tensors, ctx: ServerContext) -> Server:
        """Return the server's state: the model, and the sites that return each part."""
        if self.exchange != "usplit":
            return Server(model, *(ctx.sites if part in TRAVELS[self.exchange] else () for part in PARTS))
        if len(ctx.sites) == 1:
            return Server(model, ctx.sites, ctx.sites, ctx.sites)
        order = [ctx.sites[i] for i in torch.randperm(len(ctx.sites), generator=ctx.rng).tolist()]
        halves: tuple[list[str], ...] = ([], [], [])
        for pair in (order[i : i + 2] for i in range(0, len(order), 2)):
            coin, turned = torch.randint(2, (2,), generator=ctx.rng).tolist()
            # A site without a partner returns encoder or decoder, and the bottleneck.
            for site, end in zip(pair, (2, 0) if turned else (0, 2), strict=False):
                halves[end].append(site)
            halves[1].append(pair[coin % len(pair)])
        return Server(model, *(tuple(sorted(half)) for half in halves))

    def broadcast(self, server: Server, site: str) -> Asked:
        return Asked(server.model, tuple(part for part in PARTS if site in getattr(server, part)))

    # start: the sites store their private parts

    def init_client_state(self, received: Asked, ctx: ClientContext) -> Model | None:
        return Model(only(received.model, lambda name: denoiser(ctx).part(name) in self.private)) if self.private else None

    def keep(self, received: Asked, state: Model | None, ctx: ClientContext) -> Reply[Empty]:
        return Reply(Empty(), state, float(rows(ctx.data["train"])), {})

    def started(self, server: Server, replies: Replies[Empty], ctx: ServerContext) -> tuple[Server, Metrics]:
        return replace(server, model=only(server.model, lambda name: denoiser(ctx).part(name) not in self.private)), {}

    # train

    def train(self, received: Asked, state: Model | None, ctx: ClientContext) -> Reply[Returned]:
        model, metrics = fit(ctx, self.client_model(received, state), self.local, ctx.data["train"])
        kept = Model(only(model, lambda name: denoiser(ctx).part(name) in self.private)) if self.private else None
        back = only(model, lambda name: denoiser(ctx).part(name) in received.parts)
        return Reply(Returned(back), kept, float(rows(ctx.data["train"])), metrics)

    def check(self, reply: Reply[Returned], site: str, ctx: ServerContext) -> None:
        parts = {denoiser(ctx).part(name) for name in reply.message.model}
        expect(reply.message.model, ctx, lambda name: denoiser(ctx).part(name) in parts)

    def aggregate(self, server: Server, replies: Replies[Returned], ctx: ServerContext) -> tuple[Server, Metrics]:
        model = dict(server.model)
        for part in PARTS:
            asked = {site: reply for site, reply in replies.items() if site in getattr(server, part)}
            returned = {site: self.of(part, reply, ctx) for site, reply in asked.items()}
            returned = {site: reply for site, reply in returned.items() if reply.message.model}
            if returned:
                model |= self.robust.combine(server.model, returned)
        return self.turn(model, ctx), {}

    def of(self, part: str, reply: Reply[Returned], ctx: ServerContext) -> Reply[Returned]:
        """Return the reply, reduced to one part of its model."""
        return replace(reply, message=Returned(only(reply.message.model, lambda name: denoiser(ctx).part(name) == part)))

    def global_model(self, server: Server) -> Tensors | None:
        return None if self.private else server.model

    def client_model(self, received: Asked, state: Model | None) -> Tensors:
        return {**received.model, **(state.model if state is not None else {})}
