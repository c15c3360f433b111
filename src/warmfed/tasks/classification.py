"""Image classification: cross-entropy loss and the metrics of the report."""

from collections.abc import Callable, Collection, Mapping
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
    """Return uint8 images [n, c, h, w] as float [n, c, h, w] in [-1, 1].

    The result is contiguous, since the memory layout changes the last bits of a convolution.
    """
    return image.contiguous().float().div_(127.5).sub_(1)


def load_model(path: Path, like: Tensors | Callable[[Tensors], Tensors], what: str, *, datastore: bool = False) -> Tensors:
    """Return the weights in a safetensors file.

    Args:
        path: the file.
        like: the expected tensors, or a function that returns them for the tensors found (a network may be pruned).
        what: the file's purpose, for error messages.
        datastore: whether the file may hold a datastore beside the weights (`models.Remembering`).

    Raises:
        InputError: if the file cannot be read, or the names or shapes of its tensors are not those of `like`.
    """
    try:
        found = load(read_bytes(path, what))
    except SafetensorError as error:
        raise InputError(f"{what} at {path} is damaged or not a safetensors file ({error}); restore it") from error
    like = like(found) if callable(like) else like
    weights = {name for name in found if not (datastore and name.startswith(models.DATASTORE))}
    for name in sorted(like.keys() | weights):
        if name not in found or name not in like or found[name].shape != like[name].shape:
            raise InputError(
                f"{what} at {path} does not fit the model: tensor {name!r} differs; set the model that the file was made with"
            )
    return found


@dataclass(frozen=True)
class Classify:
    """Classify uint8 images [n, c, h, w] into `classes` classes (a `Task`)."""

    shape: tuple[int, int, int]
    classes: int
    model: str = "cnn"
    start: str = ""
    """Safetensors file of initial weights; empty: random weights.

    If the class counts differ, the backbone is reused and the head is re-initialised."""

    @property
    def measure(self) -> str:
        """Name of the main metric; higher is better."""
        return "accuracy"

    def tables(self, splits: Mapping[str, Table]) -> Mapping[str, Table]:
        """Return a site's tables unchanged."""
        return splits

    def fitting(self, model: Tensors) -> "Classify":
        """Return this task: its networks have one width."""
        return self

    def probe(self, image: Tensor) -> None:
        """Raise RuntimeError if the model does not accept images of this shape."""
        self.predict(self.init(torch.Generator()), {"image": image})

    def build(self) -> nn.Module:
        """Return the network; its weights come from torch's global random stream."""
        return models.build(self.model, self.shape, self.classes)

    def init(self, rng: torch.Generator) -> Tensors:
        """Return initial weights: those of `start`, or random ones from `rng`.

        Raises:
            InputError: as `load_model` does.
        """
        with seeded(rng):
            fresh = models.initial(self.build())
        return self.lent(fresh, Path(self.start), "the classifier to start from") if self.start else fresh

    def lent(self, fresh: Tensors, path: Path, what: str) -> Tensors:
        """Return the weights in a safetensors file; if its class count differs, keep the head of `fresh`.

        Args:
            fresh: initial weights of this task's model.
            path: the file.
            what: the file's purpose, for error messages.

        Raises:
            InputError: as `load_model` does.
        """
        has_body = any(not name.startswith("head.") for name in fresh)

        def like(found: Tensors) -> Tensors:
            """Return tensors of this model with the file's number of classes."""
            rows = len(found["head.weight"]) if "head.weight" in found and has_body else self.classes
            with torch.device("meta"):
                return models.initial(replace(self, classes=rows).build())

        found = load_model(path, like, what)
        return {**found, **{name: value for name, value in fresh.items() if value.shape != found[name].shape}}

    @classmethod
    def of(cls, path: Path, shape: tuple[int, int, int], what: str) -> tuple["Classify", Tensors]:
        """Return the classifier in a safetensors file: its task and its weights.

        The names of the tensors identify the network; the head gives the number of classes.

        Args:
            path: the file.
            shape: (channels, height, width) of an image.
            what: the file's purpose, for error messages.

        Raises:
            InputError: if the file holds none of the networks in `warmfed.models`, or one for another image shape.
        """
        tasks: list[Classify] = []

        def like(found: Tensors) -> Tensors:
            name = models.named_by(found)
            if name is None:
                raise InputError(
                    f"{what} at {path} holds none of the networks {', '.join(models.MODELS)}; its tensors are "
                    f"{', '.join(sorted(found)[:4])}, …; set a file that warmfed wrote"
                )
            tasks.append(cls(shape, len(found["head.weight"]), name))
            with torch.device("meta"):
                return models.initial(tasks[0].build())

        found = load_model(path, like, what)
        return tasks[0], found

    def logits(self, model: nn.Module, batch: Table) -> Tensor:
        """Return logits, float [n, classes]."""
        return model(pixels(batch["image"]))

    def embed(self, model: Any, batch: Table) -> Tensor:
        """Return the features before the head, float [n, width]; the gradient flows through them."""
        return model.features(pixels(batch["image"]))

    def loss(self, model: nn.Module, batch: Table) -> Tensor:
        """Return the cross-entropy with the labels, or with the column "target", float [n, classes], if there is one."""
        return F.cross_entropy(self.logits(model, batch), batch.get("target", batch["label"]))

    def predict(self, model: Tensors, data: Table, batch: int = 256, device: str = "cpu") -> Tensor:
        """Return logits, float [n, classes], on the CPU."""
        return self._batched(self.logits, model, data, batch, device)

    def features(self, model: Tensors, data: Table, batch: int = 256, device: str = "cpu") -> Tensor:
        """Return the features before the head, float [n, width], on the CPU."""
        return self._batched(self.embed, model, data, batch, device)

    def _batched(self, call: Callable[[Any, Table], Tensor], model: Tensors, data: Table, batch: int, device: str) -> Tensor:
        net = models.holding(self.build(), model).to(device)
        with torch.inference_mode():
            return torch.cat([call(net, {"image": part.to(device)}).cpu() for part in data["image"].split(batch)])

    def metrics(
        self, model: Tensors, data: Table, device: str = "cpu", held: Collection[int] | None = None
    ) -> dict[str, float]:
        """Return the metrics of `metrics.classification.measure` on `data`; `held` are the classes of the training images."""
        return measure(self.predict(model, data, device=device), data["label"], held)
