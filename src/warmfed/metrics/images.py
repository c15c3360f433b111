"""How near drawn images are to real ones: Fréchet and kernel distance, precision, recall, density, coverage, and copies.

Statistics are torchmetrics'. All take features of images, float [n, width]; scores compare only within one choice of features
and one number of samples.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ..core.tensors import evenly_spaced
from ..utils.errors import InputError


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
    one, other = (evenly_spaced({"features": table}, size)["features"].double() for table in (real, fake))
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


def memorization_rate(train: Tensor, test: Tensor, fake: Tensor) -> dict[str, float]:
    """Percent of samples nearer to a training image than 95 % of the test images are: about 5 where nothing is copied."""
    nearest = torch.cdist(test, train).min(1).values.quantile(0.05)
    return {"memorization_rate": 100 * (torch.cdist(fake, train).min(1).values < nearest).double().mean().item()}


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
