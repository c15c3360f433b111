"""Import adapters that diffusers, peft or kohya's scripts made."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ..core.tensors import Tensors
from ..utils.errors import InputError
from ..utils.files import loads_json, read_bytes, read_json
from . import lora as lora
from .pipeline import Parts
from .settings import GeneratorSettings

_PEFT = "base_model.model."
_A, _B, _MAGNITUDE = ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"


def digest(base: str, adapters: Mapping[str, str]) -> str:
    """Return a SHA-256 of a base's fingerprint and these files; raise `InputError` if a file cannot be read."""
    found = [(site, hashlib.sha256(read_bytes(Path(path), _who(site))).hexdigest()) for site, path in sorted(adapters.items())]
    return hashlib.sha256(repr((base, found)).encode()).hexdigest()


def imported(path: Path, like: Tensors, base: Parts, settings: GeneratorSettings, site: str) -> dict[str, Tensor]:
    """Return the adapter in a file, with the names, shapes and types of an adapter of this run.

    A lower rank and missing layers are filled with zeros; alpha is multiplied into B. Prompts and tokens are read from the
    files beside it (`NAME.prompts.safetensors`); without these, the base's are used.

    Args:
        path: the file.
        like: a fresh adapter of this run.
        base: the parts of the base.
        settings: the generator's settings.
        site: name of the site, for error messages.

    Raises:
        InputError: if the file is not an adapter, or adapts other layers than this run's settings and base.
    """
    who = _who(site)
    found, wanted = _modules(path, who, base), lora.to_diffusers(like)
    names = [name.removesuffix(_A) for name in wanted if name.endswith(_A)]
    foreign = sorted(found.keys() - set(names))
    if foreign:
        raise InputError(
            f"{who} ({path}) adapts {foreign[0]!r}" + (f" and {len(foreign) - 1} more" if len(foreign) > 1 else "")
            + f", which generator.target_modules={settings.target_modules!r} does not on this base; "
            "set more target_modules, or set another file"
        )  # fmt: skip
    dora = [module for module, parts in found.items() if _MAGNITUDE in parts]
    if bool(dora) != settings.lora.dora:
        has = "is" if dora else "is not"
        raise InputError(f"{who} ({path}) {has} a DoRA adapter; set generator.lora.dora={str(bool(dora)).lower()}")
    words = lora.beside(path, who, lora.PROMPTS, lora.TOKENS)
    made = dict(wanted) | {name: t.to(wanted[name].dtype) if name in wanted else t for name, t in words.items()}
    for module in names:
        parts = found.get(module)
        made[module + _A] = torch.zeros_like(wanted[module + _A])
        if parts is not None:
            made |= _filled({name: wanted[module + name] for name in parts}, parts, module, who)
    lora.check(made, wanted, who)
    return made


def _who(site: str) -> str:
    return f"the adapter of site {site!r}"


def _filled(wanted: Tensors, parts: Tensors, module: str, who: str) -> dict[str, Tensor]:
    """Return a layer's tensors with the run's rank and types; `check` finds other differences later."""
    (rank, most), made = (len(table[_A]) for table in (parts, wanted)), {}
    if rank > most:
        raise InputError(f"{who} has rank {rank} at {module!r}, this run has {most}; set generator.rank={rank}")
    for name, tensor in parts.items():
        if name == _MAGNITUDE:
            tensor = tensor.reshape(wanted[name].shape) if tensor.numel() == wanted[name].numel() else tensor
        else:
            rest = (most - rank, *tensor.shape[1:]) if name == _A else (len(tensor), most - rank, *tensor.shape[2:])
            tensor = torch.cat([tensor, tensor.new_zeros(rest)], 0 if name == _A else 1)
        made[module + name] = tensor.to(wanted[name].dtype)
    return made


def _modules(path: Path, who: str, base: Parts) -> dict[str, dict[str, Tensor]]:
    """Return the layers in a file, {"unet.….to_q": {".lora_A.weight": …, ".lora_B.weight": …}}, with alpha in B."""
    from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft

    tensors, prefix = lora.opened(path, who), f"{base.family.denoiser}."
    alphas: dict[str, float] = {}
    metadata: Any
    if any(name.startswith(_PEFT) for name in tensors):
        # alpha is only in these settings
        metadata = read_json(path.with_name("adapter_config.json"), f"the settings of {who}")
        tensors = {prefix + name.removeprefix(_PEFT): tensor for name, tensor in tensors.items()}
    else:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get("lora_adapter_metadata", "{}")
        try:
            kept = dict(loads_json(text))
        except (TypeError, ValueError) as error:
            raise InputError(f"{who} ({path}) has settings that are not JSON ({error}); export it again") from error
        metadata = {name.removeprefix(prefix): value for name, value in kept.items() if name.startswith(prefix)}
        tensors, alphas = _diffusers(tensors, base, who, path)
    if not isinstance(metadata, dict) or type(metadata.get("lora_alpha", 1)) not in (int, float):
        raise InputError(f"{who} ({path}) has settings without a number lora_alpha; export it again")
    readers = sorted({name.split(".")[0] for name in tensors if not name.startswith(prefix)})
    if readers or not tensors:
        what = f"adapts {', '.join(readers)}" if readers else "has no layers"
        raise InputError(f"{who} ({path}) {what}; only adapters of {base.family.denoiser} are supported: export one")
    if any(metadata.get(name) for name in ("alpha_pattern", "rank_pattern")) and not alphas:
        raise InputError(f"{who} ({path}) has an alpha of its own for some layers; export it with one alpha")
    converted = convert_unet_state_dict_to_peft({_plain(name): tensor for name, tensor in tensors.items()})
    scales = {_layer(convert_unet_state_dict_to_peft({_plain(f"{n}.lora.down.weight"): 0})): a for n, a in alphas.items()}
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in converted.items():
        for part in (_A, _B, _MAGNITUDE):
            if name.removesuffix(".weight").endswith(part.removesuffix(".weight")):
                found.setdefault(name.partition(".lora_")[0], {})[part] = tensor.float()
                break
        else:
            raise InputError(f"{who} ({path}) has the tensor {name!r}, which no LoRA or DoRA adapter of diffusers has")
    for module, parts in found.items():
        if not {_A, _B} <= parts.keys():
            raise InputError(f"{who} ({path}) lacks A or B of {module!r}; request the file again")
        rank = len(parts[_A])
        alpha = scales[module] if module in scales else metadata.get("lora_alpha", rank)
        parts[_B] = parts[_B] * (alpha / (rank**0.5 if metadata.get("use_rslora") else rank))
    return found


def _diffusers(tensors: dict[str, Tensor], base: Parts, who: str, path: Path) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Return the tensors and the alpha by layer that diffusers' loader reads from a file of any supported format."""
    import diffusers

    pipeline: Any = getattr(diffusers, base.family.pipelines[0])
    try:
        found = pipeline.lora_state_dict(dict(tensors), unet_config=base.denoiser.config)
    except (ValueError, KeyError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"{who} ({path}) is not in a format of diffusers ({reason}); save it with diffusers") from error
    converted, alphas = found if isinstance(found, tuple) else (found, None)
    return converted, {name.removesuffix(".alpha"): float(alpha) for name, alpha in (alphas or {}).items()}


def _plain(name: str) -> str:
    return name.replace(".processor.", ".")


def _layer(converted: Mapping[str, Any]) -> str:
    return next(iter(converted)).partition(".lora_")[0]
