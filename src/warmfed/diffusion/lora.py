"""LoRA adapters (Hu et al., ICLR 2022, arXiv:2106.09685) of a pipeline's denoiser, with optional learned class prompts.

The layers are peft's. On the wire and on disk an adapter has diffusers' names (`unet.….lora_A.weight`, 16 bits), so
`load_lora_weights` reads it. alpha equals the rank, the default of every tool; another scale is multiplied into B before an
adapter is sent. DoRA's magnitudes (Liu et al., ICML 2024, arXiv:2402.09353) keep 32 bits.
"""

import copy
import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from ..core.tensors import Tensors, only
from ..utils.errors import InputError, printable
from ..utils.files import atomic_write, read_bytes
from ..utils.paths import exists
from . import pipeline
from .pipeline_families import STABLE, Condition, ids

TARGETS: dict[str, tuple[str, ...]] = {
    "none": (),
    "attention": ("to_q", "to_k", "to_v", "to_out.0"),
    "transformer": ("to_q", "to_k", "to_v", "to_out.0", "net.0.proj", "net.2", "proj_in", "proj_out"),
    "all": (
        *("to_q", "to_k", "to_v", "to_out.0", "net.0.proj", "net.2", "proj_in", "proj_out"),
        *("conv1", "conv2", "conv_shortcut", "time_emb_proj", "conv_in", "conv_out"),
    ),
}
"""Layers of the denoiser with an adapter, by the setting `target_modules`."""

PROMPTS = "prompts"
TOKENS = "tokens"
_MAGNITUDE = ".lora_magnitude_vector"


class Words:
    """Textual inversion (Gal et al., ICLR 2023, arXiv:2208.01618): a learned word replaces the last word of each prompt.

    The text encoder is frozen and encodes the prompts at each step.
    """

    def __init__(self, base: pipeline.Parts) -> None:
        if base.family is not STABLE:
            raise InputError(
                f"generator.lora.textual_inversion needs one CLIP text encoder, {base.family.name} has others; "
                "set generator.prompts instead"
            )
        self.base = base
        self.ids = self.last = torch.empty(0, dtype=torch.int64)

    def take(self, prompts: Sequence[str]) -> Tensor:
        """Set the prompts and return the embeddings of their last words, float [classes, width]."""
        self.ids = ids(self.base.tokenizer, prompts).to(self.base.device)
        self.last = (self.ids == self.base.tokenizer.eos_token_id).int().argmax(1) - 1
        rows = torch.arange(len(prompts), device=self.ids.device)
        return self.base.text_encoder.get_input_embeddings().weight.detach()[self.ids[rows, self.last]].float()

    def read(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """Return the embedded prompts of these classes with their learned words, float [n, tokens, width]."""
        present, place = labels.unique(return_inverse=True)
        rows = torch.arange(len(present), device=present.device)

        def put(module: nn.Module, given: Any, found: Tensor) -> Tensor:
            return found.index_put((rows, self.last[present]), tokens[present].to(found.dtype))

        hook = self.base.text_encoder.get_input_embeddings().register_forward_hook(put)
        try:
            return self.base.text_encoder(self.ids[present])[0].float()[place]
        finally:
            hook.remove()


class Adapted(nn.Module):
    """A frozen denoiser with LoRA layers; the classes' prompts are parameters.

    Only the adapter changes, so all sites share one instance; each use loads an adapter first.
    """

    tokens: nn.Parameter | None

    def __init__(self, base: pipeline.Parts, denoiser: nn.Module, prompts: Sequence[str], words: bool = False) -> None:
        super().__init__()
        self.words = Words(base) if words else None
        self.family, self.scale, self.dtype = base.family, base.scale, base.dtype
        self.add_module(self.family.denoiser, denoiser)  # under its folder's name, the prefix of the names in an adapter
        self.empty = base.embed([""])
        self.conditioning: Condition = {}
        self.prompts = nn.Parameter(self.tell(base, prompts).clone())
        self.tokens = nn.Parameter(self.words.take(prompts)) if self.words else None
        self.magnitudes = {name: p.detach().clone() for name, p in self.named_parameters() if ".lora_magnitude" in name}

    def tell(self, base: pipeline.Parts, prompts: Sequence[str]) -> Tensor:
        """Set the conditioning of these classes and return their embedded prompts, float [classes, tokens, width]."""
        self.conditioning = base.embed(prompts)
        return self.conditioning.pop("prompt").float()

    @property
    def denoiser(self) -> nn.Module:
        """Denoiser with the LoRA layers."""
        return self.get_submodule(self.family.denoiser)

    def condition(self, labels: Tensor) -> Condition:
        """Return the conditioning of these classes, n rows."""
        prompt = self.words.read(self.tokens, labels) if self.words and self.tokens is not None else self.prompts[labels]
        return {"prompt": prompt, **{name: table[labels] for name, table in self.conditioning.items()}}

    def forward(self, noisy: Tensor, time: Tensor, condition: Condition) -> Tensor:
        """Return the denoiser's prediction for latents [n, c, h, w] with n prompts."""
        return self.family.ask(self.denoiser, noisy, time, condition, self.scale, self.dtype)


def parts(base: str, device: str, dtype: str = "fp32") -> pipeline.Parts:
    """Return a base's parts, loaded once per process."""
    return _loaded(base, device, dtype)


_loaded = functools.cache(pipeline.load)


@functools.cache
def _injected(base: str, classes: int, rank: int, targets: str, device: str, dtype: str, dora: bool, words: bool) -> Adapted:
    loaded = parts(base, device, dtype)
    # the copy has its own modules and shares the base's weights, so a base is in memory once
    shared = {id(tensor): tensor for tensor in (*loaded.denoiser.parameters(), *loaded.denoiser.buffers())}
    denoiser = inject(copy.deepcopy(loaded.denoiser, shared), rank, targets, dora)
    return Adapted(loaded, denoiser, [""] * classes, words).requires_grad_(False).to(device)


def inject(denoiser: Any, rank: int, targets: str, dora: bool = False) -> Any:
    """Return the denoiser with LoRA layers, in 32 bits, on the layers of `TARGETS[targets]`."""
    from peft import LoraConfig, inject_adapter_in_model

    if not TARGETS[targets]:
        return denoiser
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(TARGETS[targets]), use_dora=dora)
    denoiser = inject_adapter_in_model(config, denoiser)
    for name, parameter in denoiser.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.float()
    return denoiser


