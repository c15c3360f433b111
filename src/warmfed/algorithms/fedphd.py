"""FedPhD: hierarchical averaging weighted by class balance, and pruning.

Long, Wang, Anagnostopoulos, Bi, "FedPhD: Federated Pruning with Hierarchical Learning of Diffusion Models", 2025,
arXiv:2507.06449.

The full text was not available; this reading follows the abstract. Edge servers stand between sites and cloud. A site joins the
edge whose class balance improves most. An edge averages its sites each round. The cloud averages the edges every few
rounds. Both averages weigh by number of images and class balance (homogeneity). After the dense rounds, the network is
pruned: in each block, the hidden units of the smallest norm are removed. Later rounds train and send the smaller model.

Departures: edges are groups of sites within the server, so an edge round saves no traffic. The homogeneity score is one
minus the total variation distance to equal classes. Each edge takes the same number of sites, since one edge would get all
of them otherwise. Pruning removes hidden units between two layers of a block; blocks keep their outer width.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from ..core import ClientContext, Empty, Metrics, Replies, Reply, ServerContext, Stage, denoiser
from ..core.messages import message
from ..core.tensors import Tensors, mean, rows
from ..core.training import Training
from ..fit import fit
from ..utils.errors import InputError
from .shared.base import DRAWING, Combined, Model, count_fits, counted, gathering, upload


@message("fedphd.Server")
class Server:
    """The cloud's last model, the edges' models, and the sites of each edge."""

    model: Tensors
    edges: Mapping[str, Tensors]
    members: Mapping[str, Tensors]  # class counts, by edge and site
    labels: Tensors  # class counts, by site
    done: int  # rounds so far


@message("fedphd.Labels")
class Labels:
    """Class counts of a site."""

    counts: tuple[float, ...]


def homogeneity(counts: Tensor) -> float:
    """Return 1 - ½·Σ|q_c - 1/C|: 1 if all C classes are equally frequent, 1/C if there is only one."""
    share = counts.double() / counts.sum().clamp(min=1)
    return 1 - 0.5 * (share - 1 / len(share)).abs().sum().item()


def together(counts: Iterable[Tensor]) -> Tensor:
    """Return the sum of class counts."""
    return torch.stack(list(counts)).sum(0)


def gain(counts: Tensor, there: Collection[Tensor]) -> float:
    """Return the increase of an edge's homogeneity if these counts join; an edge without sites has homogeneity 0."""
    return homogeneity(together([counts, *there])) - (homogeneity(together(there)) if there else 0.0)


@final
@dataclass(frozen=True)
class FedPhD(Combined[Server, Model, None, Model]):
    """Average within and across edges by class balance, and prune the network after the dense rounds."""

    local: Training = DRAWING
    """Local training in one round."""
    edges: int = 2
    """Number of edge servers; at least 1."""
    period: int = 2
    """Edge rounds r_g between two averages of the cloud; at least 1."""
    trust: float = 1.0
    """Exponent of the homogeneity in the weights of both averages; at least 0, 0: number of images only."""
    dense: int = 2
    """Rounds before pruning; at least 0."""
    pruned: float = 0.25
    """Share of the hidden units of each block that is pruned, from 0 to below 1; 0: no pruning."""

    def __post_init__(self) -> None:
        if self.edges < 1 or self.period < 1 or self.dense < 0 or self.trust < 0 or not 0 <= self.pruned < 1:
            raise InputError(
                "edges and period must be at least 1, dense and trust at least 0, pruned from 0 to below 1; check [algorithm]"
            )

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

    # enrol: sites send their class counts and join an edge

    def tell(self, received: Empty, state: None, ctx: ClientContext) -> Reply[Labels]:
        counts = ctx.data["train"]["label"].bincount(minlength=ctx.task.classes)
        return Reply(Labels(tuple(map(float, counts.tolist()))), state, float(rows(ctx.data["train"])), {})

    def told(self, reply: Reply[Labels], site: str, ctx: ServerContext) -> None:
        """Raise `InputError` if the counts do not add up to the site's rows."""
        count_fits(reply.message.counts, ctx.task.classes, reply.weight)

    def enrolled(self, server: Server, replies: Replies[Labels], ctx: ServerContext) -> tuple[Server, Metrics]:
        labels = {site: counted(torch.tensor(reply.message.counts), reply.weight) for site, reply in replies.items()}
        return self.joined(replace(server, labels=labels), ctx), {}

    def joined(self, server: Server, ctx: ServerContext) -> Server:
        """Give every edge the cloud's model, and let the sites, in random order, join the edge with the largest gain."""
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
        """Return n·h^trust."""
        found: float = count * homogeneity(labels) ** self.trust
        return found
