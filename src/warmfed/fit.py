"""The training loop of clients, server and generator. No other module calls `.backward()`."""

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _NormBase

from .core import no_progress
from .core.rng import seeded, spawn
from .core.tensors import Table, Tensors, rows, select, sha256, to
from .core.training import Training
from .core.training_snapshot import Snapshots
from .core.training_state import TrainState
from .utils.errors import InputError

Loss = Callable[[nn.Module, Table], Tensor]
Penalty = Callable[[Tensors], Tensor]
Correct = Callable[[str, Tensor], Tensor]
Watch = Callable[[int, int, Callable[[], dict[str, Tensor]]], None]
Draw = Callable[[Table], Table]
_RESIDENT = 2**31
"""Bytes up to which the data are moved to the device at once; more are moved batch by batch."""


class Trains(Protocol):
    """Part of a task that `fit` uses."""

    def build(self) -> nn.Module: ...
    def loss(self, model: nn.Module, batch: Table) -> Tensor: ...


@runtime_checkable
class Encodes(Protocol):
    """A task that trains on another form of a table, such as the features of a frozen body."""

    def inputs(self, table: Table) -> Table: ...


class Context(Protocol):
    """Part of a `ClientContext` or `ServerContext` that `fit` uses."""

    @property
    def task(self) -> Trains: ...
    @property
    def rng(self) -> torch.Generator: ...
    @property
    def device(self) -> str: ...
    @property
    def progress(self) -> Callable[[str, int, int], None]: ...


C = TypeVar("C", bound=Context)


@dataclass(frozen=True)
class Problem:
    """Context of `fit` for a task other than the run's."""

    task: Trains
    rng: torch.Generator
    device: str = "cpu"
    progress: Callable[[str, int, int], None] = no_progress


def solving(ctx: Context, task: Trains) -> Problem:
    """Return a context with another task; it shares the random stream of `ctx`."""
    return Problem(task, ctx.rng, ctx.device, ctx.progress)


def _slices(batch: Table, size: int) -> list[dict[str, Tensor]]:
    return [select(batch, slice(begin, begin + size)) for begin in range(0, rows(batch), size)]


@dataclass(frozen=True)
class Stop:
    """Early stopping: `judge(model)` returns a figure after each epoch, without gradients; lower is better."""

    judge: Callable[[nn.Module], float]
    patience: int
    """Epochs without a better figure after which training ends."""


def _optimizer(training: Training, live: list[nn.Parameter]) -> torch.optim.Optimizer:
    match training.optimizer:
        case "adamw8bit":
            try:
                import bitsandbytes
            except ImportError as error:
                raise InputError(
                    "optimizer adamw8bit needs bitsandbytes, which is not installed; pip install bitsandbytes, or choose adamw"
                ) from error
            # tensors with fewer values keep 32-bit optimizer state, as by default in the library
            found: torch.optim.Optimizer = bitsandbytes.optim.AdamW8bit(
                live, training.lr, weight_decay=training.weight_decay, min_8bit_size=4096
            )
            return found
        case "sgd":
            return torch.optim.SGD(live, training.lr, training.momentum, weight_decay=training.weight_decay)
        case "adam":
            return torch.optim.Adam(live, training.lr, weight_decay=training.weight_decay)
        case _:
            return torch.optim.AdamW(live, training.lr, weight_decay=training.weight_decay)


def _rate(training: Training, step: int, steps: int) -> float:
    rate = training.lr * min(1.0, (step + 1) / (training.warmup + 1))
    if training.schedule == "cosine":
        rate *= 0.5 * (1 + torch.cos(torch.tensor(torch.pi * step / steps)).item())
    return rate


def _batches(n: int, size: int, rng: torch.Generator) -> Iterator[Tensor]:
    """Yield index batches of shuffled epochs, forever."""
    while True:
        yield from torch.randperm(n, generator=rng).split(size)


@dataclass(frozen=True)
class _Loop:
    """Inputs of a training step that do not change."""

    training: Training
    steps: int
    data: Table
    resident: bool
    """Whether all data are on the device."""
    device: str
    autocast: AbstractContextManager[object]
    parameters: Mapping[str, nn.Parameter]
    live: list[nn.Parameter]
    loss: Loss
    penalty: Penalty | None
    correct: Correct | None
    draw: Draw | None

    def batch(self, index: Tensor) -> Table:
        """Return the rows of a batch, on the device, with the random numbers of its loss."""
        found = select(self.data, index)
        if not self.resident:
            found = to(found, self.device)
        return dict(self.draw(found)) if self.draw else found


