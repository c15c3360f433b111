"""A latent diffusion pipeline as a `Generator`, with one code path for all families and the embedded base."""

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..core import AnyContext, ClientContext
from ..core.rng import spawn
from ..core.tensors import Tensors
from ..utils.errors import InputError, suggest
from . import known_pipelines, pipeline
from . import lora as lora
from .cost import micro_batch
from .lora import Adapted
from .lora_import import digest, imported
from .lora_training import LoraTask, prior_samples, train_adapter
from .pipeline_families import Condition
from .prompt_check import check_prompts
from .sampler import draw, timed
from .settings import GeneratorSettings


@dataclass(frozen=True)
class LatentDiffusion(GeneratorSettings):
    """Adapt a pipeline with LoRA on cached latents, and sample from it (a `Generator`)."""

    def fingerprint(self) -> str:
        """Return the SHA-256 of the base's files and of the imported adapters."""
        base = pipeline.fingerprint(self.base)
        return digest(base, self.adapters) if self.adapters else base

    def check_settings(self) -> None:
        """Raise `InputError` if these settings cannot sample from this base; its weights need not exist."""
        timed(self.noise(), self.sampler, self.steps, self.spacing)
        if self.compile and self.compile not in torch._dynamo.list_backends(()):
            known = torch._dynamo.list_backends(())
            raise InputError(f"torch.compile has no backend {self.compile!r}{suggest(self.compile, known)}")

    def check_prompts(self, classes: Sequence[str], prompts: Mapping[str, Sequence[str]]) -> None:
        """Raise `InputError` if two classes have equal tokens at a site (`prompts` by site); the weights need not exist.

        Learned prompts begin as the embedded ones, so they would begin equal too.
        """
        check_prompts(self.base, classes, prompts)

    def noise(self) -> Any:
        """Return the base's own scheduler."""
        return known_pipelines.build(*known_pipelines.outline(self.base)[1]["scheduler"])

    def adapt(self, ctx: ClientContext) -> tuple[Tensors, dict[str, float]]:
        """Return the site's adapter and the metrics of its training; an imported adapter is not trained."""
        if ctx.site in self.adapters:
            return self.imported(ctx.site, ctx.prompts), {"imported": 1.0}
        model, base = self._model(ctx.prompts, ctx.device), self._parts(ctx.device)
        start = self._learned(lora.fresh(model, spawn(ctx.rng)))
        settings = micro_batch(self, len(ctx.prompts), ctx.device)
        task = LoraTask(
            model,
            settings,
            base,
            prior_samples(ctx, settings, base, self.drawn_latents) if self.lora.prior_loss_weight else None,
        )
        with lora.scaled(model, self.lora.scale(self.rank)):
            tensors, info = train_adapter(ctx, task, start)
        return lora.to_diffusers(tensors, self.lora.scale(self.rank)), info

    def imported(self, site: str, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Return a site's adapter from its file in `adapters`; raise `InputError` if it does not fit."""
        return imported(Path(self.adapters[site]), self._like(prompts), self._parts("cpu"), self, site)

    def check(self, adapter: Tensors, prompts: Sequence[str], who: str, classes: Sequence[int] = ()) -> None:
        """Raise `InputError` if an adapter does not fit this base and these settings."""
        lora.check(adapter, lora.to_diffusers(self._like(prompts)), who)

    def write(self, adapter: Tensors, folder: Path, site: str) -> None:
        """Write a site's adapter to a folder, as `lora.write` does."""
        lora.write(adapter, folder, site)

    def synthesize(self, adapter: Tensors | None, prompts: Sequence[str], labels: Tensor, ctx: AnyContext) -> Tensor:
        """Return one image per label, uint8 [n, 3, h, w]; without an adapter, from the base with its own prompts."""
        base = self._parts(ctx.device)
        return torch.cat([base.decode(part, self.batch_size) for part in self._drawn(adapter, prompts, labels, ctx)])

    def drawn_latents(self, adapter: Tensors | None, prompts: Sequence[str], labels: Tensor, ctx: AnyContext) -> Tensor:
        """Return the latents of the same images, float [n, c, h, w]."""
        return torch.cat(list(self._drawn(adapter, prompts, labels, ctx)))

    def _drawn(self, adapter: Tensors | None, prompts: Sequence[str], labels: Tensor, ctx: AnyContext) -> Iterator[Tensor]:
        loaded, model = self._parts(ctx.device), self._model(tuple(prompts), ctx.device)
        blank = lora.fresh(model, torch.Generator())
        noise = torch.randn((len(labels), *self.space(loaded)), generator=ctx.rng)
        with lora.applied(model, {**blank, **lora.to_peft(adapter or {})}, fused=self.fuse_lora):
            for done in range(0, len(labels), self.batch_size):
                part = slice(done, done + self.batch_size)
                with torch.no_grad():
                    condition = model.condition(labels[part].to(ctx.device))
                yield self.denoise(model, loaded, noise[part].to(ctx.device), condition, model.empty, ctx.rng)
                ctx.progress("sample", min(done + self.batch_size, len(labels)), len(labels))

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
        """Return the clean latents of noise [n, c, h, w].

        Args:
            model: the adapted denoiser.
            base: the parts of the pipeline.
            latents: the noise.
            condition: conditioning of the samples, n rows.
            empty: conditioning of the empty prompt, one row.
            rng: source of the noise of samplers that add noise at each step.
            begin: time of the noise; None: the last one.
        """
        solver = timed(base.scheduler, self.sampler, self.steps, self.spacing, begin, latents.device)
        against = base.embed([self.negative_prompt]) if self.negative_prompt else empty
        denoiser = _compiled(model, self.compile) if self.compile else model
        return draw(denoiser, solver, latents, condition, against, self.guidance, self.guidance_interval, rng)

    def _model(self, prompts: Sequence[str], device: str) -> Adapted:
        kind = (self.base, tuple(prompts), self.rank, self.target_modules, device, self.dtype)
        return lora.adapted(*kind, dora=self.lora.dora, words=self.lora.textual_inversion)

    def _parts(self, device: str) -> pipeline.Parts:
        return lora.parts(self.base, device, self.dtype)

    def _like(self, prompts: Sequence[str]) -> Tensors:
        return self._learned(lora.fresh(self._model(prompts, "cpu"), torch.Generator()))

    def _learned(self, adapter: Tensors) -> dict[str, Tensor]:
        """Return the trained tensors of a fresh adapter."""
        return {name: tensor for name, tensor in adapter.items() if self.prompts or name != lora.PROMPTS}


@functools.cache
def _compiled(model: nn.Module, backend: str) -> Any:
    return torch.compile(model, backend=backend)
