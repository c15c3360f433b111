"""FedAMP and HeurFedAMP: a mixture of models for each site, weighted by similarity.

Huang et al., "Personalized Cross-Silo Federated Learning on Non-IID Data", AAAI 2021, arXiv:2007.03797, Algorithm 1 and
Section "HeurFedAMP".

The default is HeurFedAMP, which the paper proposes for deep networks. The defaults of σ, ξ_ii (`itself`) and λ are ours.

Departures: a fixed number of epochs from the site's last model solves the proximal problem. A site without a model yet
receives the mean of the known models.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor

from ..core import ClientContext, Metrics, Replies, Reply, ServerContext
from ..core.messages import message
from ..core.tensors import Tensors, learned, mean
from ..fit import fit, proximal
from ..utils.errors import InputError
from ..utils.settings import check_choices
from .shared.base import Model, Rounds, upload


@message("fedamp.Server")
class Server:
    """The last model and the mixture of each site, and the model for a site that has none yet."""

    start: Tensors  # random weights; later the mean of the sites' models
    personal: Mapping[str, Tensors]  # w_i
    cloud: Mapping[str, Tensors]  # u_i


@final
@dataclass(frozen=True)
class FedAMP(Rounds[Server, Model, Model, Model]):
    """Train each site's model near its own mixture of all sites' models; no global model."""

    attention: Literal["distance", "cosine"] = "cosine"
    """Similarity of two models: distance (FedAMP) or cosine (HeurFedAMP)."""
    sigma: float = 10.0
    """Width σ of A(x) = 1 - exp(-x/σ) in the squared distance, or factor of the cosine; above 0."""
    alpha: float = 1.0
    """Step α_k of the mixing; above 0; used by distance."""
    itself: float = 0.5
    """Weight ξ_ii of a site's own model, from 0 to 1; used by cosine."""
    lam: float = 0.1
    """Weight λ: the local loss adds λ/(2α_k)·||w - u_i||²; with cosine, α_k is 1."""

    def __post_init__(self) -> None:
        check_choices(self)
        if not self.sigma > 0 or not self.alpha > 0 or not 0 <= self.itself <= 1:
            raise InputError("sigma and alpha must be above 0, itself at least 0 and at most 1; check [algorithm]")

    def init(self, ctx: ServerContext) -> Server:
        return Server(ctx.task.init(ctx.rng), {}, {})

    def broadcast(self, server: Server, site: str) -> Model:
        return Model(server.cloud.get(site, server.start))

    def init_client_state(self, received: Model, ctx: ClientContext) -> Model:
        return Model(received.model)

    def train(self, received: Model, state: Model, ctx: ClientContext) -> Reply[Model]:
        held = self.lam / (self.alpha if self.attention == "distance" else 1.0)
        model, metrics = fit(ctx, state.model, self.local, ctx.data["train"], penalty=proximal(received.model, held))
        return upload(model, Model(model), ctx, metrics)

    def aggregate(self, server: Server, replies: Replies[Model], ctx: ServerContext) -> tuple[Server, Metrics]:
        personal = dict(sorted({**server.personal, **{site: r.message.model for site, r in replies.items()}}.items()))
        weights = [learned(w) for w in personal.values()]
        weight = self.weights([torch.cat([value.double().flatten() for value in w.values()]) for w in weights])
        cloud = {
            site: mean(zip(personal.values(), share.tolist(), strict=True))
            for site, share in zip(personal, weight, strict=True)
        }
        start = mean((w, 1.0) for w in personal.values())
        return Server(start, personal, cloud), {"own_weight": weight.diagonal().mean().item()}

    def weights(self, models: list[Tensor]) -> Tensor:
        """Return ξ, float64 [sites, sites], whose rows sum to 1.

        Args:
            models: flat models of the sites.
        """
        flat, count = torch.stack(models), len(models)
        if count == 1:
            return torch.ones(1, 1, dtype=torch.float64)
        if self.attention == "cosine":
            unit = flat / flat.norm(dim=1, keepdim=True).clamp_min(1e-12)
            like = (self.sigma * (unit @ unit.T)).masked_fill(torch.eye(count, dtype=torch.bool), -math.inf)
            found: Tensor = (1 - self.itself) * like.softmax(-1) + self.itself * torch.eye(count, dtype=torch.float64)
            return found
        squared = torch.cdist(flat, flat, compute_mode="donot_use_mm_for_euclid_dist").square()
        weight = self.alpha / self.sigma * (-squared / self.sigma).exp()  # α_k·A'(||w_i - w_j||²)
        weight.fill_diagonal_(0)
        weight += torch.diag(1 - weight.sum(1))
        if weight.min() < 0:
            raise InputError(
                f"the other sites weigh more than 1 in a site's model; set alpha below sigma/(sites - 1), "
                f"now {self.alpha} and {self.sigma}/{count - 1}"
            )
        return weight

    def global_model(self, server: Server) -> Tensors | None:
        return None

    def client_model(self, received: Model, state: Model) -> Tensors | None:
        return state.model
