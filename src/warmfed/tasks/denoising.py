"""The task of learning to draw: a diffusion model of the sites' images, in pixels or in a frozen autoencoder's latents."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from .. import models
from ..core import ClientContext, Metrics, ServerContext
from ..core.rng import seeded, spawn, stream
from ..core.tensors import Table, Tensors, add_prefix, apportion, rows, select, to
from ..core.training import Training
from ..diffusion import pipeline, pruning
from ..diffusion.losses import denoising_loss
from ..diffusion.networks import DENOISERS, DenoiserSettings, noise_scheduler
from ..diffusion.result_cache import cached
from ..fit import fit
from ..metrics.images import distances, memorization_rate
from ..utils.errors import InputError
from .classification import load_model, pixels


@functools.cache
def _autoencoder(base: str) -> pipeline.Parts:
    return pipeline.load(base)


@dataclass(frozen=True)
class Denoise:
    """Learning to draw uint8 images [n, c, h, w] of `classes` classes (a `Task`).

    Its tables are `encoded` ones: {"latent": float [n, c', h', w'], "label": int64 [n]}.
    """

    shape: tuple[int, int, int]
    classes: int
    settings: DenoiserSettings = DenoiserSettings()
    start: str = ""
    """A safetensors file that the denoiser starts from; empty: random weights."""
    widths: tuple[tuple[str, int], ...] = ()
    """Hidden units of the blocks that are not as wide as the settings make them, by the prefix of their tensors' names."""
    shared: Path | None = field(default=None, compare=False, repr=False)
    """Where what runs of a comparison have in common is kept: models that sites learned alone, and what these draw."""

    @functools.cached_property
    def space(self) -> tuple[int, int, int]:
        """(channels, height, width) of a latent."""
        if not self.settings.latent:
            return self.shape
        channels = int(_autoencoder(self.settings.latent).vae.config.latent_channels)
        factor = pipeline.side(self.settings.latent) // int(_autoencoder(self.settings.latent).denoiser.config.sample_size)
        if self.shape[1] % factor or self.shape[2] % factor:
            raise InputError(f"images of {self.shape[1:]} do not fit {self.settings.latent}'s patches of {factor} pixels")
        return channels, self.shape[1] // factor, self.shape[2] // factor

    @property
    def measure(self) -> str:
        """The metric that sums up a model; lower is better."""
        return "loss"

    def tables(self, splits: Mapping[str, Table]) -> Mapping[str, Table]:
        """A site's tables as this task takes them."""
        return {name: self.encoded(table) for name, table in splits.items()}

    def probe(self, image: Tensor) -> None:
        """Raise RuntimeError or `InputError` where the model does not take such images."""
        self.metrics(self.init(torch.Generator()), self.encoded({"image": image, "label": torch.zeros(len(image)).long()}))

    def encoded(self, data: Table) -> dict[str, Tensor]:
        """The table that this task learns from, of {"image", "label"}: the autoencoder leaves the training loop."""
        image = data["image"]
        latent = _autoencoder(self.settings.latent).encode(image)[0] if self.settings.latent else pixels(image)
        return {"latent": latent.contiguous(), "label": data["label"]}

    def decoded(self, latent: Tensor) -> Tensor:
        """uint8 images [n, 3, h, w] of latents."""
        if self.settings.latent:
            return _autoencoder(self.settings.latent).decode(latent)
        return latent.add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8).contiguous()

    def build(self) -> nn.Module:
        channels, height, width = self.space
        if height != width:
            raise InputError(f"square images were expected, {self.shape[1:]} came; set data.options.image_size")
        net = DENOISERS[self.settings.denoiser](self.settings, channels, height, self.classes)
        pruning.narrow(net, dict(self.widths))
        return net

    @functools.cached_property
    def _hidden(self) -> dict[str, int]:
        with seeded(stream("hidden")):
            return dict(pruning.widths(self.build().state_dict()))

    def fitting(self, model: Tensors) -> "Denoise":
        """The task whose network is as wide as this model, which may have been pruned."""
        found = {prefix: units for prefix, units in pruning.widths(model) if prefix in self._hidden and units}
        return self if found.items() <= self._hidden.items() else replace(self, widths=tuple(sorted(found.items())))

    def pruned(self, model: Tensors, share: float) -> Tensors:
        """The model without that share of its blocks' hidden units; see `pruning.prune`."""
        return pruning.prune(model, share)

    def part(self, name: str) -> str:
        """Where the tensor of this name lies: encoder (with what embeds time and class), bottleneck, or decoder.

        A transformer's bottleneck is its one or two middle blocks.
        """
        kind, _, rest = name.removeprefix("net.").partition(".")
        if kind == "transformer_blocks":
            outer, block = (self.settings.depth - 1) // 2, int(rest.partition(".")[0])
            return "encoder" if block < outer else "bottleneck" if block < self.settings.depth - outer else "decoder"
        return {"mid_block": "bottleneck", "up_blocks": "decoder"}.get(kind, "decoder" if "out" in kind else "encoder")

    def init(self, rng: torch.Generator) -> Tensors:
        with seeded(rng):
            fresh = models.initial(self.build())
        return load_model(Path(self.start), fresh, "the denoiser to start from") if self.start else fresh

    def loss(self, model: nn.Module, batch: Table) -> Tensor:
        """Mean squared error of the prediction at random times."""
        label = batch["label"]
        forget = torch.rand(len(label)).to(label.device) < (self.settings.dropout if self.settings.conditional else 1.0)
        label = torch.where(forget, self.classes, label)
        return denoising_loss(
            lambda noisy, time: model(noisy, time, label),
            batch["latent"],
            noise_scheduler(self.settings).alphas_cumprod,
            self.settings.prediction,
            self.settings.min_snr_gamma if self.settings.weighting == "min-snr" else None,
        )

    def metrics(self, model: Tensors, data: Table, device: str = "cpu") -> dict[str, float]:
        """The loss with the same noise in every call, so that two models are told apart by their weights alone."""
        total, count = 0.0, rows(data)
        with torch.no_grad(), seeded(stream("denoise", "metrics"), device):
            net = self._loaded(model, device)
            for part in torch.arange(count).split(self.settings.batch_size):
                total += self.loss(net, to(select(data, part), device)).item() * len(part)
        return {"loss": total / count, "count": float(count)}

    def _loaded(self, model: Tensors, device: str) -> nn.Module:
        net = self.fitting(model).build().eval()
        net.load_state_dict(dict(model))
        return net.to(device)

    def sample(
        self,
        model: Tensors,
        label: Tensor,
        rng: torch.Generator,
        device: str = "cpu",
        progress: Callable[[int, int], None] | None = None,
    ) -> Tensor:
        """One latent for each label, float [n, c, h, w], drawn from `rng`; labels count where it is conditional."""
        noise = torch.randn((len(label), *self.space), generator=rng)
        with seeded(spawn(rng)):
            net = self._loaded(model, device)
        drawn = []
        for part in torch.arange(len(label)).split(self.settings.batch_size):
            with seeded(spawn(rng), device):
                drawn.append(self._sample(net, noise[part].to(device), label[part].to(device)).cpu())
            if progress is not None:
                progress(int(part[-1]) + 1, len(label))
        return torch.cat(drawn) if drawn else noise

    def learned_alone(self, ctx: ClientContext, training: Training) -> tuple[Tensors, Metrics]:
        """A model of a site's own images, from a fresh start."""
        start, data = self.init(spawn(ctx.rng)), ctx.data["train"]
        given = {**add_prefix(start, "start/"), **data}
        return cached(
            self.shared, "alone", (self, training, ctx.device), ctx.rng, given, lambda: fit(ctx, start, training, data)
        )

    def sample_alone(self, model: Tensors, label: Tensor, ctx: ClientContext | ServerContext) -> Tensor:
        """What `sample` draws by such a model."""

        def progress(done: int, total: int) -> None:
            ctx.progress("sample", done, total)

        def make() -> tuple[Tensors, Metrics]:
            return {"latent": self.sample(model, label, ctx.rng, ctx.device, progress)}, {}

        return cached(self.shared, "drawn", (self, ctx.device), ctx.rng, {**model, "labels": label}, make)[0]["latent"]

    def fidelity(
        self, model: Tensors, data: Mapping[str, Table], count: int, rng: torch.Generator, device: str = "cpu"
    ) -> dict[str, float]:
        """How like a site's own images a model draws, classes as frequent as there: by latents, since they need no network.

        Returns:
            fid and kid of `count` samples against the training rows, and in percent copies: see `metrics.images.copies`.
        """
        seen, unseen = (data[split]["latent"].flatten(1) for split in ("train", "validation"))
        label = apportion(data["train"]["label"].bincount(minlength=self.classes), count)
        drawn = self.sample(model, label, rng, device).flatten(1)
        return distances(seen, drawn) | memorization_rate(seen, unseen, drawn)

    @torch.inference_mode()
    def _sample(self, net: nn.Module, latent: Tensor, label: Tensor) -> Tensor:
        scheduler = type(noise_scheduler(self.settings)).from_config(noise_scheduler(self.settings).config)
        scheduler.set_timesteps(self.settings.steps, device=latent.device)
        none = torch.full_like(label, self.classes)
        label = label if self.settings.conditional else none
        guidance = self.settings.guidance
        # the others draw their noise from the generator that they are given
        options = {} if self.settings.sampler == "dpm++" else {"generator": torch.default_generator}
        for time in scheduler.timesteps:
            times = time.expand(len(latent))
            if guidance == 1:
                predicted = net(latent, times, label)
            else:
                plain, guided = net(latent.repeat(2, 1, 1, 1), times.repeat(2), torch.cat([none, label])).chunk(2)
                predicted = plain + guidance * (guided - plain)
            latent = scheduler.step(predicted, time, latent, **options).prev_sample
        return latent
