"""Text-conditioned latent diffusion pipelines: folders in the layout of diffusers.

A folder holds `model_index.json` and a subfolder for each part: tokenizer, text encoder, denoiser, autoencoder, scheduler.
The embedded base is such a folder inside the package, so `StableDiffusionPipeline.from_pretrained` and other tools open it.
This module does not use the network: the name of a repository means its copy in the hub's cache. Weights are read from
safetensors files only.
"""

import copy
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ..core.tensors import finite
from ..utils.errors import InputError
from ..utils.files import loads_json, make_folder, open_regular, read_bytes, read_regular, restrict_access
from ..utils.paths import children, exists, is_file, is_folder, matching, resolved
from .pipeline_families import AUTOENCODERS, STABLE, Condition, Family, family, library

BASES = Path(__file__).parent.parent / "bases"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
WEIGHTS = {"diffusers": "diffusion_pytorch_model", "transformers": "model"}
"""Name of the weights of each library."""
_MOST = 2**28
"""Maximum bytes of a JSON file of a pipeline; Gemma's tokenizer has 2^25."""
_SHARD = re.compile(r"[\w.-]+\.safetensors")
_STRANGE = {"quantization_config", "attn_implementation"}
"""Settings with which a library loads other code or reads the weights differently."""
_WANTED = "--include '*.json' --include '*/*.txt' --include '*/*.model' --include '*/*.safetensors' --exclude '*.fp16.*'"
PUBLIC_CLASSIFIER = "classifier.safetensors"
"""File of a base with its public classifier, trained on the base's public images."""
_SMALL = 2**28
"""Maximum bytes of a network on the CPU whose convolutions are converted to channels-last."""
_READ = 2**26
"""Bytes that are read from a mapped file before it is mapped again."""
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+(@[\w.-]+)?")


@dataclass(frozen=True)
class Parts:
    """The parts of a pipeline, loaded, frozen and in evaluation mode."""

    tokenizer: Any
    """Tokenizer of transformers."""
    text_encoder: Any
    """Text model of transformers."""
    denoiser: Any
    """U-Net or transformer of diffusers."""
    vae: Any
    """Autoencoder: diffusers' AutoencoderKL, AutoencoderTiny or AutoencoderDC."""
    scheduler: Any
    """Scheduler of diffusers; its configuration has the noise schedule and the target of the prediction."""
    more: Mapping[str, Any] = field(default_factory=dict)
    """Other parts of the family by folder, such as the second text encoder of SDXL."""
    family: Family = STABLE
    """Family of the pipeline."""
    index: Mapping[str, Any] = field(default_factory=dict)
    """Content of model_index.json."""

    @property
    def device(self) -> torch.device:
        """Device of the denoiser."""
        return next(self.denoiser.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the denoiser's weights."""
        return next(self.denoiser.parameters()).dtype

    @property
    def scale(self) -> int:
        """Pixels per latent position along each axis."""
        return scale_of(self.vae.config)

    def part(self, folder: str) -> Any:
        """Return a part by its folder's name."""
        if folder in self.more:
            return self.more[folder]
        return getattr(self, "denoiser" if folder == self.family.denoiser else folder)

    @torch.no_grad()
    def embed(self, prompts: Sequence[str]) -> Condition:
        """Return the conditioning of these prompts, one row each; the empty prompt is the unconditional one."""
        return self.family.embed(self, prompts)

    @torch.no_grad()
    def encode(self, images: Tensor, batch: int = 64) -> tuple[Tensor, Tensor]:
        """Return the mean and the standard deviation of the scaled latents of uint8 images [n, 3, h, w].

        The standard deviation is 0 if the autoencoder has none.
        """
        means, deviations = [], []
        for part in images.split(chunk(images.shape[-1], batch)):
            output = self.vae.encode(pixels(part.to(self.device)).to(self.vae.dtype))
            mean, deviation = _LATENTS[type(self.vae).__name__](output)
            means.append(mean.float())
            deviations.append(deviation.float())
        scale, shift = self._range
        return (torch.cat(means) - shift) * scale, torch.cat(deviations) * scale

    @torch.no_grad()
    def decode(self, latents: Tensor, batch: int = 64) -> Tensor:
        """Return the uint8 images [n, 3, h, w] of scaled latents."""
        scale, shift = self._range
        decoded = [
            self.vae.decode((part.to(self.device) / scale + shift).to(self.vae.dtype)).sample.float()
            for part in latents.split(chunk(latents.shape[-1] * self.scale, batch))
        ]
        # contiguous, as images from a file are: the layout changes the last bits of sums
        return torch.cat(decoded).add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8).cpu().contiguous()

    @property
    def _range(self) -> tuple[float, float]:
        return self.vae.config.scaling_factor, getattr(self.vae.config, "shift_factor", None) or 0.0


