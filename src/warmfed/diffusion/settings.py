"""Settings of a latent diffusion generator, checked before a base is loaded."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from ..core.training import Training
from ..utils.errors import InputError, suggest
from ..utils.names import plain_name
from ..utils.settings import check_choices
from . import lora as layers
from . import pipeline


@dataclass(frozen=True)
class Lora:
    """Further settings of an adapter and its training; docs/lora.md gives the cost of each."""

    RENAMED: ClassVar[Mapping[str, str]] = {
        "tokens": "textual_inversion",
        "prior": "prior_loss_weight",
        "offset": "noise_offset",
        "checkpointing": "gradient_checkpointing",
        "auto": "auto_micro_batch",
    }

    alpha: float = 0.0
    """Scale of LoRA updates: alpha/rank; 0: a scale of 1."""
    rslora: bool = False
    """Scale of alpha/√rank instead (Kalajdzievski, 2023, arXiv:2312.03732)."""
    dora: bool = False
    """Learned magnitude of each output, beside A and B (DoRA)."""
    textual_inversion: bool = False
    """Learned word per class in place of its prompt's last word (textual inversion), instead of `prompts`."""
    prior_loss_weight: float = 0.0
    """Weight of the loss on the base's own samples of the classes (Ruiz et al., CVPR 2023, arXiv:2208.12242); 0: none."""
    prior_images: int = 20
    """Number of these samples per class; at least 1."""
    noise_offset: float = 0.0
    """Standard deviation of the offset noise, one value per channel of an image; 0: none."""
    flip: bool = False
    """Mirrored copy of each image; not for digits, letters or sides of a body."""
    gradient_checkpointing: bool = False
    """Recomputation of activations in the backward pass: much less memory, 1.4 × the time."""
    auto_micro_batch: bool = False
    """Choice of `training.micro_batch_size` to fit half of the free memory; the last bits of results depend on it."""
    patience: int = 0
    """Epochs without a lower validation loss until early stopping; 0: all epochs."""
    cache: Literal["memory", "disk"] = "memory"
    """Storage of the latents: memory or disk; later runs reuse latents on disk."""
    snapshots: int = 100
    """Steps between two snapshots of unfinished training on disk; 0: none."""

    def __post_init__(self) -> None:
        check_choices(self)
        if (
            min(self.alpha, self.prior_loss_weight, self.noise_offset, self.patience, self.snapshots) < 0
            or self.prior_images < 1
        ):
            raise InputError(
                "alpha, prior_loss_weight, noise_offset, patience and snapshots must be at least 0, prior_images 1; "
                "check [generator.lora]"
            )

    def scale(self, rank: int) -> float:
        """Return the scale of the LoRA updates."""
        return (self.alpha or rank) / (math.sqrt(rank) if self.rslora else rank)


