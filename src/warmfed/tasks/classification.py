"""Image classification: cross-entropy, and the figures that reports show."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor, nn

from .. import models
from ..core.rng import seeded
from ..core.tensors import Table, Tensors
from ..metrics.classification import measure
from ..utils.errors import InputError
from ..utils.files import read_bytes


def pixels(image: Tensor) -> Tensor:
    """Float [n, c, h, w] in [-1, 1], of uint8 images of that shape, in one layout: last bits depend on it."""
    return image.contiguous().float().div_(127.5).sub_(1)


def load_model(path: Path, like: Tensors | Callable[[Tensors], Tensors], what: str, *, datastore: bool = False) -> Tensors:
    """The weights in a safetensors file, checked against a model's names and shapes; raises `InputError`.

    Args:
        like: that model, or what gives it for the weights that were found (they may be of a pruned network).
        datastore: whether there may be one beside the weights (`models.Remembering`).
    """
    try:
        found = load(read_bytes(path, what))
    except SafetensorError as error:
        raise InputError(f"{what} at {path} is damaged or no safetensors file ({error}); restore it") from error
    like = like(found) if callable(like) else like
    weights = {name for name in found if not (datastore and name.startswith(models.DATASTORE))}
    for name in sorted(like.keys() | weights):
        if name not in found or name not in like or found[name].shape != like[name].shape:
            raise InputError(
                f"{what} at {path} does not fit the model: tensor {name!r} differs; choose the model it was made with"
            )
    return found


@dataclass(frozen=True)
class Classify:
    """Classification of uint8 images [n, c, h, w] into `classes` classes (a `Task`)."""

    shape: tuple[int, int, int]
    classes: int
    model: str = "cnn"
    start: str = ""
    """A safetensors file that the model starts from; empty: random weights.

    Where its head has another number of classes, the body is taken, and the head is drawn."""

    @property
    def measure(self) -> str:
        """The metric that sums up a model."""
        return "accuracy"

    def tables(self, splits: Mapping[str, Table]) -> Mapping[str, Table]:
        """A site's tables as this task takes them: as they are."""
        return splits

    def fitting(self, model: Tensors) -> "Classify":
        """This task: its networks have one width."""
        return self

    def probe(self, image: Tensor) -> None:
        """Raise RuntimeError where the model does not take such images."""
        self.predict(self.init(torch.Generator()), {"image": image})

    def build(self) -> nn.Module:
        return models.build(self.model, self.shape, self.classes)

    def init(self, rng: torch.Generator) -> Tensors:
        with seeded(rng):
            fresh = models.initial(self.build())
        return self.lent(fresh, Path(self.start), "the classifier to start from") if self.start else fresh

    def lent(self, fresh: Tensors, path: Path, what: str) -> Tensors:
        """The weights in a safetensors file; of a classifier of other classes the body only, with the head of `fresh`.

        Raises `InputError` as `load_model` does.
        """
        has_body = any(not name.startswith("head.") for name in fresh)

        def like(found: Tensors) -> Tensors:
            """The shapes of a network of this model with as many classes as are found."""
            rows = len(found["head.weight"]) if "head.weight" in found and has_body else self.classes
            with torch.device("meta"):
                return models.initial(replace(self, classes=rows).build())

        found = load_model(path, like, what)
        return {**found, **{name: value for name, value in fresh.items() if value.shape != found[name].shape}}

    @classmethod
    def of(cls, path: Path, shape: tuple[int, int, int], what: str) -> tuple["Classify", Tensors]:
        """The classifier in a safetensors file: the names of its tensors tell the network, its head the number of classes.

        Raises `InputError` where it is none of `warmfed.models`, or not for images of this shape.
        """
        tasks: list[Classify] = []

        def like(found: Tensors) -> Tensors:
            name = models.named_by(found)
            if name is None:
                raise InputError(
                    f"{what} at {path} holds none of the networks {', '.join(models.MODELS)}; its tensors are "
                    f"{', '.join(sorted(found)[:4])}, …"
                )
            tasks.append(cls(shape, len(found["head.weight"]), name))
            with torch.device("meta"):
                return models.initial(tasks[0].build())

        found = load_model(path, like, what)
        return tasks[0], found

    def logits(self, model: nn.Module, batch: Table) -> Tensor:
        return model(pixels(batch["image"]))

    def embed(self, model: Any, batch: Table) -> Tensor:
        """What the model's head sees, float [n, width]: a loss on features is between this and `model.head`."""
        return model.features(pixels(batch["image"]))

    def loss(self, model: nn.Module, batch: Table) -> Tensor:
        """Cross-entropy with the labels; a column "target", float [n, classes], stands for them where there is one."""
        return F.cross_entropy(self.logits(model, batch), batch.get("target", batch["label"]))

    def predict(self, model: Tensors, data: Table, batch: int = 256, device: str = "cpu") -> Tensor:
        """Logits, float [n, classes]."""
        return self._asked(self.logits, model, data, batch, device)

    def features(self, model: Tensors, data: Table, batch: int = 256, device: str = "cpu") -> Tensor:
        """What the model's head sees, float [n, width]."""
        return self._asked(self.embed, model, data, batch, device)

    def _asked(self, ask: Callable[[Any, Table], Tensor], model: Tensors, data: Table, batch: int, device: str) -> Tensor:
        net = models.holding(self.build(), model).to(device)
        with torch.inference_mode():
            return torch.cat([ask(net, {"image": part.to(device)}).cpu() for part in data["image"].split(batch)])

    def metrics(self, model: Tensors, data: Table, device: str = "cpu") -> dict[str, float]:
        return measure(self.predict(model, data, device=device), data["label"])
