"""Denoising: a diffusion model of the sites' images, in pixels or in the latents of a frozen autoencoder."""

import functools
from collections.abc import Callable, Collection, Mapping
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
from .classification import load_model


@functools.cache
def _autoencoder(base: str) -> pipeline.Parts:
    return pipeline.load(base)


@dataclass(frozen=True)
class Denoise:
    """Train a diffusion model of uint8 images [n, c, h, w] of `classes` classes (a `Task`).

    Its tables are encoded: {"latent": float [n, c', h', w'], "label": int64 [n]}.
    """

    shape: tuple[int, int, int]
    classes: int
    settings: DenoiserSettings = DenoiserSettings()
    start: str = ""
    """Safetensors file of initial weights; empty: random weights."""
    widths: tuple[tuple[str, int], ...] = ()
    """Hidden units of the pruned blocks, as (prefix of the tensors' names, units)."""
    shared: Path | None = field(default=None, compare=False, repr=False)
    """Cache folder that the runs of a comparison share: models trained at one site, and their samples."""

    @functools.cached_property
    def space(self) -> tuple[int, int, int]:
        """(channels, height, width) of a latent.

        Raises:
            InputError: if the image size is not a multiple of the autoencoder's patch size.
        """
        if not self.settings.latent:
            return self.shape
        channels = int(_autoencoder(self.settings.latent).vae.config.latent_channels)
        factor = pipeline.side(self.settings.latent) // int(_autoencoder(self.settings.latent).denoiser.config.sample_size)
        if self.shape[1] % factor or self.shape[2] % factor:
            raise InputError(
                f"images of {self.shape[1:]} do not fit {self.settings.latent}'s patches of {factor} pixels; "
                f"set data.options.image_size to a multiple of {factor}"
            )
        return channels, self.shape[1] // factor, self.shape[2] // factor

    @property
    def measure(self) -> str:
        """Name of the main metric; lower is better."""
        return "loss"

    def tables(self, splits: Mapping[str, Table]) -> Mapping[str, Table]:
        """Return a site's tables, encoded."""
        return {name: self.encoded(table) for name, table in splits.items()}

    def probe(self, image: Tensor) -> None:
        """Raise RuntimeError or `InputError` if the model does not accept images of this shape."""
        self.metrics(self.init(torch.Generator()), self.encoded({"image": image, "label": torch.zeros(len(image)).long()}))

    def encoded(self, data: Table) -> dict[str, Tensor]:
        """Return the table {"latent", "label"} of a table {"image", "label"}; training needs no autoencoder."""
        image = data["image"]
        latent = _autoencoder(self.settings.latent).encode(image)[0] if self.settings.latent else models.pixels(image)
        return {"latent": latent.contiguous(), "label": data["label"]}

    def decoded(self, latent: Tensor) -> Tensor:
        """Return the uint8 images [n, 3, h, w] of latents."""
        if self.settings.latent:
            return _autoencoder(self.settings.latent).decode(latent)
        return latent.add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8).contiguous()

    def build(self) -> nn.Module:
        """Return the network; its weights come from torch's global random stream.

        Raises:
            InputError: if the images are not square.
        """
        channels, height, width = self.space
        if height != width:
            raise InputError(f"expected square images, got {self.shape[1:]}; set data.options.image_size")
        net = DENOISERS[self.settings.denoiser](self.settings, channels, height, self.classes)
        pruning.narrow(net, dict(self.widths))
        return net

    @functools.cached_property
    def _hidden(self) -> dict[str, int]:
        with seeded(stream("hidden")):
            return dict(pruning.widths(self.build().state_dict()))

    def fitting(self, model: Tensors) -> "Denoise":
        """Return the task whose network has the widths of `model`, which may be pruned."""
        found = {prefix: units for prefix, units in pruning.widths(model) if prefix in self._hidden and units}
        return self if found.items() <= self._hidden.items() else replace(self, widths=tuple(sorted(found.items())))

    def pruned(self, model: Tensors, share: float) -> Tensors:
        """Return the model without this share of its blocks' hidden units; see `pruning.prune`."""
        return pruning.prune(model, share)

    def part(self, name: str) -> str:
        """Return the part of the network that holds the tensor `name`: "encoder", "bottleneck" or "decoder".

        The encoder includes the time and class embeddings. A transformer's bottleneck is its one or two middle blocks.
        """
        kind, _, rest = name.removeprefix("net.").partition(".")
        if kind == "transformer_blocks":
            outer, block = (self.settings.depth - 1) // 2, int(rest.partition(".")[0])
            return "encoder" if block < outer else "bottleneck" if block < self.settings.depth - outer else "decoder"
        return {"mid_block": "bottleneck", "up_blocks": "decoder"}.get(kind, "decoder" if "out" in kind else "encoder")

    def init(self, rng: torch.Generator) -> Tensors:
        """Return initial weights: those of `start`, or random ones from `rng`.

        Raises:
            InputError: as `load_model` does.
        """
        with seeded(rng):
            fresh = models.initial(self.build())
        return load_model(Path(self.start), fresh, "the denoiser to start from") if self.start else fresh

    def loss(self, model: nn.Module, batch: Table) -> Tensor:
        """Return the mean squared error of the prediction at random times; each label is dropped with `settings.dropout`."""
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

    def metrics(
        self, model: Tensors, data: Table, device: str = "cpu", held: Collection[int] | None = None
    ) -> dict[str, float]:
        """Return the loss and the count; every call uses the same noise, so only the weights change the loss.

        A loss is not split by the classes that a site holds.
        """
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
        """Return one sampled latent per label, float [n, c, h, w]; an unconditional model ignores the labels.

        Args:
            model: weights of the denoiser.
            label: classes, int64 [n].
            rng: source of all noise.
            device: the device of the network.
            progress: receives (samples done, samples in all) after each batch.
        """
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
        """Return a model trained from its initial weights on one site's images, and the metrics of the training."""
        start, data = self.init(spawn(ctx.rng)), ctx.data["train"]
        given = {**add_prefix(start, "start/"), **data}
        return cached(
            self.shared, "alone", (self, training, ctx.device), ctx.rng, given, lambda: fit(ctx, start, training, data)
        )

    def sample_alone(self, model: Tensors, label: Tensor, ctx: ClientContext | ServerContext) -> Tensor:
        """Return the samples of a model from `learned_alone`, float [n, c, h, w]."""

        def progress(done: int, total: int) -> None:
            ctx.progress("sample", done, total)

        def make() -> tuple[Tensors, Metrics]:
            return {"latent": self.sample(model, label, ctx.rng, ctx.device, progress)}, {}

        return cached(self.shared, "drawn", (self, ctx.device), ctx.rng, {**model, "labels": label}, make)[0]["latent"]

    def fidelity(
        self, model: Tensors, data: Mapping[str, Table], count: int, rng: torch.Generator, device: str = "cpu"
    ) -> dict[str, float]:
        """Return the distance of a model's samples to one site's images, on latents, which need no feature extractor.

        Classes are as frequent in the samples as in the training rows.

        Args:
            model: weights of the denoiser.
            data: the site's encoded tables "train" and "validation".
            count: number of samples.
            rng: source of all noise.
            device: the device of the network.

        Returns:
            fid and kid against the training rows, and memorization_rate in percent (`metrics.images`).
        """
        train, validation = (data[split]["latent"].flatten(1) for split in ("train", "validation"))
        label = apportion(data["train"]["label"].bincount(minlength=self.classes), count)
        drawn = self.sample(model, label, rng, device).flatten(1)
        return distances(train, drawn) | memorization_rate(train, validation, drawn)

    @torch.inference_mode()
    def _sample(self, net: nn.Module, latent: Tensor, label: Tensor) -> Tensor:
        scheduler = type(noise_scheduler(self.settings)).from_config(noise_scheduler(self.settings).config)
        scheduler.set_timesteps(self.settings.steps, device=latent.device)
        none = torch.full_like(label, self.classes)
        label = label if self.settings.conditional else none
        guidance = self.settings.guidance
        # the other samplers add noise in each step, from this generator
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
