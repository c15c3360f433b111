"""Diffusion networks and noise schedules of our own settings, built from diffusers' parts."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..utils.errors import InputError
from ..utils.settings import check_choices
from .pipeline import Parts

LATENT = 8
"""Side of the latents of `text_to_image`, whatever that of the images."""
SCHEDULES = {"linear": "linear", "cosine": "squaredcos_cap_v2", "exponential": ""}


SAMPLERS = {"ddpm": "DDPMScheduler", "ddim": "DDIMScheduler", "dpm++": "DPMSolverMultistepScheduler"}


PREDICTIONS = ("epsilon", "v_prediction")


@dataclass(frozen=True)
class DenoiserSettings:
    """What a denoiser is, how it learns and how it draws."""

    RENAMED: ClassVar[Mapping[str, str]] = {"gamma": "min_snr_gamma", "batch": "batch_size"}

    denoiser: Literal["unet", "dit"] = "dit"
    """unet (Ho et al., NeurIPS 2020) or dit (Peebles and Xie, ICCV 2023)."""
    width: int = 128
    """Channels of the widest level of the U-Net (its first has half of them), or width of the transformer."""
    depth: int = 6
    """Blocks of the transformer, or residual blocks of a level of the U-Net."""
    patch: int = 2
    """Side of the transformer's patches."""
    latent: str = "digits"
    """The base whose frozen autoencoder makes the latents; empty: pixels."""
    conditional: bool = True
    """Whether it is told the class of an image."""
    dropout: float = 0.1
    """Share of training images shown without their class, for guidance."""
    prediction: Literal["epsilon", "v_prediction"] = "v_prediction"
    """What it predicts: epsilon or v_prediction."""
    schedule: Literal["linear", "cosine", "exponential"] = "cosine"
    """Noise over the times: linear (Ho et al.), cosine (Nichol and Dhariwal, ICML 2021), or exponential, with a log-SNR of
    -log(expm1(1e-4 + 10·t²)) for t from 0 to 1 (Tun et al., 2023)."""
    times: int = 1000
    """T, the times of the forward process."""
    min_snr_gamma: float = 5.0
    """Largest weight of a time (min-SNR-γ); 0: none."""
    weighting: Literal["min-snr", "signal"] = "min-snr"
    """min-snr, or signal: a time weighs SNR/(SNR + 1), and `min_snr_gamma` does not count (Tun et al.)."""
    sampler: Literal["ddpm", "ddim", "dpm++"] = "dpm++"
    """ddpm, ddim or dpm++."""
    steps: int = 20
    """Sampler steps."""
    guidance: float = 1.0
    """Scale of classifier-free guidance; 1: none."""
    batch_size: int = 250
    """Images of one sampler batch."""

    def __post_init__(self) -> None:
        check_choices(self)
        if min(self.width, self.depth, self.patch, self.times, self.steps, self.batch_size) < 1 or self.width % 32:
            raise InputError("width must be a multiple of 32, and depth, patch, times, steps and batch_size at least 1")
        if not self.conditional and self.guidance != 1:
            raise InputError(f"guidance needs a conditional denoiser; got guidance {self.guidance} of an unconditional one")


