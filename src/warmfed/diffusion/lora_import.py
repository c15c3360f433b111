"""Import adapters that diffusers, peft or kohya's scripts made.

A file is used as a whole or refused: each tensor has a known role and a floating type, each layer has an A, a B and one scale,
and no setting changes the meaning of the tensors.
"""

import hashlib
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ..core.tensors import Tensors
from ..utils.errors import InputError, printable
from ..utils.files import loads_json, read_bytes, read_json
from . import lora as lora
from .pipeline import Parts
from .settings import GeneratorSettings

_PEFT = "base_model.model."
_A, _B, _MAGNITUDE = ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"
_ALPHA = ".alpha"
_ROLES = (
    ".lora_A", ".lora_B", _MAGNITUDE, ".lora.down", ".lora.up", "_lora.down", "_lora.up", ".lora_down", ".lora_up",
    ".lora_linear_layer.down", ".lora_linear_layer.up",
)  # fmt: skip
"""Ends of the names of a layer's tensors, without ".weight"."""
_FOREIGN = {
    r"dora_scale$": "the magnitude of a DoRA in kohya's format, which does not name its axis; export it with peft or diffusers",
    r"hada_": "a part of a LoHa; merge it into a model and extract a LoRA",
    r"lokr_": "a part of a LoKr; merge it into a model and extract a LoRA",
    r"oft_|boft_|vera_|ia3_|on_input$": "a part of an adapter of another kind; merge it into a model and extract a LoRA",
    r"lora_mid|hada_t|lokr_t": "the core of a Tucker decomposition; train the adapter without it",
    r"\.diff(_b)?$|\.set_weight$": "a difference of whole weights; export the adapter without it",
    r"norm\d*(\.\w+)*$": "a weight of a normalisation layer; export the adapter without it",
    r"\.scalar$": "a learned scale; export the adapter without it",
    r"bias$": "a bias; train the adapter without biases",
    r"SCB$|absmax$|quant|qweight$|qzeros$|scale$|scale_inv$|scale_weight$|zero_point$|weight_format$": "a part of a quantised "
    "model; export the adapter in 16 or 32 bits",
}
"""Patterns of the names of other tensors, what these are, and what to do."""
_FLOATS = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16,
    torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz,
)  # fmt: skip
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_ERROR = 2.0**-8
"""Largest relative error of A and B in 16 bits; their rounding has less than 2^-11."""
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, "gaussian", "eva", "orthogonal"),  # the others alter the base
    "rank_pattern": (), "alpha_pattern": (), "lora_bias": (), "use_qalora": (), "layer_replication": (), "modules_to_save": (),
    "target_parameters": (), "trainable_token_indices": (), "alora_invocation_tokens": (), "use_bdlora": (), "arrow_config": (),
    "kasa_config": (), "monteclora_config": (), "velora_config": (),
}  # fmt: skip
"""Settings of peft that may change the effect of the tensors, and the values that do not, beside empty ones."""


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
    dora = any(_MAGNITUDE in parts for parts in found.values())
    if dora != settings.lora.dora:
        has = "is" if dora else "is not"
        raise InputError(f"{who} ({path}) {has} a DoRA adapter; set generator.lora.dora={str(dora).lower()}")
    words = lora.beside(path, who, lora.PROMPTS, lora.TOKENS)
    for name, tensor in words.items():
        _check_numbers(name, tensor, f"{who} ({path})")
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
            flat = tensor.dim() == 1 and len(tensor) == wanted[name].numel()
            tensor = tensor.reshape(wanted[name].shape) if flat else tensor
        else:
            rest = (most - rank, *tensor.shape[1:]) if name == _A else (len(tensor), most - rank, *tensor.shape[2:])
            tensor = torch.cat([tensor, tensor.new_zeros(rest)], 0 if name == _A else 1)
        made[module + name] = tensor.to(wanted[name].dtype)
    return made


