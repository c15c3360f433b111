"""Screening of adapters: classifiers of each site's samples predict the classes of the other sites' samples.

An average of updates has no such check. Adapters are separate, so the server can compare them class by class before it uses
them. The classifiers must not depend on a site's colours or background, which differ more than the classes do. Their features
are histograms of oriented gradients (Dalal, Triggs, CVPR 2005), unsigned and normalised by block. They have the same value for
dark on light and light on dark. The classifiers are ridge regressions: no training loop and no random number.
"""

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ...core import Metrics
from ...core.tensors import Table

GRID, BINS = 8, 9
"""Cells along each side of an image; orientations from 0 to π."""
RIDGE = 0.03
"""Weight of the squared norm in a classifier's regression, per sample."""
MARGIN = 0.1
"""Minimum margin of the votes for another class over those for the prompt's class."""


def gradients(image: Tensor, batch: int = 256) -> Tensor:
    """Return histograms of oriented gradients, float64 [n, GRID²·BINS], of uint8 images [n, c, h, w]."""
    return torch.cat([_gradients(part) for part in image.split(batch)])


def _gradients(image: Tensor) -> Tensor:
    grey = F.pad(image.double().mean(1, keepdim=True), (1, 1, 1, 1), mode="replicate")[:, 0]
    across = grey[:, 1:-1, 2:] - grey[:, 1:-1, :-2]
    received = grey[:, 2:, 1:-1] - grey[:, :-2, 1:-1]
    strength, angle = (across.square() + received.square()).sqrt(), torch.atan2(received, across) % math.pi * (BINS / math.pi)
    lower, upper = angle.floor().long() % BINS, (angle.floor().long() + 1) % BINS
    share = angle - angle.floor()
    bins = torch.zeros(len(grey), BINS, *grey.shape[1:], dtype=torch.float64)
    bins.scatter_add_(1, lower[:, None], (strength * (1 - share))[:, None])
    bins.scatter_add_(1, upper[:, None], (strength * share)[:, None])
    cells = F.adaptive_avg_pool2d(bins, GRID)
    block = F.avg_pool2d(F.pad(cells.square().sum(1, keepdim=True), (1, 1, 1, 1), mode="replicate"), 3, 1).sqrt()
    return (cells / (block + 0.3 * block.mean((1, 2, 3), keepdim=True) + 1e-6)).flatten(1)


def votes(learn: Tensor, label: Tensor, guess: Tensor) -> Tensor:
    """Return the classes, int64 [n], that a ridge regression on `learn` and its labels predicts for `guess`."""
    target = F.one_hot(label).double()
    middle, mean = learn.mean(0), target.mean(0)
    apart = learn - middle
    gram = apart.T @ apart + RIDGE * len(learn) * torch.eye(learn.shape[1], dtype=torch.float64)
    weight = torch.linalg.solve(gram, apart.T @ (target - mean))
    score = (guess - middle) @ weight + mean
    found: Tensor = score.masked_fill(mean == 0, -torch.inf).argmax(1)
    return found


def favourites(found: Tensor, label: Tensor, known: Sequence[int]) -> dict[int, int]:
    """Return, for each prompt's class, the class that the votes favour.

    Votes for a class count relative to their frequency in the site's other classes. A classifier that predicts one class for
    all samples of an unfamiliar site therefore favours none.

    Args:
        found: predicted classes of a site's samples, int64 [n].
        label: classes of their prompts, int64 [n].
        known: classes that the classifier has samples of.

    Returns:
        By class: the class itself, the clear favourite among the others, or -1 if there is none.
    """
    classes = [c for c in label.unique().tolist() if c in set(known)]
    if not classes:
        return {}
    share = torch.stack([F.one_hot(found[label == c], max(known) + 1).double().mean(0) for c in classes])
    share -= share.mean(0)
    chosen = {}
    for row, c in enumerate(classes):
        own, best = share[row, c].item(), int(share[row].argmax())
        chosen[c] = c if best == c else best if share[row, best].item() - own > MARGIN else -1
    return chosen


def contradicted(opinions: Sequence[Mapping[int, int]], least: int = 2) -> float:
    """Return the share of a site's classes for which most classifiers favour one and the same other class.

    Args:
        opinions: the `favourites` of each classifier.
        least: minimum number of classifiers for a class to count.

    Returns:
        The share; 0 if fewer than two classes are contradicted, since one class alone may be a legitimate difference.
    """
    judged, wrong = 0, 0
    for c in {c for opinion in opinions for c in opinion}:
        named = [opinion[c] for opinion in opinions if c in opinion]
        if len(named) >= least:
            judged += 1
            wrong += any(2 * named.count(other) > len(named) for other in set(named) - {c, -1})
    return wrong / judged if wrong > 1 else 0.0


def suspects(samples: Table, sites: Sequence[str], limit: float) -> tuple[tuple[str, ...], Metrics]:
    """Return the sites whose samples the other sites' samples contradict, and metrics for the record.

    A colluding minority cannot exclude an honest site, since most classifiers must agree. If half of the sites or more would be
    excluded, no majority is left: no site is excluded, and the record marks the adapters as disputed.

    Args:
        samples: {"image", "label", "site"}; "site" is an index into `sites`.
        limit: minimum share of contradicted classes to exclude a site; 0: no screening.

    Returns:
        The sites to exclude, and the metrics; empty if no site is contradicted.
    """
    if not limit or len(sites) < 3:
        return (), {}
    seen = gradients(samples["image"])
    place = [(samples["site"] == i).nonzero()[:, 0] for i in range(len(sites))]
    label = [samples["label"][rows] for rows in place]
    known = [classes.unique().tolist() for classes in label]
    opinions: dict[int, list[dict[int, int]]] = {}
    for judge in range(len(sites)):
        if len(known[judge]) > 1:
            found = votes(seen[place[judge]], label[judge], seen)
            opinions[judge] = [favourites(found[rows], label[i], known[judge]) for i, rows in enumerate(place)]
    share = {s: contradicted([told[i] for j, told in opinions.items() if j != i]) for i, s in enumerate(sites)}
    aside = tuple(site for site in sites if share[site] >= limit)
    if not aside:
        return (), {}
    metrics = {f"contradicted/{site}": value for site, value in share.items()}
    if 2 * len(aside) >= len(sites):
        return (), {**metrics, "disputed": 1.0}
    return aside, {**metrics, **{f"set_aside/{site}": 1.0 for site in aside}}


def late_suspects(samples: Table, sites: Sequence[str], trusted: Table, limit: float) -> tuple[tuple[str, ...], Metrics]:
    """Return the late sites whose samples the samples in use contradict, and metrics for the record.

    There is only one classifier, so the limit is halfway between `limit` and all classes.

    Args:
        samples: {"image", "label", "site"} of the late sites; "site" is an index into `sites`.
        trusted: {"image", "label"} of the synthetic samples in use.
        limit: as in `suspects`.
    """
    known = trusted["label"].unique().tolist()
    if not limit or len(known) < 2:
        return (), {}
    found = votes(gradients(trusted["image"]), trusted["label"], gradients(samples["image"]))
    mine = {site: samples["site"] == i for i, site in enumerate(sites)}
    share = {s: contradicted([favourites(found[rows], samples["label"][rows], known)], least=1) for s, rows in mine.items()}
    aside = tuple(site for site in sites if share[site] >= (1 + limit) / 2)
    return aside, {name: value for s in aside for name, value in ((f"contradicted/{s}", share[s]), (f"set_aside/{s}", 1.0))}
