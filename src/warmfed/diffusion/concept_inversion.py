"""Bi-level personalisation of a frozen pipeline (FedBiP): learned concept vectors and noised latents."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, nn

from ..core import AnyContext, ClientContext
from ..core.rng import spawn
from ..core.tensors import Table, Tensors
from ..utils.errors import InputError
from ..utils.files import atomic_write
from . import lora as lora
from .cost import micro_batch
from .generator import LatentDiffusion
from .lora_training import LoraTask, train_adapter
from .pipeline import Parts
from .pipeline_families import Condition
from .sampler import flows, timed


class Conceived(nn.Module):
    """A frozen denoiser. Its prompts are the classes' texts plus one vector for the domain and one for the class."""

    def __init__(self, base: Parts, prompts: Sequence[str]) -> None:
        super().__init__()
        self.base, self.text, self.empty = base, base.embed(prompts), base.embed([""])
        self.denoiser = base.denoiser
        width = self.text["prompt"].shape[-1]
        self.domain = nn.Parameter(torch.zeros(width))  # S
        self.concept = nn.Parameter(torch.zeros(len(prompts), width))  # V

    def condition(self, labels: Tensor) -> Condition:
        """Return the conditioning of these classes, n rows."""
        condition = {name: table[labels] for name, table in self.text.items()}
        return {**condition, "prompt": condition["prompt"] + self.domain + self.concept[labels][:, None]}

    def forward(self, noisy: Tensor, time: Tensor, condition: Condition) -> Tensor:
        """Return the denoiser's prediction for latents [n, c, h, w] with n prompts."""
        return self.base.family.ask(self.denoiser, noisy, time, condition, self.base.scale, self.base.dtype)


