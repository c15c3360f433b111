"""Losses of a denoiser, for pre-training and adaptation."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..utils.errors import InputError


def drawn(latent: Tensor, offset: float = 0.0) -> tuple[Tensor, Tensor]:
    """Return the random numbers of a loss for latents [n, c, h, w], from torch's global stream.

    The times are stratified: the i-th row's is uniform in the i-th part of the range. This lowers the variance and keeps the
    expectation.

    Args:
        latent: clean latents.
        offset: standard deviation of the offset noise, one value per channel. With it a model learns to change an image's
            mean, as very dark or bright pictures need.

    Returns:
        Times as float [n] in [0, 1), and the noise [n, c, h, w].
    """
    n = len(latent)
    place = (torch.arange(n) + torch.rand(n)) / n
    noise = torch.randn(latent.shape).to(latent)
    if offset:
        noise = noise + offset * torch.randn(*latent.shape[:2], 1, 1).to(latent)
    return place.to(latent.device), noise


def denoising_loss(
    predict: Callable[[Tensor, Tensor], Tensor],
    latent: Tensor,
    alphas: Tensor,
    prediction: str,
    gamma: float | None,
    at: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Return the mean squared error of a denoiser at random times, with capped weights.

    In terms of the error of the clean image, a loss on noise has the signal-to-noise ratio (SNR) as weight, and a loss on v
    has SNR + 1. Min-SNR-γ caps this weight at γ, which matters at low noise. This loss has the same cap, but keeps the
    "+ 1" of v at high noise: those times decide the colours and the coarse shape, and a small model needs them.

    Args:
        predict: predict(noisy, time), float [n, c, h, w] and int64 [n]; returns the model's output.
        latent: clean latents, float [n, c, h, w].
        alphas: ᾱ_t, float [T].
        prediction: the model's target, "epsilon" or "v_prediction".
        gamma: the largest weight; 0: no cap; None: the weight of a time is ᾱ_t.
        at: the result of `drawn`; None: drawn here.

    Raises:
        InputError: if `prediction` is not supported.

    References:
        v: Salimans and Ho, ICLR 2022, arXiv:2202.00512. Min-SNR-γ: Hang et al., ICCV 2023, arXiv:2303.09556.
    """
    place, noise = at or drawn(latent)
    time = (place * len(alphas)).long().clamp_max(len(alphas) - 1)
    signal = alphas.to(latent)[time].view(-1, 1, 1, 1)
    noisy = signal.sqrt() * latent + (1 - signal).sqrt() * noise
    ratio = signal / (1 - signal)
    cap = gamma or 0.0
    match prediction:
        case "epsilon":
            target, weight = noise, ratio.clamp_max(cap) / ratio
        case "v_prediction":
            target, weight = signal.sqrt() * noise - (1 - signal).sqrt() * latent, (ratio + 1).clamp_max(cap) / (ratio + 1)
        case _:
            raise InputError(f"expected a prediction of epsilon or v_prediction, got {prediction!r}; set another base")
    error = (predict(noisy, time) - target).square()
    if gamma is None:
        return (signal * error).mean()
    return (weight * error).mean() if gamma else error.mean()


def flow_loss(
    predict: Callable[[Tensor, Tensor], Tensor],
    latent: Tensor,
    shift: float,
    times: int,
    at: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Return the mean squared error of a rectified flow's velocity at random noise levels.

    Levels σ are uniform, then shifted as in the base's sampler: σ' = shift·σ / (1 + (shift - 1)·σ).

    Args:
        predict: predict(noisy, time), float [n, c, h, w] and float [n], time = σ'·`times`; returns the output, ε - z.
        latent: clean latents z, float [n, c, h, w].
        shift: shift of the noise levels.
        times: number of times of the base's scheduler.
        at: the result of `drawn`; None: drawn here.

    References:
        Rectified flow: Liu et al., ICLR 2023, arXiv:2209.03003. Shift: Esser et al., ICML 2024, arXiv:2403.03206.
    """
    level, noise = at or drawn(latent)
    level = (shift * level / (1 + (shift - 1) * level)).to(latent)
    share = level.view(-1, 1, 1, 1)
    noisy = (1 - share) * latent + share * noise
    return (predict(noisy, level * times) - (noise - latent)).square().mean()