def adapted(
    base: str,
    prompts: tuple[str, ...],
    rank: int,
    targets: str,
    device: str,
    dtype: str = "fp32",
    dora: bool = False,
    words: bool = False,
) -> Adapted:
    """Return the base with LoRA layers and these prompts, built once per process and shared; load an adapter before use.

    Args:
        base: name or folder of the base.
        prompts: one prompt per class.
        rank: rank of A and B.
        targets: a key of `TARGETS`.
        device: device of the model.
        dtype: type of the base's weights.
        dora: whether each output has a learned magnitude beside A and B.
        words: whether each prompt has a learned word.
    """
    model = _injected(base, len(prompts), rank, targets, device, dtype, dora, words)
    model.prompts.data.copy_(model.tell(parts(base, device, dtype), prompts))
    if model.words and model.tokens is not None:
        model.tokens.data.copy_(model.words.take(prompts))
    return model


@contextmanager
def scaled(model: Adapted, scale: float) -> Iterator[None]:
    """Scale the updates of the LoRA layers by `scale` inside the context."""
    from peft.tuners.lora import LoraLayer

    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    for layer in layers:
        layer.scaling["default"] = scale
    try:
        yield
    finally:
        for layer in layers:
            layer.scaling["default"] = 1.0


def fresh(model: Adapted, rng: torch.Generator) -> dict[str, Tensor]:
    """Return an adapter with no effect: A is uniform in ±1/√inputs (as in peft), B zero, the rest is the base's."""
    start: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if ".lora_A." in name:
            bound = parameter[0].numel() ** -0.5
            start[name] = (2 * torch.rand(parameter.shape, generator=rng) - 1) * bound
        elif ".lora_B." in name:
            start[name] = torch.zeros(parameter.shape)
        elif ".lora_magnitude" in name:
            start[name] = model.magnitudes[name].cpu().clone()
    words = {} if model.tokens is None else {TOKENS: model.tokens.detach().cpu().clone()}
    return {**start, PROMPTS: model.prompts.detach().cpu().clone(), **words}


_OUT = {".lora_A.default.": ".lora_A.", ".lora_B.default.": ".lora_B.", ".lora_magnitude_vector.default.weight": _MAGNITUDE}


def to_diffusers(adapter: Tensors, scale: float = 1.0) -> dict[str, Tensor]:
    """Return an adapter with diffusers' names, in 16 bits; B is multiplied by `scale`, the scale of its training."""
    out: dict[str, Tensor] = {}
    for name, tensor in adapter.items():
        outer = _renamed(name, _OUT)
        scaled = tensor * scale if ".lora_B." in outer and scale != 1 else tensor
        out[outer] = scaled.float() if outer.endswith(_MAGNITUDE) else scaled.half()
    return out


def to_peft(adapter: Tensors) -> dict[str, Tensor]:
    """Return an adapter of diffusers' names with peft's names, in 32 bits."""
    return {_renamed(name, {outer: inner for inner, outer in _OUT.items()}): t.float() for name, t in adapter.items()}


def _renamed(name: str, words: dict[str, str]) -> str:
    return functools.reduce(lambda text, pair: text.replace(*pair), words.items(), name)


