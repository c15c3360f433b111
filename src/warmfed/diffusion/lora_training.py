"""Training of an adapter at a site: its loss, its data and the usual options of LoRA trainers; the loop is `fit`."""

import hashlib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core import ClientContext
from ..core.rng import fork, seeded, spawn, stream
from ..core.tensors import Table, Tensors, rows, select, sha256, strip_prefix, to
from ..core.training_snapshot import Snapshots
from ..data.image_cache import Cache
from ..fit import Stop, fit, solving
from ..utils.errors import InputError
from . import pipeline
from .losses import denoising_loss, drawn, flow_loss
from .pipeline_families import Condition, chosen
from .sampler import flows
from .settings import GeneratorSettings


class LoraTask:
    """The task of an adapter: the denoising loss with the class's prompt, `model.condition(labels)`."""

    def __init__(self, model: nn.Module, settings: GeneratorSettings, base: pipeline.Parts, prior: Table | None = None) -> None:
        """Create the task.

        Args:
            model: the base with LoRA layers.
            settings: the generator's settings.
            base: the parts of the base.
            prior: latents of the base's own samples, {"latent": float [m, c, h, w], "label": int64 [m]}, and "condition/…",
                the base's conditioning of each class.
        """
        self.model, self.settings, self.base, self.prior = model, settings, base, prior

    def build(self) -> nn.Module:
        """Return the model."""
        return self.model

    def draw(self, batch: Table) -> dict[str, Tensor]:
        """Return the batch of one view per row, with all random numbers of its loss."""
        n, device = len(batch["label"]), batch["label"].device
        view = torch.randint(batch["latent"].shape[1], (n,)).to(device)
        latent = batch["latent"][torch.arange(n, device=device), view]
        empty = (torch.rand(n) < self.settings.dropout).to(device)
        place, noise = drawn(latent, self.settings.lora.noise_offset)
        found = {"latent": latent, "label": batch["label"], "empty": empty, "place": place, "noise": noise}
        if self.prior is not None:
            chosen_rows = torch.randint(len(self.prior["label"]), (n,))
            latent, label = (self.prior[name][chosen_rows].to(device) for name in ("latent", "label"))
            place, noise = drawn(latent, self.settings.lora.noise_offset)
            found |= {"prior/latent": latent, "prior/label": label, "prior/place": place, "prior/noise": noise}
        return found

    def loss(self, model: Any, batch: Table) -> Tensor:
        """Return the mean loss over the rows of a batch from `draw`."""
        condition = chosen(batch["empty"], model.empty, model.condition(batch["label"]))
        total = self._error(model, batch, "", condition)
        if self.prior is None:
            return total
        label = batch["prior/label"]
        tables = strip_prefix(self.prior, "condition/")
        condition = {name: table.to(label.device)[label] for name, table in tables.items()}
        return total + self.settings.lora.prior_loss_weight * self._error(model, batch, "prior/", condition)

    def _error(self, model: Any, batch: Table, of: str, condition: Condition) -> Tensor:
        latent, at = batch[f"{of}latent"], (batch[f"{of}place"], batch[f"{of}noise"])
        scheduler, config = self.base.scheduler, self.base.scheduler.config

        def predict(noisy: Tensor, time: Tensor) -> Tensor:
            return model(noisy, time, condition)

        if shift := flows({"_class_name": type(scheduler).__name__, **config}):
            return flow_loss(predict, latent, shift, config.num_train_timesteps, at)
        return denoising_loss(
            predict, latent, scheduler.alphas_cumprod, config.prediction_type, self.settings.min_snr_gamma, at
        )

    def judge(self, held: Table, device: str) -> Callable[[nn.Module], float]:
        """Return a function that computes the loss on held-out latents, with the same noise in every call."""
        plain, held = LoraTask(self.model, replace(self.settings, dropout=0.0), self.base), to(held, device)

        def measure(model: nn.Module) -> float:
            total = 0.0
            with seeded(stream("adapting", "judge")):
                for part in torch.arange(rows(held)).split(self.settings.training.batch_size):
                    total += plain.loss(model, plain.draw(select(held, part))).item() * len(part)
            return total / rows(held)

        return measure