def _train_step(state: TrainState, loop: _Loop, batches: Iterator[Tensor]) -> None:
    """Take one optimizer step; record the loss of each batch in `state`."""
    training, optimizer, scaler = loop.training, state.optimizer, state.scaler
    if training.warmup > 0 or training.schedule != "constant":
        for group in optimizer.param_groups:
            group["lr"] = _rate(training, state.step, loop.steps)
    for parameter in loop.live:  # optimizer.zero_grad() adds a profiler record, which takes a tenth of a small step
        parameter.grad = None
    for _ in range(training.gradient_accumulation_steps):
        batch = loop.batch(next(batches))
        count, values = rows(batch), []
        for part in [batch] if count <= (training.micro_batch_size or count) else _slices(batch, training.micro_batch_size):
            with loop.autocast:
                value = loop.loss(state.model, part)
                full = value + loop.penalty(loop.parameters) if loop.penalty else value
            fraction = training.gradient_accumulation_steps * count / rows(part)
            scaler.scale(full / fraction if fraction != 1 else full).backward()
            values.append(value.detach() * (rows(part) / count) if rows(part) < count else value.detach())
        state.record(sum(values[1:], start=values[0]), count)
    scaler.unscale_(optimizer)
    if loop.correct:
        for name, parameter in loop.parameters.items():
            if parameter.grad is not None:
                parameter.grad = loop.correct(name, parameter.grad)
    if training.max_grad_norm:
        torch.nn.utils.clip_grad_norm_(loop.live, training.max_grad_norm)
    scaler.step(optimizer)
    scaler.update()
    for name, smooth in state.average.items():
        # a smaller decay in the first steps, so that the initial weights do not dominate a short training
        decay = min(training.ema_decay, (1 + state.step) / (10 + state.step))
        smooth.lerp_(loop.parameters[name].detach(), 1 - decay)
    state.step += 1


def fit(
    ctx: Context,
    start: Tensors,
    training: Training,
    data: Table,
    *,
    loss: Loss | None = None,
    penalty: Penalty | None = None,
    correct: Correct | None = None,
    trainable: Callable[[str], bool] | None = None,
    watch: Watch | None = None,
    draw: Draw | None = None,
    stop: Stop | None = None,
    snapshots: Snapshots | None = None,
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Train from `start` on the rows of `data`; return the new tensors, under the names of `start`, and metrics.

    `start` may name only a part of the model's state; `ctx.task.build()` gives the rest (a LoRA adapter on a frozen base).
    Rows are shuffled in each epoch from `ctx.rng`. torch's global stream, which dropout and losses use, is spawned from it.

    Args:
        ctx: task, random stream, device and progress.
        start: initial tensors.
        training: settings of training.
        data: rows to train on.
        loss: loss(model, batch) replaces the task's loss (distillation).
        penalty: penalty(parameters) is added to the loss (FedProx, Ditto).
        correct: correct(name, gradient) returns the new gradient (SCAFFOLD).
        trainable: trainable(name) is False for frozen tensors (FedPer, LoRA).
        watch: watch(step, steps, tensors) is called after each optimizer step; tensors() returns the current result.
        draw: draw(batch) adds the random numbers of the loss; they do not depend on `training.micro_batch_size`.
        stop: early stopping; the tensors of the best epoch are returned.
        snapshots: snapshots of unfinished training. If one has the same start, settings, data and random numbers, the
            training resumes from it with the same result. Dropout on a GPU is not covered.

    Returns:
        The tensors (with `training.ema_decay`, their moving averages), and metrics. The metrics are the mean loss of the last
        and of the first epoch (with `training.steps`, of a tenth of the steps), the number of steps and the number of rows.
        With `stop`, they include the best figure and its step.

    Raises:
        InputError: There are no rows or no trainable tensors, or the loss or a weight is not finite.
    """
    n = rows(data)
    if not n:
        raise InputError("cannot train: there are no rows; check the site's training data")
    if isinstance(ctx.task, Encodes):
        data = ctx.task.inputs(data)
    with seeded(ctx.rng, ctx.device):
        model = _model(ctx, start, trainable)
        parameters = dict(model.named_parameters())
        live = [parameter for parameter in parameters.values() if parameter.requires_grad]
        if not live:
            raise InputError("no trainable tensors: the model lacks the part to train; choose another model")
        steps, kind = training.count(n), torch.device(ctx.device).type
        half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(training.mixed_precision)
        resident = sum(column.nbytes for column in data.values()) <= _RESIDENT
        loop = _Loop(
            training, steps, to(data, ctx.device) if resident else data, resident, ctx.device,
            torch.autocast(kind, half) if half else nullcontext(), parameters, live,
            loss or ctx.task.loss, penalty, correct, draw,
        )  # fmt: skip
        state = TrainState(
            model, _optimizer(training, live), torch.amp.GradScaler(kind, enabled=training.mixed_precision == "fp16"),
            average={name: p.detach().clone() for name, p in parameters.items() if p.requires_grad and training.ema_decay},
            # one preallocated tensor: a small tensor for each step fragments the memory that later steps free and allocate
            losses=torch.zeros(steps * training.gradient_accumulation_steps, dtype=torch.float64, device=ctx.device),
        )  # fmt: skip
        key = _key(ctx.rng, start, training, data, snapshots.of) if snapshots else ""
        batches = _batches(n, training.batch_size, ctx.rng)
        if snapshots and (kept := snapshots.load(key)):
            state.load_state_dict(kept, ctx.device)
            for _ in range(state.step * training.gradient_accumulation_steps):
                next(batches)
        tail = -(-n // (training.batch_size * training.gradient_accumulation_steps)) if not training.steps else -(-steps // 10)
        while state.step < steps:
            _train_step(state, loop, batches)
            if watch:
                watch(state.step, steps, lambda: state.tensors(start))
            if stop and (state.step % tail == 0 or state.step == steps) and _judged(state, loop, stop, start, tail):
                break
            if snapshots and state.step % snapshots.every == 0:
                snapshots.save(key, **state.state_dict(start))
            ctx.progress("train", state.step, steps)
    return _result(state, training, start, steps, tail, judged=stop is not None)


def _model(ctx: Context, start: Tensors, trainable: Callable[[str], bool] | None) -> nn.Module:
    """Return the task's model with the tensors of `start`, frozen except those for which `trainable` is True."""
    model = ctx.task.build()
    if ctx.device != "cpu":
        model.to(ctx.device)
    model.load_state_dict(dict(start), strict=False)
    model.train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in start and (trainable is None or trainable(name)))
    return model


