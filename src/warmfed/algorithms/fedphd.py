"""FedPhD. Long, Wang, Anagnostopoulos, Bi, 2025, arXiv:2507.06449: hierarchical averaging by homogeneity, and pruning.

Between sites and cloud stand edge servers. A site joins the edge whose mixture of classes gains most evenness by it; an edge
averages its sites every round, and the cloud the edges every few rounds, both by number of images and by how even their classes
are. After the dense rounds the network is pruned: a share of the hidden units of each block goes, those of the smallest norm,
and smaller models are trained and sent from then on.
The full text was not at hand: this is a reading of its abstract.

Departures: edges are groups of sites within the server, so an edge's round costs no less traffic than the cloud's. The score is
one minus the total variation distance to equal classes. Edges take equally many sites, or else one edge would get all of
them. Pruning is by hidden units between two layers of a block: blocks keep their outer width.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from ..core import ClientContext, Empty, Metrics, Replies, Reply, ServerContext, Stage, denoiser
from ..core.messages import message
from ..core.tensors import Tensors, mean, rows
from ..fit import Training, fit
from ..utils.errors import InputError
from .shared.base import DRAWING, Combined, Model, count_fits, counted, gathering, upload


@message("fedphd.Server")
class Server:
    """The cloud's last model, the edges', and which sites each edge has."""

    model: Tensors
    edges: Mapping[str, Tensors]
    members: Mapping[str, Tensors]  # by edge and site, how often each class occurs
    labels: Tensors  # the same, by site
    done: int  # rounds so far


@message("fedphd.Labels")
class Labels:
    """How often each class occurs at a site."""

    counts: tuple[float, ...]


def homogeneity(counts: Tensor) -> float:
    """1 - ½·Σ|q_c - 1/C|: 1 where all classes are equally frequent, 1/C where there is one of C."""
    share = counts.double() / counts.sum().clamp(min=1)
    return 1 - 0.5 * (share - 1 / len(share)).abs().sum().item()


def together(counts: Iterable[Tensor]) -> Tensor:
    """How often each class occurs at all of these."""
    return torch.stack(list(counts)).sum(0)


def gain(counts: Tensor, there: Collection[Tensor]) -> float:
    """By how much an edge's homogeneity grows if these counts join; that of an edge without sites is 0."""
    return homogeneity(together([counts, *there])) - (homogeneity(together(there)) if there else 0.0)


@final
@dataclass(frozen=True)
class FedPhD(Combined[Server, Model, None, Model]):
    """Edges of sites that together have all classes, averaged by how even they are, and a network that becomes smaller."""

    local: Training = DRAWING
    """A site's training in one round."""
    edges: int = 2
    """Edge servers."""
    period: int = 2
    """r_g, edge rounds between two averages of the cloud."""
    trust: float = 1.0
    """Power of the homogeneity in the weights of both averages; 0: numbers of images alone count."""
    dense: int = 2
    """Rounds after which the network is pruned."""
    pruned: float = 0.25
    """Share of the hidden units of each block that goes then; 0: nothing is pruned."""

    def __post_init__(self) -> None:
        if self.edges < 1 or self.period < 1 or self.dense < 0 or self.trust < 0 or not 0 <= self.pruned < 1:
            raise InputError("edges and period from 1, dense and trust from 0 and pruned from 0 to below 1 were expected")

    def stages(self) -> tuple[Stage, ...]:
        enrol = gathering("enrol", self.enrolled, self.tell, replies=(Labels,), check=self.told, images=False)
        return (
            enrol,
            *(Stage("train", self.aggregate, self.train, client_fraction=self.client_fraction, images=False),) * self.rounds,
        )

    def init(self, ctx: ServerContext) -> Server:
        return Server(ctx.task.init(ctx.rng), {}, {}, {}, 0)

    def broadcast(self, server: Server, site: str) -> Model:
        edge = next((edge for edge, sites in server.members.items() if site in sites), None)
        return Model(server.model if edge is None else server.edges[edge])

    # enrol: sites say which classes they have, and join an edge

    def tell(self, received: Empty, state: None, ctx: ClientContext) -> Reply[Labels]:
        counts = ctx.data["train"]["label"].bincount(minlength=ctx.task.classes)
        return Reply(Labels(tuple(map(float, counts.tolist()))), state, float(rows(ctx.data["train"])), {})

    def told(self, reply: Reply[Labels], site: str, ctx: ServerContext) -> None:
        """Raise `InputError` if the counts are not those of the site's rows."""
        count_fits(reply.message.counts, ctx.task.classes, reply.weight)

    def enrolled(self, server: Server, replies: Replies[Labels], ctx: ServerContext) -> tuple[Server, Metrics]:
        labels = {site: counted(torch.tensor(reply.message.counts), reply.weight) for site, reply in replies.items()}
        return self.joined(replace(server, labels=labels), ctx), {}

    def joined(self, server: Server, ctx: ServerContext) -> Server:
        """Every edge has the cloud's model; the sites, in an order that is drawn, choose where they make classes most even."""
        sites = [sorted(server.labels)[i] for i in torch.randperm(len(server.labels), generator=ctx.rng).tolist()]
        names = [f"edge-{i}" for i in range(min(self.edges, len(sites)))]
        members: dict[str, dict[str, Tensor]] = {name: {} for name in names}
        for site in sites:
            room = [name for name in names if len(members[name]) < -(-len(sites) // len(names))]
            gains = {name: gain(server.labels[site], members[name].values()) for name in room}
            members[max(room, key=lambda name: gains[name])][site] = server.labels[site]
        members = {name: dict(sorted(sites.items())) for name, sites in members.items() if sites}
        return replace(server, edges=dict.fromkeys(members, server.model), members=members)

    # train

    def train(self, received: Model, state: None, ctx: ClientContext) -> Reply[Model]:
        there = replace(ctx, task=ctx.task.fitting(received.model))
        model, metrics = fit(there, received.model, self.local, ctx.data["train"])
        return upload(model, state, ctx, metrics)

    def aggregate(self, server: Server, replies: Replies[Model], ctx: ServerContext) -> tuple[Server, Metrics]:
        edges = dict(server.edges)
        for edge, sites in server.members.items():
            answered = {
                site: replace(replies[site], weight=self.weight(replies[site].weight, labels))
                for site, labels in sites.items()
                if site in replies
            }
            if answered:
                edges[edge] = {**edges[edge], **self.robust.combine(edges[edge], answered)}
        server = replace(server, edges=edges, done=server.done + 1)
        even = {edge: together(sites.values()) for edge, sites in server.members.items()}
        server = replace(server, model=mean((edges[edge], self.weight(int(n.sum()), n)) for edge, n in even.items()))
        metrics = {f"homogeneity/{edge}": homogeneity(counts) for edge, counts in even.items()}
        prune = bool(self.pruned) and server.done == self.dense
        if prune:
            server = replace(server, model=denoiser(ctx).pruned(server.model, self.pruned))
        if prune or server.done % self.period == 0:
            server = self.joined(server, ctx)
        return server, {**metrics, "parameters": float(sum(value.numel() for value in server.model.values()))}

    def weight(self, count: float, labels: Tensor) -> float:
        """n·h^trust."""
        found: float = count * homogeneity(labels) ** self.trust
        return found