def _modules(path: Path, who: str, base: Parts) -> dict[str, dict[str, Tensor]]:
    """Return the layers in a file, {"unet.….to_q": {".lora_A.weight": …, ".lora_B.weight": …}}, with the scale in B.

    A and B have 16 bits, a magnitude has 32.
    """
    tensors, prefix, it = lora.opened(path, who), f"{base.family.denoiser}.", f"{who} ({path})"
    for name, tensor in sorted(tensors.items()):
        _check_role(name, it)
        _check_numbers(name, tensor, it)
    alphas: dict[str, float] = {}
    settings: Any
    if any(name.startswith(_PEFT) for name in tensors):
        # alpha is only in these settings
        settings = read_json(path.with_name("adapter_config.json"), f"the settings of {who}")
        if odd := next((name for name in sorted(tensors) if not name.startswith(_PEFT)), None):
            raise InputError(f"{it} has the tensor {odd!r} beside those of peft; expected {_PEFT!r} before it; export it again")
        tensors = {prefix + name.removeprefix(_PEFT): tensor for name, tensor in tensors.items()}
    else:
        settings = _header(path, prefix, it)
        tensors, alphas = _diffusers(tensors, base, it)
        if alphas and settings:
            raise InputError(f"{it} has its alpha twice, as tensors and in its settings; export it again with one of them")
    alpha, rank, dora, stable = _scale(settings, it)
    readers = sorted({name.split(".")[0] for name in tensors if not name.startswith(prefix)})
    if readers or not tensors:
        what = f"adapts {', '.join(readers[:3])}" if readers else "has no layers"
        raise InputError(f"{it} {what}; only adapters of {base.family.denoiser} are supported: export one")
    found = _layers(tensors, it)
    scales = {_layer(f"{name}.lora.down.weight"): value for name, value in alphas.items()}
    if scales and scales.keys() != found.keys():
        odd = min(scales.keys() ^ found.keys())
        raise InputError(f"{it} has no alpha of {odd!r}, but of other layers; expected one for each or none; export it again")
    for module, parts in found.items():
        size = len(parts[_A])
        if rank not in (None, size):
            raise InputError(f"{it} has rank {size} at {module!r}, but r={rank!r} in its settings; export it again")
        if dora is not None and dora != (_MAGNITUDE in parts):
            raise InputError(f"{it} has use_dora={dora} in its settings, but its tensors say the opposite; export it again")
        scale = scales.get(module, size if alpha is None else alpha) / (size**0.5 if stable else size)
        parts |= _halved(parts[_A], parts[_B], scale, f"{it}: {module!r}")
        if _MAGNITUDE in parts:
            parts[_MAGNITUDE] = parts[_MAGNITUDE].float()
    return found


def _check_role(name: str, it: str) -> None:
    """Raise `InputError` unless a tensor is a part of a LoRA or DoRA layer, by its name."""
    if name.endswith(_ALPHA) or name.removesuffix(".weight").endswith(_ROLES):
        return
    what = next((what for pattern, what in _FOREIGN.items() if re.search(pattern, name)), "of another format; export it again")
    raise InputError(f"{it} has the tensor {name!r}, which no LoRA or DoRA adapter of diffusers has: it is {what}")


def _check_numbers(name: str, tensor: Tensor, it: str) -> None:
    """Raise `InputError` unless a tensor has finite numbers of a floating type; alpha may be an integer, but not 0."""
    if name.endswith(_ALPHA):
        if tensor.dtype not in _FLOATS + _INTEGERS or tensor.numel() != 1:
            got = f"{tensor.dtype} of shape {tuple(tensor.shape)}"
            raise InputError(f"{it}: {name!r} is {got}, expected one number; export it again")
        # 0 means the rank to kohya's scripts, and no effect to diffusers
        if not tensor.double().isfinite().all() or not tensor.double().any():
            raise InputError(f"{it}: {name!r} is {tensor.item()}, expected a finite number other than 0; export it again")
    elif tensor.dtype not in _FLOATS:
        raise InputError(
            f"{it}: {name!r} is {str(tensor.dtype).removeprefix('torch.')}, expected a floating type; "
            "export the adapter in 16 or 32 bits"
        )
    elif not tensor.float().isfinite().all():
        raise InputError(f"{it}: {name!r} holds values that are not finite in 32 bits; export an earlier state of its training")


def _header(path: Path, prefix: str, it: str) -> dict[str, Any] | None:
    """Return the settings of the denoiser's adapter in the header of a file of diffusers, if there are any."""
    with safe_open(path, "pt") as file:
        text = (file.metadata() or {}).get("lora_adapter_metadata", "{}")
    try:
        kept = dict(loads_json(text))
    except (TypeError, ValueError) as error:
        raise InputError(f"{it} has settings that are not JSON ({error}); export it again") from error
    for name in kept:
        if not name.startswith((prefix, "text_encoder")):
            raise InputError(f"{it} has the setting {name!r}, expected {prefix!r} before it; export it again")
    return {name.removeprefix(prefix): value for name, value in kept.items() if name.startswith(prefix)} or None


def _scale(settings: Any, it: str) -> tuple[float | None, int | None, bool | None, bool]:
    """Return lora_alpha, r and use_dora of an adapter's settings, None if it has none, and use_rslora.

    Raises:
        InputError: A setting is not valid, or changes the effect of the tensors in a way that is not supported.
    """
    if settings is None:
        return None, None, None, False
    alpha: Any = settings.get("lora_alpha") if isinstance(settings, dict) else None
    if type(alpha) not in (int, float):
        raise InputError(f"{it} has settings without a number lora_alpha; export it again")
    if not 0 < abs(alpha) < 1e300:
        raise InputError(
            f"{it} has lora_alpha={alpha!r:.40} in its settings, expected a finite number other than 0; export it again"
        )
    for name, values in _NEUTRAL.items():
        if (value := settings.get(name)) and not any(value == each and type(value) is type(each) for each in values):
            raise InputError(f"{it} has {name}={value!r:.80} in its settings, which is not supported; export it without")
    dora, stable = settings.get("use_dora"), settings.get("use_rslora", False)
    if type(dora) not in (bool, type(None)) or type(stable) is not bool:
        raise InputError(
            f"{it} has use_dora={dora!r:.40} and use_rslora={stable!r:.40}, expected true or false; export it again"
        )
    return alpha, settings.get("r"), dora, stable


