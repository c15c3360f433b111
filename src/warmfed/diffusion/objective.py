"""The loss of a denoiser: what pre-training and adaptation share."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import InputError


def denoising_loss(
    predict: Callable[[Tensor, Tensor], Tensor], latent: Tensor, alphas: Tensor, prediction: str, gamma: float | None
) -> Tensor:
    """Mean squared error of a denoiser at random times, its weight on a clean image held between 1 and γ.

    In terms of the error of the clean image, a loss on noise weighs a time by its signal-to-noise ratio, a loss on v by that
    ratio plus one (Salimans and Ho, ICLR 2022, arXiv:2202.00512). Min-SNR-γ (Hang et al., ICCV 2023, arXiv:2303.09556) caps
    this weight at γ, where there is little noise. We cap it too, but keep v's "plus one" where there is much: colours and
    the coarse shape, which tell the class, are decided there, and a small model that hardly learns them draws grey.

    Noise and times come from torch's global stream. The times are stratified: the i-th row's is uniform in the i-th part of
    the range, which leaves the expectation as it is and lowers its variance.

    Args:
        predict: predict(noisy, time), float [n, c, h, w] and int64 [n]; the model's output.
        latent: clean latents, float [n, c, h, w].
        alphas: ᾱ_t, float [T].
        prediction: what the model predicts, "epsilon" or "v_prediction".
        gamma: the largest weight; 0: no cap; none: a time weighs ᾱ_t.
    """
    n = len(latent)
    time = ((torch.arange(n) + torch.rand(n)) / n * len(alphas)).long().clamp_max(len(alphas) - 1).to(latent.device)
    signal = alphas.to(latent)[time].view(-1, 1, 1, 1)
    noise = torch.randn(latent.shape).to(latent)
    noisy = signal.sqrt() * latent + (1 - signal).sqrt() * noise
    ratio = signal / (1 - signal)
    cap = gamma or 0.0
    match prediction:
        case "epsilon":
            target, weight = noise, ratio.clamp_max(cap) / ratio
        case "v_prediction":
            target, weight = signal.sqrt() * noise - (1 - signal).sqrt() * latent, (ratio + 1).clamp_max(cap) / (ratio + 1)
        case _:
            raise InputError(f"the scheduler predicts {prediction!r}; epsilon and v_prediction are supported")
    error = (predict(noisy, time) - target).square()
    if gamma is None:
        return (signal * error).mean()
    return (weight * error).mean() if gamma else error.mean()
