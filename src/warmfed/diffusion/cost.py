"""Estimate the cost of a generator: count the operations of its network on torch's meta device, which has no values.

Memory is the peak of the bytes that the work allocates, from the storages of its tensors. Time is a roofline over three
speeds of this machine (matrix products, copies, calls) and is accurate to about a factor of two.
"""

import functools
import gc
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from ..utils.errors import InputError
from ..utils.memory import free
from . import lora as lora
from . import pipeline
from .known_pipelines import Outline, build, outline, side
from .lora_training import LoraTask
from .pipeline_families import Condition, Family
from .settings import GeneratorSettings


@dataclass(frozen=True)
class Cost:
    """Cost of a computation."""

    flops: float = 0.0
    """Floating-point operations."""
    moved: float = 0.0
    """Bytes that the operations read and write."""
    calls: float = 0.0
    """Number of operations."""
    peak: float = 0.0
    """Peak of the bytes that the computation allocates."""

    def times(self, count: float) -> "Cost":
        """Return the cost of `count` repetitions."""
        return Cost(self.flops * count, self.moved * count, self.calls * count, self.peak)

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            self.flops + other.flops, self.moved + other.moved, self.calls + other.calls, max(self.peak, other.peak)
        )  # fmt: skip


T = TypeVar("T", bound=GeneratorSettings)
_EVERY = 20
"""Operations between two collections of cyclic garbage."""


class _Alive(TorchDispatchMode):
    """Count operations, the bytes that they read and write, and the peak bytes of new storages."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls, self.moved, self.alive, self.peak = 0, 0.0, 0, 0
        self._held: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.calls += 1
            if not self.calls % _EVERY:
                gc.collect(1)
            touched = (*tree_leaves(args), *tree_leaves(result))
            self.moved += sum(each.numel() * each.element_size() for each in touched if isinstance(each, Tensor))
        for each in tree_leaves(result):
            if isinstance(each, Tensor):
                self._note(each.untyped_storage())
        return result

    def _note(self, storage: Any) -> None:
        name, size = storage._cdata, storage.nbytes()
        if name in self._held:
            return
        self._held[name] = weakref.ref(storage, lambda _: self._gone(name, size))
        self.alive += size
        self.peak = max(self.peak, self.alive)

    def _gone(self, name: int, size: int) -> None:
        if self._held.pop(name, None) is not None:
            self.alive -= size


@contextmanager
def _fused() -> Iterator[None]:
    """Replace attention by a fused kernel inside the context, as on a CPU or GPU; it never stores the whole matrix.

    The meta device would use the plain formula. A dispatch mode would not reach the recomputation of checkpoints.
    """
    functions: Any = F
    plain = functions.scaled_dot_product_attention

    def attention(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None,
        dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None, **more: Any,
    ) -> Tensor:  # fmt: skip
        kernel = torch.ops.aten._scaled_dot_product_efficient_attention
        return kernel(query, key, value, attn_mask, True, dropout_p, is_causal, scale=scale)[0]

    functions.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        functions.scaled_dot_product_attention = plain


def counted(work: Callable[[], object]) -> Cost:
    """Return the cost of `work`, whose tensors should be on the meta device."""
    flops, alive, automatic = FlopCounterMode(display=False), _Alive(), gc.isenabled()
    gc.collect()
    gc.disable()  # checkpoints hold tensors in cycles; collections at fixed places make the counts reproducible
    try:
        with _fused(), flops, alive:
            work()
    finally:
        if automatic:
            gc.enable()
    return Cost(float(flops.get_total_flops()), alive.moved, float(alive.calls), float(alive.peak))


@dataclass(frozen=True)
class Machine:
    """Three speeds of a device."""

    flops: float
    """Floating-point operations of matrix products per second."""
    bytes: float
    """Bytes that copies read and write per second."""
    call: float
    """Seconds of one operation on a tiny tensor."""

    def seconds(self, cost: Cost) -> float:
        """Return the seconds of a computation, as a sum of the three parts."""
        return cost.flops / self.flops + cost.moved / self.bytes + cost.calls * self.call


@functools.cache
def machine(device: str, dtype: str) -> Machine:
    """Return the speeds of this machine, measured in a fraction of a second."""
    kind = pipeline.DTYPES[dtype]
    square, long, one = (torch.ones(shape, dtype=kind, device=device) for shape in ((512, 512), (2**23,), (8,)))
    products, copies, calls = (
        _rate(lambda: square @ square, device),
        _rate(lambda: long + 1, device),
        _rate(lambda: one + 1, device),
    )
    return Machine(2 * 512**3 * products, 2 * long.nbytes * copies, 1 / calls)


def _rate(work: Callable[[], object], device: str) -> float:
    """Return the calls of `work` per second."""

    def wait() -> float:
        if device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter()

    work()
    count, begun = 0, wait()
    while wait() - begun < 0.05:
        work()
        count += 1
    return count / (wait() - begun)


def skeleton(base: str, dtype: str = "fp32") -> pipeline.Parts:
    """Return a base's parts on the meta device, without values. Its prompts are empty tensors of the right shape."""
    kind, made = outline(base)
    loaded: dict[str, Any] = dict.fromkeys(kind.parts)
    for part in kind.models:
        with torch.device("meta"):
            loaded[part] = build(*made[part])
        loaded[part].to(pipeline.DTYPES[dtype]).requires_grad_(False).eval()
    loaded["scheduler"] = build(*made["scheduler"])
    shapes = told(kind, made)

    def embed(parts: Any, prompts: Any) -> Condition:
        return {name: torch.empty(len(prompts), *shape, device="meta") for name, shape in shapes.items()}

    return pipeline.assemble(replace(kind, embed=embed), loaded, {})


