"""Pre-training of a small text-conditioned latent diffusion pipeline on public images: rendered digits or a user's own.

Four phases: an autoencoder (`AutoencoderTiny`, 32×32 pixels to 8×8×8 latents; its encoder in closed form), the text
encoder on captions, the denoiser on cached latents and embeddings, and the public classifier. The denoiser predicts v
(Salimans and Ho, ICLR 2022, arXiv:2202.00512) with the cosine schedule. A share of the captions is empty, for
classifier-free guidance.
"""

import json
import math
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from ..core import ServerContext
from ..core.rng import seeded, stream
from ..core.tensors import Table, Tensors, only, strip_prefix
from ..core.training import Training
from ..core.training_snapshot import Snapshots
from ..data.rendered_digits import SIDE
from ..diffusion.losses import denoising_loss
from ..diffusion.networks import LATENT, text_to_image
from ..diffusion.pipeline import PUBLIC_CLASSIFIER, Parts, pixels, save
from ..diffusion.pipeline_families import ids
from ..fit import Problem, fit
from ..tasks import Classify
from ..utils.errors import InputError
from ..utils.files import atomic_write, loads_json, open_regular, read_bytes, read_json
from ..utils.paths import exists, is_file
from ..utils.settings import check_seed
from .captions import Captions, ImageSet, check_captions, digits, drawn, mirrored, tokenizer

Phase = tuple[Mapping[str, Tensor], Mapping[str, float]]
"""Tensors of a phase, and its figures for `pretraining.json`."""