def _layers(tensors: Tensors, it: str) -> dict[str, dict[str, Tensor]]:
    """Return the tensors by layer and part; raise `InputError` if a layer is not complete or A and B do not match."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in sorted(tensors.items()):
        stem = _converted(name).removesuffix(".weight")
        part = next((each for each in (_A, _B, _MAGNITUDE) if stem.endswith(each.removesuffix(".weight"))), "")
        if not part:
            raise InputError(f"{it} has the tensor {name!r}, which no LoRA or DoRA adapter of diffusers has")
        parts = found.setdefault(module := stem.removesuffix(part.removesuffix(".weight")), {})
        if part in parts:
            raise InputError(f"{it} has {part.removeprefix('.')!r} of {module!r} twice; remove one of them")
        parts[part] = tensor
    for module, parts in found.items():
        if not {_A, _B} <= parts.keys():
            raise InputError(f"{it} lacks A or B of {module!r}; request the file again")
        if (_MAGNITUDE in parts) != any(_MAGNITUDE in each for each in found.values()):
            raise InputError(f"{it} has a magnitude (DoRA) for other layers, but not for {module!r}; export it again")
        one, two = tuple(parts[_A].shape), tuple(parts[_B].shape)
        if len(one) < 2 or len(one) != len(two) or one[0] != two[1] or not one[0]:
            raise InputError(
                f"{it}: A and B of {module!r} have the shapes {one} and {two}; "
                "expected [rank, …] and […, rank] with a rank of at least 1; export it again"
            )
    return found


def _halved(a: Tensor, b: Tensor, scale: float, what: str) -> dict[str, Tensor]:
    """Return A and scale·B in 16 bits.

    If 16 bits cannot hold one of them, a power of two moves from one to the other; their product stays the same.

    Raises:
        InputError: 16 bits cannot hold the product.
    """
    exact = a.double(), b.double() * scale
    halves = a.float().half(), (b.float() * scale).half()
    if not _holds(halves, exact):
        most = [float(table.abs().max()) for table in exact]
        if all(0 < each < math.inf for each in most):
            shift = 2.0 ** round((math.log2(most[1]) - math.log2(most[0])) / 2)
            exact = exact[0] * shift, exact[1] / shift
            halves = exact[0].half(), exact[1].half()
        if not _holds(halves, exact):
            raise InputError(f"{what} has values that 16 bits cannot hold (scale {scale:.3g}); export it with another alpha")
    return {_A: halves[0], _B: halves[1]}


def _holds(halves: tuple[Tensor, Tensor], exact: tuple[Tensor, Tensor]) -> bool:
    """Return whether tensors of 16 bits are finite and within `_ERROR` of the exact ones."""
    return all(
        bool(half.isfinite().all()) and bool((half.double() - table).norm() <= _ERROR * table.norm())
        for half, table in zip(halves, exact, strict=True)
    )


def _diffusers(tensors: dict[str, Tensor], base: Parts, it: str) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Return the tensors and the alpha by layer that diffusers' loader reads from a file of any supported format.

    Raises:
        InputError: The loader does not know the format, or leaves out a tensor.
    """
    import diffusers

    pipeline: Any = getattr(diffusers, base.family.pipelines[0])
    try:
        found = pipeline.lora_state_dict(dict(tensors), unet_config=base.denoiser.config)
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = printable(str(error))
        raise InputError(f"{it} is not in a format of diffusers ({reason}); save it with diffusers") from error
    converted, alphas = found if isinstance(found, tuple) else (found, None)
    alphas = {name.removesuffix(_ALPHA): float(alpha) for name, alpha in (alphas or {}).items()}
    if len(converted) + len(alphas) != len(tensors):
        used = {id(tensor) for tensor in converted.values()}
        unused = [name for name, tensor in sorted(tensors.items()) if id(tensor) not in used and not name.endswith(_ALPHA)]
        which = unused[0] if unused else "an alpha"
        raise InputError(f"{it} has the tensor {which!r}, which diffusers would leave out; export it again without it")
    return converted, alphas


def _converted(name: str) -> str:
    """Return peft's name of a tensor of diffusers."""
    from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft

    return str(next(iter(convert_unet_state_dict_to_peft({name: 0}))))


def _layer(name: str) -> str:
    return _converted(name).partition(".lora_")[0]
