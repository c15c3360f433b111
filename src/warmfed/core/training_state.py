"""State that a training step changes; a snapshot holds exactly these fields."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .tensors import Tensors, to
from .training_snapshot import load_optimizer_state, optimizer_state


@dataclass
class TrainState:
    """State of a training between two steps."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    average: dict[str, Tensor]
    """Moving averages of the trainable weights; empty if there are none."""
    losses: Tensor
    """Loss of each batch so far, float64 [all batches of the training]."""
    counts: list[int] = field(default_factory=list)
    """Rows of each batch so far."""
    step: int = 0
    """Optimizer steps done."""
    best: dict[str, Tensor] = field(default_factory=dict)
    """Tensors of the epoch with the best figure; empty before the first evaluation."""
    best_step: int = 0
    best_figure: float = math.inf

    def record(self, loss: Tensor, count: int) -> None:
        """Record the loss of a batch of `count` rows."""
        self.losses[len(self.counts)] = loss
        self.counts.append(count)

    def tensors(self, names: Tensors) -> dict[str, Tensor]:
        """Return the current result of the training: the tensors of these names, copied to the CPU."""
        state = self.model.state_dict() | self.average
        return {name: state[name].detach().to("cpu", copy=True) for name in names}

    def state_dict(self, names: Tensors) -> dict[str, Tensors]:
        """Return the state as named tensors, by part; of the model, only the tensors of these names.

        It includes the state of torch's global random stream, which dropout uses.
        """
        log = {
            "steps": torch.tensor([self.step, self.best_step]),
            "found": torch.tensor(self.best_figure, dtype=torch.float64),
            "losses": self.losses[: len(self.counts)].clone(),
            "counts": torch.tensor(self.counts),
            "rng": torch.default_generator.get_state(),
        }
        return {
            "model": {name: value for name, value in self.model.state_dict().items() if name in names},
            "optimizer": optimizer_state(self.optimizer),
            "scaler": {name: torch.as_tensor(value) for name, value in self.scaler.state_dict().items()},
            "average": self.average,
            "best": self.best,
            "log": log,
        }

    def load_state_dict(self, part: Callable[[str], dict[str, Tensor]], device: str) -> None:
        """Restore the state that `state_dict` returned; part(name) returns one part of it."""
        self.model.load_state_dict(part("model"), strict=False)
        load_optimizer_state(self.optimizer, part("optimizer"))
        self.scaler.load_state_dict({name: value.item() for name, value in part("scaler").items()})
        self.average, self.best, log = to(part("average"), device), part("best"), part("log")
        (self.step, self.best_step), self.best_figure = log["steps"].tolist(), log["found"].item()
        self.counts = log["counts"].tolist()
        self.losses[: len(self.counts)] = log["losses"].to(device)
        torch.default_generator.set_state(log["rng"])