class Denoiser(nn.Module):
    """A network of diffusers under one signature; class `classes` is "no class"."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, noisy: Tensor, time: Tensor, label: Tensor) -> Tensor:
        """The prediction for float [n, c, h, w] at times int64 [n], given classes int64 [n]."""
        return self.net(noisy, timestep=time, class_labels=label).sample


def _unet(settings: DenoiserSettings, channels: int, side: int, classes: int) -> Denoiser:
    from diffusers import UNet2DModel

    widths = (settings.width // 2, settings.width) if side <= 8 else (settings.width // 2, settings.width, settings.width)
    kinds = ("DownBlock2D", *("AttnDownBlock2D",) * (len(widths) - 1))
    net = UNet2DModel(
        sample_size=side,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=widths,
        layers_per_block=settings.depth,
        down_block_types=kinds,
        up_block_types=tuple(kind.replace("Down", "Up") for kind in reversed(kinds)),
        norm_num_groups=8,
        attention_head_dim=32,
        num_class_embeds=classes + 1,
    )
    return Denoiser(net)


def _dit(settings: DenoiserSettings, channels: int, side: int, classes: int) -> Denoiser:
    from diffusers import DiTTransformer2DModel
    from diffusers.models.embeddings import LabelEmbedding

    if side % settings.patch:
        raise InputError(f"patches of {settings.patch} do not fit into {side}×{side}; choose a divisor")
    net = DiTTransformer2DModel(
        num_attention_heads=settings.width // 32,
        attention_head_dim=32,
        in_channels=channels,
        num_layers=settings.depth,
        sample_size=side,
        patch_size=settings.patch,
        num_embeds_ada_norm=classes + 1,
        norm_num_groups=8,
    )
    for module in net.modules():
        if isinstance(module, LabelEmbedding):
            module.dropout_prob = 0.0  # each block would forget the class by a coin of its own; the task does it for all
    return Denoiser(net)


DENOISERS: Mapping[str, Callable[..., Denoiser]] = {"unet": _unet, "dit": _dit}


@functools.cache
def noise_scheduler(settings: DenoiserSettings) -> Any:
    """Return diffusers' scheduler of these settings."""
    import diffusers

    options: dict[str, Any] = {"num_train_timesteps": settings.times}
    if settings.schedule == "exponential":
        # ᾱ = SNR/(SNR + 1) = exp(-(1e-4 + 10·t²)), and 1 - β_t = ᾱ_t/ᾱ_{t-1}
        times = torch.arange(settings.times + 1, dtype=torch.float64) / settings.times
        options["trained_betas"] = (-torch.expm1(-(10 * times.square()).diff())).float().tolist()
    else:
        options["beta_schedule"] = SCHEDULES[settings.schedule]
    if settings.sampler != "dpm++":
        options["clip_sample"] = not settings.latent
    else:
        options["timestep_spacing"] = "linspace"
    return getattr(diffusers, SAMPLERS[settings.sampler])(**options, prediction_type=settings.prediction)


def text_to_image(
    words: Any, *, side: int, channels: int, decoder_width: int, widths: Sequence[int], text_width: int, text_layers: int
) -> Parts:
    """Return a small text-to-image pipeline with random weights, drawn from torch's global stream.

    Args:
        words: its tokenizer, with at most `model_max_length` tokens a prompt.
        side: pixels of a side of the images; latents have 8×8 places, each of which stands for a patch.
        channels: channels of the latents.
        widths: channels of the denoiser at 8 and 4 places.
    """
    from diffusers import AutoencoderTiny, DPMSolverMultistepScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    depth, levels = len(widths), (side // LATENT).bit_length()
    vae = AutoencoderTiny(
        encoder_block_out_channels=(3 * (side // LATENT) ** 2,) * levels, num_encoder_blocks=(0,) * levels,
        latent_channels=channels,
        decoder_block_out_channels=(decoder_width,) * levels, num_decoder_blocks=(3, 2, 1, 1, 1)[:levels],
    )  # fmt: skip
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(words), hidden_size=text_width, intermediate_size=4 * text_width,
            projection_dim=text_width, num_hidden_layers=text_layers, num_attention_heads=4,
            max_position_embeddings=words.model_max_length, bos_token_id=words.bos_token_id, eos_token_id=words.eos_token_id,
            pad_token_id=words.pad_token_id,
        )
    )  # fmt: skip
    # Attention costs half of the speed at 8×8 and little at 4×4, where it is enough: the pooled prompt is added to the
    # time embedding of all layers as well.
    unet = UNet2DConditionModel(
        sample_size=LATENT, in_channels=channels, out_channels=channels, layers_per_block=1,
        block_out_channels=widths, norm_num_groups=16, attention_head_dim=4,
        down_block_types=("DownBlock2D",) * (depth - 1) + ("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",) + ("UpBlock2D",) * (depth - 1),
        cross_attention_dim=text_width, resnet_time_scale_shift="scale_shift",
        addition_embed_type="text", addition_embed_type_num_heads=4,
    )  # fmt: skip
    scheduler = DPMSolverMultistepScheduler(
        num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction",
        algorithm_type="dpmsolver++", solver_order=2, timestep_spacing="trailing", steps_offset=1,
    )  # fmt: skip
    for model in (vae, unet):
        model.to(memory_format=torch.channels_last)
    return Parts(words, text_encoder, unet, vae, scheduler)