_LATENTS: Mapping[str, Any] = {
    "AutoencoderKL": lambda output: (output.latent_dist.mean, output.latent_dist.std),
    "AutoencoderTiny": lambda output: (output.latents, torch.zeros_like(output.latents)),
    "AutoencoderDC": lambda output: (output.latent, torch.zeros_like(output.latent)),
}
"""Mean and standard deviation from the result of each autoencoder's `encode`."""


def scale_of(config: Mapping[str, Any]) -> int:
    """Return the pixels per latent position along each axis, from an autoencoder's configuration."""
    # each level of an autoencoder except the last halves the image
    return int(2 ** (len(config.get("block_out_channels") or config["encoder_block_out_channels"]) - 1))


def chunk(side: int, batch: int = 64) -> int:
    """Return the autoencoder's batch size: `batch` for 32×32 pixels, less for larger images."""
    return max(1, min(batch, batch * 32**2 // side**2))


def pixels(images: Tensor) -> Tensor:
    """Return uint8 images as float in [-1, 1], in channels-last layout, the fastest for convolutions."""
    return images.float().div(127.5).sub(1).contiguous(memory_format=torch.channels_last)


def _named(base: str | Path) -> tuple[Path, str]:
    """Return the folder of a base, whether or not it exists, and the download command of a repository of the hub."""
    if str(base) in embedded():
        return BASES / base, ""
    if is_folder(Path(base)) or not _REPOSITORY.fullmatch(str(base)):
        return Path(base), ""
    from huggingface_hub import constants

    name, _, revision = str(base).partition("@")
    cache = Path(os.environ.get("HF_HUB_CACHE") or constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"
    reference = cache / "refs" / (revision or "main")
    saved = read_bytes(reference, "the hub cache's reference", 1024).decode(errors="replace") if is_file(reference) else ""
    commit = saved.strip() or revision or "main"
    return cache / "snapshots" / commit, f"hf download {name}{f' --revision {revision}' if revision else ''} {_WANTED}"


def folder_of(base: str | Path) -> Path:
    """Return the folder of a base, whether or not it exists."""
    return _named(base)[0]


def advice(base: str | Path) -> str:
    """Return the advice for a missing file of a base: how to download it."""
    folder, fetch = _named(base)
    own = f"hf download ORGANISATION/NAME --local-dir {folder} {_WANTED}"
    return f"on a machine with a network, `{fetch or own}` downloads it"


def find(base: str | Path, *, weights: bool = True) -> Path:
    """Return the folder of a base.

    Args:
        base: an embedded base ("digits"), a pipeline's folder, or a repository in the hub's cache.
        weights: whether the weights must exist.

    Raises:
        InputError: The base does not exist, or a file of the pipeline is missing, not JSON or not supported.
    """
    folder, fetch = _named(base)
    if not is_folder(folder):
        sought = f"the hub's cache has no {folder}" if fetch else "it is not a folder"
        raise InputError(
            f"expected a pipeline folder or an embedded base ({', '.join(embedded())}); {base} is neither, and {sought}; "
            + (advice(base) if fetch else "check the path")
        )
    for name, path in files(base).items():
        if path.suffix == ".safetensors" and not weights:
            continue
        if not is_file(path):
            kind = " (other formats of weights are not read)" if path.suffix == ".safetensors" else ""
            raise InputError(f"{folder} is not a complete diffusers pipeline: {name} is missing{kind}; {advice(base)}")
        if path.suffix == ".json":
            metadata = json_of(path)
            if not name.startswith("tokenizer") and not isinstance(metadata, dict):
                raise InputError(f"{path} is damaged: expected a JSON object; save or download the pipeline again")
            if why := _foreign(name, metadata if isinstance(metadata, dict) else {}):
                raise InputError(f"{folder}: {name} {why}, which is not supported; set another base")
    _enclosed(base, folder)
    return folder


def _enclosed(base: str | Path, folder: Path) -> None:
    """Raise `InputError` if a part of a base holds a path that is not a regular file, or a link to a path outside the base.

    The check covers every file, since the libraries choose which files of a part they read. A link may lead to a path in
    the base, or, in the hub's cache, in the repository's folder.
    """
    if str(base) in embedded():
        return
    root = resolved(folder)
    if root.parent.name == "snapshots" and root.parent.parent.name.startswith("models--"):
        root = root.parent.parent
    for part in index_of(folder)[0].parts:
        if not resolved(folder / part).is_relative_to(root):
            raise InputError(f"{folder / part} leads out of {root}; copy the folder into the base")
        for path in children(folder / part):
            if path.name == "adapter_config.json":
                raise InputError(f"{path} replaces the base by another; remove it, or set generator.adapters")
            if path.is_symlink() and not resolved(path).is_relative_to(root):
                raise InputError(f"{path} leads out of {root}; copy the file into the base")
            if exists(path) and not (is_file(path) or is_folder(path)):
                raise InputError(f"{path} is not a regular file; save or download the pipeline again")


def _foreign(name: str, config: Mapping[str, Any]) -> str:
    """Return the unsupported setting of a part's configuration, with which diffusers would sample other images; else ""."""
    if "auto_map" in config:
        return "names its own code (auto_map)"
    if name.endswith("/config.json") and config.keys() & _STRANGE:
        return f"has the setting {min(config.keys() & _STRANGE)}"
    if name.endswith("/config.json") and config.get("time_cond_proj_dim"):
        return "makes the denoiser take the guidance as an input (time_cond_proj_dim)"
    if name == "vae/config.json" and (config.get("latents_mean") or config.get("latents_std")):
        return "shifts every channel of the latents by its own mean (latents_mean, latents_std)"
    if name == "vae/config.json" and config.get("_class_name", "AutoencoderKL") not in AUTOENCODERS:
        return f"is of an {config['_class_name']}, not one of {', '.join(AUTOENCODERS)}"
    if name == "scheduler/scheduler_config.json" and "sigma_data" in config:
        return f"is of an {config.get('_class_name')}, whose noise has no steps (EDM)"
    return ""


def json_of(path: Path) -> Any:
    """Return the value of a pipeline's JSON file; raise `InputError` if it is missing or damaged."""
    try:
        return loads_json(read_regular(path, _MOST))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is missing or damaged ({error}); save or download the pipeline again") from error


def index_of(folder: Path) -> tuple[Family, dict[str, Any]]:
    """Return the family of a pipeline's folder, and model_index.json.

    Raises:
        InputError: if model_index.json is damaged, names an unknown kind of pipeline, or a class outside its family.
    """
    path = folder / "model_index.json"
    index = json_of(path)
    kind = family(str(index.get("_class_name") if isinstance(index, dict) else None))
    for part, known in kind.classes.items():
        wanted = [[library(part), name] for name in known]
        if part in index and index[part] not in wanted:
            expected = " or ".join(f"{library(part)}.{name}" for name in known)
            raise InputError(f"{path}: expected {expected} for {part}, got {str(index[part])[:80]}; set another base")
    return kind, index


def files(base: str | Path) -> dict[str, Path]:
    """Return all files of a base that are read, by their names in the folder, whether or not they exist.

    Raises:
        InputError: if model_index.json is damaged or names an unknown kind of pipeline.
    """
    folder, _ = _named(base)
    found = {"model_index.json": folder / "model_index.json"}
    if not is_file(found["model_index.json"]):
        return found
    kind, _ = index_of(folder)
    for part in kind.parts:
        if part in kind.models:
            names = ["config.json", *_weights(folder / part, WEIGHTS[library(part)])]
        elif part == "scheduler":
            names = ["scheduler_config.json"]
        else:
            names = [path.name for path in matching(folder / part, "*") if path.suffix in (".json", ".txt", ".model")]
            names = names or ["tokenizer_config.json"]
        found |= {f"{part}/{name}": folder / part / name for name in names}
    return dict(sorted(found.items()))


def _weights(folder: Path, stem: str) -> Iterator[str]:
    """Yield the names of a part's weights: in full precision if they exist, else the 16-bit variant."""
    for variant in ("", ".fp16"):
        whole, shards = f"{stem}{variant}.safetensors", f"{stem}.safetensors.index{variant}.json"
        if is_file(folder / shards):
            yield shards
            metadata = json_of(folder / shards)
            held = metadata.get("weight_map") if isinstance(metadata, dict) else None
            names = {str(name) for name in held.values()} if isinstance(held, dict) else {""}
            if not all(_SHARD.fullmatch(name) for name in names):
                raise InputError(f"{folder / shards} names files that are not safetensors beside it; save the pipeline again")
            yield from sorted(names)
            return
        if is_file(folder / whole):
            yield whole
            return
    yield f"{stem}.safetensors"


def configuration(base: str | Path, part: str) -> dict[str, Any]:
    """Return config.json of a part; "denoiser" means the family's denoiser. Raises `InputError` as `find` does."""
    folder = find(base, weights=False)
    if part == "denoiser":
        part = index_of(folder)[0].denoiser
    return dict(json_of(folder / part / "config.json"))


def side(base: str | Path) -> int:
    """Return the height and width of a base's images in pixels; raise `InputError` as `find` does."""
    try:
        return int(configuration(base, "denoiser")["sample_size"]) * scale_of(configuration(base, "vae"))
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{base} has no size of its images ({error}); save the pipeline again") from error


def embedded() -> tuple[str, ...]:
    """Return the names of the bases in the package."""
    return tuple(sorted(path.parent.name for path in BASES.glob("*/model_index.json")))


def load(base: str | Path, device: str = "cpu", dtype: str = "fp32") -> Parts:
    """Return a pipeline's parts, frozen.

    Args:
        base: as in `find`.
        device: the device of the parts.
        dtype: type of the weights: fp32, bf16 or fp16. An autoencoder that overflows in fp16 stays in fp32.

    Raises:
        InputError: The base does not exist, a part does not load, or a weight is not finite.
    """
    folder = find(base)
    quiet()
    (kind, index), held = index_of(folder), files(base)
    loaded: dict[str, Any] = {}
    size = {part: sum(path.stat().st_size for name, path in held.items() if name.startswith(f"{part}/")) for part in kind.parts}
    # the largest first: for another type, the file's own type stays in memory until the whole part is converted
    for part in sorted(kind.parts, key=lambda part: -size[part]):
        options: dict[str, Any] = {}
        if part in kind.models:
            options["use_safetensors"] = True
            options["dtype" if library(part) == "transformers" else "torch_dtype"] = DTYPES[dtype]
            if any(key.startswith(f"{part}/") and ".fp16" in key for key in held):
                options["variant"] = "fp16"
        loaded[part] = load_part(folder, part, index, **options)
    if dtype == "fp16" and loaded["vae"].config.get("force_upcast"):
        loaded["vae"].float()
    for part in kind.models:
        loaded[part].requires_grad_(False).eval().to(device)
    for path in held.values():
        if path.suffix == ".safetensors":
            _check_finite(path, DTYPES[dtype])
    for part in (kind.denoiser, "vae"):
        # the conversion copies every convolution of the mapped file; for a large network on a CPU it gains nothing
        if device != "cpu" or sum(weight.nbytes for weight in loaded[part].parameters()) < _SMALL:
            loaded[part].to(memory_format=torch.channels_last)
    return assemble(kind, loaded, index)


def load_part(folder: Path, part: str, index: Mapping[str, Any], **options: Any) -> Any:
    """Return a part of a pipeline from its files; raise `InputError` if it does not load."""
    import diffusers
    import transformers

    name = (index.get(part) or ("", ""))[1]
    options["local_files_only"] = True
    if library(part) == "transformers":
        options["trust_remote_code"] = False
    try:
        source = {"diffusers": diffusers, "transformers": transformers}[library(part)]
        with torch.device("cpu"):  # a caller on the meta device still needs a readable base
            return getattr(source, name).from_pretrained(folder / part, **options)
    except Exception as error:  # each library raises its own errors; all mean that the folder is damaged or of another kind
        reason = str(error).strip().split("\n")[0]
        raise InputError(
            f"cannot load {part} of {folder}: expected a {name or 'part named in model_index.json'}; {reason}; "
            "save or download the pipeline again"
        ) from error


def _check_finite(path: Path, dtype: torch.dtype) -> None:
    """Raise `InputError` if a weight is not finite in this type.

    The file is read apart from the network that maps it, since unused parts of an autoencoder would stay in memory. It is
    mapped again after every `_READ` bytes, since all bytes read would stay in memory until the end.
    """
    with safe_open(path, "pt") as weights:
        left = sorted(weights.keys(), reverse=True)
    while left:
        with safe_open(path, "pt") as weights:
            read = 0
            while left and read < _READ:
                tensor = weights.get_tensor(name := left.pop())
                if not finite(tensor.to(dtype) if tensor.is_floating_point() else tensor):
                    raise InputError(f"{path}: {name} is not finite; save or download the pipeline again")
                read += tensor.nbytes


def assemble(kind: Family, loaded: Mapping[str, Any], index: Mapping[str, Any]) -> Parts:
    """Return the `Parts` of a family from its parts by folder."""
    main = {"tokenizer", "text_encoder", "vae", "scheduler"}
    return Parts(
        **{name: loaded[name] for name in main},
        denoiser=loaded[kind.denoiser],
        more={name: part for name, part in loaded.items() if name not in main | {kind.denoiser}},
        family=kind,
        index=index,
    )


def quiet() -> None:
    """Disable the libraries' progress bars, and diffusers' warning of a key that it writes but does not read."""
    import diffusers
    import transformers

    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


def save(parts: Parts, folder: Path, extra: dict[str, str] | None = None) -> None:
    """Write a pipeline folder, atomically.

    The denoiser and the autoencoder are written in 16 bits, and diffusers reads them in 32. The text encoder is written in
    32 bits, since transformers keeps the type of the file and the parts must agree.

    Args:
        parts: the pipeline.
        folder: the folder to write or replace.
        extra: text files to add, by name.
    """
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    make_folder(partial)
    index: dict[str, Any] = {"_class_name": parts.family.pipelines[0]}
    if parts.family is STABLE:
        index |= {"requires_safety_checker": False}
        index |= {part: [None, None] for part in ("feature_extractor", "image_encoder", "safety_checker")}
    quiet()
    for name in parts.family.parts:
        part = parts.part(name)
        index[name] = [type(part).__module__.split(".")[0], type(part).__name__]
        half = copy.deepcopy(part).half() if name in (parts.family.denoiser, "vae") else part
        half.save_pretrained(partial / name)
    texts = {"model_index.json": json.dumps(index, indent=2, sort_keys=True) + "\n"} | (extra or {})
    for name, text in texts.items():
        (partial / name).write_text(text)
    restrict_access(partial)
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if exists(folder):
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def fingerprint(base: str | Path) -> str:
    """Return the SHA-256 over the names and bytes of a base's weights, configurations and tokenizer."""
    folder, total = find(base), hashlib.sha256()
    # model_index.json names classes and is left out, except for the setting that one family reads
    if not index_of(folder)[1].get("force_zeros_for_empty_prompt", True):
        total.update(b"the empty prompt is read as any other")
    for path in sorted(path for name, path in files(base).items() if "/" in name):
        total.update(f"{path.relative_to(folder).as_posix()}:{path.stat().st_size}:".encode())
        with open_regular(path) as file:
            while block := file.read(2**24):
                total.update(block)
    return total.hexdigest()
