"""A latent diffusion pipeline as a `Generator`: one code path for the embedded base and for Stable Diffusion."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core import Central, Generator, Local
from ..errors import InputError, suggest
from ..fit import Training, fit
from ..randomness import child
from ..tensors import Table, Tensors
from . import adapter as lora
from . import pipeline
from .objective import denoising_loss


@dataclass(frozen=True)
class LatentDiffusion:
    """Adapts by LoRA on cached latents and samples with a few steps of DPM-Solver++ (a `Generator`)."""

    base: str = "digits"
    """An embedded base or a folder in diffusers' layout."""
    rank: int = 6
    """Rank of the adapter."""
    targets: str = "all"
    """Which layers of the denoiser get an adapter: attention, transformer, all or none (then only prompts are learned)."""
    prompts: bool = True
    """Whether the classes' prompt embeddings are learned too and travel beside the adapter."""
    training: Training = Training(optimizer="adamw", lr=1e-2, epochs=12, batch=32, schedule="cosine", warmup=5, clip=1.0)
    """A site's training of its adapter."""
    views: int = 2
    """Shifted copies of each image whose latents are cached; 1: only the image itself."""
    dropout: float = 0.1
    """Share of training images shown without a prompt, for guidance."""
    gamma: float = 5.0
    """Largest weight of a time in the loss, as an error of the clean image; 0: no cap."""
    steps: int = 8
    """Sampler steps."""
    guidance: float = 1.5
    """Scale of classifier-free guidance; 1: none. More of it draws clearer classes that are more alike, which teach less."""
    batch: int = 100
    """Images of one sampler batch."""

    def __post_init__(self) -> None:
        if self.targets not in lora.TARGETS:
            raise InputError(f"there is no choice of layers {self.targets!r}{suggest(self.targets, list(lora.TARGETS))}")
        if min(self.rank, self.views, self.steps, self.batch) < 1:
            raise InputError("rank, views, steps and batch of the generator must be at least 1; check [generator]")
        if self.targets == "none" and not self.prompts:
            raise InputError("the generator has nothing to learn: set generator.targets or generator.prompts")

    def fingerprint(self) -> str:
        """SHA-256 of the base's files."""
        return pipeline.fingerprint(self.base)

    def adapt(self, ctx: Local) -> tuple[Tensors, dict[str, float]]:
        model = self._model(ctx.prompts, ctx.device)
        start = lora.fresh(model, child(ctx.rng))
        if not self.prompts:
            start.pop(lora.PROMPTS)
        task = Adapting(model, self, lora.parts(self.base, ctx.device).scheduler)
        tensors, info = fit(replace(ctx, task=task), start, self.training, self.latents(ctx))
        return lora.outward(tensors), info

    def check(self, adapter: Tensors, prompts: Sequence[str], who: str) -> None:
        lora.check(adapter, lora.outward(self._like(prompts)), who)

    def write(self, adapter: Tensors, folder: Path, site: str) -> None:
        lora.write(adapter, folder, site)

    def synthesize(self, adapter: Tensors | None, prompts: Sequence[str], labels: Tensor, ctx: Local | Central) -> Tensor:
        """One image for each label, uint8 [n, 3, h, w]; without an adapter: from the base alone, by its own prompts."""
        loaded, model = lora.parts(self.base, ctx.device), self._model(tuple(prompts), ctx.device)
        blank = lora.fresh(model, torch.Generator())
        fused = lora.merged(model, {**blank, **lora.inward(adapter or {})})
        shape = (len(labels), loaded.unet.config.in_channels, *(2 * (loaded.unet.config.sample_size,)))
        noise, images = torch.randn(shape, generator=ctx.rng), []
        for done in range(0, len(labels), self.batch):
            part = slice(done, done + self.batch)
            latents = self._sample(fused, loaded.scheduler, noise[part].to(ctx.device), labels[part].to(ctx.device))
            images.append(loaded.decode(latents, self.batch))
            ctx.progress("sample", min(done + self.batch, len(labels)), len(labels))
        return torch.cat(images)

    def describing(self, training: Training) -> "LatentDiffusion":
        return replace(self, targets="none", prompts=True, training=training)

    def conceiving(self, training: Training, signal: float, variation: float) -> Generator:
        from .concepts import Concepts

        return Concepts(replace(self, training=training), signal, variation)

    def _sample(self, model: lora.Adapted, config: object, latents: Tensor, labels: Tensor) -> Tensor:
        return self.denoise(model, config, latents, model.condition(labels), model.empty)

    @torch.inference_mode()
    def denoise(
        self, model: nn.Module, config: Any, latents: Tensor, condition: Tensor, empty: Tensor, begin: int | None = None
    ) -> Tensor:
        """Clean latents of noise [n, c, h, w] under prompts [n, tokens, width].

        Args:
            begin: the time that the noise is of; none: the last one.
        """
        from diffusers import DPMSolverMultistepScheduler

        scheduler = DPMSolverMultistepScheduler.from_config(config.config)
        if begin is None:
            scheduler.set_timesteps(self.steps, device=latents.device)
        else:
            times = (torch.linspace(begin + 1, 0, self.steps + 1)[:-1].round() - 1).int().tolist()
            scheduler.set_timesteps(timesteps=times, device=latents.device)
        if self.guidance != 1:
            condition = torch.cat([empty.expand(len(condition), -1, -1), condition])
        latents = latents * scheduler.init_noise_sigma
        for time in scheduler.timesteps:
            inputs = scheduler.scale_model_input(latents, time)
            if self.guidance == 1:
                predicted = model(inputs, time, condition)
            else:
                plain, guided = model(torch.cat([inputs, inputs]), time, condition).chunk(2)
                predicted = plain + self.guidance * (guided - plain)
            latents = scheduler.step(predicted, time, latents).prev_sample
        return latents

    def latents(self, ctx: Local) -> Table:
        """The latents of the training images and of their shifted copies: the autoencoder leaves the loop."""
        table, rng = ctx.data["train"], child(ctx.rng)
        images = [table["image"], *(_shifted(table["image"], rng) for _ in range(self.views - 1))]
        mean, _ = lora.parts(self.base, ctx.device).encode(torch.cat(images))
        views = mean.cpu().unflatten(0, (self.views, -1)).transpose(0, 1)
        return {"latent": views.contiguous(), "label": table["label"]}

    def _model(self, prompts: Sequence[str], device: str) -> lora.Adapted:
        return lora.adapted(self.base, tuple(prompts), self.rank, self.targets, device)

    def _like(self, prompts: Sequence[str]) -> Tensors:
        like = lora.fresh(self._model(prompts, "cpu"), torch.Generator())
        return like if self.prompts else {name: tensor for name, tensor in like.items() if name != lora.PROMPTS}


