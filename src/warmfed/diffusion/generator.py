"""A latent diffusion pipeline as a `Generator`: one code path for the embedded base and for pipelines of any family."""

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..core import Central, Generator, Local
from ..core.rng import child
from ..core.tensors import Tensors
from ..fit import Training
from ..utils.errors import InputError, one_of, suggest
from . import known_pipelines as outlines
from . import lora as lora
from . import pipeline
from .lora import Adapted
from .lora_import import digest, imported
from .lora_training import Adapting, Lora, learn, prior
from .pipeline_families import Condition
from .sampler import SAMPLERS, SPACINGS, draw, timed


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
    lora: Lora = Lora()
    """What else there is to set about the adapter and its training."""
    adapters: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Adapters from elsewhere, {site = "file.safetensors"}: such a site learns none."""
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
    """Backend of torch.compile for sampling, as inductor; empty: not compiled. It pays for thousands of samples."""

    def __post_init__(self) -> None:
        if self.targets not in lora.TARGETS:
            raise InputError(f"there is no choice of layers {self.targets!r}{suggest(self.targets, list(lora.TARGETS))}")
        one_of(self, dtype=tuple(pipeline.DTYPES), sampler=tuple(SAMPLERS), spacing=SPACINGS)
        if len(self.interval) != 2 or not 0 <= self.interval[0] <= self.interval[1] <= 1:
            raise InputError(f"generator.interval must be two shares in order, as [0.2, 0.8]; got {list(self.interval)}")
        if min(self.rank, self.views, self.steps, self.batch) < 1:
            raise InputError("rank, views, steps and batch of the generator must be at least 1; check [generator]")
        if self.size < 0:
            raise InputError(f"generator.size is a number of pixels, or 0 for what the base was made for; got {self.size}")
        if self.gamma < 0 or not 0 <= self.dropout <= 1:
            raise InputError("generator.gamma must be at least 0 and generator.dropout from 0 to 1; check [generator]")
        if self.sampler == "lcm" and self.spacing:
            raise InputError("the sampler lcm has its steps where its base was distilled for them; take generator.spacing out")
        if self.targets == "none" and not (self.prompts or self.lora.tokens):
            raise InputError("the generator has nothing to learn: set generator.targets or generator.prompts")
        if self.prompts and self.lora.tokens:
            raise InputError("learned tokens take the place of learned prompts; set generator.prompts=false beside lora.tokens")
        if not all(isinstance(path, str) for path in self.adapters.values()):
            raise InputError('generator.adapters names a file for each site, as {ink = "ink.safetensors"}')

    def fingerprint(self) -> str:
        """SHA-256 of the base's files, and of the adapters that come from elsewhere."""
        base = pipeline.fingerprint(self.base)
        return digest(base, self.adapters) if self.adapters else base

    def able(self) -> None:
        """Raise `InputError` where these settings cannot draw with this base, whose weights need not be there."""
        timed(self.noise(), self.sampler, self.steps, self.spacing)
        if self.compile and self.compile not in torch._dynamo.list_backends(()):
            known = torch._dynamo.list_backends(())
            raise InputError(f"torch.compile has no backend {self.compile!r}{suggest(self.compile, known)}")

    def noise(self) -> Any:
        """The base's own scheduler."""
        return outlines.build(*outlines.outline(self.base)[1]["scheduler"])

    def adapt(self, ctx: Local) -> tuple[Tensors, dict[str, float]]:
        if ctx.site in self.adapters:
            return self.imported(ctx.site, ctx.prompts), {"imported": 1.0}
        model, base = self._model(ctx.prompts, ctx.device), self._parts(ctx.device)
        start = self._learned(lora.fresh(model, child(ctx.rng)))
        task = Adapting(model, self, base, prior(ctx, self, base) if self.lora.prior else None)
        with lora.scaled(model, self.lora.scale(self.rank)):
            tensors, info = learn(ctx, task, start)
        return lora.outward(tensors, self.lora.scale(self.rank)), info

    def imported(self, site: str, prompts: Sequence[str]) -> dict[str, Tensor]:
        """A site's adapter from the file that `adapters` names; raises `InputError` where it does not fit."""
        return imported(Path(self.adapters[site]), self._like(prompts), self._parts("cpu"), self, site)

    def check(self, adapter: Tensors, prompts: Sequence[str], who: str, classes: Sequence[int] = ()) -> None:
        lora.check(adapter, lora.outward(self._like(prompts)), who)

    def write(self, adapter: Tensors, folder: Path, site: str) -> None:
        lora.write(adapter, folder, site)

    def synthesize(self, adapter: Tensors | None, prompts: Sequence[str], labels: Tensor, ctx: Local | Central) -> Tensor:
        """One image for each label, uint8 [n, 3, h, w]; without an adapter: from the base alone, by its own prompts."""
        base = self._parts(ctx.device)
        return torch.cat([base.decode(part, self.batch) for part in self._drawn(adapter, prompts, labels, ctx)])

    def drawn_latents(self, adapter: Tensors | None, prompts: Sequence[str], labels: Tensor, ctx: Local | Central) -> Tensor:
        """The same images before they are decoded, float [n, c, h, w]."""
        return torch.cat(list(self._drawn(adapter, prompts, labels, ctx)))

    def _drawn(self, adapter: Tensors | None, prompts: Sequence[str], labels: Tensor, ctx: Local | Central) -> Iterator[Tensor]:
        loaded, model = self._parts(ctx.device), self._model(tuple(prompts), ctx.device)
        blank = lora.fresh(model, torch.Generator())
        noise = torch.randn((len(labels), *self.space(loaded)), generator=ctx.rng)
        with lora.worn(model, {**blank, **lora.inward(adapter or {})}, fused=self.fused):
            for done in range(0, len(labels), self.batch):
                part = slice(done, done + self.batch)
                with torch.no_grad():
                    condition = model.condition(labels[part].to(ctx.device))
                yield self.denoise(model, loaded, noise[part].to(ctx.device), condition, model.empty, ctx.rng)
                ctx.progress("sample", min(done + self.batch, len(labels)), len(labels))

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
        plain = replace(self.lora, dora=False, tokens=False, prior=0.0)
        return replace(self, targets="none", prompts=True, training=training, lora=plain)

    def conceiving(self, training: Training, signal: float, variation: float) -> Generator:
        from .concept_inversion import Concepts

        return Concepts(replace(self, training=training), signal, variation)

    def denoise(
        self,
        model: nn.Module,
        base: pipeline.Parts,
        latents: Tensor,
        condition: Condition,
        empty: Condition,
        rng: torch.Generator,
        begin: int | None = None,
    ) -> Tensor:
        """Clean latents of noise [n, c, h, w].

        Args:
            rng: for samplers that draw noise at each step.
            begin: the time that the noise is of; none: the last one.
        """
        solver = timed(base.scheduler, self.sampler, self.steps, self.spacing, begin, latents.device)
        against = base.embed([self.negative]) if self.negative else empty
        asked = _compiled(model, self.compile) if self.compile else model
        return draw(asked, solver, latents, condition, against, self.guidance, self.interval, rng)

    def _model(self, prompts: Sequence[str], device: str) -> Adapted:
        kind = (self.base, tuple(prompts), self.rank, self.targets, device, self.dtype)
        return lora.adapted(*kind, dora=self.lora.dora, words=self.lora.tokens)

    def _parts(self, device: str) -> pipeline.Parts:
        return lora.parts(self.base, device, self.dtype)

    def _like(self, prompts: Sequence[str]) -> Tensors:
        return self._learned(lora.fresh(self._model(prompts, "cpu"), torch.Generator()))

    def _learned(self, adapter: Tensors) -> dict[str, Tensor]:
        """What of a fresh adapter is learned and travels."""
        return {name: tensor for name, tensor in adapter.items() if self.prompts or name != lora.PROMPTS}


@functools.cache
def _compiled(model: nn.Module, backend: str) -> Any:
    return torch.compile(model, backend=backend)
