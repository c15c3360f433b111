"""CCVR: after FedAvg, the head is calibrated on virtual features, sampled from the Gaussian of each class.

Luo, Chen, Hu, Zhang, Liang, Feng, "No Fear of Heterogeneity: Classifier Calibration for Federated Learning with Non-IID Data",
NeurIPS 2021, arXiv:2106.05001, Algorithm 1.

The sites send mean and covariance of the features of each class that they hold, by the last global model. The server merges
them into one Gaussian of each class and trains the head on as many samples of each.

Departures: covariances are those of the population (divided by n), not of the sample (n - 1).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import torch

from ..core import ClientContext, Metrics, Replies, Reply, ServerContext, Stage
from ..utils.errors import InputError
from .shared.base import Model
from .shared.feature_gaussians import FeatureGaussians, HeadFromFeatures, admitted, check_gaussians, merged, sampled


@final
@dataclass(frozen=True)
class CCVR(HeadFromFeatures):
    """Run FedAvg; then train the head on features sampled from one Gaussian of each class."""

    per_class: int = 200
    """Virtual features of each class; at least 1."""

    def __post_init__(self) -> None:
        if self.per_class < 1:
            raise InputError(f"per_class must be at least 1; got {self.per_class}")

    def samples(self, rows: Mapping[str, int], pairs: int) -> int:
        return self.per_class * max(1, pairs // max(len(rows), 1))

    def stages(self) -> tuple[Stage, ...]:
        return (self.round,) * self.rounds + (self.description,)

    def describe(self, received: Model, state: None, ctx: ClientContext) -> Reply[FeatureGaussians]:
        return self.gaussians_of(received, ctx, 1, "full")

    def check_features(self, reply: Reply[FeatureGaussians], site: str, ctx: ServerContext) -> None:
        check_gaussians(reply.message, len(ctx.prompts), self.width(ctx), 1, "full", reply.weight)

    def set_head(self, server: Model, replies: Replies[FeatureGaussians], ctx: ServerContext) -> tuple[Model, Metrics]:
        one = merged([reply.message for reply in replies.values()], [admitted(reply) for reply in replies.values()])
        count = torch.where(one.count["images"] > 0, self.per_class, 0)
        return self.tuned(server, sampled(one, count, "full", ctx.rng), ctx)
