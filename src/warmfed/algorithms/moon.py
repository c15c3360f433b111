"""MOON: a contrastive loss towards the global model and away from the site's last one.

Li, He, Song, "Model-Contrastive Federated Learning", CVPR 2021, arXiv:2103.16257, Algorithm 1.

Departures: representations are the features under the classifier's head; the paper adds a projection head. A site in its first
round has no previous model, and its loss has no contrastive term.
"""

from dataclasses import dataclass
from functools import partial
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core import ClientContext, Reply, classifier
from ..core.tensors import Table
from ..fit import fit
from .shared.base import Averaging, Model, Personal, upload


def contrast(now: Tensor, near: Tensor, far: Tensor, temperature: float) -> Tensor:
    """Return ℓ_con, mean over rows; `now`, `near` and `far` are float [n, width].

    ℓ_con = -log(e^(sim(now, near)/τ) / (e^(sim(now, near)/τ) + e^(sim(now, far)/τ)))
    """
    similar = torch.stack([F.cosine_similarity(now, other, -1) for other in (near, far)], -1)
    return F.cross_entropy(similar / temperature, torch.zeros(len(now), dtype=torch.long, device=now.device))


@final
@dataclass(frozen=True)
class MOON(Averaging[Personal, Model]):
    """Run FedAvg with a contrastive loss between the local, the global and the last local features."""

    mu: float = 1.0
    """Weight μ of the contrastive loss; at least 0 (the authors' code for CIFAR-10: 5)."""
    temperature: float = 0.5
    """Temperature τ of the contrastive loss."""

    def init_client_state(self, received: Model, ctx: ClientContext) -> Personal:
        return Personal(None)

    def train(self, received: Model, state: Personal, ctx: ClientContext) -> Reply[Model]:
        data, loss = ctx.data["train"], None
        if self.mu and state.model is not None:
            near, far = (classifier(ctx).features(other, data, device=ctx.device) for other in (received.model, state.model))
            data = {**data, "near": near, "far": far}  # z_glob, z_prev
            loss = partial(self.contrasted, ctx)
        model, metrics = fit(ctx, received.model, self.local, data, loss=loss)
        return upload(model, Personal(model), ctx, metrics)

    def contrasted(self, ctx: ClientContext, model: nn.Module, batch: Table) -> Tensor:
        """Return cross-entropy + μ·ℓ_con."""
        features = classifier(ctx).embed(model, batch)  # z
        logits = model.get_submodule("head")(features)
        far = contrast(features, batch["near"], batch["far"], self.temperature)
        return F.cross_entropy(logits, batch["label"]) + self.mu * far
