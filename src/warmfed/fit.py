"""The only training loop: clients, the server and the generator all use it, and it alone calls `.backward()`."""

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .core import no_progress
from .core.rng import seeded, spawn
from .core.tensors import Table, Tensors, rows, select, sha256, to
from .core.training_snapshot import Snapshots, load_optimizer_state, optimizer_state
from .utils.errors import InputError, one_of

Loss = Callable[[nn.Module, Table], Tensor]
Penalty = Callable[[Tensors], Tensor]
Correct = Callable[[str, Tensor], Tensor]
Watch = Callable[[int, int, Callable[[], dict[str, Tensor]]], None]
Draw = Callable[[Table], Table]
OPTIMIZERS = ("sgd", "adam", "adamw", "adamw8bit")
_RESIDENT = 2**31
"""Bytes of data that go to the device as a whole; more go batch by batch."""


class Trains(Protocol):
    """What `fit` needs of a task."""

    def build(self) -> nn.Module: ...
    def loss(self, model: nn.Module, batch: Table) -> Tensor: ...


class Context(Protocol):
    """What `fit` needs of a `ClientContext` or `ServerContext`."""

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
    """A problem to train on that is not a run's task, with all that `fit` needs."""

    task: Trains
    rng: torch.Generator
    device: str = "cpu"
    progress: Callable[[str, int, int], None] = no_progress


def solving(ctx: Context, task: Trains) -> Problem:
    """Return the problem `task` in the place of a context's own task; both draw from one random stream."""
    return Problem(task, ctx.rng, ctx.device, ctx.progress)


