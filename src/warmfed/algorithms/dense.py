"""DENSE, data-free one-shot federated learning. Zhang et al., NeurIPS 2022, arXiv:2112.12371, Algorithm 1.

The sites send their trained models once. The server trains a generator whose images the mean of these models (the ensemble)
recognises and on which the global model (the student) disagrees with it, and distils the ensemble into the student on them.
Departures: the networks here have no BatchNorm, so there is no loss of its statistics; the generator is smaller (0.2 M
parameters at 32×32) and sees the label beside the noise; its images go to a pool that grows, as in the authors' code (where it
also begins anew in each epoch), here in 8 bits. Sizes are ours: 12 epochs of 20 generator steps on 64 images (the paper: 200 of
30 on 128), local training of 25 epochs (200). More than one round is the paper's extension: sites go on from the student.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core import ClientContext, Metrics, Replies, Reply, ServerContext, classifier
from ..core.rng import seeded, spawn
from ..core.tensors import Table, Tensors, join
from ..fit import Loss, Training, fit, solving
from ..models import initial
from ..utils.errors import InputError
from .shared.base import Model, Rounds, average, upload
from .shared.distillation import divergence


class Imagination(nn.Module):
    """Draws images from noise and labels: a hidden map of a quarter of the size, enlarged twice."""

    def __init__(self, shape: tuple[int, int, int], classes: int, noise: int, width: int = 32) -> None:
        super().__init__()
        channels, height, breadth = shape
        self.classes, self.noise = classes, noise
        self.hidden = (width, -(-height // 4), -(-breadth // 4))
        self.begin = nn.Linear(noise + classes, self.hidden[0] * self.hidden[1] * self.hidden[2])
        self.draw = nn.Sequential(
            nn.GroupNorm(8, width),
            nn.Upsample(size=(-(-height // 2), -(-breadth // 2))),
            nn.Conv2d(width, width, 3, padding=1),
            nn.GroupNorm(8, width),
            nn.LeakyReLU(0.2),
            nn.Upsample(size=(height, breadth)),
            nn.Conv2d(width, width, 3, padding=1),
            nn.GroupNorm(8, width),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width, channels, 3, padding=1),
            nn.Tanh(),
        )

    def forward(self, label: Tensor) -> Tensor:
        """Images, float [n, c, h, w] in [-1, 1]; the noise comes from torch's global stream."""
        noise = torch.randn(len(label), self.noise).to(label.device)
        begun = self.begin(torch.cat([noise, F.one_hot(label, self.classes).float()], 1))
        found: Tensor = self.draw(begun.view(-1, *self.hidden))
        return found


class Ensemble(nn.Module):
    """The mean of the models' logits."""

    def __init__(self, models: Sequence[nn.Module]) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)

    def forward(self, image: Tensor) -> Tensor:
        return torch.stack([model(image) for model in self.models]).mean(0)


def frozen(ctx: ServerContext, tensors: Tensors) -> nn.Module:
    """The task's model with these weights, to be asked and not to be trained."""
    model = ctx.task.build().eval().requires_grad_(False)
    model.load_state_dict(dict(tensors))
    return model.to(ctx.device)


@dataclass(frozen=True)
class _Drawing:
    """The task of the generator: what the ensemble recognises and the student does not."""

    shape: tuple[int, int, int]
    classes: int
    noise: int
    disagreement: float
    ensemble: nn.Module
    student: nn.Module

    def build(self) -> Imagination:
        return Imagination(self.shape, self.classes, self.noise)

    def loss(self, model: nn.Module, batch: Table) -> Tensor:
        image = model(batch["label"])
        teacher, student = self.ensemble(image), self.student(image)
        apart = (teacher.argmax(1) != student.argmax(1)).float()  # ω: where they decide differently
        far = F.kl_div(student.log_softmax(1), teacher.log_softmax(1), reduction="none", log_target=True).sum(1)
        found: Tensor = F.cross_entropy(teacher, batch["label"]) - self.disagreement * (apart * far).mean()
        return found


