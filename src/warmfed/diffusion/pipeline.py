"""Text-conditioned latent diffusion pipelines: folders in the layout of diffusers' Stable Diffusion.

A folder holds `model_index.json` and one subfolder each for tokenizer, text encoder, denoiser (`unet`), autoencoder
(`vae`) and scheduler. The embedded base is such a folder inside the package, so
`StableDiffusionPipeline.from_pretrained` and every other Stable Diffusion tool opens it. Nothing here uses the network,
and weights are read from safetensors only.
"""

import copy
import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from warmfed.errors import InputError

PARTS = ("tokenizer", "text_encoder", "unet", "vae", "scheduler")
MODELS = ("text_encoder", "unet", "vae")
BASES = Path(__file__).parent.parent / "bases"


@dataclass(frozen=True)
class Parts:
    """The five parts of a pipeline, loaded, frozen and in evaluation mode."""

    tokenizer: Any
    """transformers.CLIPTokenizer."""
    text_encoder: Any
    """transformers.CLIPTextModel."""
    unet: Any
    """diffusers.UNet2DConditionModel."""
    vae: Any
    """diffusers.AutoencoderKL or AutoencoderTiny."""
    scheduler: Any
    """A diffusers scheduler; its config names the noise schedule and what the denoiser predicts."""

    @property
    def device(self) -> torch.device:
        return next(self.unet.parameters()).device

    @torch.no_grad()
    def embed(self, prompts: Sequence[str]) -> Tensor:
        """The prompts' token embeddings, [n, tokens, width]; the empty prompt is the unconditional one."""
        ids = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, return_tensors="pt",
            max_length=self.tokenizer.model_max_length,
        ).input_ids  # fmt: skip
        return self.text_encoder(ids.to(self.device))[0]

    @torch.no_grad()
    def encode(self, images: Tensor, batch: int = 64) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (0 for AutoencoderTiny) of the latents of uint8 images [n, 3, h, w], scaled."""
        from diffusers import AutoencoderTiny

        means, deviations = [], []
        for part in images.split(batch):
            output = self.vae.encode(pixels(part.to(self.device)))
            exact = isinstance(self.vae, AutoencoderTiny)
            means.append(output.latents if exact else output.latent_dist.mean)
            deviations.append(torch.zeros_like(means[-1]) if exact else output.latent_dist.std)
        scale = self.vae.config.scaling_factor
        return torch.cat(means) * scale, torch.cat(deviations) * scale

    @torch.no_grad()
    def decode(self, latents: Tensor, batch: int = 64) -> Tensor:
        """uint8 images [n, 3, h, w] of scaled latents."""
        decoded = [
            self.vae.decode(part.to(self.device) / self.vae.config.scaling_factor).sample for part in latents.split(batch)
        ]
        # in the layout that images have when they have been written and read, or sums over them differ in last bits
        return torch.cat(decoded).add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8).cpu().contiguous()


def pixels(images: Tensor) -> Tensor:
    """uint8 images as float in [-1, 1], in the memory layout that convolutions like best."""
    return images.float().div(127.5).sub(1).contiguous(memory_format=torch.channels_last)


def find(base: str | Path) -> Path:
    """The folder of a base: the name of an embedded one ("digits") or a pipeline folder.

    Raises:
        InputError: neither, or a file of the pipeline is missing or no JSON.
    """
    folder = BASES / base if str(base) in embedded() else Path(base)
    if not folder.is_dir():
        raise InputError(
            f"expected a pipeline folder or an embedded base ({', '.join(embedded())}); {base} is neither; check the path"
        )
    needed = ["model_index.json", "scheduler/scheduler_config.json", *(f"{part}/config.json" for part in MODELS)]
    for file in needed:
        try:
            json.loads((folder / file).read_text())
        except (OSError, ValueError) as error:
            raise InputError(
                f"{folder} is no whole diffusers pipeline: {file} is missing or damaged ({error}); save or download it again"
            ) from error
    for part in MODELS:
        if not any((folder / part).glob("*.safetensors")):
            raise InputError(
                f"{folder}/{part} holds no .safetensors weights (other formats are not read); save the pipeline as safetensors"
            )
    return folder


def side(base: str | Path) -> int:
    """Height and width in pixels of the images that a base draws; raises `InputError` as `find`."""
    unet, vae = (json.loads((find(base) / part / "config.json").read_text()) for part in ("unet", "vae"))
    try:
        # each level of the autoencoder but the last one halves the image
        return int(unet["sample_size"]) * 2 ** (len(vae["block_out_channels"]) - 1)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{find(base)} does not say the size of its images ({error}); save the pipeline again") from error


def embedded() -> tuple[str, ...]:
    """The names of the bases inside the package."""
    return tuple(sorted(path.parent.name for path in BASES.glob("*/model_index.json")))


def load(base: str | Path, device: str = "cpu") -> Parts:
    """A pipeline's parts from an embedded base or a folder, in 32 bits, frozen.

    Raises:
        InputError: there is no such base, or a part of it does not load.
    """
    folder = find(base)
    import diffusers
    import transformers

    quiet()

    index = json.loads((folder / "model_index.json").read_text())
    loaded: dict[str, Any] = {}
    for part in PARTS:
        library, kind = index.get(part) or ("", "")
        options: dict[str, Any] = {"local_files_only": True}
        if part in MODELS:
            options["use_safetensors"] = True
            options["dtype" if library == "transformers" else "torch_dtype"] = torch.float32
        try:
            source = {"diffusers": diffusers, "transformers": transformers}[library]
            loaded[part] = getattr(source, kind).from_pretrained(folder / part, **options)
        except Exception as error:  # each library has its own; all mean that the folder is damaged or of another kind
            reason = str(error).strip().split("\n")[0]
            raise InputError(
                f"cannot load {part} of {folder}: expected a {kind or 'part named in model_index.json'}; {reason}; "
                "save or download the pipeline again"
            ) from error
    for part in MODELS:
        loaded[part].requires_grad_(False).eval().to(device)
        for name, tensor in loaded[part].state_dict().items():
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise InputError(f"{folder}/{part}: {name} is not finite; save or download the pipeline again")
    for part in ("unet", "vae"):
        loaded[part].to(memory_format=torch.channels_last)
    return Parts(**loaded)


def quiet() -> None:
    """No progress bars for files that take milliseconds, and no warning of a key that diffusers writes but does not read."""
    import diffusers
    import transformers

    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


def save(parts: Parts, folder: Path, extra: dict[str, str] | None = None) -> None:
    """Write a pipeline folder; `extra` adds text files by name. It is moved to its place when it is whole.

    Denoiser and autoencoder are written in 16 bits (diffusers reads them in 32 again), the text encoder in 32, since
    transformers keeps the type that it reads and the parts must agree.
    """
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    index: dict[str, Any] = {"_class_name": "StableDiffusionPipeline", "requires_safety_checker": False}
    index |= {part: [None, None] for part in ("feature_extractor", "image_encoder", "safety_checker")}
    quiet()
    for name in PARTS:
        part = getattr(parts, name)
        index[name] = [type(part).__module__.split(".")[0], type(part).__name__]
        half = copy.deepcopy(part).half() if name in ("unet", "vae") else part
        half.save_pretrained(partial / name)
    files = {"model_index.json": json.dumps(index, indent=2, sort_keys=True) + "\n"} | (extra or {})
    for name, text in files.items():
        (partial / name).write_text(text)
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def fingerprint(base: str | Path) -> str:
    """SHA-256 over the names and bytes of a base's weights, configurations and tokenizer."""
    folder, total = find(base), hashlib.sha256()
    for path in sorted(folder.glob("*/*")):
        if path.is_file() and path.suffix in (".json", ".safetensors", ".txt"):
            total.update(f"{path.relative_to(folder).as_posix()}:{path.stat().st_size}:".encode())
            total.update(path.read_bytes())
    return total.hexdigest()