def train_adapter(ctx: ClientContext, task: LoraTask, start: Tensors) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Train the tensors of `start` on the site's training images.

    Args:
        ctx: the site's context.
        task: the task, with the settings.
        start: initial tensors.

    Returns:
        The trained tensors and the metrics of the training.

    Raises:
        InputError: as `fit` does, or if early stopping has no validation images.
    """
    settings, base = task.settings, task.base
    lora, training = settings.lora, settings.training
    data = latents(ctx, "train", settings, base)
    stop = None
    if lora.patience:
        held = ctx.data.get("validation", {})
        if not held or not rows(held):
            raise InputError(f"site {ctx.site!r} has no validation images for early stopping; set generator.lora.patience to 0")
        stop = Stop(task.judge(latents(ctx, "validation", settings, base), ctx.device), lora.patience)
    keep = None
    if ctx.snapshot_path is not None and lora.snapshots:
        keep = Snapshots(ctx.snapshot_path, lora.snapshots, repr((settings, ctx.prompts)))
    with _checkpointing(task.model, lora.gradient_checkpointing):
        found, info = fit(solving(ctx, task), start, training, data, draw=task.draw, stop=stop, snapshots=keep)
    return found, (info | {"micro": float(training.micro_batch_size)} if lora.auto_micro_batch else info)


@contextmanager
def _checkpointing(model: Any, wanted: bool) -> Iterator[None]:
    if not wanted:
        yield
        return
    model.denoiser.enable_gradient_checkpointing()
    try:
        yield
    finally:
        model.denoiser.disable_gradient_checkpointing()


def latents(ctx: ClientContext, split: str, settings: GeneratorSettings, base: pipeline.Parts) -> dict[str, Tensor]:
    """Return the cached latents of the images and their copies, {"latent": float [n, views, c, h, w], "label"}.

    Training images have shifted copies (`views`) and mirrored ones (`lora.flip`); validation images have none.
    """
    table = ctx.data[split]
    images = [table["image"]]
    if split == "train":
        rng = spawn(ctx.rng)
        images += [_shifted(table["image"], rng) for _ in range(settings.views - 1)]
        images += [image.flip(-1) for image in images] if settings.lora.flip else []
    if settings.lora.cache == "disk":
        mean = _on_disk(torch.cat(images), settings.base, base)
    else:
        mean = base.encode(torch.cat(images))[0].cpu()
    views = mean.unflatten(0, (len(images), -1)).transpose(0, 1)
    return {"latent": views if settings.lora.cache == "disk" else views.contiguous(), "label": table["label"]}


def _on_disk(images: Tensor, name: str, base: pipeline.Parts) -> Tensor:
    """Return the latents of images, memory-mapped from a file that is written once.

    The batches are those of `Parts.encode`, so the bits are the same as those of latents in memory.
    """
    batch = pipeline.chunk(images.shape[-1])
    _, height, width = images.shape[1:]
    channels = base.denoiser.config.in_channels
    shape = (len(images), channels, height // base.scale, width // base.scale)
    made_of = repr((sha256({"image": images}), pipeline.fingerprint(name), str(base.dtype), batch))

    def make(content: Any) -> None:
        done = 0
        for part in images.split(batch):
            found = np.ascontiguousarray(base.encode(part)[0].float().cpu().contiguous().numpy()).view(np.uint8).reshape(-1)
            content[done : done + len(found)] = found
            done += len(found)

    kept = Cache().array(f"latents-{hashlib.sha256(made_of.encode()).hexdigest()}", (4 * math.prod(shape),), make)
    return torch.from_numpy(kept).view(torch.float32).reshape(shape)


def _shifted(images: Tensor, rng: torch.Generator) -> Tensor:
    """Return each image shifted by up to two pixels along each axis, with its edge repeated."""
    n, _, height, width = images.shape
    padded = F.pad(images.float(), (2, 2, 2, 2), mode="replicate").to(images.dtype)
    down, right = torch.randint(5, (2, n), generator=rng).tolist()
    return torch.stack([image[:, y : y + height, x : x + width] for image, y, x in zip(padded, down, right, strict=True)])


def prior_samples(
    ctx: ClientContext, settings: GeneratorSettings, base: pipeline.Parts, draw: Callable[..., Tensor]
) -> dict[str, Tensor]:
    """Return latents of the site's classes that `draw` samples from the base; `ctx.rng` does not advance."""
    label = ctx.data["train"]["label"].unique().repeat_interleave(settings.lora.prior_images)
    latent = draw(None, ctx.prompts, label, replace(ctx, rng=fork(ctx.rng, "prior")))
    condition = {f"condition/{name}": table.cpu() for name, table in base.embed(ctx.prompts).items()}
    return {"latent": latent.cpu(), "label": label, **condition}
