"""Metrics of generated images: FID, KID, precision, recall, density, coverage, memorization rate and diversity.

FID and KID are torchmetrics' statistics. All functions take features of images, float [n, width]. Scores are comparable
only for one feature extractor and one number of samples.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ..core.tensors import evenly_spaced
from ..utils.errors import InputError


class _Features(nn.Module):
    """Identity network: torchmetrics gets features that are already computed."""

    num_features: int

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_features = width

    def forward(self, features: Tensor) -> Tensor:
        return features


def distances(real: Tensor, fake: Tensor) -> dict[str, float]:
    """Return the Fréchet distance ("fid") and the kernel distance ("kid") of two sets of features.

    Shapes:
        real: [n, width]; fake: [m, width].

    Raises:
        InputError: if a set has fewer than two images, since one image has no covariance.

    References:
        FID: Heusel et al., NeurIPS 2017. KID: Bińkowski et al., ICLR 2018.
    """
    if min(len(real), len(fake)) < 2:
        raise InputError(f"distances need at least 2 images in each set, got {len(real)} and {len(fake)}; add images")
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import poly_mmd

    width, size = real.shape[1], min(len(real), len(fake))
    options: Any = {"feature": _Features(width), "input_img_size": (width,)}
    frechet: Any = FrechetInceptionDistance(**options).set_dtype(torch.float64)
    frechet.update(real.double(), real=True)
    frechet.update(fake.double(), real=False)
    one, other = (evenly_spaced({"features": table}, size)["features"].double() for table in (real, fake))
    return {"fid": frechet.compute().item(), "kid": poly_mmd(one, other).item()}


def neighbourhoods(real: Tensor, fake: Tensor, k: int) -> dict[str, float]:
    """Return precision, recall, density and coverage, in percent, from the k nearest neighbours.

    Shapes:
        real: [n, width]; fake: [m, width].

    References:
        Precision and recall: Kynkäänniemi et al., NeurIPS 2019. Density and coverage: Naeem et al., ICML 2020.
    """

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
    """Return the percentage of samples nearer to a training image than 95 % of the test images are.

    It is about 5 if the model copies nothing.
    """
    nearest = torch.cdist(test, train).min(1).values.quantile(0.05)
    return {"memorization_rate": 100 * (torch.cdist(fake, train).min(1).values < nearest).double().mean().item()}


def diversity(real: Tensor, real_label: Tensor, fake: Tensor, fake_label: Tensor) -> float:
    """Return the mean distance between samples of one class, in percent of that between its real images.

    The value is a mean over the classes with at least two samples and two real images; nan if there are none.

    Shapes:
        real: [n, width]; real_label: int64 [n]; fake: [m, width]; fake_label: int64 [m].
    """

    def apart(features: Tensor) -> float:
        return torch.pdist(features).mean().item()

    found = []
    for label in fake_label.unique():
        one, other = fake[fake_label == label], real[real_label == label]
        if min(len(one), len(other)) > 1 and apart(other):
            found.append(apart(one) / apart(other))
    return 100 * sum(found) / len(found) if found else float("nan")


def nearest(train: Tensor, test: Tensor, fake: Tensor) -> float:
    """Return the smallest distance of a sample to a training image, in percent of the test images' median distance.

    0 means that a sample is a copy.
    """
    usual = torch.cdist(test, train).min(1).values.median()
    return 100 * (torch.cdist(fake, train).min() / usual).item()
