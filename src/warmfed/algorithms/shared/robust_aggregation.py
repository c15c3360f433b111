"""Robust aggregation: rules that bound the influence of faulty or malicious sites.

Coordinate-wise median and trimmed mean: Yin et al., ICML 2018, arXiv:1803.01498, Definitions 1 and 2. Krum and multi-Krum:
Blanchard et al., NeurIPS 2017, arXiv:1703.02757, section 4. Clipping of updates: Sun et al., 2019, arXiv:1911.07963.

Departures: as in the paper, median and trimmed mean are unweighted. The mean of multi-Krum's selection is weighted by images.
Krum's distances cover all shared tensors together.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ...core import Replies
from ...core.tensors import Tensors, flat, mean
from ...utils.errors import InputError
from ...utils.settings import check_choices


@dataclass(frozen=True)
class Robust:
    """Aggregation rule of the sites' models."""

    rule: Literal["mean", "median", "trimmed", "krum"] = "mean"
    """Rule: mean (weighted by images), median, trimmed (trimmed mean) or krum."""
    trim: float = 0.2
    """Share of values cut off at each end, per coordinate, from 0 to below 0.5; rounded down to whole sites; for trimmed."""
    faulty: int = 1
    """Number f of faulty sites to withstand; 2·f + 2 must be below the number of replies; for krum."""
    chosen: int = 1
    """Number m of models that are averaged; 1: Krum, above 1: multi-Krum; for krum."""
    clip: float = 0.0
    """Maximum L2 norm of a model's update; longer updates are scaled down to it; 0: no clipping."""

    def __post_init__(self) -> None:
        check_choices(self)
        if not 0 <= self.trim < 0.5 or self.faulty < 0 or self.chosen < 1 or self.clip < 0:
            raise InputError(
                "trim must be from 0 to below 0.5, faulty and clip at least 0, chosen at least 1; check [algorithm.robust]"
            )

    def enough(self, answers: int) -> None:
        """Raise `InputError` if the rule cannot aggregate so few replies."""
        needed = max(2 * self.faulty + 3, self.faulty + self.chosen)
        if self.rule == "krum" and answers < needed:
            raise InputError(
                f"Krum against {self.faulty} faulty sites that averages {self.chosen} needs {needed} answers or more, "
                f"{answers} sites are too few; set robust.faulty or robust.chosen lower"
            )

    def combine(self, start: Tensors, replies: Replies[Any]) -> Tensors:
        """Return the aggregate of the replies' models.

        Args:
            start: the model that the sites received.
        """
        models = {site: self._clipped(reply.message.model, start) for site, reply in replies.items()}
        match self.rule:
            case "median":
                return _by_coordinate(models, _median)
            case "trimmed":
                return _by_coordinate(models, self._trimmed)
            case "krum":
                models = {site: models[site] for site in self._selected(models)}
        return mean((model, replies[site].weight) for site, model in models.items())

    def _clipped(self, model: Tensors, start: Tensors) -> Tensors:
        if not self.clip:
            return model
        change = {name: model[name].double() - start[name].double() for name in model if model[name].is_floating_point()}
        norm = torch.stack([part.square().sum() for part in change.values()]).sum().sqrt()
        share = min(1.0, self.clip / max(float(norm), 1e-12))
        if share == 1:
            return model
        short = {name: (start[name].double() + share * part).to(model[name].dtype) for name, part in change.items()}
        return {**model, **short}

    def _trimmed(self, values: Tensor) -> Tensor:
        cut = int(self.trim * len(values))
        return values.sort(0).values[cut : len(values) - cut].mean(0)

    def _selected(self, models: dict[str, Tensors]) -> list[str]:
        """Return the sites of the m lowest scores.

        A score is the sum of squared distances to the n - f - 2 nearest other models.
        """
        self.enough(len(models))
        sites, near = sorted(models), len(models) - self.faulty - 2
        points = [flat(models[site]) for site in sites]
        scores = {}
        for i, site in enumerate(sites):
            distances = sorted(float((points[i] - points[j]).square().sum()) for j in range(len(sites)) if j != i)
            scores[site] = sum(distances[:near])
        return sorted(sorted(sites, key=lambda site: (scores[site], site))[: self.chosen])


def _median(values: Tensor) -> Tensor:
    """Return the median; for an even number of values, the mean of the two middle ones."""
    ordered = values.sort(0).values
    return (ordered[(len(values) - 1) // 2] + ordered[len(values) // 2]) / 2


def _by_coordinate(models: dict[str, Tensors], rule: Callable[[Tensor], Tensor]) -> Tensors:
    first = next(iter(models.values()))
    return {
        name: rule(torch.stack([m[name].double() for m in models.values()])).to(value.dtype)
        if value.is_floating_point()
        else value
        for name, value in first.items()
    }
