"""Evaluation of a generator's samples: FID, KID, precision, recall, density, coverage, memorization rate and CAS.

Scores are comparable only for one feature extractor and one number of samples; the results give both. The distance between
test and training images is reported as the lower bound.
"""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..core import Round, ServerContext
from ..core.rng import stream
from ..core.tensors import Table, Tensors, apportion, join, rows
from ..core.training import Training
from ..data import Federation
from ..diffusion import pipeline
from ..fit import fit
from ..metrics.images import distances, diversity, memorization_rate, nearest, neighbourhoods
from ..tasks.classification import Classify
from ..tasks.denoising import Denoise
from ..utils.errors import InputError
from ..utils.paths import exists
from ..utils.settings import check_choices
from .features import Extractor, extractor


@dataclass(frozen=True)
class Evaluation:
    """Settings of the evaluation of a generator."""

    samples: int = 1000
    """Number of samples of an evaluation, with the class frequencies of the data; at least 2, or 0 for no evaluation."""
    when: Literal["every", "last"] = "last"
    """Stages that are evaluated: every stage that may change the model, or the last."""
    features: str = "public"
    """Feature extractor: public (backbone of the base's public classifier), a warmfed classifier's .safetensors, a LeNet's
    or ResNet-20's .npz, or the folder of a Hugging Face vision model; for adapters also global (the run's own classifier)."""
    neighbours: int = 5
    """k of precision, recall, density and coverage; at least 1."""
    adapters: bool = False
    """Evaluation of each site's adapter against that site's images, at the end of a run."""

    def __post_init__(self) -> None:
        check_choices(self)
        if self.samples < 0 or self.samples == 1 or self.neighbours < 1:
            raise InputError(
                "[evaluation]: expected samples of 0 (none) or at least 2 and neighbours of at least 1, "
                f"got {self.samples} and {self.neighbours}"
            )


def check(settings: Evaluation, base: str, federation: Federation, *, drawn: bool, weights: bool = True) -> None:
    """Check before a run that its evaluation is possible.

    Args:
        settings: the evaluation.
        base: the base whose public classifier the features "public" select.
        federation: the run's data.
        drawn: whether the run trains a diffusion model; otherwise only its adapters can be evaluated.
        weights: whether the base's weights must exist.

    Raises:
        InputError: if the feature extractor is missing or unusable, or there are fewer than two real images.
    """
    if not (settings.samples if drawn else settings.adapters) or (settings.features == "global" and not drawn):
        return
    path = Path(settings.features)
    if settings.features == "public":
        path = pipeline.find(base, weights=weights) / pipeline.PUBLIC_CLASSIFIER
    if not exists(path):
        other = "a file" if drawn else "global, or to a file"
        raise InputError(f"the feature extractor (evaluation.features) {path} is not there; set features to {other}")
    if weights:
        extractor(settings.features, base, federation.shape)
    if drawn and min(sum(rows(site.splits[part]) for site in federation.sites.values()) for part in ("train", "test")) < 2:
        raise InputError(
            "the evaluation of a generator needs at least two training and two test images; set evaluation.samples to 0"
        )


def adapter_scores(
    extract: Extractor, federation: Federation, samples: Mapping[str, Table], neighbours: int
) -> dict[str, dict[str, float]]:
    """Return the scores of each site's adapter against that site's images.

    Args:
        extract: the feature extractor.
        federation: the run's data.
        samples: {"image", "label", "kept"} by site, as a run keeps them; samples that the filters dropped count too.
        neighbours: k of `neighbourhoods`.

    Returns:
        By site, the finite values of `distances`, `neighbourhoods`, `memorization_rate`, `diversity` and `nearest`; the share
        kept in percent; the number of samples; and `floor_fid` and `floor_kid` of the test against the training images.
    """
    found: dict[str, dict[str, float]] = {}
    for name, mine in samples.items():
        site = federation.sites[name]
        if rows(mine) < 2:
            continue
        fake, train, test = extract(mine["image"]), extract(site.train["image"]), extract(site.test["image"])
        scores = distances(train, fake) if len(train) > 1 else {}
        scores |= neighbourhoods(train, fake, neighbours) | memorization_rate(train, test, fake)
        scores |= {
            "diversity": diversity(train, site.train["label"], fake, mine["label"]),
            "nearest": nearest(train, test, fake),
            "kept": 100 * mine["kept"].double().mean().item(),
            "samples": float(rows(mine)),
        }
        if min(len(train), len(test)) > 1:
            scores |= {f"floor_{key}": value for key, value in distances(train, test).items()}
        found[name] = {key: value for key, value in scores.items() if math.isfinite(value)}
    return found


