"""DENSE: one-shot, data-free distillation of the sites' models.

Zhang et al., "DENSE: Data-Free One-Shot Federated Learning", NeurIPS 2022, arXiv:2112.12371, Algorithm 1.

The sites send their trained models once. The server trains a generator. The mean of the sites' models (the ensemble)
classifies its images with confidence, and the global model (the student) disagrees with the ensemble on them. The server then
distils the ensemble into the student on these images. More than one round is the paper's extension: sites continue from
the student.

Departures: there is no loss on BatchNorm statistics, since the networks here have no BatchNorm. The generator is smaller
(0.2 M parameters at 32×32) and is conditioned on the label. Its images go to a growing pool, as in the authors' code, here
in 8 bits. The generator is kept between epochs; the authors' code re-initialises it. Sizes are ours: 12 epochs of 20
generator steps on 64 images (the paper: 200 of 30 on 128), and 25 local epochs (200).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core import ClientContext, Metrics, Replies, Reply, ServerContext, Workload, classifier
from ..core.rng import seeded, spawn
from ..core.tensors import Table, Tensors, join
from ..core.training import Training
from ..fit import Loss, fit, solving
from ..models import initial
from ..utils.errors import InputError
from ..utils.settings import check_choices
from .shared.base import Model, Rounds, average, upload
from .shared.distillation import divergence


class Imagination(nn.Module):
    """Generator of images from noise and labels: a hidden map of a quarter of the image's size, upsampled twice."""

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
        """Return images, float [n, c, h, w] in [-1, 1]; the noise comes from torch's global random stream."""
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
    """Return the task's model with these weights, in evaluation mode and without gradients."""
    model = ctx.task.build().eval().requires_grad_(False)
    model.load_state_dict(dict(tensors))
    return model.to(ctx.device)


@dataclass(frozen=True)
class _Drawing:
    """Task of the generator: images that the ensemble classifies with confidence and on which the student disagrees."""

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
        apart = (teacher.argmax(1) != student.argmax(1)).float()  # ω: 1 if their predictions differ
        far = F.kl_div(student.log_softmax(1), teacher.log_softmax(1), reduction="none", log_target=True).sum(1)
        found: Tensor = F.cross_entropy(teacher, batch["label"]) - self.disagreement * (apart * far).mean()
        return found


@final
@dataclass(frozen=True)
class DENSE(Rounds[Model, Model, None, Model]):
    """Distil the sites' models into one, on images of a generator that is trained from these models."""

    rounds: int = 1
    """Rounds of local training and distillation; 1: one-shot."""
    local: Training = Training(lr=0.02, epochs=25, max_grad_norm=1.0)
    """Local training in one round; the default has as many epochs as five rounds of the other methods."""
    epochs: int = 12
    """Epochs E of generator and student training; at least 1."""
    drawing: Training = Training(optimizer="adam", lr=2e-3, steps=20, batch_size=64)
    """Training of the generator in one epoch; T_G is `steps`."""
    images: int = 64
    """Images added to the pool in one epoch; at least 1."""
    noise: int = 64
    """Width of the generator's noise z; at least 1."""
    disagreement: float = 1.0
    """Weight λ_2 of the student's disagreement in the generator's loss."""
    distillation: Training = Training(lr=0.01, epochs=2, batch_size=64, max_grad_norm=1.0)
    """Training of the student on the pool in one epoch."""
    temperature: float = 1.0
    """Temperature T of the distillation."""
    student: Literal["average", "own"] = "average"
    """Initial student: average (mean of the sites' models) or own (the server's random weights, as in the paper)."""

    def further_work(self, rows: Mapping[str, int], pairs: int) -> tuple[Workload, ...]:
        # the pool of images grows with each turn
        steps = sum(self.distillation.count(self.images * (turn + 1)) for turn in range(self.epochs))
        return (
            Workload(
                "images of the ensemble", "server", self.rounds * self.epochs * self.drawing.count(self.images), self.drawing
            ),
            Workload("distillation", "server", self.rounds * steps, self.distillation),
        )

    def __post_init__(self) -> None:
        check_choices(self)
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
        """Return generated images in 8 bits, the ensemble's logits for them, and whether its prediction is their label."""
        net = task.build().eval().to(ctx.device)
        net.load_state_dict(dict(generator))
        with seeded(spawn(ctx.rng), ctx.device), torch.no_grad():
            image = net(label.to(ctx.device)).add(1).mul(127.5).round().to(torch.uint8)
            logits = classifier(ctx).logits(task.ensemble, {"image": image}).cpu()
        return {"image": image.cpu(), "logits": logits, "right": logits.argmax(1) == label}

    def distil(self, ctx: ServerContext) -> Loss:
        """Return the loss KL(ensemble ‖ student) on the pool."""

        def loss(model: nn.Module, batch: Table) -> Tensor:
            return divergence(classifier(ctx).logits(model, batch), batch["logits"], self.temperature)

        return loss