@dataclass(frozen=True)
class GeneratorSettings:
    """Settings of a generator's adaptation and sampling: the table `[generator]` of a configuration."""

    RENAMED: ClassVar[Mapping[str, str]] = {
        "targets": "target_modules",
        "interval": "guidance_interval",
        "negative": "negative_prompt",
        "gamma": "min_snr_gamma",
        "fused": "fuse_lora",
        "batch": "batch_size",
    }

    base: str = "digits"
    """Base: an embedded one, a folder in diffusers' layout, or a repository in the hub's cache."""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Type of the base's weights: fp32, bf16 or fp16; adapters are always trained in fp32."""
    size: int = 0
    """Height and width of the images in pixels; 0: the base's own size."""
    rank: int = 6
    """Rank of the adapter; at least 1."""
    target_modules: Literal["attention", "transformer", "all", "none"] = "all"
    """Layers of the denoiser with an adapter: attention, transformer, all, or none (only prompts are learned)."""
    prompts: bool = True
    """Learned prompt embeddings of the classes, sent with the adapter."""
    training: Training = Training(
        optimizer="adamw", lr=1e-2, epochs=12, batch_size=32, schedule="cosine", warmup=5, max_grad_norm=1.0
    )
    """Training of an adapter at a site."""
    views: int = 2
    """Number of cached views of each image: itself and shifted copies; 1: only the image."""
    lora: Lora = Lora()
    """Further settings of the adapter and its training."""
    adapters: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Imported adapters, {site = "file.safetensors"}; these sites train none."""
    dropout: float = 0.1
    """Share of training images without a prompt, for guidance; 0 to 1."""
    min_snr_gamma: float = 5.0
    """Largest weight of a time in the loss, in terms of the error of the clean image; 0: no cap."""
    sampler: Literal["dpm++", "ddim", "unipc", "lcm"] = "dpm++"
    """Sampler: dpm++ (DPM-Solver++), ddim, unipc, or lcm for a base that is distilled for few steps."""
    steps: int = 8
    """Number of sampler steps; at least 1."""
    spacing: Literal["", "leading", "linspace", "trailing"] = ""
    """Spacing of the steps: leading, linspace or trailing; empty: that of the base's scheduler."""
    guidance: float = 1.5
    """Scale of classifier-free guidance; 1: none. A larger scale gives clearer, but less diverse samples of a class."""
    negative_prompt: str = ""
    """Negative prompt of the guidance; empty: the empty prompt."""
    guidance_interval: tuple[float, ...] = (0.0, 1.0)
    """Range of the times with guidance, from clean (0) to noise (1); a step outside of it costs half."""
    batch_size: int = 100
    """Images per sampler batch, of any classes; at least 1."""
    fuse_lora: bool = True
    """Merge of an adapter into the weights for sampling; without it sampling is slower and needs a few MB less."""
    compile: str = ""
    """Backend of torch.compile for sampling, such as inductor; empty: none. Useful from thousands of samples."""

    def __post_init__(self) -> None:
        if self.target_modules not in layers.TARGETS:
            raise InputError(
                f"there are no target_modules {self.target_modules!r}{suggest(self.target_modules, list(layers.TARGETS))}"
            )
        check_choices(self)
        if len(self.guidance_interval) != 2 or not 0 <= self.guidance_interval[0] <= self.guidance_interval[1] <= 1:
            raise InputError(
                f"generator.guidance_interval must be two shares in order, as [0.2, 0.8]; got {list(self.guidance_interval)}"
            )
        if min(self.rank, self.views, self.steps, self.batch_size) < 1:
            raise InputError("rank, views, steps and batch_size of the generator must be at least 1; check [generator]")
        if self.size < 0:
            raise InputError(f"expected generator.size in pixels, or 0 for the base's own size, got {self.size}")
        if self.min_snr_gamma < 0 or not 0 <= self.dropout <= 1:
            raise InputError("generator.min_snr_gamma must be at least 0 and generator.dropout from 0 to 1; check [generator]")
        if self.sampler == "lcm" and self.spacing:
            raise InputError("the sampler lcm has the spacing of its base's distillation; remove generator.spacing")
        if self.target_modules == "none" and not (self.prompts or self.lora.textual_inversion):
            raise InputError("the generator has nothing to learn: set generator.target_modules or generator.prompts")
        if self.prompts and self.lora.textual_inversion:
            raise InputError(
                "textual inversion replaces learned prompts; set generator.prompts=false beside lora.textual_inversion"
            )
        object.__setattr__(self, "adapters", {plain_name(site): path for site, path in self.adapters.items()})
        if not all(isinstance(path, str) for path in self.adapters.values()):
            raise InputError('expected a file for each site in generator.adapters, as {ink = "ink.safetensors"}')

    @property
    def side(self) -> int:
        """Height and width of the images in pixels; raises `InputError` if the base is not found."""
        return self.size or pipeline.side(self.base)

    def space(self, base: pipeline.Parts) -> tuple[int, int, int]:
        """Return (channels, height, width) of a latent; raise `InputError` if the size is not a multiple of the scale."""
        side, rest = divmod(self.side, base.scale)
        if rest or not side:
            raise InputError(f"images of {self.side} pixels are not a multiple of {base.scale}; set generator.size to one")
        return base.denoiser.config.in_channels, side, side