def check(adapter: Tensors, like: Tensors, who: str) -> None:
    """Raise `InputError` if an adapter's names, shapes or types are not those of `like`, or a value is not finite."""
    for name in sorted(adapter.keys() | like.keys()):
        if name not in adapter or name not in like:
            where = "lacks" if name not in adapter else "has the unknown"
            raise InputError(
                f"{who} {where} tensor {name!r}: it was made for another base, rank or choice of layers; "
                "adapt again with this run's settings"
            )
        if adapter[name].shape != like[name].shape:
            raise InputError(
                f"{who}: {name!r} has shape {tuple(adapter[name].shape)}, expected {tuple(like[name].shape)}; "
                "it was made for another base or rank; adapt again with this run's settings"
            )
        if adapter[name].dtype != like[name].dtype:
            raise InputError(f"{who}: {name!r} is {adapter[name].dtype}, expected {like[name].dtype}; adapt again")
        if not adapter[name].isfinite().all():
            raise InputError(
                f"{who}: {name!r} holds values that are not finite; its training diverged: adapt again with a lower lr"
            )


@contextmanager
def applied(model: Adapted, adapter: Tensors, *, fused: bool = True) -> Iterator[Adapted]:
    """Load an adapter into the model inside the context.

    Args:
        model: the base with LoRA layers.
        adapter: tensors with peft's names.
        fused: whether to merge the adapter into the weights, so that sampling costs as much as with the base alone; the
            original weights are restored afterwards, bit for bit. Otherwise the LoRA layers stay separate.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    model.load_state_dict(dict(adapter), strict=False)
    model.eval()
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)] if fused else []
    own = [(layer, layer.get_base_layer().weight) for layer in layers]
    kept = [weight.data for _, weight in own]
    try:
        for layer, weight in own:
            weight.data = weight.data.clone()
            layer.merge()
        yield model
    finally:
        for (layer, weight), data in zip(own, kept, strict=True):
            weight.data = data
            layer.merged_adapters.clear()


def write(adapter: Tensors, folder: Path, site: str) -> None:
    """Write an adapter to a folder.

    diffusers' `load_lora_weights` reads `<site>.safetensors`. Learned prompts are in `<site>.prompts.safetensors`. Tokens
    `<site-0>`, `<site-1>`, …, one per class, are in `<site>.tokens.safetensors`; `load_textual_inversion` reads each.
    """
    if layers := only(adapter, lambda name: name not in (PROMPTS, TOKENS)):
        atomic_write(folder / f"{site}.safetensors", save(layers, {"format": "pt"}))  # the same bytes as diffusers writes
    if PROMPTS in adapter:
        atomic_write(folder / f"{site}.prompts.safetensors", save({PROMPTS: adapter[PROMPTS].contiguous()}))
    if TOKENS in adapter:
        words = {f"<{site}-{i}>": word.clone() for i, word in enumerate(adapter[TOKENS])}
        atomic_write(folder / f"{site}.{TOKENS}.safetensors", save(words))


def read(folder: Path, site: str) -> dict[str, Tensor]:
    """Return an adapter that `write` wrote; raise `InputError` if a file is missing or damaged."""
    path, who = folder / f"{site}.safetensors", f"the adapter of site {site!r}"
    words = beside(path, who, PROMPTS, TOKENS)
    return opened(path, who) | words if exists(path) or not words else words


def beside(path: Path, who: str, *kinds: str) -> dict[str, Tensor]:
    """Return the learned prompts or tokens in the files beside that of an adapter's layers, if there are any."""
    found: dict[str, Tensor] = {}
    for kind in kinds:
        other = path.with_name(f"{path.name.removesuffix('.safetensors')}.{kind}.safetensors")
        if exists(other):
            words = opened(other, who)
            found[kind] = _stacked(words, f"{who} ({other})") if kind == TOKENS else words.pop(PROMPTS, torch.empty(0))
            if kind == PROMPTS and words:
                raise InputError(f"{who} ({other}) has the tensor {min(words)!r}, expected only {PROMPTS!r}; adapt again")
    return found


def _stacked(words: Tensors, who: str) -> Tensor:
    """Return the tokens `<NAME-0>`, `<NAME-1>`, … as one tensor; raise `InputError` if one is missing or of another shape."""
    order = sorted(words, key=lambda name: (len(name), name))
    first = order[0].removesuffix("-0>") if order else ""
    if not order or order != [f"{first}-{i}>" for i in range(len(order))]:
        got = printable(", ".join(order[:3]), 80)
        raise InputError(f"{who} has the tokens {got}, expected <NAME-0>, <NAME-1>, …; adapt again")
    if len({(words[name].shape, words[name].dtype) for name in order}) > 1:
        raise InputError(f"{who} has tokens of several shapes or types; adapt again")
    return torch.stack([words[name] for name in order])


def opened(path: Path, who: str) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file; raise `InputError` if it is missing or damaged."""
    try:
        return load(read_bytes(path, who))
    except SafetensorError as error:
        raise InputError(f"{who} at {path} is damaged or not a safetensors file ({error}); request it again") from error
    except KeyError as error:
        raise InputError(f"{who} at {path} has numbers of type {error}, which torch lacks; export it in 16 bits") from error
