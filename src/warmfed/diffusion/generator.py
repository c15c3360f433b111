"""A latent diffusion pipeline as a `Generator`: one code path for the embedded base and for pipelines of any family."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core import Central, Generator, Local
from ..errors import InputError, one_of, suggest
from ..fit import Training, fit
from ..randomness import child
from ..tensors import Table, Tensors
from . import adapter as lora
from . import pipeline
from .families import Condition, chosen
from .objective import denoising_loss, flow_loss
from .sampler import SAMPLERS, SPACINGS, draw, flows, scheduler


@dataclass(frozen=True)
class LatentDiffusion:
    """Adapts by LoRA on cached latents and samples with a few steps of DPM-Solver++ (a `Generator`)."""

    base: str = "digits"
    """An embedded base, a folder in diffusers' layout, or a repository of the hub that lies in its cache."""
    dtype: str = "fp32"
    """Type of the base's weights: fp32, bf16 or fp16; an adapter learns in fp32 in any case."""
    size: int = 0
    """Height and width in pixels of its images; 0: what the base was made for."""
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
    sampler: str = "dpm++"
    """dpm++ (DPM-Solver++), ddim, unipc, or lcm for a base that was distilled for a few steps."""
    steps: int = 8
    """Sampler steps."""
    spacing: str = ""
    """Where the steps lie: leading, linspace or trailing; empty: where the base's own scheduler has them."""
    guidance: float = 1.5
    """Scale of classifier-free guidance; 1: none. More of it draws clearer classes that are more alike, which teach less."""
    negative: str = ""
    """The text that guidance leads away from."""
    interval: tuple[float, ...] = (0.0, 1.0)
    """The part of the times with guidance, from clean (0) to noise (1); a step outside of it costs half."""
    batch: int = 100
    """Images of one sampler batch; any classes together."""
    fused: bool = True
    """Whether an adapter is folded into the weights to sample; otherwise it stays beside them: slower, but a few MB less."""
    compile: str = ""
    """Backend of torch.compile for sampling, as inductor; empty: not compiled. It pays on a graphics card for many samples."""

    def __post_init__(self) -> None:
        if self.targets not in lora.TARGETS:
            raise InputError(f"there is no choice of layers {self.targets!r}{suggest(self.targets, list(lora.TARGETS))}")
        one_of(self, dtype=tuple(pipeline.DTYPES), sampler=tuple(SAMPLERS), spacing=SPACINGS)
        if len(self.interval) != 2 or not 0 <= self.interval[0] <= self.interval[1] <= 1:
            raise InputError(f"generator.interval must be two shares in order, as [0.2, 0.8]; got {list(self.interval)}")
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
        task = Adapting(model, self, self._parts(ctx.device).scheduler)
        tensors, info = fit(replace(ctx, task=task), start, self.training, self.latents(ctx))
        return lora.outward(tensors), info

    def check(self, adapter: Tensors, prompts: Sequence[str], who: str) -> None:
        lora.check(adapter, lora.outward(self._like(prompts)), who)

    def write(self, adapter: Tensors, folder: Path, site: str) -> None:
        lora.write(adapter, folder, site)

    def synthesize(self, adapter: Tensors | None, prompts: Sequence[str], labels: Tensor, ctx: Local | Central) -> Tensor:
        """One image for each label, uint8 [n, 3, h, w]; without an adapter: from the base alone, by its own prompts."""
        loaded, model = self._parts(ctx.device), self._model(tuple(prompts), ctx.device)
        blank = lora.fresh(model, torch.Generator())
        noise, images = torch.randn((len(labels), *self.space(loaded)), generator=ctx.rng), []
        with lora.worn(model, {**blank, **lora.inward(adapter or {})}, fused=self.fused):
            for done in range(0, len(labels), self.batch):
                part = slice(done, done + self.batch)
                condition = model.condition(labels[part].to(ctx.device))
                latents = self.denoise(model, loaded, noise[part].to(ctx.device), condition, model.empty, rng=ctx.rng)
                images.append(loaded.decode(latents, self.batch))
                ctx.progress("sample", min(done + self.batch, len(labels)), len(labels))
        return torch.cat(images)

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

    def describing(self, training: Training) -> "LatentDiffusion":
        return replace(self, targets="none", prompts=True, training=training)

    def conceiving(self, training: Training, signal: float, variation: float) -> Generator:
        from .concepts import Concepts

        return Concepts(replace(self, training=training), signal, variation)

    def denoise(
        self,
        model: nn.Module,
        base: pipeline.Parts,
        latents: Tensor,
        condition: Condition,
        empty: Condition,
        begin: int | None = None,
        rng: torch.Generator | None = None,
    ) -> Tensor:
        """Clean latents of noise [n, c, h, w].

        Args:
            begin: the time that the noise is of; none: the last one.
            rng: for samplers that draw noise at each step.
        """
        solver = scheduler(base.scheduler, self.sampler, self.spacing)
        if begin is None:
            solver.set_timesteps(self.steps, device=latents.device)
        else:
            times = (torch.linspace(begin + 1, 0, self.steps + 1)[:-1].round() - 1).int().tolist()
            solver.set_timesteps(timesteps=times, device=latents.device)
        against = base.embed([self.negative]) if self.negative else empty
        asked = _compiled(model, self.compile) if self.compile else model
        return draw(asked, solver, latents, condition, against, self.guidance, self.interval, rng)

    def latents(self, ctx: Local) -> Table:
        """The latents of the training images and of their shifted copies: the autoencoder leaves the loop."""
        table, rng = ctx.data["train"], child(ctx.rng)
        images = [table["image"], *(_shifted(table["image"], rng) for _ in range(self.views - 1))]
        mean, _ = self._parts(ctx.device).encode(torch.cat(images))
        views = mean.cpu().unflatten(0, (self.views, -1)).transpose(0, 1)
        return {"latent": views.contiguous(), "label": table["label"]}

    def _model(self, prompts: Sequence[str], device: str) -> lora.Adapted:
        return lora.adapted(self.base, tuple(prompts), self.rank, self.targets, device, self.dtype)

    def _parts(self, device: str) -> pipeline.Parts:
        return lora.parts(self.base, device, self.dtype)

    def _like(self, prompts: Sequence[str]) -> Tensors:
        like = lora.fresh(self._model(prompts, "cpu"), torch.Generator())
        return like if self.prompts else {name: tensor for name, tensor in like.items() if name != lora.PROMPTS}