@dataclass(frozen=True)
class Pretraining:
    """Settings of a pre-training; the defaults are those of the embedded base."""

    RENAMED: ClassVar[Mapping[str, str]] = {
        "gamma": "min_snr_gamma",
        "ema": "ema_decay",
        "batch": "batch_size",
        "decoder_batch": "decoder_batch_size",
    }

    characters: str = "0123456789"
    """Digits to render, if no images are given."""
    images: int = 100_000
    """Number of rendered images."""
    side: int = 32
    """Side of the images in pixels: 16, 32, 64 or 128; a latent position covers side/8 pixels along each axis."""
    flip: bool = False
    """Mirrored copy of each image: for photographs, not for digits."""
    channels: int = 8
    """Channels of the latents; at most the values of a patch."""
    decoder_width: int = 32
    """Channels of the autoencoder's decoder."""
    decoder_steps: int = 1600
    """Optimizer steps of the decoder."""
    decoder_batch_size: int = 32
    """Images per step of the decoder."""
    decoder_lr: float = 1e-3
    """Peak learning rate of the decoder."""
    decoder_noise: float = 0.05
    """Standard deviation of the noise on the latents in the decoder's training."""
    widths: tuple[int, ...] = (64, 128)
    """Channels of the denoiser at 8 and 4 pixels; multiples of 16."""
    text_width: int = 96
    """Width of the text encoder; a multiple of 4."""
    text_layers: int = 2
    """Layers of the text encoder."""
    text_steps: int = 300
    """Optimizer steps of the text encoder."""
    steps: int = 18_000
    """Optimizer steps of the denoiser."""
    batch_size: int = 64
    """Latents per optimizer step of the denoiser."""
    lr: float = 1e-3
    """Peak learning rate of the denoiser, after `warmup` steps; it falls to zero as a cosine."""
    warmup: int = 300
    """Steps over which the learning rate rises."""
    ema_decay: float = 0.999
    """Decay of the moving average of the weights; the average is the result."""
    dropout: float = 0.12
    """Share of empty captions; 0 to 1."""
    min_snr_gamma: float = 5.0
    """Largest weight of a time in the loss, in terms of the error of the clean image; 0: no cap."""
    classifier: str = "cnn"
    """Public classifier: a network of `warmfed.models`."""
    classifier_epochs: int = 5
    """Epochs of the public classifier, the initial model of FedAvg in comparisons with WarmFed."""
    at: tuple[int, ...] = ()
    """Steps of the denoiser after which the base is also written to the folder OUT-STEP."""
    threads: int = 1
    """Threads of torch; another number changes the last bits."""
    snapshot: int = 500
    """Steps between two snapshots of the denoiser's training in the work folder; 0: none."""
    seed: int = 0
    """Seed of all random numbers, from 0 to 2**63 - 1."""

    def __post_init__(self) -> None:
        check_seed(self.seed)
        counts = (
            "images", "channels", "decoder_width", "decoder_steps", "decoder_batch_size", "text_layers", "text_steps", "steps",
            "batch_size", "classifier_epochs", "threads",
        )  # fmt: skip
        for name in counts:
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1; got {getattr(self, name)}")
        if not self.characters or not set(self.characters) <= set("0123456789"):
            raise InputError(f"characters must be digits, as 0123456789; got {self.characters!r}")
        if not self.widths or any(width < 16 or width % 16 for width in self.widths):
            raise InputError(f"widths must be multiples of 16; got {list(self.widths)}")
        if self.text_width < 4 or self.text_width % 4:
            raise InputError(f"text_width must be a multiple of 4; got {self.text_width}")
        if not (0 <= self.dropout <= 1 and 0 <= self.ema_decay < 1) or min(self.min_snr_gamma, self.warmup, self.snapshot) < 0:
            raise InputError(
                "dropout must be from 0 to 1, ema_decay from 0 to below 1, and min_snr_gamma, warmup and snapshot at least 0"
            )
        if not all(0 < rate < math.inf for rate in (self.lr, self.decoder_lr)) or not 0 <= self.decoder_noise < math.inf:
            raise InputError("lr and decoder_lr must be above 0, decoder_noise at least 0, and all finite")
        if self.side not in (16, 32, 64, 128):
            raise InputError(f"side must be 16, 32, 64 or 128 pixels; got {self.side}")
        if self.channels > self.patch:
            raise InputError(f"a patch of {self.side}-pixel images has {self.patch} values; set channels to at most that")
        if not all(0 < step < self.steps for step in self.at):
            raise InputError(f"at must have steps above 0 and below {self.steps}; got {list(self.at)}")

    @property
    def levels(self) -> int:
        """Number of halvings of an image in the autoencoder."""
        return (self.side // LATENT).bit_length() - 1

    @property
    def patch(self) -> int:
        """Number of values of the patch of one latent position."""
        return 3 * (self.side // LATENT) ** 2


def silent(phase: str, step: int, steps: int) -> None:
    """Report no progress."""


def build(settings: Pretraining, captions: Captions = ()) -> Parts:
    """Return the parts of the pipeline with random weights from torch's global stream.

    Args:
        settings: the pre-training.
        captions: source of the tokenizer's vocabulary; empty: the captions of digits.
    """
    return text_to_image(
        tokenizer(captions or digits(settings.characters)),
        side=settings.side, channels=settings.channels, decoder_width=settings.decoder_width, widths=settings.widths,
        text_width=settings.text_width, text_layers=settings.text_layers,
    )  # fmt: skip


@torch.no_grad()
def principal_patches(encoder: Any, images: Tensor) -> None:
    """Set the encoder to the projection of patches (4×4 pixels of 32×32) on their principal components, in closed form.

    A trained encoder needs many more steps until it separates all colours. The components of the rendered images leave an
    error of 0.01 of a variance of 0.38. The first convolutions move a patch's values into channels, the last one projects.
    The standard deviation of a component is the square root of its own, which is between the image's spectrum and white
    noise; the mean is 1. So the coarse shape remains the largest signal and is the last that noise hides.
    """
    pick, *sort, project = encoder.layers
    for layer in encoder.layers:
        layer.weight.zero_()
    pick.bias.zero_()
    for colour in range(3):
        pick.weight[colour, colour, 1, 1] = 1
    for level, layer in enumerate(sort):
        for channel in range(3 * 4**level):
            for place in range(4):
                layer.weight[4 * channel + place, channel, 1 + place // 2, 1 + place % 2] = 1
    patches = torch.cat([encoder.layers[:-1](part.float() / 255).double() for part in images.split(500)])
    patches = patches.permute(0, 2, 3, 1).reshape(-1, project.in_channels)
    mean = patches.mean(0)
    variance, basis = torch.linalg.eigh((patches - mean).T @ (patches - mean) / len(patches))
    # the sign of an eigenvector depends on the library
    basis = basis.flip(1)[:, : project.out_channels]
    basis = basis * basis.abs().amax(0, keepdim=True).eq(basis.abs()).mul(basis).sum(0).sign()
    deviation = variance.flip(0)[: project.out_channels].sqrt()
    weight = basis * deviation.rsqrt() / deviation.mean().sqrt()
    project.weight[:, :, 1, 1] = weight.T.float()
    project.bias.copy_(-(mean @ weight).float())


class Decoding:
    """Task of the decoder: absolute plus squared error of the pixels, with noise on the latents."""

    def __init__(self, vae: nn.Module, noise: float) -> None:
        self.vae, self.noise = vae, noise

    def build(self) -> nn.Module:
        return self.vae

    def loss(self, model: Any, batch: Table) -> Tensor:
        latent = batch["latent"]
        error = model.decode(latent + self.noise * torch.randn_like(latent)).sample - pixels(batch["image"])
        return error.abs().mean() + error.square().mean()


class Reader(nn.Module):
    """Text encoder with a linear head that classifies captions."""

    def __init__(self, text_encoder: nn.Module, width: int, outputs: int) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        self.head = nn.Linear(width, outputs)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.text_encoder(ids)[0].mean(1))


class Reading:
    """Task of the text encoder: the class of a caption, or none.

    As in Stable Diffusion, the text encoder is trained first and then frozen. In joint training the denoiser mixed the
    digits: an untrained denoiser gives no useful gradient for similar captions.
    """

    def __init__(self, model: Reader) -> None:
        self.model = model

    def build(self) -> nn.Module:
        return self.model

    def loss(self, model: Any, batch: Table) -> Tensor:
        return F.cross_entropy(model(batch["ids"]), batch["label"])


class Denoising:
    """Task of the denoiser: v of noisy latents, with a random caption of the class."""

    def __init__(self, unet: nn.Module, embedded: Tensor, signal: Tensor, settings: Pretraining, per_class: int) -> None:
        self.unet, self.signal, self.settings, self.per_class = unet, signal, settings, per_class
        self.embedded = embedded
        """Embedded captions, [1 + classes·captions, tokens, width]; the empty caption is the first."""

    def build(self) -> nn.Module:
        return self.unet

    def loss(self, model: Any, batch: Table) -> Tensor:
        label, n = batch["label"], len(batch["label"])
        caption = 1 + label * self.per_class + torch.randint(self.per_class, (n,)).to(label)
        caption = caption.masked_fill((torch.rand(n) < self.settings.dropout).to(label.device), 0)
        condition = self.embedded[caption]
        return denoising_loss(
            lambda noisy, time: model(noisy, time, condition).sample,
            batch["latent"],
            self.signal,
            "v_prediction",
            self.settings.min_snr_gamma,
        )


def pretrain(
    settings: Pretraining,
    out: Path,
    progress: Callable[[str, int, int], None] = silent,
    work: Path | None = None,
    device: str = "cpu",
    pictures: ImageSet | None = None,
) -> Mapping[str, Any]:
    """Pre-train a base, write it to the folder `out`, and return the content of `pretraining.json`.

    Args:
        settings: the pre-training.
        out: folder of the base.
        progress: progress(phase, done, total), called after each step.
        work: folder of finished phases and of the denoiser's snapshot; a later call with the same settings and images
            resumes from it and gives the same bytes.
        device: device of the training.
        pictures: public images; None: rendered digits.

    Raises:
        InputError: if the work folder is of other settings or images, the side is not that of rendered digits, or two classes
            have a caption with equal tokens.
    """
    if pictures is None and settings.side != SIDE:
        raise InputError(f"digits are rendered with {SIDE} pixels; set side to {SIDE}, or set your own images")
    if pictures is not None:
        check_captions(pictures.classes, pictures.captions)
    _claim(work, {"settings": asdict(settings), "pictures": pictures and pictures.metadata})
    torch.set_num_threads(settings.threads)
    torch.set_flush_denormal(True)  # denormal numbers are slow, and frequent early in the training
    try:
        return _pretrain(settings, out, progress, work, device, pictures)
    finally:
        torch.set_flush_denormal(False)


def _pretrain(
    settings: Pretraining,
    out: Path,
    progress: Callable[[str, int, int], None],
    work: Path | None,
    device: str,
    pictures: ImageSet | None,
) -> Mapping[str, Any]:
    begun = time.time()
    record: dict[str, Any] = {"pictures": pictures.metadata} if pictures else {}
    captions = pictures.captions if pictures else digits(settings.characters)

    def phase(name: str, make: Callable[[], Phase]) -> Tensors:
        tensors, info = kept(work, name, make)
        record.update({f"{name}_{key}": value for key, value in info.items()})
        return tensors

    def render() -> Phase:
        table = drawn(settings.characters, settings.images, stream("pretrain", settings.seed, "images"))
        progress("images", settings.images, settings.images)
        return table, {"seconds": round(time.time() - begun, 1)}

    images = pictures.table if pictures else phase("images", render)
    if settings.flip:
        images = mirrored(images)
    with seeded(stream("pretrain", settings.seed, "weights")):
        parts = build(settings, captions)

    principal_patches(parts.vae.encoder, images["image"][:20_000])
    parts.vae.to(device).eval()
    parts.denoiser.to(device)

    def latents() -> Phase:
        latent = parts.encode(images["image"])[0].cpu()
        progress("latents", len(latent), len(latent))
        return {"latent": latent, "label": images["label"]}, {}

    table = phase("latents", latents)

    def decoder() -> Phase:
        training = Training(
            optimizer="adamw", lr=settings.decoder_lr, steps=settings.decoder_steps, batch_size=settings.decoder_batch_size,
            schedule="cosine", warmup=settings.decoder_steps // 20, max_grad_norm=1.0, ema_decay=0.99,
        )  # fmt: skip
        ctx = Problem(Decoding(parts.vae, settings.decoder_noise), stream("pretrain", settings.seed, "decoder"), device=device)
        start = only(parts.vae.state_dict(), lambda name: name.startswith("decoder."))
        data = {"latent": table["latent"], "image": images["image"]}
        return fit(ctx, start, training, data, watch=lambda step, steps, _: progress("decoder", step, steps))

    parts.vae.load_state_dict(dict(phase("decoder", decoder)), strict=False)
    record["seconds_before_denoiser"] = round(time.time() - begun, 1)

    texts = ["", *(text for row in captions for text in row)]
    meaning = torch.tensor([0, *(1 + i for i, row in enumerate(captions) for _ in row)])

    def text_encoder() -> Phase:
        reader = Reader(parts.text_encoder, settings.text_width, 1 + len(captions)).to(device)
        training = Training(optimizer="adamw", lr=1e-3, steps=settings.text_steps, batch_size=64, warmup=20, max_grad_norm=1.0)
        ctx = Problem(Reading(reader), stream("pretrain", settings.seed, "text"), device=device)
        tensors, info = fit(ctx, reader.state_dict(), training, {"ids": ids(parts.tokenizer, texts), "label": meaning})
        return strip_prefix(tensors, "text_encoder."), info

    with seeded(stream("pretrain", settings.seed, "head")):
        parts.text_encoder.load_state_dict(dict(phase("text", text_encoder)))
    parts.text_encoder.eval()
    embedded = parts.embed(texts)["prompt"].to(device)
    task = Denoising(parts.denoiser, embedded, parts.scheduler.alphas_cumprod, settings, len(captions[0]))
    training = Training(
        optimizer="adamw", lr=settings.lr, steps=settings.steps, batch_size=settings.batch_size, schedule="cosine",
        warmup=settings.warmup, max_grad_norm=1.0, ema_decay=settings.ema_decay,
    )  # fmt: skip

    way = {step: out.with_name(f"{out.name}-{step}") for step in settings.at}

    def write(folder: Path, tensors: Tensors, **more: Any) -> None:
        """Write a folder with these weights, without a change of the models in training."""
        with seeded(stream("pretrain", settings.seed, "copy")):
            copy = replace(parts, denoiser=build(settings, captions).denoiser)
        copy.denoiser.load_state_dict(dict(tensors))
        record.update(settings=asdict(settings), machine=f"{platform.machine()}, torch {torch.__version__}", **more)
        record["seconds"] = round(time.time() - begun, 1)
        save(copy, folder, {"pretraining.json": json.dumps(record, indent=2) + "\n"})

    def each(step: int, steps: int, tensors: Callable[[], dict[str, Tensor]]) -> None:
        progress("denoiser", step, steps)
        if step in settings.at:
            write(way[step], tensors(), denoiser_steps=step)

    ctx = Problem(task, stream("pretrain", settings.seed, "denoiser"), device=device)
    unfinished = Snapshots(work / "denoiser.unfinished", settings.snapshot) if work and settings.snapshot else None
    tensors, info = fit(ctx, parts.denoiser.state_dict(), training, table, watch=each, snapshots=unfinished)
    write(out, tensors, denoiser_steps=settings.steps, **info)
    classifier = phase("classifier", lambda: public_classifier(settings, images, len(captions), progress, device))
    for folder in (*way.values(), out):  # `out` last: its classifier marks the base as finished
        atomic_write(folder / PUBLIC_CLASSIFIER, save_tensors(dict(classifier)))
    return record


def public_classifier(
    settings: Pretraining, images: Table, classes: int, progress: Callable[[str, int, int], None] = silent, device: str = "cpu"
) -> Phase:
    """Return a classifier trained on the public images, and its figures."""
    task = Classify((3, settings.side, settings.side), classes, settings.classifier)
    training = Training(
        lr=0.05, epochs=settings.classifier_epochs, batch_size=64, schedule="cosine", weight_decay=5e-4, max_grad_norm=1.0
    )
    ctx = ServerContext(task, stream("pretrain", settings.seed, "classifier"), device=device)
    start = task.init(stream("pretrain", settings.seed, "classifier", "start"))
    return fit(ctx, start, training, images, watch=lambda step, steps, _: progress("classifier", step, steps))


def resumable(out: Path, settings: Pretraining) -> bool:
    """Return whether a folder has a base of these settings without its public classifier, which is written last."""
    path = out / "pretraining.json"
    if not is_file(path) or exists(out / PUBLIC_CLASSIFIER):
        return False
    found = read_json(path, "the record of the pre-training")
    return bool(found.get("settings") == json.loads(json.dumps(asdict(settings))))


def _claim(work: Path | None, made_of: Mapping[str, Any]) -> None:
    """Record the inputs of the phases in a new work folder; raise `InputError` if the folder has other inputs."""
    if work is None:
        return
    note = work / "made_of.json"
    text = json.dumps(made_of, indent=2, sort_keys=True) + "\n"
    if exists(note) and read_bytes(note, "the inputs of the phases").decode(errors="replace") != text:
        raise InputError(f"{work} has phases of other settings or images; set another --work, or remove the folder")
    atomic_write(note, text.encode())


def kept(work: Path | None, name: str, make: Callable[[], Phase]) -> Phase:
    """Return the result of `make`, tensors and figures, from the work folder if an earlier call wrote it there.

    Raises:
        InputError: if the file is damaged.
    """
    path = work and work / f"{name}.safetensors"
    if path and exists(path):
        try:
            open_regular(path).close()
            with safe_open(path, "pt") as file:
                figures = loads_json((file.metadata() or {}).get("figures", "{}"))
            return load_file(path), figures
        except (SafetensorError, ValueError, OSError) as error:
            raise InputError(f"{path} is damaged ({error}); remove it to repeat this phase") from error
    made, figures = make()
    if path:
        tensors = {key: tensor.contiguous() for key, tensor in made.items()}
        atomic_write(path, save_tensors(tensors, {"figures": json.dumps(figures)}))
    return made, figures
