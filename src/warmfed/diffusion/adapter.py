"""LoRA adapters (Hu et al., ICLR 2022, arXiv:2106.09685) of a pipeline's denoiser, with learned class prompts beside them.

The layers are peft's. On the wire and on disk an adapter has diffusers' names (`unet.….lora_A.weight`, 16 bits), so that
`pipeline.load_lora_weights` takes it. alpha equals the rank, which every tool assumes where no alpha is given.
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

from ..errors import InputError
from ..files import read_bytes, write_whole
from ..tensors import Tensors, only
from . import pipeline
from .families import Condition

TARGETS: dict[str, tuple[str, ...]] = {
    "none": (),
    "attention": ("to_q", "to_k", "to_v", "to_out.0"),
    "transformer": ("to_q", "to_k", "to_v", "to_out.0", "net.0.proj", "net.2", "proj_in", "proj_out"),
    "all": (
        *("to_q", "to_k", "to_v", "to_out.0", "net.0.proj", "net.2", "proj_in", "proj_out"),
        *("conv1", "conv2", "conv_shortcut", "time_emb_proj", "conv_in", "conv_out"),
    ),
}
"""Which layers of the denoiser get an adapter."""

PROMPTS = "prompts"


class Adapted(nn.Module):
    """A frozen denoiser with LoRA layers, and the classes' prompts as parameters.

    Its state outside of the adapter never changes, so one instance serves all sites: an adapter is loaded before each use.
    """

    def __init__(self, base: pipeline.Parts, denoiser: nn.Module, prompts: Sequence[str]) -> None:
        super().__init__()
        self.family, self.scale, self.dtype = base.family, base.scale, base.dtype
        self.add_module(self.family.denoiser, denoiser)  # under its folder's name, which the names in an adapter begin with
        self.empty = base.embed([""])
        self.told: Condition = {}
        self.prompts = nn.Parameter(self.tell(base, prompts).clone())

    def tell(self, base: pipeline.Parts, prompts: Sequence[str]) -> Tensor:
        """Take what belongs to these classes, and return their prompts' embeddings, float [classes, tokens, width]."""
        self.told = base.embed(prompts)
        return self.told.pop("prompt").float()

    @property
    def denoiser(self) -> nn.Module:
        return self.get_submodule(self.family.denoiser)

    def condition(self, labels: Tensor) -> Condition:
        """What the denoiser is told of these classes, n rows."""
        return {"prompt": self.prompts[labels], **{name: table[labels] for name, table in self.told.items()}}

    def forward(self, noisy: Tensor, time: Tensor, condition: Condition) -> Tensor:
        """The denoiser's prediction for latents [n, c, h, w] under n prompts."""
        return self.family.ask(self.denoiser, noisy, time, condition, self.scale, self.dtype)


def parts(base: str, device: str, dtype: str = "fp32") -> pipeline.Parts:
    """A base's parts, loaded once per process."""
    return _loaded(base, device, dtype)


_loaded = functools.cache(pipeline.load)


@functools.cache
def _injected(base: str, classes: int, rank: int, targets: str, device: str, dtype: str) -> Adapted:
    loaded = parts(base, device, dtype)
    # the copy has modules of its own and the base's weights: a base lies in memory once
    shared = {id(tensor): tensor for tensor in (*loaded.denoiser.parameters(), *loaded.denoiser.buffers())}
    denoiser = inject(copy.deepcopy(loaded.denoiser, shared), rank, targets)
    return Adapted(loaded, denoiser, [""] * classes).requires_grad_(False).to(device)


def inject(denoiser: Any, rank: int, targets: str) -> Any:
    """The denoiser with LoRA layers, in 32 bits, beside those that `targets` names."""
    from peft import LoraConfig, inject_adapter_in_model

    if not TARGETS[targets]:
        return denoiser
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(TARGETS[targets]))
    denoiser = inject_adapter_in_model(config, denoiser)
    for name, parameter in denoiser.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.float()
    return denoiser


def adapted(base: str, prompts: tuple[str, ...], rank: int, targets: str, device: str, dtype: str = "fp32") -> Adapted:
    """The base with LoRA layers and these prompts. The model is made once per process and shared; load an adapter into it."""
    model = _injected(base, len(prompts), rank, targets, device, dtype)
    model.prompts.data.copy_(model.tell(parts(base, device, dtype), prompts))
    return model


def fresh(model: Adapted, rng: torch.Generator) -> dict[str, Tensor]:
    """An adapter that changes nothing yet: A uniform in ±1/√inputs (peft's choice), B zero, the prompts as they are."""
    start: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if ".lora_A." in name:
            bound = parameter[0].numel() ** -0.5
            start[name] = (2 * torch.rand(parameter.shape, generator=rng) - 1) * bound
        elif ".lora_B." in name:
            start[name] = torch.zeros(parameter.shape)
    return {**start, PROMPTS: model.prompts.detach().cpu().clone()}


def outward(adapter: Tensors) -> dict[str, Tensor]:
    """An adapter as it travels: diffusers' names, 16 bits."""
    return {name.replace(".default.", "."): tensor.half() for name, tensor in adapter.items()}


def inward(adapter: Tensors) -> dict[str, Tensor]:
    """The names and the type that the model has, of an adapter that has travelled."""
    return {
        name.replace(".lora_A.", ".lora_A.default.").replace(".lora_B.", ".lora_B.default."): tensor.float()
        for name, tensor in adapter.items()
    }


def check(adapter: Tensors, like: Tensors, who: str) -> None:
    """Raise `InputError` where an adapter's names or shapes are not those of `like` or a value is not finite."""
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
        if not adapter[name].isfinite().all():
            raise InputError(
                f"{who}: {name!r} holds values that are not finite; its training diverged: adapt again with a lower lr"
            )


@contextmanager
def worn(model: Adapted, adapter: Tensors, *, fused: bool = True) -> Iterator[Adapted]:
    """The model with an adapter, inside.

    Args:
        fused: the adapter is folded into the weights, so that sampling costs what the base alone costs; afterwards the
            layers that it changes have their own weights again, bit for bit. Otherwise its layers stay beside the weights.
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
    """Two files: `<site>.safetensors`, which `load_lora_weights` takes, and `<site>.prompts.safetensors`; or one of them."""
    if adapter.keys() != {PROMPTS}:
        layers = only(adapter, lambda name: name != PROMPTS)
        write_whole(folder / f"{site}.safetensors", save(layers, {"format": "pt"}))  # byte for byte what diffusers writes
    if PROMPTS in adapter:
        write_whole(folder / f"{site}.prompts.safetensors", save({PROMPTS: adapter[PROMPTS].contiguous()}))


def read(folder: Path, site: str) -> dict[str, Tensor]:
    """An adapter that `write` wrote, or one from elsewhere in diffusers' format; raises `InputError`."""
    found: dict[str, Tensor] = {}
    for path in (folder / f"{site}.safetensors", folder / f"{site}.prompts.safetensors"):
        if path.exists() or not found:
            try:
                found |= load(read_bytes(path, f"the adapter of site {site!r}"))
            except SafetensorError as error:
                raise InputError(
                    f"the adapter of site {site!r} at {path} is damaged or no safetensors file ({error}); "
                    "ask the site for it again"
                ) from error
    return found
