"""Metrics of a classifier, from its logits."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..utils.errors import InputError


def measure(logits: Tensor, label: Tensor) -> dict[str, float]:
    """Return the metrics of a classifier.

    Args:
        logits: float [n, classes].
        label: int64 [n].

    Returns:
        accuracy, balanced_accuracy, macro_f1 and ece (expected calibration error, 15 bins) in percent; loss; count.
        Balanced accuracy is a mean over the classes in `label`, macro-F1 over those in `label` or among the predictions,
        as in scikit-learn.

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
    return {
        "accuracy": 100 * right.mean().item(),
        "balanced_accuracy": 100 * (hits / truth.clamp(min=1))[occurs].mean().item(),
        "macro_f1": 100 * f1[occurs | (guessed > 0)].mean().item(),
        "ece": 100 * gap.item() / len(label),
        "loss": F.cross_entropy(logits.double(), label).item(),
        "count": float(len(label)),
    }
