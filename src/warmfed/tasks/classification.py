"""Image classification: cross-entropy loss and the metrics of the report."""

import functools
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor, nn

from .. import models
from ..core.rng import seeded, stream
from ..core.tensors import Table, Tensors, sha256
from ..metrics.classification import measure
from ..models import pixels
from ..utils.errors import InputError
from ..utils.files import read_bytes
from .frozen_features import frozen_features


def _input(batch: Table) -> Tensor:
    return batch["feature"] if "feature" in batch else pixels(batch["image"])


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


def _fitting(found: Tensor | None, fresh: Tensor) -> Tensor:
    return found if found is not None and found.shape == fresh.shape else fresh


@functools.cache
def _template(task: "Classify") -> models.Partial:
    """Return the network with its frozen part, built once per process; its random weights come from a stream of its name."""
    with torch.device("cpu"), seeded(stream("network", task.model)):  # whoever calls first must not lose random numbers
        whole = models.network(task.model, task.shape, task.classes)
        if task.start:
            found = task._started(Path(task.start), "the classifier to start from")
            fitting = {name: value for name, value in found.items() if value.shape == whole.state_dict()[name].shape}
            whole.load_state_dict(fitting, strict=False)
        made: models.Partial = models.part_trained(whole, task.trainable, task.buffers).eval()
    return made


@functools.cache
def _frozen_digest(task: "Classify") -> str:
    net = _template(task)
    frozen = {n: value for n, value in net.state_dict().items() if n in net.frozen and value.is_floating_point()}
    return sha256(frozen) if frozen else ""


def _drawn(task: "Classify") -> models.Partial:
    """Return the network with new random weights; pretrained ones are as they were."""
    return models.part_trained(models.network(task.model, task.shape, task.classes), task.trainable, task.buffers)


def network_of(path: Path, what: str) -> str | None:
    """Return the name of the network in a safetensors file, or None if it is none of `models.MODELS`; raise as `load_model`."""
    return models.named_by(load_model(path, lambda found: found, what))


@dataclass(frozen=True)
class Classify:
    """Classify uint8 images [n, c, h, w] into `classes` classes (a `Task`)."""

    shape: tuple[int, int, int]
    classes: int
    model: str = "cnn"
    """Network: a key of `models.MODELS`, `python:package.module:function`, or `backbone:FOLDER` (`models.network`)."""
    start: str = ""
    """Safetensors file of initial weights; empty: random or pretrained weights.

    If the class counts differ, the backbone is reused and the head is re-initialised."""
    trainable: str = "all"
    """Trained part: all, head, lora or last:N (`models.part_trained`). The rest is frozen, and not part of the tensors."""
    buffers: str = "averaged"
    """Running statistics of normalisation layers: averaged (part of the tensors) or frozen."""

    @property
    def measure(self) -> str:
        """Name of the main metric; higher is better."""
        return "accuracy"

    def tables(self, splits: Mapping[str, Table]) -> Mapping[str, Table]:
        """Return a site's tables unchanged."""
        return splits

    def inputs(self, table: Table) -> Table:
        """Return a table as the network takes it: with "feature", float [n, width], for "image" if the body is frozen.

        Features are computed once: they are kept in a memory-mapped file whose name is the digest of images and network.
        """
        if self.trainable != "head" or "image" not in table:
            return table
        others = {name: column for name, column in table.items() if name != "image"}
        return {"feature": frozen_features(_template(self), self.frozen_digest(), table["image"]), **others}

    def fitting(self, model: Tensors) -> "Classify":
        """Return this task: its networks have one width."""
        return self

    def probe(self, image: Tensor) -> None:
        """Raise RuntimeError if the model does not accept images of this shape."""
        self.predict(self.init(torch.Generator()), {"image": image})

    @property
    def whole(self) -> bool:
        """Whether the network is one of the package's and trained whole."""
        return not models.outside(self.model) and self.trainable == "all"

    def frozen_digest(self) -> str:
        """Return the SHA-256 of the network's frozen part; empty if there is none."""
        return "" if self.whole else _frozen_digest(self)

    def build(self) -> nn.Module:
        """Return the network; trained weights may be random, from torch's global random stream, frozen ones are set."""
        return models.build(self.model, self.shape, self.classes) if self.whole else models.copied(_template(self))

    def init(self, rng: torch.Generator) -> Tensors:
        """Return initial weights: those of `start`, or random ones from `rng`.

        Raises:
            InputError: as `load_model` does.
        """
        with seeded(rng):
            fresh = models.initial(self.build() if self.whole else _drawn(self))
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
        found = self._started(path, what)
        return {name: _fitting(found.get(name), value) for name, value in fresh.items()}

    def _started(self, path: Path, what: str) -> Tensors:
        """Return the tensors of the whole network in a file, with the file's number of classes; raise as `load_model`."""

        def like(found: Tensors) -> Tensors:
            state = (self.build() if self.whole else models.network(self.model, self.shape, self.classes)).state_dict()
            counters = {name for name, value in state.items() if not value.is_floating_point()} - found.keys()
            wanted = {name: value for name, value in state.items() if name not in counters}
            if "head.weight" in found and any(not name.startswith("head.") for name in wanted):
                count = len(found["head.weight"])
                wanted |= {n: v.new_empty(count, *v.shape[1:]) for n, v in wanted.items() if n.startswith("head.")}
            return wanted

        return load_model(path, like, what)

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
        return model(_input(batch))

    def embed(self, model: Any, batch: Table) -> Tensor:
        """Return the features before the head, float [n, width]; the gradient flows through them."""
        return model.features(_input(batch))

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
        given = self.inputs(data)
        name = "feature" if "feature" in given else "image"
        with torch.inference_mode():
            return torch.cat([call(net, {name: part.to(device)}).cpu() for part in given[name].split(batch)])

    def metrics(
        self, model: Tensors, data: Table, device: str = "cpu", held: Collection[int] | None = None
    ) -> dict[str, float]:
        """Return the metrics of `metrics.classification.measure` on `data`; `held` are the classes of the training images."""
        return measure(self.predict(model, data, device=device), data["label"], held)