@final
@dataclass(frozen=True)
class DENSE(Rounds[Model, Model, None, Model]):
    """One-shot: the sites' models are distilled into one on images that a generator makes up from them."""

    rounds: int = 1
    """Rounds of local training and distillation; 1 is one-shot."""
    local: Training = Training(lr=0.02, epochs=25, max_grad_norm=1.0)
    """A site's training in one round: in one round as much as others have in five."""
    epochs: int = 12
    """E: how often generator and student take turns."""
    drawing: Training = Training(optimizer="adam", lr=2e-3, steps=20, batch_size=64)
    """The generator's training in one turn: T_G is `steps`."""
    images: int = 64
    """Images that each turn adds to the pool."""
    noise: int = 64
    """Width of the generator's noise z."""
    disagreement: float = 1.0
    """λ_2, weight of the student's disagreement in the generator's loss."""
    distillation: Training = Training(lr=0.01, epochs=2, batch_size=64, max_grad_norm=1.0)
    """The student's training on the pool in one turn."""
    temperature: float = 1.0
    """T of the distillation."""
    student: str = "average"
    """What the student starts from: the mean of the sites' models, or the server's own (random weights; the paper's)."""

    def __post_init__(self) -> None:
        if self.student not in ("average", "own"):
            raise InputError(f"student must be average or own; got {self.student!r}")
        if min(self.epochs, self.images, self.noise) < 1:
            raise InputError("epochs, images and noise must be at least 1; check [algorithm]")

    def train(self, received: Model, state: None, ctx: ClientContext) -> Reply[Model]:
        model, metrics = fit(ctx, received.model, self.local, ctx.data["train"])
        return upload(model, state, ctx, metrics)

    def aggregate(self, server: Model, replies: Replies[Model], ctx: ServerContext) -> tuple[Model, Metrics]:
        student = average(replies) if self.student == "average" else server.model
        ensemble = Ensemble([frozen(ctx, reply.message.model) for reply in replies.values()])
        with seeded(ctx.rng):
            generator: Tensors = initial(Imagination(ctx.task.shape, ctx.task.classes, self.noise))
        pool, drawn, learned = list[Table](), dict[str, float](), dict[str, float]()
        for turn in range(self.epochs):
            task = self.task(ctx, ensemble, student)
            label = torch.arange(self.images) % ctx.task.classes
            generator, drawn = fit(solving(ctx, task), generator, self.drawing, {"label": label})
            pool.append(self.imagine(ctx, task, generator, label))
            student, learned = fit(ctx, student, self.distillation, join(pool), loss=self.distil(ctx))
            ctx.progress("distil", turn + 1, self.epochs)
        right = join(pool)["right"].double().mean().item()
        return Model(student), {"generator_loss": drawn["loss"], "distillation_loss": learned["loss"], "recognised": right}

    def task(self, ctx: ServerContext, ensemble: nn.Module, student: Tensors) -> _Drawing:
        shape, classes = ctx.task.shape, ctx.task.classes
        return _Drawing(shape, classes, self.noise, self.disagreement, ensemble, frozen(ctx, student))

    def imagine(self, ctx: ServerContext, task: _Drawing, generator: Tensors, label: Tensor) -> Table:
        """Images of the generator in 8 bits, the ensemble's logits for them, and whether it recognises their labels."""
        net = task.build().eval().to(ctx.device)
        net.load_state_dict(dict(generator))
        with seeded(spawn(ctx.rng), ctx.device), torch.no_grad():
            image = net(label.to(ctx.device)).add(1).mul(127.5).round().to(torch.uint8)
            logits = classifier(ctx).logits(task.ensemble, {"image": image}).cpu()
        return {"image": image.cpu(), "logits": logits, "right": logits.argmax(1) == label}

    def distil(self, ctx: ServerContext) -> Loss:
        """KL(ensemble ‖ student) on the pool."""

        def loss(model: nn.Module, batch: Table) -> Tensor:
            return divergence(classifier(ctx).logits(model, batch), batch["logits"], self.temperature)

        return loss