def _judged(state: TrainState, loop: _Loop, stop: Stop, start: Tensors, tail: int) -> bool:
    """Evaluate the model, record it if it is the best so far, and return whether the training ends."""
    _exchange(loop.parameters, state.average)
    state.model.eval()
    with torch.no_grad(), loop.autocast:
        figure = stop.judge(state.model)
    state.model.train()
    _exchange(loop.parameters, state.average)
    if figure < state.best_figure:
        state.best, state.best_step, state.best_figure = state.tensors(start), state.step, figure
        return False
    return state.step - state.best_step >= stop.patience * tail


def _result(
    state: TrainState, training: Training, start: Tensors, steps: int, tail: int, *, judged: bool
) -> tuple[dict[str, Tensor], dict[str, float]]:
    window = tail * training.gradient_accumulation_steps
    info = {"steps": len(state.counts) / training.gradient_accumulation_steps, "samples": float(sum(state.counts))}
    result = state.best or state.tensors(start)
    if judged:
        info |= {"judged": state.best_figure, "best_step": float(state.best_step)}
    if state.counts:
        losses = state.losses[: len(state.counts)].cpu()
        weights = torch.tensor(state.counts, dtype=torch.float64)
        info |= {"loss": _mean(losses[-window:], weights[-window:]), "first_loss": _mean(losses[:window], weights[:window])}
        # a sum is not finite if any term is not finite
        if not all(math.isfinite(value.sum()) for value in (losses, *result.values())):
            raise InputError(
                f"training diverged: loss or weights not finite after {steps} steps; "
                f"lower lr (now {training.lr}) or set max_grad_norm"
            )
    return result, info


def _key(rng: torch.Generator, start: Tensors, training: Training, data: Table, of: str) -> str:
    """Return a digest of all inputs of a training."""
    text = repr((sha256(start), training, sha256(data), sha256({"rng": rng.get_state()}), of))
    return hashlib.sha256(text.encode()).hexdigest()


def _exchange(parameters: Mapping[str, nn.Parameter], average: dict[str, Tensor]) -> None:
    """Swap the weights and their moving averages; a second call restores them."""
    for name, smooth in average.items():
        weight = parameters[name].data
        parameters[name].data, average[name] = smooth, weight


def _mean(values: Tensor, weights: Tensor) -> float:
    return float((values * weights).sum() / weights.sum())


def proximal(anchor: Tensors, mu: float) -> Penalty:
    """Return the penalty mu/2·||w - anchor||² over trainable parameters."""

    def penalty(parameters: Tensors) -> Tensor:
        live = [(p, anchor[name].to(p.device)) for name, p in parameters.items() if p.requires_grad]
        return mu / 2 * torch.stack([((p - a) ** 2).sum() for p, a in live]).sum()

    return penalty


def minibatches(ctx: C, training: Training, data: Table) -> Iterator[tuple[C, Table]]:
    """Yield the batches of `fit`, in the same order, for methods that solve a separate problem on each batch.

    Yields:
        A context for that problem, and the rows. All contexts share one random stream, spawned from `ctx.rng`.

    Raises:
        InputError: There are no rows.
    """
    if not rows(data):
        raise InputError("cannot train: there are no rows; check the site's training data")
    inner: Any = replace(ctx, rng=spawn(ctx.rng))  # type: ignore[type-var]
    order = _batches(rows(data), training.batch_size, ctx.rng)
    for _ in range(training.count(rows(data))):
        yield inner, select(data, torch.cat([next(order) for _ in range(training.gradient_accumulation_steps)]))


@contextmanager
def untracked(model: nn.Module) -> Iterator[bool]:
    """Let normalisation layers use a batch's statistics without recording them, as transforms of torch.func need.

    Yields:
        Whether there are such layers.
    """
    layers = [m for m in model.modules() if isinstance(m, _NormBase) and m.training and m.track_running_stats]
    try:
        for layer in layers:
            layer.track_running_stats = False
        yield bool(layers)
    finally:
        for layer in layers:
            layer.track_running_stats = True


def at(model: nn.Module, weights: Tensors) -> Any:
    """Return a function that calls the model with these weights; gradients flow to the weights."""
    return lambda *inputs: functional_call(model, dict(weights), inputs)
