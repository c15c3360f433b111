"""Self-distillation from a site's past models: static (pFedSD) and dynamic (WarmFed)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core import ClientContext, classifier
from ...core.rng import seeded
from ...core.tensors import Table, Tensors, add_prefix, rows, strip_prefix
from ...core.training import Training
from ...fit import fit, solving


@dataclass(frozen=True)
class Distillation:
    """Settings of self-distillation."""

    weight: float = 1.0
    """Weight λ of the distillation loss; 0: none."""
    temperature: float = 3.0
    """Temperature T of teacher and student."""
    hidden: int = 64
    """Width of the selector's hidden layer."""
    tau_first: float = 1.0
    """Initial temperature τ_0 of the Gumbel-softmax."""
    tau_last: float = 0.1
    """Final temperature τ; τ_t falls geometrically with each optimizer step of the whole run."""
    selector_lr: float = 0.1
    """Learning rate of the selector, as a multiple of the student's."""


def divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return T²·KL(softmax(teacher/T) ‖ softmax(student/T)), mean over rows; logits are float [n, classes]."""
    return temperature**2 * F.kl_div(
        F.log_softmax(student / temperature, -1),
        F.log_softmax(teacher / temperature, -1),
        reduction="batchmean",
        log_target=True,
    )


def distilled(
    ctx: ClientContext, start: Tensors, training: Training, teacher: Tensors | None, settings: Distillation
) -> tuple[Tensors, dict[str, float]]:
    """Train from `start` with cross-entropy and the distillation loss of one teacher (pFedSD).

    The teacher's logits are computed once per row, in 32 bits, since they do not change during the training.

    Args:
        teacher: None: cross-entropy alone.

    Returns:
        The student and its metrics.
    """
    data = ctx.data["train"]
    if teacher is None or settings.weight == 0:
        return fit(ctx, start, training, data)

    def loss(student: nn.Module, batch: Table) -> Tensor:
        logits = classifier(ctx).logits(student, batch)
        far = divergence(logits, batch["wanted"], settings.temperature)
        return F.cross_entropy(logits, batch["label"]) + settings.weight * far

    return fit(ctx, start, training, {**data, "wanted": classifier(ctx).predict(teacher, data, device=ctx.device)}, loss=loss)


class _Pair(nn.Module):
    """Student and selector as one module for one training loop; their losses share no gradient."""

    def __init__(self, student: nn.Module, selector: nn.Module) -> None:
        super().__init__()
        self.student, self.selector = student, selector


class _Selecting:
    """Task of dynamic self-distillation: a selector chooses, for each row, the past model that is its teacher."""

    def __init__(self, task: Any, teachers: int, settings: Distillation, done: int, planned: int) -> None:
        self.task, self.teachers, self.settings, self.done, self.planned = task, teachers, settings, done, max(planned, 1)
        self.seen: list[dict[str, Tensor]] = []

    def stepped(self, step: int, steps: int, tensors: object) -> None:
        """Count an optimizer step, on which τ_t depends; micro-batches do not count."""
        self.done += 1

    def noised(self, batch: Table) -> Table:
        """Return the batch with a Gumbel variable for each row and teacher."""
        shape = rows(batch), self.teachers
        return {**batch, "gumbel": -torch.empty(shape, device=batch["label"].device).exponential_().log()}

    def selector(self) -> nn.Module:
        inputs, hidden = self.teachers * self.task.classes, self.settings.hidden
        return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, self.teachers))

    def build(self) -> nn.Module:
        return _Pair(self.task.build(), self.selector())

    def tau(self) -> float:
        share = min(1.0, self.done / self.planned)
        found: float = self.settings.tau_first * (self.settings.tau_last / self.settings.tau_first) ** share  # τ_t
        return found

    def loss(self, model: Any, batch: Table) -> Tensor:
        pool = batch["pool"]  # z^(1), z^(2)
        # Probabilities instead of logits: their range does not grow over the rounds.
        score = model.selector(pool.softmax(-1).flatten(1))  # s_i
        soft = ((score + batch["gumbel"]) / self.tau()).softmax(-1)
        mask = F.one_hot(soft.argmax(-1), soft.shape[1]) - soft.detach() + soft  # W_t^n, one-hot, with the gradient of `soft`
        teacher = (mask.unsqueeze(-1) * pool).sum(1)  # z̄_i
        logits = self.task.logits(model.student, batch)
        student = F.cross_entropy(logits, batch["label"])
        student = student + self.settings.weight * divergence(logits, teacher.detach(), self.settings.temperature)
        selection = F.cross_entropy(teacher, batch["label"])  # L_select(ψ): rewards the more informative past model
        share = score.detach().softmax(-1)
        self.seen.append(
            {
                "selector_share_recent": mask.detach()[:, 0].mean(),
                "selector_entropy": -(share * share.clamp_min(1e-12).log()).sum(-1).mean(),
                "selection_loss": selection.detach(),
            }
        )
        return student + self.settings.selector_lr * selection

    def metrics(self) -> dict[str, float]:
        means = {name: torch.stack([step[name] for step in self.seen]).double().mean().item() for name in self.seen[0]}
        older = 1 - means["selector_share_recent"]
        return {**means, "selector_share_older": older, "selector_temperature": self.tau()}


def dynamic(
    ctx: ClientContext,
    start: Tensors,
    training: Training,
    teachers: Sequence[Tensors],
    selector: Mapping[str, Tensor] | None,
    settings: Distillation,
    done: int,
    planned: int,
) -> tuple[Tensors, Tensors, dict[str, float]]:
    """Train a student and a selector by dynamic self-distillation from two past models, the recent one first.

    Args:
        selector: its weights after an earlier round; None: random ones.
        done, planned: optimizer steps of distillation before this call, and in the whole run; τ_t depends on them.
        training: its `max_grad_norm` bounds the joint gradient of student and selector.

    Returns:
        The student, the selector, and their metrics.
    """
    data = ctx.data["train"]
    pool = torch.stack([classifier(ctx).predict(teacher, data, device=ctx.device) for teacher in teachers], 1)
    task = _Selecting(ctx.task, len(teachers), settings, done, planned)
    if selector is None:
        with seeded(ctx.rng):
            selector = {name: value.detach().clone() for name, value in task.selector().state_dict().items()}
    pair = add_prefix(start, "student.") | add_prefix(selector, "selector.")
    table = {**data, "pool": pool}
    tensors, info = fit(solving(ctx, task), pair, training, table, watch=task.stepped, draw=task.noised)
    return strip_prefix(tensors, "student."), strip_prefix(tensors, "selector."), info | task.metrics()
