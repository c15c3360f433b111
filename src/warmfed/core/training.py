"""The settings of a training: the optimizer, and how long."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from ..utils.errors import InputError
from ..utils.settings import check_choices


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

    optimizer: Literal["sgd", "adam", "adamw", "adamw8bit"] = "sgd"
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
    schedule: Literal["constant", "cosine"] = "constant"
    """constant, or cosine (to zero at the last step)."""
    warmup: int = 0
    """Steps over which the learning rate rises from zero."""
    max_grad_norm: float = 0.0
    """Largest norm of the whole gradient; 0: no clipping."""
    ema_decay: float = 0.0
    """Decay of the exponential moving average that is returned instead of the last weights; 0: none."""
    mixed_precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """fp32, bf16 or fp16: the type of the forward pass (autocast)."""

    def __post_init__(self) -> None:
        check_choices(self)
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
