"""Metrics of a classifier, from its logits."""

from collections.abc import Collection

import torch
import torch.nn.functional as F
from torch import Tensor

from ..utils.errors import InputError


def measure(logits: Tensor, label: Tensor, held: Collection[int] | None = None) -> dict[str, float]:
    """Return the metrics of a classifier.

    Args:
        logits: float [n, classes].
        label: int64 [n].
        held: classes of the site's training images; None: not known.

    Returns:
        accuracy, balanced_accuracy, macro_f1 and ece (expected calibration error, 15 bins) in percent; loss; count.
        Balanced accuracy is a mean over the classes in `label`, macro-F1 over those in `label` or among the predictions,
        as in scikit-learn. If some of the images are of classes that the site does not hold, also held_accuracy and
        lacking_accuracy, in percent, and lacking_count: of the images of classes that the site holds and lacks.

    Raises:
        InputError: if a logit is not finite.
    """
    if not logits.isfinite().all():
        raise InputError("the model's outputs are not finite: its training diverged; set a lower learning rate")
    probability, guess = logits.double().softmax(-1).max(-1)
    right = (guess == label).double()
    classes = logits.shape[-1]
    confusion = torch.zeros(classes, classes, dtype=torch.float64)
    confusion.index_put_((label, guess), torch.ones_like(right), accumulate=True)
    hits, truth, guessed = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
    occurs = truth > 0
    f1 = 2 * hits / (truth + guessed).clamp(min=1)
    bins = (probability * 15).long().clamp(max=14)
    gap = torch.zeros(15, dtype=torch.float64).index_add_(0, bins, right - probability).abs().sum()
    found = {
        "accuracy": 100 * right.mean().item(),
        "balanced_accuracy": 100 * (hits / truth.clamp(min=1))[occurs].mean().item(),
        "macro_f1": 100 * f1[occurs | (guessed > 0)].mean().item(),
        "ece": 100 * gap.item() / len(label),
        "loss": F.cross_entropy(logits.double(), label).item(),
        "count": float(len(label)),
    }
    if held is None:
        return found
    own = torch.isin(label, torch.tensor(sorted(held), dtype=label.dtype))
    if not own.all():
        found |= {"lacking_accuracy": 100 * right[~own].mean().item(), "lacking_count": float((~own).sum())}
        if own.any():
            found["held_accuracy"] = 100 * right[own].mean().item()
    return found