def _shifted(images: Tensor, rng: torch.Generator) -> Tensor:
    """Each image moved by up to two pixels each way, its edge repeated."""
    n, _, height, width = images.shape
    padded = F.pad(images.float(), (2, 2, 2, 2), mode="replicate").to(images.dtype)
    down, right = torch.randint(5, (2, n), generator=rng).tolist()
    return torch.stack([image[:, y : y + height, x : x + width] for image, y, x in zip(padded, down, right, strict=True)])


class Adapting:
    """The task of an adapter: the denoising loss under the class's prompt, `model.condition(labels)`."""

    def __init__(self, model: nn.Module, settings: LatentDiffusion, scheduler: object) -> None:
        self.model, self.settings, self.scheduler = model, settings, scheduler

    def build(self) -> nn.Module:
        return self.model

    def loss(self, model: Any, batch: Table) -> Tensor:
        n, device = len(batch["label"]), batch["label"].device
        view = torch.randint(batch["latent"].shape[1], (n,)).to(device)
        latent = batch["latent"][torch.arange(n, device=device), view]
        empty = (torch.rand(n) < self.settings.dropout).to(device)[:, None, None]
        condition = torch.where(empty, model.empty, model.condition(batch["label"]))
        scheduler = self.scheduler
        return denoising_loss(
            lambda noisy, time: model(noisy, time, condition),
            latent,
            scheduler.alphas_cumprod,  # type: ignore[attr-defined]
            scheduler.config.prediction_type,  # type: ignore[attr-defined]
            self.settings.gamma,
        )
