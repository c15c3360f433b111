"""The settings of a latent diffusion generator, and what can be checked of them before a base is loaded."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from ..core.training import Training
from ..utils.errors import InputError, suggest
from ..utils.settings import check_choices
from . import lora as layers
from . import pipeline


@dataclass(frozen=True)
class Lora:
    """How an adapter is made and learned, beyond rank, targets and training; see docs/lora.md for what each costs."""

    RENAMED: ClassVar[Mapping[str, str]] = {
        "tokens": "textual_inversion",
        "prior": "prior_loss_weight",
        "offset": "noise_offset",
        "checkpointing": "gradient_checkpointing",
        "auto": "auto_micro_batch",
    }

    alpha: float = 0.0
    """What the layers add counts alpha/rank times; 0: once."""
    rslora: bool = False
    """Whether it counts alpha/√rank times instead (Kalajdzievski, 2023, arXiv:2312.03732)."""
    dora: bool = False
    """Whether each output has a learned magnitude beside A and B (DoRA)."""
    textual_inversion: bool = False
    """Whether each class learns a word in the place of its prompt's last one (textual inversion), instead of `prompts`."""
    prior_loss_weight: float = 0.0
    """Weight of the loss on the base's own samples of the classes (Ruiz et al., CVPR 2023, arXiv:2208.12242); 0: none."""
    prior_images: int = 20
    """Such samples of each class."""
    noise_offset: float = 0.0
    """Standard deviation of the noise that an image's channels share (offset noise); 0: none."""
    flip: bool = False
    """Whether each image has its mirror image beside it. Not for digits, letters, or sides of a body."""
    gradient_checkpointing: bool = False
    """Whether the denoiser computes its inner values anew instead of keeping them: much less memory, 1.4 × the time."""
    auto_micro_batch: bool = False
    """Whether `training.micro_batch_size` is set so that it fits into half of the free memory. Last bits depend on it."""
    patience: int = 0
    """Epochs without a lower loss on the validation images after which learning ends; 0: all epochs."""
    cache: Literal["memory", "disk"] = "memory"
    """Where the latents are: memory, or disk (under a digest of what they are made of, for the next run too)."""
    snapshots: int = 100
    """Steps after which unfinished training is kept on disk, for a process that is killed; 0: never."""

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
        """How often what the layers add counts."""
        return (self.alpha or rank) / (math.sqrt(rank) if self.rslora else rank)


@dataclass(frozen=True)
class GeneratorSettings:
    """How a generator adapts to a site and samples: the table `[generator]` of a configuration."""

    RENAMED: ClassVar[Mapping[str, str]] = {
        "targets": "target_modules",
        "interval": "guidance_interval",
        "negative": "negative_prompt",
        "gamma": "min_snr_gamma",
        "fused": "fuse_lora",
        "batch": "batch_size",
    }

    base: str = "digits"
    """An embedded base, a folder in diffusers' layout, or a repository of the hub that lies in its cache."""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Type of the base's weights: fp32, bf16 or fp16; an adapter learns in fp32 in any case."""
    size: int = 0
    """Height and width in pixels of its images; 0: what the base was made for."""
    rank: int = 6
    """Rank of the adapter."""
    target_modules: Literal["attention", "transformer", "all", "none"] = "all"
    """Which layers of the denoiser get an adapter: attention, transformer, all or none (then only prompts are learned)."""
    prompts: bool = True
    """Whether the classes' prompt embeddings are learned too and travel beside the adapter."""
    training: Training = Training(
        optimizer="adamw", lr=1e-2, epochs=12, batch_size=32, schedule="cosine", warmup=5, max_grad_norm=1.0
    )
    """A site's training of its adapter."""
    views: int = 2
    """Shifted copies of each image whose latents are cached; 1: only the image itself."""
    lora: Lora = Lora()
    """What else there is to set about the adapter and its training."""
    adapters: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Adapters from elsewhere, {site = "file.safetensors"}: such a site learns none."""
    dropout: float = 0.1
    """Share of training images shown without a prompt, for guidance."""
    min_snr_gamma: float = 5.0
    """Largest weight of a time in the loss, as an error of the clean image; 0: no cap."""
    sampler: Literal["dpm++", "ddim", "unipc", "lcm"] = "dpm++"
    """dpm++ (DPM-Solver++), ddim, unipc, or lcm for a base that was distilled for a few steps."""
    steps: int = 8
    """Sampler steps."""
    spacing: Literal["", "leading", "linspace", "trailing"] = ""
    """Where the steps lie: leading, linspace or trailing; empty: where the base's own scheduler has them."""
    guidance: float = 1.5
    """Scale of classifier-free guidance; 1: none. More of it draws clearer classes that are more alike, which teach less."""
    negative_prompt: str = ""
    """The text that guidance leads away from."""
    guidance_interval: tuple[float, ...] = (0.0, 1.0)
    """The part of the times with guidance, from clean (0) to noise (1); a step outside of it costs half."""
    batch_size: int = 100
    """Images of one sampler batch; any classes together."""
    fuse_lora: bool = True
    """Whether an adapter is folded into the weights to sample; otherwise it stays beside them: slower, but a few MB less."""
    compile: str = ""
    """Backend of torch.compile for sampling, as inductor; empty: not compiled. It pays for thousands of samples."""

    def __post_init__(self) -> None:
        if self.target_modules not in layers.TARGETS:
            raise InputError(
                f"there is no choice of layers {self.target_modules!r}{suggest(self.target_modules, list(layers.TARGETS))}"
            )
        check_choices(self)
        if len(self.guidance_interval) != 2 or not 0 <= self.guidance_interval[0] <= self.guidance_interval[1] <= 1:
            raise InputError(
                f"generator.guidance_interval must be two shares in order, as [0.2, 0.8]; got {list(self.guidance_interval)}"
            )
        if min(self.rank, self.views, self.steps, self.batch_size) < 1:
            raise InputError("rank, views, steps and batch_size of the generator must be at least 1; check [generator]")
        if self.size < 0:
            raise InputError(f"generator.size is a number of pixels, or 0 for what the base was made for; got {self.size}")
        if self.min_snr_gamma < 0 or not 0 <= self.dropout <= 1:
            raise InputError("generator.min_snr_gamma must be at least 0 and generator.dropout from 0 to 1; check [generator]")
        if self.sampler == "lcm" and self.spacing:
            raise InputError("the sampler lcm has its steps where its base was distilled for them; take generator.spacing out")
        if self.target_modules == "none" and not (self.prompts or self.lora.textual_inversion):
            raise InputError("the generator has nothing to learn: set generator.target_modules or generator.prompts")
        if self.prompts and self.lora.textual_inversion:
            raise InputError(
                "textual inversion replaces learned prompts; set generator.prompts=false beside lora.textual_inversion"
            )
        if not all(isinstance(path, str) for path in self.adapters.values()):
            raise InputError('generator.adapters names a file for each site, as {ink = "ink.safetensors"}')

    @property
    def side(self) -> int:
        """Height and width in pixels of its images; raises `InputError` where there is no such base."""
        return self.size or pipeline.side(self.base)

    def space(self, base: pipeline.Parts) -> tuple[int, int, int]:
        """(channels, height, width) of a latent."""
        side, rest = divmod(self.side, base.scale)
        if rest or not side:
            raise InputError(f"images of {self.side} pixels are no multiple of {base.scale}; set generator.size to one")
        return base.denoiser.config.in_channels, side, side
