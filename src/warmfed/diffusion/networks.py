"""Diffusion networks and noise schedules, built from diffusers' classes."""

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
"""Side of the latents of `text_to_image`, for every image size."""
SCHEDULES = {"linear": "linear", "cosine": "squaredcos_cap_v2", "exponential": ""}


SAMPLERS = {"ddpm": "DDPMScheduler", "ddim": "DDIMScheduler", "dpm++": "DPMSolverMultistepScheduler"}


@dataclass(frozen=True)
class DenoiserSettings:
    """Settings of a denoiser: network, training and sampling."""

    RENAMED: ClassVar[Mapping[str, str]] = {"gamma": "min_snr_gamma", "batch": "batch_size"}

    denoiser: Literal["unet", "dit"] = "dit"
    """Network: unet (Ho et al., NeurIPS 2020) or dit (Peebles and Xie, ICCV 2023)."""
    width: int = 128
    """Channels of the widest U-Net level (the first has half), or width of the transformer; a multiple of 32."""
    depth: int = 6
    """Number of blocks of the transformer, or of residual blocks per level of the U-Net; at least 1."""
    patch: int = 2
    """Side of the transformer's patches; at least 1."""
    latent: str = "digits"
    """Base whose frozen autoencoder makes the latents; empty: pixels."""
    conditional: bool = True
    """Conditioning on the class of an image."""
    dropout: float = 0.1
    """Share of training images without their class, for guidance; 0 to 1."""
    prediction: Literal["epsilon", "v_prediction"] = "v_prediction"
    """Target of the prediction: epsilon or v_prediction."""
    schedule: Literal["linear", "cosine", "exponential"] = "cosine"
    """Noise schedule: linear (Ho et al.), cosine (Nichol and Dhariwal, ICML 2021), or exponential, with a log-SNR of
    -log(expm1(1e-4 + 10·t²)) for t from 0 to 1 (Tun et al., 2023)."""
    times: int = 1000
    """Number of times T of the forward process; at least 1."""
    min_snr_gamma: float = 5.0
    """Largest weight of a time (min-SNR-γ); 0: no cap."""
    weighting: Literal["min-snr", "signal"] = "min-snr"
    """Weight of a time: min-snr, or signal for SNR/(SNR + 1) without `min_snr_gamma` (Tun et al.)."""
    sampler: Literal["ddpm", "ddim", "dpm++"] = "dpm++"
    """Sampler: ddpm, ddim or dpm++."""
    steps: int = 20
    """Number of sampler steps; at least 1."""
    guidance: float = 1.0
    """Scale of classifier-free guidance; 1: none."""
    batch_size: int = 250
    """Images per sampler batch; at least 1."""

    def __post_init__(self) -> None:
        check_choices(self)
        if min(self.width, self.depth, self.patch, self.times, self.steps, self.batch_size) < 1 or self.width % 32:
            raise InputError("width must be a multiple of 32, and depth, patch, times, steps and batch_size at least 1")
        if not self.conditional and self.guidance != 1:
            raise InputError(f"guidance needs a conditional denoiser, got guidance {self.guidance}; set conditional=true")


class Denoiser(nn.Module):
    """A network of diffusers with one signature; the label `classes` means "no class"."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, noisy: Tensor, time: Tensor, label: Tensor) -> Tensor:
        """Return the prediction for float [n, c, h, w] at times int64 [n] with classes int64 [n]."""
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
        raise InputError(f"patches of {settings.patch} do not divide {side}×{side}; set patch to a divisor of {side}")
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
            module.dropout_prob = 0.0  # the task drops the class once for all blocks
    return Denoiser(net)


DENOISERS: Mapping[str, Callable[..., Denoiser]] = {"unet": _unet, "dit": _dit}


@functools.cache
def noise_scheduler(settings: DenoiserSettings) -> Any:
    """Return the diffusers scheduler of these settings."""
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
        words: the tokenizer, with at most `model_max_length` tokens per prompt.
        side: side of the images in pixels; latents have 8×8 positions, one per patch.
        channels: channels of the latents.
        decoder_width: channels of the autoencoder's decoder.
        widths: channels of the denoiser at 8×8 and 4×4 positions.
        text_width: width of the text encoder.
        text_layers: layers of the text encoder.
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
    # Attention at 8×8 would halve the speed; at 4×4 it is cheap and sufficient, since the pooled prompt is also added to
    # the time embedding of all layers.
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
