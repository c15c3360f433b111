"""How good samples are: Fréchet and kernel distance, precision, recall, density, coverage, and copies of training images.

Statistics are torchmetrics'; features are the user's choice, since Inception's weights are a download: scores compare only
within one choice of features and one number of samples, which are told with them, as is real against real as the floor.
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
from ..utils.settings import check_choices
from .features import Extractor, extractor


@dataclass(frozen=True)
class Evaluation:
    """How a generator is measured."""

    samples: int = 1000
    """Samples drawn for a measurement, classes as frequent as in the data; 0: none is made."""
    when: Literal["every", "last"] = "last"
    """every (stage that may change the model) or last."""
    features: str = "public"
    """What looks at images: public (the body of the base's public classifier), a warmfed classifier's .safetensors, a LeNet's
    or ResNet-20's .npz, or a folder of a Hugging Face vision model; for adapters also global (the run's own classifier)."""
    neighbours: int = 5
    """k of precision, recall, density and coverage."""
    adapters: bool = False
    """Whether the samples of each site's adapter are measured too, against that site's images, at the end of a run."""

    def __post_init__(self) -> None:
        check_choices(self)
        if self.samples < 0 or self.samples == 1 or self.neighbours < 1:
            raise InputError("samples must be 0 (none) or at least 2, and neighbours at least 1; check [evaluation]")


def check(settings: Evaluation, base: str, federation: Federation, *, drawn: bool, weights: bool = True) -> None:
    """Raise `InputError` where what a run is to measure cannot be: before it begins.

    Args:
        base: whose public classifier `features` may mean.
        drawn: whether the run learns a diffusion model, which is measured; otherwise its adapters may be.
        weights: whether the base's weights must be there.
    """
    if not (settings.samples if drawn else settings.adapters) or (settings.features == "global" and not drawn):
        return
    path = Path(settings.features)
    if settings.features == "public":
        path = pipeline.find(base, weights=weights) / "classifier.safetensors"
    if not path.exists():
        other = "a file" if drawn else "global, or to a file"
        raise InputError(f"what looks at samples (evaluation.features): {path} is not there; set features to {other}")
    if weights:
        extractor(settings.features, base, federation.shape)
    if drawn and min(sum(rows(site.splits[part]) for site in federation.sites.values()) for part in ("train", "test")) < 2:
        raise InputError(
            "a generator is measured against at least two training and two test images; set evaluation.samples to 0"
        )


def adapter_scores(
    look: Extractor, federation: Federation, samples: Mapping[str, Table], neighbours: int
) -> dict[str, dict[str, float]]:
    """By site, how good the samples of its adapter are, against its own images: all that `distances`, `neighbourhoods`,
    `memorization_rate`, `diversity` and `nearest` say, and the floor of the distances, which is test against training images.

    Args:
        samples: {"image", "label", "kept"} by site, as a run keeps them; those that were dropped count too.
    """
    found: dict[str, dict[str, float]] = {}
    for name, mine in samples.items():
        site = federation.sites[name]
        if rows(mine) < 2:
            continue
        fake, seen, unseen = look(mine["image"]), look(site.train["image"]), look(site.test["image"])
        scores = distances(seen, fake) if len(seen) > 1 else {}
        scores |= neighbourhoods(seen, fake, neighbours) | memorization_rate(seen, unseen, fake)
        scores |= {
            "diversity": diversity(seen, site.train["label"], fake, mine["label"]),
            "nearest": nearest(seen, unseen, fake),
            "kept": 100 * mine["kept"].double().mean().item(),
            "samples": float(rows(mine)),
        }
        if min(len(seen), len(unseen)) > 1:
            scores |= {f"floor_{key}": value for key, value in distances(seen, unseen).items()}
        found[name] = {key: value for key, value in scores.items() if math.isfinite(value)}
    return found


SCHOOL = Training(lr=0.02, epochs=15, batch_size=64, schedule="cosine", weight_decay=5e-4, max_grad_norm=1.0)
"""Training of the classifier that learns from samples alone."""


@dataclass(frozen=True, eq=False)
class GeneratorEvaluator:
    """Measures the generator of a run on this machine; in a deployment nobody sees all sites' images, and nobody can."""

    settings: Evaluation
    task: Denoise
    federation: Federation
    base: str
    seed: int
    device: str = "cpu"
    """Where samples are drawn and learned from; what looks at them is on the processor."""

    @classmethod
    def for_run(
        cls, settings: Evaluation, task: object, federation: object, base: str, seed: int, device: str = "cpu"
    ) -> "GeneratorEvaluator | None":
        """The gauge of a run; None where nothing can be measured."""
        if isinstance(task, Denoise) and isinstance(federation, Federation) and settings.samples:
            return cls(settings, task, federation, base, seed, device)
        return None

    def due(self, done: Round, *, last: bool) -> bool:
        """Whether the model is measured after this stage."""
        return last or (self.settings.when == "every" and bool(done.evaluation))

    @functools.cached_property
    def _real(self) -> tuple[Extractor, str, Table, Table, Tensor, Tensor]:
        sites = self.federation.sites.values()
        train, test = join(site.train for site in sites), join(site.test for site in sites)
        look, digest = extractor(self.settings.features, self.base, self.federation.shape)
        return look, digest, train, test, look(train["image"]), look(test["image"])

    def _drawing(self, model: Any, train: Table, classes: int) -> list[tuple[Tensors, Tensor, tuple[str, ...]]]:
        """Which model draws which labels, and what names its noise."""
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
        """Samples against training images; `floor_…` is test against training images, the best that can be hoped for.

        Args:
            model: the global one; or by site each one's own: then each draws its site's share, classes as frequent as there.

        Returns:
            fid, kid, precision, recall, density, coverage, memorization_rate (in percent); of conditional models `cas`, the
            accuracy on real test images of a classifier trained on samples alone (Ravuri and Vinyals, NeurIPS 2019); the number
            of samples, and the SHA-256 of what looked at them.
        """
        look, digest, train, test, seen, unseen = self._real
        classes = len(self.federation.classes)
        drawing = self._drawing(model, train, classes)
        label = torch.cat([each for _, each, _ in drawing])
        drawn_by = [
            self.task.sample(one, each, stream(self.seed, "measure", step, *who), self.device) for one, each, who in drawing
        ]
        fake = self.task.decoded(torch.cat(drawn_by))
        found: dict[str, Any] = {"features": digest, "samples": len(fake), "models": len(drawing)}
        drawn, k = look(fake), self.settings.neighbours
        found |= distances(seen, drawn) | neighbourhoods(seen, drawn, k) | memorization_rate(seen, unseen, drawn)
        found |= {f"floor_{name}": value for name, value in distances(seen, unseen).items()}
        if self.task.settings.conditional:
            school = ServerContext(Classify(self.federation.shape, classes), stream(self.seed, "school"), device=self.device)
            pupil, _ = fit(school, school.task.init(school.rng), SCHOOL, {"image": fake, "label": label})
            found["cas"] = school.task.metrics(pupil, test, self.device)["accuracy"]
        return found