CAS_TRAINING = Training(lr=0.02, epochs=15, batch_size=64, schedule="cosine", weight_decay=5e-4, max_grad_norm=1.0)
"""Training of the CAS classifier, on samples only."""


@dataclass(frozen=True, eq=False)
class GeneratorEvaluator:
    """Evaluate the generator of a local run; a deployment has no machine with the images of all sites."""

    settings: Evaluation
    task: Denoise
    federation: Federation
    base: str
    seed: int
    device: str = "cpu"
    """Device of the sampling and of the CAS classifier; the feature extractor runs on the CPU."""

    @classmethod
    def for_run(
        cls, settings: Evaluation, task: object, federation: object, base: str, seed: int, device: str = "cpu"
    ) -> "GeneratorEvaluator | None":
        """Return the evaluator of a run, or None if the run has nothing to evaluate."""
        if isinstance(task, Denoise) and isinstance(federation, Federation) and settings.samples:
            return cls(settings, task, federation, base, seed, device)
        return None

    def due(self, done: Round, *, last: bool) -> bool:
        """Return whether the model is evaluated after this stage."""
        return last or (self.settings.when == "every" and bool(done.evaluation))

    @functools.cached_property
    def _real(self) -> tuple[Extractor, str, Table, Table, Tensor, Tensor]:
        sites = self.federation.sites.values()
        train, test = join(site.train for site in sites), join(site.test for site in sites)
        extract, digest = extractor(self.settings.features, self.base, self.federation.shape)
        return extract, digest, train, test, extract(train["image"]), extract(test["image"])

    def _drawing(self, model: Any, train: Table, classes: int) -> list[tuple[Tensors, Tensor, tuple[str, ...]]]:
        """Return (model, labels that it samples, extra key of its noise stream) for each model."""
        if not isinstance(next(iter(model.values())), Mapping):
            return [(model, apportion(train["label"].bincount(minlength=classes), self.settings.samples), ())]
        sizes = torch.tensor([len(site.train["label"]) for site in self.federation.sites.values()])
        shares = apportion(sizes, self.settings.samples).bincount(minlength=len(sizes)).tolist()
        counts = {name: site.train["label"].bincount(minlength=classes) for name, site in self.federation.sites.items()}
        return [
            (model[name], apportion(counts[name], share), (name,))
            for name, share in zip(counts, shares, strict=True) if share and name in model
        ]  # fmt: skip

    def measure(self, model: Tensors | Mapping[str, Tensors], step: int) -> dict[str, Any]:
        """Return the scores of a model's samples against the training images.

        Args:
            model: the global model; or one model per site, each of which draws its site's share of the samples, with the
                class frequencies of that site.
            step: the stage, part of the key of the noise stream.

        Returns:
            fid and kid; precision, recall, density, coverage and memorization_rate in percent; floor_fid and floor_kid of the
            test against the training images, the lower bound; cas in percent, for conditional models; the numbers of samples
            and models; features, the fingerprint of the feature extractor.

        References:
            CAS: Ravuri and Vinyals, NeurIPS 2019.
        """
        extract, digest, train, test, real_train, real_test = self._real
        classes = len(self.federation.classes)
        drawing = self._drawing(model, train, classes)
        label = torch.cat([each for _, each, _ in drawing])
        drawn_by = [
            self.task.sample(one, each, stream(self.seed, "measure", step, *who), self.device) for one, each, who in drawing
        ]
        fake = self.task.decoded(torch.cat(drawn_by))
        found: dict[str, Any] = {"features": digest, "samples": len(fake), "models": len(drawing)}
        drawn, k = extract(fake), self.settings.neighbours
        found |= distances(real_train, drawn) | neighbourhoods(real_train, drawn, k)
        found |= memorization_rate(real_train, real_test, drawn)
        found |= {f"floor_{name}": value for name, value in distances(real_train, real_test).items()}
        if self.task.settings.conditional:
            ctx = ServerContext(Classify(self.federation.shape, classes), stream(self.seed, "school"), device=self.device)
            classifier, _ = fit(ctx, ctx.task.init(ctx.rng), CAS_TRAINING, {"image": fake, "label": label})
            found["cas"] = ctx.task.metrics(classifier, test, self.device)["accuracy"]
        return found
