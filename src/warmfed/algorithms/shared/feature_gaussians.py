"""Gaussians of class features: the sites describe their features by them, and the server trains a head on samples.

`HeadFromFeatures` is the abstract family of FedAvg with such a stage. Its methods differ in what a site sends, and when.
"""

import warnings
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ...core import ClientContext, Metrics, Replies, Reply, ServerContext, Stage, Workload, classifier
from ...core.messages import message
from ...core.tensors import Table, Tensors, layout_mismatch, rows
from ...core.training import Training
from ...fit import fit
from ...utils.errors import InputError
from .base import Averaging, Model, count_fits, counted, upload

Covariance = Literal["spherical", "diagonal", "full"]
_SMALLEST = 1e-6
"""Variance added to each feature of a Gaussian."""
HEAD = Training(optimizer="adam", lr=0.003, epochs=30, batch_size=64, schedule="cosine", max_grad_norm=1.0)
"""Default training of a head on sampled features."""


@message("gaussians.Features")
class FeatureGaussians:
    """A site's features of each class as a mixture of Gaussians, and the number of images behind it.

    Shapes:
        mixture: share [classes, k]; mean [classes, k, width]; spread, the covariance: [classes, k, 1], [classes, k, width] or
        [classes, k, width, width] in float32; count: images, int64 [classes]. Rows of classes without images are zeros.
    """

    mixture: Tensors
    count: Tensors


def shapes(classes: int, width: int, components: int, covariance: Covariance) -> Tensors:
    """Return empty tensors with the layout of a mixture."""
    of = {"spherical": (1,), "diagonal": (width,), "full": (width, width)}[covariance]
    return {
        "share": torch.empty(classes, components),
        "mean": torch.empty(classes, components, width),
        "spread": torch.empty(classes, components, *of),
    }


def gaussians(
    features: Tensor, label: Tensor, classes: int, components: int, covariance: Covariance, rng: torch.Generator
) -> FeatureGaussians:
    """Fit a mixture to the features of each class.

    Args:
        features: float [n, width].
        label: int64 [n].
        classes: number of classes.
        components: Gaussians of a class; a class of fewer images has as many Gaussians as images.
        covariance: form of the covariances.
        rng: source of the initial values of a mixture.
    """
    mixture = {
        name: torch.zeros_like(value) for name, value in shapes(classes, features.shape[1], components, covariance).items()
    }
    for each in label.unique().tolist():
        mine = features[label == each].double()
        found = _single(mine, covariance) if min(components, len(mine)) == 1 else _mixed(mine, components, covariance, rng)
        for name, value in found.items():
            mixture[name][each, : len(value)] = value.float()
    return FeatureGaussians(mixture, {"images": torch.bincount(label, minlength=classes)})


def _single(mine: Tensor, covariance: Covariance) -> dict[str, Tensor]:
    far = mine - mine.mean(0)
    if covariance == "full":
        spread = far.T @ far / len(mine)
    else:
        spread = far.square().mean(0)
        spread = spread.mean(0, keepdim=True) if covariance == "spherical" else spread
    return {"share": torch.ones(1), "mean": mine.mean(0)[None], "spread": spread[None]}


