"""FedPFT: one shot of Gaussian mixtures of features; the server trains the head on samples of them.

Beitollahi, Bie, Hemati, Brunswic, Li, Chen, Zhang, "Parametric Feature Transfer: One-shot Federated Learning with Foundation
Models", 2024, arXiv:2402.01862.

Each site fits a mixture to the features of each class that it holds, by the body of the initial model, and sends it. The server
samples as many features as the site has images, at most `most` of a class, and trains the head on those of all sites.

Departures: rounds of FedAvg follow; with `rounds` 0 it is the paper's method. The paper's body is a frozen foundation model:
set `model.backbone` or a public start. There is no differential privacy here.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

from ..core import ClientContext, Metrics, Replies, Reply, ServerContext, Stage
from ..core.tensors import join
from ..utils.errors import InputError
from ..utils.settings import check_choices
from .shared.base import Model
from .shared.feature_gaussians import Covariance, FeatureGaussians, HeadFromFeatures, admitted, check_gaussians, sampled


@final
@dataclass(frozen=True)
class FedPFT(HeadFromFeatures):
    """Train the head on features sampled from the sites' Gaussian mixtures."""

    components: int = 1
    """Number K of Gaussians of a class at a site; at least 1."""
    covariance: Covariance = "diagonal"
    """Covariances: spherical, diagonal or full."""
    most: int = 2000
    """Largest number of features that the server samples for a class of a site; at least 1."""

    def __post_init__(self) -> None:
        check_choices(self)
        if self.components < 1 or self.most < 1:
            raise InputError(f"components and most must be at least 1; got {self.components} and {self.most}")

    def samples(self, rows: Mapping[str, int], pairs: int) -> int:
        return sum(rows.values())

    def stages(self) -> tuple[Stage, ...]:
        return (self.description,) + (self.round,) * self.rounds

    def describe(self, received: Model, state: None, ctx: ClientContext) -> Reply[FeatureGaussians]:
        return self.gaussians_of(received, ctx, self.components, self.covariance)

    def check_features(self, reply: Reply[FeatureGaussians], site: str, ctx: ServerContext) -> None:
        check_gaussians(reply.message, len(ctx.prompts), self.width(ctx), self.components, self.covariance, reply.weight)

    def set_head(self, server: Model, replies: Replies[FeatureGaussians], ctx: ServerContext) -> tuple[Model, Metrics]:
        counts = [admitted(reply).clamp_max(self.most) for reply in replies.values()]
        sent = [reply.message for reply in replies.values()]
        tables = [sampled(one, count, self.covariance, ctx.rng) for one, count in zip(sent, counts, strict=True)]
        return self.tuned(server, join(tables), ctx)