@dataclass(frozen=True)
class Concepts:
    """A `Generator` whose adapters are concept vectors and noised latents.

    Shapes:
        In 16 bits: domain [width], concept [classes, width], and latent [n, c, h, w], one per training image. of: int64 [n],
        the class of each latent.
    """

    diffusion: LatentDiffusion
    """Pipeline that samples."""
    signal: float
    """ᾱ of the latents: the image's share of their variance."""
    variation: float
    """Standard deviation of the noise on the domain vector of each sample."""

    def fingerprint(self) -> str:
        """Return the SHA-256 of the base's files."""
        return self.diffusion.fingerprint()

    def check_settings(self) -> None:
        """Raise `InputError` if these settings and this base cannot sample from latents with this noise."""
        self.diffusion.check_settings()
        if self.diffusion.adapters:
            raise InputError("FedBiP's sites send latents, not adapters; remove generator.adapters from the configuration")
        noise = self.diffusion.noise()
        if flows({"_class_name": type(noise).__name__, **noise.config}):
            raise InputError(f"FedBiP needs a diffusion process, but {self.diffusion.base} is a flow; set another base")
        timed(noise, self.diffusion.sampler, self.diffusion.steps, self.diffusion.spacing, self.begin(noise.alphas_cumprod))

    def check_prompts(self, classes: Sequence[str], prompts: Mapping[str, Sequence[str]]) -> None:
        """Raise `InputError` if two classes have equal tokens at a site; their vectors would begin equal too."""
        self.diffusion.check_prompts(classes, prompts)

    def adapt(self, ctx: ClientContext) -> tuple[Tensors, dict[str, float]]:
        """Return the site's adapter and the metrics of its training."""
        model = self._model(ctx.prompts, ctx.device)
        task = LoraTask(model, micro_batch(self.diffusion, len(ctx.prompts), ctx.device), self._parts(ctx.device))
        start = {"domain": torch.zeros_like(model.domain).cpu(), "concept": torch.zeros_like(model.concept).cpu()}
        found, info = train_adapter(ctx, task, start)
        latent = self.noised(ctx.data["train"], ctx.device, spawn(ctx.rng))
        tensors = {**{name: value.half() for name, value in found.items()}, "latent": latent.half()}
        return {**tensors, "of": ctx.data["train"]["label"].clone()}, info

    def noised(self, table: Table, device: str, rng: torch.Generator) -> Tensor:
        """Return √ᾱ·z + √(1 - ᾱ)·ε for each image; z mixes its latent with that of an image of the same class."""
        mean, deviation = (part.cpu() for part in self._parts(device).encode(table["image"]))
        partner = torch.empty(len(mean), dtype=torch.int64)
        for label in table["label"].unique():
            held = (table["label"] == label).nonzero()[:, 0]
            partner[held] = held[torch.randperm(len(held), generator=rng)]
        share = (0.5 + 0.1 * torch.randn(len(mean), 1, 1, 1, generator=rng)).clamp(0, 1)  # γ
        first, image, noise = (torch.randn(mean.shape, generator=rng) for _ in range(3))
        mixed = share * (mean + deviation * first) + (1 - share) * (mean + deviation * image)[partner]
        return self.signal**0.5 * mixed + (1 - self.signal) ** 0.5 * noise

    def check(self, adapter: Tensors, prompts: Sequence[str], who: str, classes: Sequence[int] = ()) -> None:
        """Raise `InputError` if an adapter does not fit this base and these prompts, or has no latent of a class."""
        base, of = self._parts("cpu"), adapter.get("of", torch.empty(0))
        if of.ndim != 1 or of.dtype != torch.int64 or not len(of) or of.min() < 0 or of.max() >= len(prompts):
            raise InputError(f"{who}: 'of' must name a class from 0 to {len(prompts) - 1} for each latent; adapt again")
        width = base.embed([""])["prompt"].shape[-1]
        like = {
            "domain": torch.empty(width, dtype=torch.half),
            "concept": torch.empty(len(prompts), width, dtype=torch.half),
            "latent": torch.empty(len(of), *self.diffusion.space(base), dtype=torch.half),
            "of": of,
        }
        lora.check(adapter, like, who)
        if missing := set(classes) - set(of.tolist()):
            raise InputError(f"{who}: the site has class {min(missing)}, but sent no latent of it; adapt again")

    def write(self, adapter: Tensors, folder: Path, site: str) -> None:
        """Write the vectors to `<site>.concepts.safetensors`.

        The latents are not written: they reveal images, and nothing needs them after the sampling of S.
        """
        atomic_write(folder / f"{site}.concepts.safetensors", save({name: adapter[name] for name in ("domain", "concept")}))

    def synthesize(self, adapter: Tensors | None, prompts: Sequence[str], labels: Tensor, ctx: AnyContext) -> Tensor:
        """Return one image per label, uint8 [n, 3, h, w], from the site's latents of its class in turn.

        Without an adapter, the base samples from noise.
        """
        if adapter is None:
            return self.diffusion.synthesize(None, prompts, labels, ctx)
        loaded, model = self._parts(ctx.device), self._model(tuple(prompts), ctx.device).eval()
        model.load_state_dict({name: adapter[name].float() for name in ("domain", "concept")}, strict=False)
        latents = adapter["latent"].float()[self.turns(adapter["of"], labels)]
        varied = self.variation * torch.randn(len(labels), 1, len(adapter["domain"]), generator=ctx.rng)
        begin, images = self.begin(loaded.scheduler.alphas_cumprod), []
        for done in range(0, len(labels), self.diffusion.batch_size):
            part = slice(done, done + self.diffusion.batch_size)
            with torch.no_grad():
                condition = model.condition(labels[part].to(ctx.device))
            condition["prompt"] = condition["prompt"] + varied[part].to(ctx.device)
            clean = self.diffusion.denoise(model, loaded, latents[part].to(ctx.device), condition, model.empty, ctx.rng, begin)
            images.append(loaded.decode(clean, self.diffusion.batch_size))
            ctx.progress("sample", min(done + self.diffusion.batch_size, len(labels)), len(labels))
        return torch.cat(images)

    def begin(self, alphas: Tensor) -> int:
        """Return the first time with ᾱ of at most `signal`."""
        there = (alphas <= self.signal).nonzero()
        return int(there[0]) if len(there) else len(alphas) - 1

    @staticmethod
    def turns(of: Tensor, labels: Tensor) -> Tensor:
        """Return for each label the row of a latent of its class; the rows of a class are used in turn.

        Raises:
            InputError: if a class has no latent.
        """
        rows = torch.empty(len(labels), dtype=torch.int64)
        for label in labels.unique():
            held, wanted = (of == label).nonzero()[:, 0], labels == label
            if not len(held):
                raise InputError(f"the site has class {int(label)}, but sent no latent of it; adapt again")
            rows[wanted] = held[torch.arange(int(wanted.sum())) % len(held)]
        return rows

    def _model(self, prompts: Sequence[str], device: str) -> Conceived:
        return Conceived(self._parts(device), prompts).to(device)

    def _parts(self, device: str) -> Parts:
        return lora.parts(self.diffusion.base, device, self.diffusion.dtype)
