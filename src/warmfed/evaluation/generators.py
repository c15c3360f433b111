"""How good samples are: Fréchet and kernel distance, precision, recall, density, coverage, and copies of training images.

Statistics are torchmetrics'; features are the user's choice, since Inception's weights are a download: scores compare only
within one choice of features and one number of samples, which are told with them, as is real against real as the floor.
"""

import functools
import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import models
from ..core import Central, Round
from ..core.rng import named
from ..core.tensors import Table, Tensors, dealt, join, rows, spread
from ..data import Federation
from ..data.readers.archives import DAMAGE, Archive
from ..diffusion import pipeline
from ..fit import Training, fit
from ..tasks.classification import Classify
from ..tasks.denoising import Denoise
from ..utils.errors import InputError
from ..utils.files import read_bytes

Extractor = Callable[[Tensor], Tensor]
"""uint8 images [n, 3, h, w] to features, float [n, width]."""


@dataclass(frozen=True)
class Measuring:
    """How a generator is measured."""

    samples: int = 1000
    """Samples drawn for a measurement, classes as frequent as in the data; 0: none is made."""
    when: str = "last"
    """every (stage that may change the model) or last."""
    features: str = "public"
    """What looks at images: public (the body of the base's public classifier), a warmfed classifier's .safetensors, a LeNet's
    or ResNet-20's .npz, or a folder of a Hugging Face vision model; for adapters also global (the run's own classifier)."""
    neighbours: int = 5
    """k of precision, recall, density and coverage."""
    adapters: bool = False
    """Whether the samples of each site's adapter are measured too, against that site's images, at the end of a run."""

    def __post_init__(self) -> None:
        if self.when not in ("every", "last"):
            raise InputError(f"when must be every or last; got {self.when!r}")
        if self.samples < 0 or self.samples == 1 or self.neighbours < 1:
            raise InputError("samples must be 0 (none) or at least 2, and neighbours at least 1; check [measuring]")


def check(settings: Measuring, base: str, federation: Federation, *, drawn: bool, weights: bool = True) -> None:
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
        raise InputError(f"what looks at samples (measuring.features): {path} is not there; set features to {other}")
    if weights:
        extractor(settings.features, base, federation.shape)
    if drawn and min(sum(rows(site.splits[part]) for site in federation.sites.values()) for part in ("train", "test")) < 2:
        raise InputError(
            "a generator is measured against at least two training and two test images; set measuring.samples to 0"
        )


def extractor(features: str, base: str, shape: tuple[int, int, int]) -> tuple[Extractor, str]:
    """What looks at images, and its fingerprint; raises `InputError` where there is no such thing."""
    path = pipeline.find(base) / "classifier.safetensors" if features == "public" else Path(features)
    if path.is_dir():
        return _hugging(path), f"{path.name}"
    data = read_bytes(path, "the network whose features measure samples")
    digest = hashlib.sha256(data).hexdigest()
    if path.suffix == ".npz":
        return _arrays(path), digest
    task, model = Classify.of(path, shape, "the classifier whose features measure samples")
    return lambda image: _batched(lambda part: task.features(model, {"image": part}), image), digest


def _batched(look: Extractor, image: Tensor, batch: int = 256) -> Tensor:
    with torch.inference_mode():
        return torch.cat([look(part) for part in image.split(batch)]).clone()


def _arrays(path: Path) -> Extractor:
    """A network of `warmfed.models` that its weights' names tell, from .npz."""
    try:
        held = Archive(path)
        weights = {name: torch.from_numpy(held[name]) for name in held.files}
    except DAMAGE as error:
        raise InputError(f"{path} is damaged or no .npz of arrays ({error}); restore it") from error
    for eyes in models.EYES.values():
        net = eyes()
        if {key for key in net.state_dict() if not key.endswith("num_batches_tracked")} == weights.keys():
            net.load_state_dict(weights, strict=False)
            net.eval().requires_grad_(False)
            return lambda image: _batched(net, image)
    raise InputError(
        f"{path} holds none of the networks {', '.join(models.EYES)}; its tensors are {', '.join(sorted(weights)[:4])}, …"
    )


def _hugging(folder: Path) -> Extractor:
    from transformers import AutoImageProcessor, AutoModel

    own: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        net = AutoModel.from_pretrained(folder, use_safetensors=True, **own).eval().requires_grad_(False)
        look = AutoImageProcessor.from_pretrained(folder, **own)
    except Exception as error:  # each model has its own; all mean that the folder is not what it should be
        raise InputError(f"cannot load a vision model from {folder} ({str(error).splitlines()[0]}); save it again") from error

    def features(part: Tensor) -> Tensor:
        inputs = look(images=list(part), return_tensors="pt")
        found = net(**inputs)
        pooled = getattr(found, "pooler_output", None)
        return pooled if pooled is not None else found.last_hidden_state.mean(1)

    return lambda image: _batched(features, image, 64)


class _Features(nn.Module):
    """Features are computed once and given to torchmetrics as they are."""

    num_features: int

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_features = width

    def forward(self, features: Tensor) -> Tensor:
        return features


def distances(real: Tensor, fake: Tensor) -> dict[str, float]:
    """Fréchet (Heusel et al., NeurIPS 2017) and kernel distance (Bińkowski et al., ICLR 2018) of features [n, width].

    Raises `InputError` where a side has but one image, which has no covariance.
    """
    if min(len(real), len(fake)) < 2:
        raise InputError(f"distances need two images on each side, {len(real)} and {len(fake)} are there; give more images")
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import poly_mmd

    width, size = real.shape[1], min(len(real), len(fake))
    eyes: Any = {"feature": _Features(width), "input_img_size": (width,)}
    frechet: Any = FrechetInceptionDistance(**eyes).set_dtype(torch.float64)
    frechet.update(real.double(), real=True)
    frechet.update(fake.double(), real=False)
    one, other = (spread({"features": table}, size)["features"].double() for table in (real, fake))
    return {"fid": frechet.compute().item(), "kid": poly_mmd(one, other).item()}