def told(kind: Family, made: Outline) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the conditioning of one prompt."""
    return kind.shapes({name: config for name, (_, _, config) in made.items()})


@dataclass(frozen=True)
class Plan:
    """Costs of a generator."""

    weights: int
    """Bytes of the base."""
    adapter: int
    """Bytes of an adapter."""
    learned: int
    """Number of trained parameters."""
    encode: Cost
    """Cost of encoding one image."""
    train: Cost
    """Cost of one training batch; `peak` includes the optimizer's state, but not the base."""
    sample: Cost
    """Cost of one sampler step with one batch."""
    decode: Cost
    """Cost of decoding one batch of latents."""


def plan(generator: GeneratorSettings, classes: int) -> Plan:
    """Return the costs of a generator, without its weights.

    Raises:
        InputError: if the base is unknown.
    """
    parts = skeleton(generator.base, generator.dtype)
    generator = replace(generator, size=generator.size or side(generator.base))
    weights = sum(_bytes(parts.part(name)) for name in parts.family.models)
    space, batch = generator.space(parts), generator.training.batch_size
    at_once = min(generator.training.micro_batch_size or batch, batch)
    denoiser = lora.inject(parts.denoiser, generator.rank, generator.target_modules, generator.lora.dora)
    model = lora.Adapted(parts, denoiser, [""] * classes).requires_grad_(False).to("meta")
    live = [
        value for name, value in model.named_parameters() if ".lora_" in name or (name == lora.PROMPTS and generator.prompts)
    ]
    words = classes * model.prompts.shape[-1] if generator.lora.textual_inversion else 0
    learned = sum(value.numel() for value in live) + words
    wide = sum(value.numel() for value in model.magnitudes.values())  # DoRA's magnitudes are sent in 32 bits
    live += [model.prompts] if words else []  # the gradient of a token goes through the prompts
    for value in live:
        value.requires_grad_(True)
    if generator.lora.gradient_checkpointing:
        parts.denoiser.enable_gradient_checkpointing()
    task = LoraTask(model, generator, parts)
    rows = {
        "latent": torch.empty(at_once, generator.views * (1 + generator.lora.flip), *space, device="meta"),
        "label": torch.zeros(at_once, dtype=torch.int64, device="meta"),
    }
    passed = counted(lambda: torch.autograd.grad(task.loss(model.train(), task.draw(rows)), live))
    if words:
        read = counted(lambda: _read(parts.text_encoder, min(at_once, classes), model.prompts))
        passed = replace(passed + read, peak=passed.peak + read.peak)
    stepped = passed.times(batch / at_once)
    state = 4 * learned * (2 if generator.training.optimizer != "sgd" else 1)
    pixels = generator.side
    with torch.no_grad():
        model.eval()
        images = torch.empty(1, 3, pixels, pixels, device="meta", dtype=parts.vae.dtype)
        encoded = counted(lambda: parts.vae.encode(images))
        guided = 1 if generator.guidance == 1 else 2
        count = generator.batch_size * guided
        noisy, time_ = torch.empty(count, *space, device="meta"), torch.zeros(count, device="meta")
        condition = model.condition(torch.zeros(count, dtype=torch.int64, device="meta"))
        sampled = counted(lambda: model(noisy, time_, condition))
        latents = torch.empty(1, *space, device="meta", dtype=parts.vae.dtype)
        decoded = counted(lambda: parts.vae.decode(latents))
    many = pipeline.chunk(pixels, generator.batch_size)
    return Plan(
        weights,
        2 * (learned + wide),
        learned,
        encoded,
        replace(stepped, peak=stepped.peak + state + 4 * learned),
        sampled,
        replace(decoded.times(generator.batch_size), peak=decoded.peak * many),
    )


def micro_batch(settings: T, classes: int, device: str) -> T:
    """Return the settings with a `training.micro_batch_size` whose training step fits into half of the free memory.

    Without `lora.auto_micro_batch`, return the settings unchanged.

    Raises:
        InputError: if not even one image fits.
    """
    if not settings.lora.auto_micro_batch:
        return settings
    batch = settings.training.batch_size
    one, two = (
        plan(replace(settings, training=replace(settings.training, batch_size=n, micro_batch_size=0)), classes) for n in (1, 2)
    )
    passes = 2 if settings.lora.prior_loss_weight else 1
    each = passes * (two.train.peak - one.train.peak)
    fixed = one.train.peak - each / passes
    room = int((free(device) / 2 - fixed) / each)
    if room >= batch:
        return replace(settings, training=replace(settings.training, micro_batch_size=0))
    if room < 1:
        raise InputError(
            f"one image of a batch needs {(fixed + each) / 1e6:.0f} MB, but only {free(device) / 2e6:.0f} MB may be used; "
            "set generator.lora.gradient_checkpointing, or free some memory"
        )
    in_equal_parts = -(-batch // -(-batch // room))
    return replace(settings, training=replace(settings.training, micro_batch_size=in_equal_parts))


def _bytes(model: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))


def _read(encoder: Any, count: int, prompts: Tensor) -> None:
    """Run the text encoder forward and backward over `count` prompts with one learned word each."""
    _, tokens, width = prompts.shape
    words = torch.empty(count, 1, width, device="meta", requires_grad=True)
    hook = encoder.get_input_embeddings().register_forward_hook(lambda module, given, found: found + words.to(found.dtype))
    try:
        embedded = encoder(torch.zeros(count, tokens, dtype=torch.int64, device="meta"))[0]
        torch.autograd.grad(embedded.float().sum(), words)
    finally:
        hook.remove()
