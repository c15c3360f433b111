"""The settings of a training: the optimizer, and how long."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from ..utils.errors import InputError
from ..utils.settings import check_choices


@dataclass(frozen=True)
class Training:
    """Settings of training: optimizer, learning rate and length."""

    RENAMED: ClassVar[Mapping[str, str]] = {
        "micro": "micro_batch_size",
        "accumulate": "gradient_accumulation_steps",
        "clip": "max_grad_norm",
        "ema": "ema_decay",
        "precision": "mixed_precision",
        "batch": "batch_size",
    }

    optimizer: Literal["sgd", "adam", "adamw", "adamw8bit"] = "sgd"
    """Optimizer: sgd (default), adam, adamw, or adamw8bit (8-bit optimizer state, from bitsandbytes)."""
    lr: float = 0.05
    """Learning rate; with a schedule, its peak. Default 0.05."""
    momentum: float = 0.9
    """Momentum of sgd, from 0 to below 1. Default 0.9."""
    weight_decay: float = 0.0
    """L2 penalty (sgd, adam) or decoupled decay (adamw). Default 0."""
    epochs: int = 1
    """Passes over the data. Default 1."""
    steps: int = 0
    """Optimizer steps; a value above 0 replaces `epochs`. Default 0."""
    batch_size: int = 32
    """Rows of a batch; the last batch of an epoch may be smaller. Default 32."""
    gradient_accumulation_steps: int = 1
    """Batches of one optimizer step. Default 1."""
    micro_batch_size: int = 0
    """Rows of one forward pass; smaller values need less memory and give the same gradient up to rounding. Default 0: all."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Schedule of the learning rate: constant (default), or cosine (to zero at the last step)."""
    warmup: int = 0
    """Steps over which the learning rate rises from zero. Default 0."""
    max_grad_norm: float = 0.0
    """Largest norm of the gradient of all parameters. Default 0: no clipping."""
    ema_decay: float = 0.0
    """Decay of the exponential moving average of the weights, which is returned instead of them. Default 0: no average."""
    mixed_precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Type of the forward pass (autocast): fp32 (default), bf16 or fp16."""

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
        """Return the number of optimizer steps of a training on `n` rows."""
        if self.steps or not n:
            return self.steps
        return self.epochs * -(-n // (self.batch_size * self.gradient_accumulation_steps))

    def accumulated(self, n: int) -> float:
        """Return ‖a‖₁ of FedNova: the sum of gradient weights, in units of `lr`, of a training on `n` rows.

        Without momentum it is `count(n)`.

        Raises:
            InputError: The optimizer is not sgd, or `lr` is not constant.
        """
        if self.optimizer != "sgd" or self.schedule != "constant" or self.warmup:
            raise InputError(
                "the algorithm needs sgd with a constant lr; "
                f"got optimizer {self.optimizer}, schedule {self.schedule}, warmup {self.warmup}; "
                "set optimizer to sgd, schedule to constant and warmup to 0"
            )
        velocity = total = 0.0
        for _ in range(self.count(n)):
            velocity = self.momentum * velocity + 1
            total += velocity
        return total