def neighbourhoods(real: Tensor, fake: Tensor, k: int) -> dict[str, float]:
    """In percent: precision and recall (Kynkäänniemi et al., NeurIPS 2019), density and coverage (Naeem et al., ICML 2020)."""

    def radius(points: Tensor) -> Tensor:
        return torch.cdist(points, points).kthvalue(min(k + 1, len(points))).values

    around_real, around_fake, apart = radius(real), radius(fake), torch.cdist(real, fake)
    inside = apart <= around_real[:, None]
    return {
        "precision": 100 * inside.any(0).double().mean().item(),
        "recall": 100 * (apart <= around_fake[None]).any(1).double().mean().item(),
        "density": 100 * (inside.double().sum(0).mean() / k).item(),
        "coverage": 100 * (apart.min(1).values <= around_real).double().mean().item(),
    }


def copies(train: Tensor, test: Tensor, fake: Tensor) -> dict[str, float]:
    """Percent of samples nearer to a training image than 95 % of the test images are: about 5 where nothing is copied."""
    nearest = torch.cdist(test, train).min(1).values.quantile(0.05)
    return {"copies": 100 * (torch.cdist(fake, train).min(1).values < nearest).double().mean().item()}


def diversity(real: Tensor, real_label: Tensor, fake: Tensor, fake_label: Tensor) -> float:
    """How far samples of a class lie from each other, in percent of how far its real images do; a mean over the classes."""

    def apart(features: Tensor) -> float:
        return torch.pdist(features).mean().item()

    found = []
    for label in fake_label.unique():
        one, other = fake[fake_label == label], real[real_label == label]
        if min(len(one), len(other)) > 1 and apart(other):
            found.append(apart(one) / apart(other))
    return 100 * sum(found) / len(found) if found else float("nan")


def nearest(train: Tensor, test: Tensor, fake: Tensor) -> float:
    """Distance of the sample nearest to a training image, in percent of what test images have in the median; 0: a copy."""
    usual = torch.cdist(test, train).min(1).values.median()
    return 100 * (torch.cdist(fake, train).min() / usual).item()


def adapter_scores(
    look: Extractor, federation: Federation, samples: Mapping[str, Table], neighbours: int
) -> dict[str, dict[str, float]]:
    """By site, how good the samples of its adapter are, against its own images: all that `distances`, `neighbourhoods`,
    `copies`, `diversity` and `nearest` say, and the floor of the distances, which is test against training images.

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
        scores |= neighbourhoods(seen, fake, neighbours) | copies(seen, unseen, fake)
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


SCHOOL = Training(lr=0.02, epochs=15, batch=64, schedule="cosine", weight_decay=5e-4, clip=1.0)
"""Training of the classifier that learns from samples alone."""


@dataclass(frozen=True, eq=False)
class Gauge:
    """Measures the generator of a run on this machine; in a deployment nobody sees all sites' images, and nobody can."""

    settings: Measuring
    task: Denoise
    federation: Federation
    base: str
    seed: int
    device: str = "cpu"
    """Where samples are drawn and learned from; what looks at them is on the processor."""

    @classmethod
    def of(
        cls, settings: Measuring, task: object, federation: object, base: str, seed: int, device: str = "cpu"
    ) -> "Gauge | None":
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
            return [(model, dealt(train["label"].bincount(minlength=classes), self.settings.samples), ())]
        sizes = torch.tensor([len(site.train["label"]) for site in self.federation.sites.values()])
        shares = dealt(sizes, self.settings.samples).bincount(minlength=len(sizes)).tolist()
        counts = {name: site.train["label"].bincount(minlength=classes) for name, site in self.federation.sites.items()}
        return [
            (model[name], dealt(counts[name], share), (name,))
            for name, share in zip(counts, shares, strict=True) if share and name in model
        ]  # fmt: skip

    def measure(self, model: Tensors | Mapping[str, Tensors], step: int) -> dict[str, Any]:
        """Samples against training images; `floor_…` is test against training images, the best that can be hoped for.

        Args:
            model: the global one; or by site each one's own: then each draws its site's share, classes as frequent as there.

        Returns:
            fid, kid, precision, recall, density, coverage, copies (shares in percent); of conditional models `taught`, the
            accuracy on real test images of a classifier trained on samples alone (Ravuri and Vinyals, NeurIPS 2019); the number
            of samples, and the SHA-256 of what looked at them.
        """
        look, digest, train, test, seen, unseen = self._real
        classes = len(self.federation.classes)
        drawing = self._drawing(model, train, classes)
        label = torch.cat([each for _, each, _ in drawing])
        drawn_by = [
            self.task.sample(one, each, named(self.seed, "measure", step, *who), self.device) for one, each, who in drawing
        ]
        fake = self.task.decoded(torch.cat(drawn_by))
        found: dict[str, Any] = {"features": digest, "samples": len(fake), "models": len(drawing)}
        drawn, k = look(fake), self.settings.neighbours
        found |= distances(seen, drawn) | neighbourhoods(seen, drawn, k) | copies(seen, unseen, drawn)
        found |= {f"floor_{name}": value for name, value in distances(seen, unseen).items()}
        if self.task.settings.conditional:
            school = Central(Classify(self.federation.shape, classes), named(self.seed, "school"), device=self.device)
            pupil, _ = fit(school, school.task.init(school.rng), SCHOOL, {"image": fake, "label": label})
            found["taught"] = school.task.metrics(pupil, test, self.device)["accuracy"]
        return found