@dataclass(frozen=True)
class Training:
    """How to train: the optimizer and how long."""

    RENAMED: ClassVar[Mapping[str, str]] = {
        "micro": "micro_batch_size",
        "accumulate": "gradient_accumulation_steps",
        "clip": "max_grad_norm",
        "ema": "ema_decay",
        "precision": "mixed_precision",
        "batch": "batch_size",
    }

    optimizer: str = "sgd"
    """sgd, adam, adamw, or adamw8bit (its moments in 8 bits: bitsandbytes)."""
    lr: float = 0.05
    """Learning rate (its peak, where there is a schedule)."""
    momentum: float = 0.9
    """Momentum of sgd."""
    weight_decay: float = 0.0
    """L2 penalty (sgd, adam) or decoupled decay (adamw)."""
    epochs: int = 1
    """Passes over the data."""
    steps: int = 0
    """Optimizer steps; above zero it replaces `epochs`."""
    batch_size: int = 32
    """Rows of one batch; the last one of an epoch may be smaller."""
    gradient_accumulation_steps: int = 1
    """Batches of one optimizer step."""
    micro_batch_size: int = 0
    """Rows of a batch that go through the model at a time; 0: all. Less memory, the same gradient but for rounding."""
    schedule: str = "constant"
    """constant, or cosine (to zero at the last step)."""
    warmup: int = 0
    """Steps over which the learning rate rises from zero."""
    max_grad_norm: float = 0.0
    """Largest norm of the whole gradient; 0: no clipping."""
    ema_decay: float = 0.0
    """Decay of the exponential moving average that is returned instead of the last weights; 0: none."""
    mixed_precision: str = "fp32"
    """fp32, bf16 or fp16: the type of the forward pass (autocast)."""

    def __post_init__(self) -> None:
        one_of(self, optimizer=OPTIMIZERS, schedule=("constant", "cosine"), mixed_precision=("fp32", "bf16", "fp16"))
        if (
            self.batch_size < 1
            or self.gradient_accumulation_steps < 1
            or min(self.steps, self.micro_batch_size) < 0
            or (self.epochs < 1 and not self.steps)
        ):
            raise InputError(
                "batch_size, gradient_accumulation_steps and epochs must be at least 1, steps and micro_batch_size at least 0; "
                "check the training settings"
            )
        if not all(0 <= number < math.inf for number in (self.lr, self.weight_decay, self.max_grad_norm, self.warmup)):
            raise InputError(
                "lr, weight_decay, max_grad_norm and warmup must be finite and at least 0; check the training settings"
            )
        if not (0 <= self.momentum < 1 and 0 <= self.ema_decay < 1):
            raise InputError("momentum and ema_decay must be at least 0 and below 1; check the training settings")

    def count(self, n: int) -> int:
        """Optimizer steps that training on `n` rows takes."""
        if self.steps or not n:
            return self.steps
        return self.epochs * -(-n // (self.batch_size * self.gradient_accumulation_steps))

    def accumulated(self, n: int) -> float:
        """How many gradients, times `lr`, training on `n` rows adds up (‖a‖₁ of FedNova): `count(n)`, and more with momentum.

        Raises:
            InputError: the weights do not move by a fixed sum of gradients.
        """
        if self.optimizer != "sgd" or self.schedule != "constant" or self.warmup:
            raise InputError("training must be sgd at a constant lr, for its steps are counted; set optimizer and schedule so")
        velocity = total = 0.0
        for _ in range(self.count(n)):
            velocity = self.momentum * velocity + 1
            total += velocity
        return total


def _slices(batch: Table, size: int) -> list[dict[str, Tensor]]:
    return [select(batch, slice(begin, begin + size)) for begin in range(0, rows(batch), size)]


@dataclass(frozen=True)
class Stop:
    """When to stop early: `judge` measures the model after each epoch, without gradients, and lower is better."""

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
            # a tensor of fewer values than this keeps moments of 32 bits, as the library does by default
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
    """Index batches of shuffled epochs, without end."""
    while True:
        yield from torch.randperm(n, generator=rng).split(size)


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
    """Train from `start` on the rows of `data` and return the new tensors, under the names of `start`.

    `start` may name only a part of the model's state: the rest is what `ctx.task.build()` gives it (a LoRA adapter on a
    frozen base). Rows are shuffled anew each epoch from `ctx.rng`; torch's global stream is a child of it meanwhile, so
    dropout and noise drawn in a loss are named too.

    Args:
        loss: loss(model, batch) replaces the task's loss (distillation).
        penalty: penalty(parameters) is added to it (FedProx, Ditto).
        correct: correct(name, gradient) rewrites each gradient (SCAFFOLD).
        trainable: trainable(name) freezes the rest (FedPer, LoRA).
        watch: watch(step, steps, tensors), called after each optimizer step; tensors() is what would be returned now.
        draw: draw(batch) adds the random numbers that a batch's loss needs; `training.micro_batch_size` cannot change them.
        stop: ends the training early, and the tensors of the best epoch are returned.
        snapshots: where unfinished training is kept. A training of the same start, settings, data and random numbers that
            finds a snapshot goes on from it and ends with the same bytes. Dropout on a graphics card is not covered.

    Returns:
        The tensors (the moving average's where `training.ema_decay` is set), and the mean loss of the last and of the first
        epoch (or of a tenth of the steps, where `training.steps` is set), the number of steps and of rows seen; with `stop`
        also the best figure and the step it was measured at.

    Raises:
        InputError: there are no rows or nothing to train, or the loss or a weight is no longer finite.
    """
    n = rows(data)
    if not n:
        raise InputError("cannot train on no rows; check the site's training data")
    with seeded(ctx.rng, ctx.device):
        model = ctx.task.build()
        if ctx.device != "cpu":
            model.to(ctx.device)
        model.load_state_dict(dict(start), strict=False)
        model.train()
        parameters = dict(model.named_parameters())
        for name, parameter in parameters.items():
            parameter.requires_grad_(name in start and (trainable is None or trainable(name)))
        live = [parameter for parameter in parameters.values() if parameter.requires_grad]
        if not live:
            raise InputError("nothing to train: the model has no tensor of the part that is asked for; choose a model that has")
        optimizer, objective = _optimizer(training, live), loss or ctx.task.loss
        steps = training.count(n)
        tail = -(-n // (training.batch_size * training.gradient_accumulation_steps)) if not training.steps else -(-steps // 10)
        average = {name: p.detach().clone() for name, p in parameters.items() if p.requires_grad} if training.ema_decay else {}
        kind = torch.device(ctx.device).type
        half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(training.mixed_precision)
        autocast = torch.autocast(kind, half) if half else nullcontext()
        scaler = torch.amp.GradScaler(kind, enabled=training.mixed_precision == "fp16")
        varying = training.warmup > 0 or training.schedule != "constant"
        # in one piece: a small tensor for each step would lie between what the next steps free and take, and split it
        losses, counts = (
            torch.zeros(steps * training.gradient_accumulation_steps, dtype=torch.float64, device=ctx.device),
            list[int](),
        )
        best, best_step, found = dict[str, Tensor](), 0, math.inf
        key = _key(ctx.rng, start, training, data, snapshots.of) if snapshots else ""
        batches = _batches(n, training.batch_size, ctx.rng)
        resident = sum(column.nbytes for column in data.values()) <= _RESIDENT
        if resident:
            data = to(data, ctx.device)

        def tensors() -> dict[str, Tensor]:
            state = model.state_dict() | average
            return {name: state[name].detach().to("cpu", copy=True) for name in start}

        def judged(stop: Stop) -> float:
            _exchange(parameters, average)
            model.eval()
            with torch.no_grad(), autocast:
                figure = stop.judge(model)
            model.train()
            _exchange(parameters, average)
            return figure

        first = 0
        if snapshots and (kept := snapshots.load(key)):
            model.load_state_dict(kept("model"), strict=False)
            load_optimizer_state(optimizer, kept("optimizer"))
            scaler.load_state_dict({name: value.item() for name, value in kept("scaler").items()})
            average, best, log = to(kept("average"), ctx.device), kept("best"), kept("log")
            (first, best_step), found = log["steps"].tolist(), log["found"].item()
            counts = log["counts"].tolist()
            losses[: len(counts)] = log["losses"].to(ctx.device)
            for _ in range(first * training.gradient_accumulation_steps):
                next(batches)
            torch.default_generator.set_state(log["rng"])

        for step in range(first, steps):
            if varying:
                for group in optimizer.param_groups:
                    group["lr"] = _rate(training, step, steps)
            for parameter in live:  # optimizer.zero_grad() without its profiler's record: a tenth of a small step
                parameter.grad = None
            for _ in range(training.gradient_accumulation_steps):
                batch = select(data, next(batches))
                if not resident:
                    batch = to(batch, ctx.device)
                batch = dict(draw(batch)) if draw else batch
                count, values = rows(batch), []
                for part in (
                    [batch] if count <= (training.micro_batch_size or count) else _slices(batch, training.micro_batch_size)
                ):
                    with autocast:
                        value = objective(model, part)
                        full = value + penalty(parameters) if penalty else value
                    fraction = training.gradient_accumulation_steps * count / rows(part)
                    scaler.scale(full / fraction if fraction != 1 else full).backward()
                    values.append(value.detach() * (rows(part) / count) if rows(part) < count else value.detach())
                losses[len(counts)] = sum(values[1:], start=values[0])
                counts.append(count)
            scaler.unscale_(optimizer)
            if correct:
                for name, parameter in parameters.items():
                    if parameter.grad is not None:
                        parameter.grad = correct(name, parameter.grad)
            if training.max_grad_norm:
                torch.nn.utils.clip_grad_norm_(live, training.max_grad_norm)
            scaler.step(optimizer)
            scaler.update()
            for name, smooth in average.items():
                # a short memory at first, so that the start does not linger in a short training
                decay = min(training.ema_decay, (1 + step) / (10 + step))
                smooth.lerp_(parameters[name].detach(), 1 - decay)
            if watch:
                watch(step + 1, steps, tensors)
            if stop and ((step + 1) % tail == 0 or step + 1 == steps):
                if (figure := judged(stop)) < found:
                    best, best_step, found = tensors(), step + 1, figure
                elif step + 1 - best_step >= stop.patience * tail:
                    break
            if snapshots and (step + 1) % snapshots.every == 0:
                log = {
                    "steps": torch.tensor([step + 1, best_step]),
                    "found": torch.tensor(found, dtype=torch.float64),
                    "losses": losses[: len(counts)].clone(),
                    "counts": torch.tensor(counts),
                    "rng": torch.default_generator.get_state(),
                }
                scale = {name: torch.as_tensor(value) for name, value in scaler.state_dict().items()}
                state = {name: value for name, value in model.state_dict().items() if name in start}
                snapshots.save(
                    key, model=state, optimizer=optimizer_state(optimizer), average=average, best=best, log=log, scaler=scale
                )
            ctx.progress("train", step + 1, steps)

    window = tail * training.gradient_accumulation_steps
    info = {"steps": len(counts) / training.gradient_accumulation_steps, "samples": float(sum(counts))}
    result = best or tensors()
    if stop:
        info |= {"judged": found, "best_step": float(best_step)}
    if counts:
        losses, weights = losses[: len(counts)].cpu(), torch.tensor(counts, dtype=torch.float64)
        info |= {"loss": _mean(losses[-window:], weights[-window:]), "first_loss": _mean(losses[:window], weights[:window])}
        # one sum tells whether any term is not finite
        if not all(math.isfinite(value.sum()) for value in (losses, *result.values())):
            raise InputError(
                f"training diverged: loss or weights not finite after {steps} steps; "
                f"lower lr (now {training.lr}) or set max_grad_norm"
            )
    return result, info


def _key(rng: torch.Generator, start: Tensors, training: Training, data: Table, of: str) -> str:
    """Names a training by all that it is made of."""
    text = repr((sha256(start), training, sha256(data), sha256({"rng": rng.get_state()}), of))
    return hashlib.sha256(text.encode()).hexdigest()


def _exchange(parameters: dict[str, nn.Parameter], average: dict[str, Tensor]) -> None:
    """Put the moving average in the place of the weights; a second time, and all is as it was."""
    for name, smooth in average.items():
        weight = parameters[name].data
        parameters[name].data, average[name] = smooth, weight


def _mean(values: Tensor, weights: Tensor) -> float:
    return float((values * weights).sum() / weights.sum())


def proximal(anchor: Tensors, mu: float) -> Penalty:
    """mu/2·||w - anchor||², over parameters (buffers are not trained)."""

    def penalty(parameters: Tensors) -> Tensor:
        live = [(p, anchor[name].to(p.device)) for name, p in parameters.items() if p.requires_grad]
        return mu / 2 * torch.stack([((p - a) ** 2).sum() for p, a in live]).sum()

    return penalty


def minibatches(ctx: C, training: Training, data: Table) -> Iterator[tuple[C, Table]]:
    """The batches that `fit` would train on, in its order, for methods that solve a problem of their own on each of them.

    Yields:
        A context for that problem (its random stream is one for all of them, and not that of the order), and the rows.
    """
    if not rows(data):
        raise InputError("cannot train on no rows; check the site's training data")
    inner: Any = replace(ctx, rng=spawn(ctx.rng))  # type: ignore[type-var]
    order = _batches(rows(data), training.batch_size, ctx.rng)
    for _ in range(training.count(rows(data))):
        yield inner, select(data, torch.cat([next(order) for _ in range(training.gradient_accumulation_steps)]))


def at(model: nn.Module, weights: Tensors) -> Any:
    """The model with these weights in the place of its own, to be called as it is; gradients flow to the weights."""
    return lambda *inputs: functional_call(model, dict(weights), inputs)
