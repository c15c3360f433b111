"""FedPFT: one shot of Gaussian mixtures of features; the server trains the head on samples of them.

Beitollahi, Bie, Hemati, Brunswic, Li, Chen, Zhang, "Parametric Feature Transfer: One-shot Federated Learning with Foundation
Models", 2024, arXiv:2402.01862.

Each site fits a mixture to the features of each class that it holds, by the body of the initial model, and sends it. The server
samples as many features as the site has images, and trains the head on those of all sites.

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

    def __post_init__(self) -> None:
        check_choices(self)
        if self.components < 1:
            raise InputError(f"components must be at least 1; got {self.components}")

    def samples(self, rows: Mapping[str, int], pairs: int) -> int:
        return sum(rows.values())

    def stages(self) -> tuple[Stage, ...]:
        return (self.description,) + (self.round,) * self.rounds

    def describe(self, received: Model, state: None, ctx: ClientContext) -> Reply[FeatureGaussians]:
        return self.gaussians_of(received, ctx, self.components, self.covariance)

    def check_features(self, reply: Reply[FeatureGaussians], site: str, ctx: ServerContext) -> None:
        check_gaussians(reply.message, len(ctx.prompts), self.width(ctx), self.components, self.covariance, reply.weight)

    def set_head(self, server: Model, replies: Replies[FeatureGaussians], ctx: ServerContext) -> tuple[Model, Metrics]:
        tables = [sampled(reply.message, admitted(reply), self.covariance, ctx.rng) for reply in replies.values()]
        return self.tuned(server, join(tables), ctx)