@functools.cache
def _compiled(model: nn.Module, backend: str) -> Any:
    return torch.compile(model, backend=backend)


def _shifted(images: Tensor, rng: torch.Generator) -> Tensor:
    """Each image moved by up to two pixels each way, its edge repeated."""
    n, _, height, width = images.shape
    padded = F.pad(images.float(), (2, 2, 2, 2), mode="replicate").to(images.dtype)
    down, right = torch.randint(5, (2, n), generator=rng).tolist()
    return torch.stack([image[:, y : y + height, x : x + width] for image, y, x in zip(padded, down, right, strict=True)])


class Adapting:
    """The task of an adapter: the denoising loss under the class's prompt, `model.condition(labels)`."""

    def __init__(self, model: nn.Module, settings: LatentDiffusion, scheduler: Any) -> None:
        self.model, self.settings, self.scheduler = model, settings, scheduler

    def build(self) -> nn.Module:
        return self.model

    def loss(self, model: Any, batch: Table) -> Tensor:
        n, device = len(batch["label"]), batch["label"].device
        view = torch.randint(batch["latent"].shape[1], (n,)).to(device)
        latent = batch["latent"][torch.arange(n, device=device), view]
        empty = (torch.rand(n) < self.settings.dropout).to(device)
        condition = chosen(empty, model.empty, model.condition(batch["label"]))
        config, gamma = self.scheduler.config, self.settings.gamma

        def predict(noisy: Tensor, time: Tensor) -> Tensor:
            return model(noisy, time, condition)

        if shift := flows({"_class_name": type(self.scheduler).__name__, **config}):
            return flow_loss(predict, latent, shift, config.num_train_timesteps)
        return denoising_loss(predict, latent, self.scheduler.alphas_cumprod, config.prediction_type, gamma)