def _mixed(mine: Tensor, components: int, covariance: Covariance, rng: torch.Generator) -> dict[str, Tensor]:
    from sklearn.mixture import GaussianMixture

    kind = {"spherical": "spherical", "diagonal": "diag", "full": "full"}[covariance]
    seed = int(torch.randint(2**31, (), generator=rng))
    # k-means++ starts in numpy alone, so the number of threads cannot change a bit
    found = GaussianMixture(
        min(components, len(mine)), covariance_type=kind, reg_covar=_SMALLEST, random_state=seed, init_params="k-means++"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a mixture of few features may not converge
        found.fit(mine.numpy())
    spread = torch.from_numpy(found.covariances_)
    return {
        "share": torch.from_numpy(found.weights_),
        "mean": torch.from_numpy(found.means_),
        "spread": spread[:, None] if covariance == "spherical" else spread,
    }


def check_gaussians(
    sent: FeatureGaussians, classes: int, width: int, components: int, covariance: Covariance, weight: float
) -> None:
    """Raise `InputError` unless a site's mixtures have this layout, and shares, covariances and counts are possible ones."""
    wrong = layout_mismatch(sent.mixture, shapes(classes, width, components, covariance))
    wrong = wrong or layout_mismatch(sent.count, {"images": torch.empty(classes, dtype=torch.int64)})
    if wrong:
        raise InputError(wrong)
    count_fits(sent.count["images"].tolist(), classes, weight)
    share, spread = sent.mixture["share"], sent.mixture["spread"]
    held = sent.count["images"] > 0
    whole = bool((share >= 0).all() and ((share.sum(1) - held.float()).abs() <= 1e-3).all())
    if not whole or not (_positive(spread) if covariance == "full" else bool((spread >= 0).all())):
        raise InputError(
            "a share or a variance of its Gaussians is below 0, a covariance is not symmetric, or the shares of a class do not "
            "add up to 1"
        )


def _positive(covariances: Tensor) -> bool:
    """Return whether matrices are symmetric without negative eigenvalues, but for rounding."""
    wide = covariances.double()
    least = 1e-3 * wide.diagonal(dim1=-2, dim2=-1).abs().amax(-1).clamp_min(_SMALLEST)
    symmetric = ((wide - wide.mT).abs().amax((-2, -1)) <= least).all()
    return bool(symmetric and (torch.linalg.eigvalsh(wide)[..., 0] >= -least).all())


def sampled(sent: FeatureGaussians, count: Tensor, covariance: Covariance, rng: torch.Generator) -> Table:
    """Return features sampled from a site's mixtures, {"feature": float [n, width], "label": int64 [n]}.

    Args:
        sent: the mixtures.
        count: number of samples of each class, int64 [classes].
        covariance: form of the covariances.
        rng: source of the samples.
    """
    parts, labels = [], []
    for each in (count > 0).nonzero()[:, 0].tolist():
        wanted = int(count[each])
        share = sent.mixture["share"][each].double().clamp_min(0)
        place = torch.multinomial(share, wanted, replacement=True, generator=rng)
        mean, spread = sent.mixture["mean"][each], sent.mixture["spread"][each]
        noise = torch.randn(wanted, mean.shape[1], generator=rng)
        if covariance == "full":
            for component, one in enumerate(spread):
                noise[place == component] = noise[place == component] @ _root(one).T
        else:
            noise = noise * (spread[place] + _SMALLEST).sqrt()
        parts.append(mean[place] + noise)
        labels.append(torch.full((wanted,), each))
    return {"feature": torch.cat(parts), "label": torch.cat(labels)}


def _root(covariance: Tensor) -> Tensor:
    """Return a matrix R with R·Rᵀ = the covariance, whose negative eigenvalues count as 0."""
    values, vectors = torch.linalg.eigh((covariance + covariance.T).double() / 2)
    root: Tensor = vectors * (values.clamp_min(0) + _SMALLEST).sqrt()
    return root.float()


def merged(sent: Sequence[FeatureGaussians], counts: Sequence[Tensor]) -> FeatureGaussians:
    """Return the Gaussian of each class over all sites, of single Gaussians with full covariances.

    Σ = Σ_k n_k/n·(Σ_k + μ_k·μ_kᵀ) - μ·μᵀ
    """
    total = torch.stack([count.double() for count in counts]).sum(0).clamp_min(1e-12)
    weight = [count.double() / total for count in counts]
    mean = torch.stack([w[:, None] * s.mixture["mean"][:, 0].double() for w, s in zip(weight, sent, strict=True)]).sum(0)
    second = torch.zeros(*mean.shape, mean.shape[1], dtype=torch.float64)
    for w, s in zip(weight, sent, strict=True):
        own = s.mixture["mean"][:, 0].double()
        second += w[:, None, None] * (s.mixture["spread"][:, 0].double() + own.unsqueeze(2) * own.unsqueeze(1))
    spread = second - mean.unsqueeze(2) * mean.unsqueeze(1)
    held = torch.stack(list(counts)).sum(0) > 0
    mixture = {"share": held.float()[:, None], "mean": mean.float()[:, None], "spread": spread.float()[:, None]}
    return FeatureGaussians(mixture, {"images": torch.stack(list(counts)).sum(0).long()})


def means_of(message: FeatureGaussians, received: Model) -> Tensors:
    """Return what the admission policy compares between sites: the means, not the numbers of images."""
    return {"mixture/mean": message.mixture["mean"]}


def of_head(name: str) -> bool:
    """Return whether a tensor belongs to the head."""
    return name.startswith("head.")


@dataclass(frozen=True)
class HeadFromFeatures(Averaging[None, Model]):
    """Abstract: FedAvg, and one stage in which the sites describe their features and the server sets the head."""

    head: Training = HEAD
    """Training of the head on sampled features."""

    def further_work(self, rows: Mapping[str, int], pairs: int) -> tuple[Workload, ...]:
        return (Workload("head", "server", self.head.count(self.samples(rows, pairs)), self.head),)

    @abstractmethod
    def samples(self, rows: Mapping[str, int], pairs: int) -> int:
        """Return the number of features that the server samples."""

    @property
    def description(self) -> Stage:
        """The stage that sets the head."""
        return Stage(
            "describe",
            self.set_head,
            self.describe,
            replies=(FeatureGaussians,),
            check=self.check_features,
            change=means_of,
            images=False,
        )

    def train(self, received: Model, state: None, ctx: ClientContext) -> Reply[Model]:
        model, metrics = fit(ctx, received.model, self.local, ctx.data["train"])
        return upload(model, state, ctx, metrics)

    def gaussians_of(
        self, received: Model, ctx: ClientContext, components: int, covariance: Covariance
    ) -> Reply[FeatureGaussians]:
        """Return the Gaussians of a site's training images, by the features of the received model."""
        data = ctx.data["train"]
        features = classifier(ctx).features(received.model, data, device=ctx.device)
        sent = gaussians(features, data["label"], len(ctx.prompts), components, covariance, ctx.rng)
        return Reply(sent, None, float(rows(data)), {})

    @abstractmethod
    def describe(self, received: Model, state: None, ctx: ClientContext) -> Reply[Any]: ...

    @abstractmethod
    def check_features(self, reply: Reply[Any], site: str, ctx: ServerContext) -> None: ...

    @abstractmethod
    def set_head(self, server: Model, replies: Replies[Any], ctx: ServerContext) -> tuple[Model, Metrics]: ...

    def width(self, ctx: ServerContext) -> int:
        """Return the width of the features."""
        with torch.device("meta"):  # build shapes only, without weights
            return int(ctx.task.build().get_parameter("head.weight").shape[1])

    def tuned(self, server: Model, table: Table, ctx: ServerContext) -> tuple[Model, Metrics]:
        """Return the model whose head is trained on sampled features."""
        model, info = fit(ctx, server.model, self.head, table, trainable=of_head)
        return Model(model), {"samples": float(rows(table)), "head_loss": info["loss"]}


def admitted(reply: Reply[FeatureGaussians]) -> Tensor:
    """Return a reply's class counts, at most its admitted weight, as whole numbers."""
    return counted(reply.message.count["images"], reply.weight).round().long()
