"""The loss of a denoiser: what pre-training and adaptation share."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..utils.errors import InputError


def drawn(latent: Tensor, offset: float = 0.0) -> tuple[Tensor, Tensor]:
    """What a loss draws from torch's global stream for latents [n, c, h, w]: places of the times in [0, 1), and the noise.

    The places are stratified: the i-th row's is uniform in the i-th part of the range, which leaves the expectation as it is
    and lowers its variance.

    Args:
        offset: standard deviation of what is added to the noise of each channel as a whole ("offset noise": a model learns
            to move an image's mean, which it needs for pictures that are dark or bright all over).
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
    """Mean squared error of a denoiser at random times, its weight on a clean image held between 1 and γ.

    In terms of the error of the clean image, a loss on noise weighs a time by its signal-to-noise ratio, a loss on v by that
    ratio plus one (Salimans and Ho, ICLR 2022, arXiv:2202.00512). Min-SNR-γ (Hang et al., ICCV 2023, arXiv:2303.09556) caps
    this weight at γ, where there is little noise. We cap it too, but keep v's "plus one" where there is much: colours and
    the coarse shape, which tell the class, are decided there, and a small model that hardly learns them draws grey.

    Args:
        predict: predict(noisy, time), float [n, c, h, w] and int64 [n]; the model's output.
        latent: clean latents, float [n, c, h, w].
        alphas: ᾱ_t, float [T].
        prediction: what the model predicts, "epsilon" or "v_prediction".
        gamma: the largest weight; 0: no cap; none: a time weighs ᾱ_t.
        at: what `drawn` has drawn; none: it is drawn here.
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
            raise InputError(f"the scheduler predicts {prediction!r}; epsilon and v_prediction are supported")
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
    """Mean squared error of a rectified flow's velocity (Liu et al., ICLR 2023, arXiv:2209.03003) at random noise levels.

    Levels σ are uniform, then shifted as the base's sampler does:
    σ' = shift·σ / (1 + (shift - 1)·σ) (Esser et al., ICML 2024, arXiv:2403.03206).

    Args:
        predict: predict(noisy, time), float [n, c, h, w] and float [n], time = σ·`times`; the model's output, ε - z.
        latent: clean latents z, float [n, c, h, w].
        at: what `drawn` has drawn; none: it is drawn here.
    """
    level, noise = at or drawn(latent)
    level = (shift * level / (1 + (shift - 1) * level)).to(latent)
    share = level.view(-1, 1, 1, 1)
    noisy = (1 - share) * latent + share * noise
    return (predict(noisy, level * times) - (noise - latent)).square().mean()
