"""Classifiers from outside the package, and classifiers of which only a part is trained.

Every classifier has a `body`, which returns features, and a linear `head`; methods select tensors by these two names. A network
from a user's function or a pretrained vision model is brought into this form, and checked.
"""

import copy
import importlib
import math
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from ..utils.errors import InputError
from ..utils.paths import expanded
from .classifiers import MODELS, Split, build
from .pretrained import BACKBONE, add_lora, vision_model

PYTHON = "python:"
"""Prefix of the name of a network from a user's function, `python:package.module:function`."""
_TRAINABLE = re.compile(r"all|head|lora|last:[1-9][0-9]*")
_STATISTICS = ("running_mean", "running_var")


def check_trainable(trainable: str) -> None:
    """Raise `InputError` unless this is a choice of the trained part."""
    if not _TRAINABLE.fullmatch(trainable):
        raise InputError(f"model.trainable must be all, head, lora or last:N with a number of layers N; got {trainable!r}")


class Partial(Split):
    """A classifier of which the tensors in `frozen` are not trained, sent or stored.

    Modules in `still` stay in evaluation mode: their running statistics and their dropout do not act in training.
    """

    def __init__(self, body: nn.Module, head: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.body, self.head = body, head
        self.frozen: frozenset[str] = frozenset()
        self.still: tuple[nn.Module, ...] = ()

    def train(self, mode: bool = True) -> "Partial":
        """Set the training mode, except of the modules in `still`."""
        super().train(mode)
        for module in self.still:
            module.eval()
        return self


def network(name: str, shape: tuple[int, int, int], classes: int) -> Split:
    """Return a classifier with random or pretrained weights; random ones come from torch's global random stream.

    Args:
        name: a key of `MODELS`; `python:package.module:function` for a function (shape, classes) of the user's; or
            `backbone:FOLDER` for a pretrained vision model with a random head.
        shape: (channels, height, width) of an image.
        classes: number of classes.

    Raises:
        InputError: The name is unknown, the function cannot be imported, fails, or returns no such classifier.
    """
    if name.startswith(BACKBONE):
        body, width = vision_model(expanded(Path(name.removeprefix(BACKBONE))), shape)
        return Partial(body, nn.Linear(width, classes))
    if not name.startswith(PYTHON):
        found = build(name, shape, classes)
        return found if isinstance(found, Split) else divided(found, shape, classes, f"the network {name}")
    function = _function(name)
    try:
        made = function(shape, classes)
    except Exception as error:
        raise InputError(f"the network {name} failed: {type(error).__name__}: {error}; correct the function") from error
    if not isinstance(made, nn.Module):
        raise InputError(f"the network {name} returned {type(made).__name__}, expected a torch.nn.Module; correct the function")
    return divided(made, shape, classes, f"the network {name}")


def _function(name: str) -> Any:
    module, _, function = name.removeprefix(PYTHON).partition(":")
    if not module or not function:
        raise InputError(f"model.name {name!r} is not python:package.module:function; correct it")
    try:
        found = getattr(importlib.import_module(module), function, None)
    except Exception as error:
        raise InputError(
            f"cannot import {module} for model.name {name!r} ({type(error).__name__}: {error}); "
            "install the module, or run from its folder with PYTHONPATH=."
        ) from error
    if not callable(found):
        raise InputError(f"the module {module} has no function {function!r}; check model.name")
    return found


def divided(net: nn.Module, shape: tuple[int, int, int], classes: int, who: str) -> Partial:
    """Return a network as body and head.

    The head is the network's last linear layer with one output per class. It must be the last operation. It gets a bias of
    zeros if it has none.

    Args:
        net: takes float [n, *shape] in [-1, 1], and returns float [n, classes].
        shape: (channels, height, width) of an image.
        classes: number of classes.
        who: name of the network, for errors.

    Raises:
        InputError: There is no such layer, another operation follows it, or the network does not take such images.
    """
    linear = [(name, module) for name, module in net.named_modules() if isinstance(module, nn.Linear)]
    heads = [(name, module) for name, module in linear if module.out_features == classes and name]
    if not heads:
        have = ", ".join(str(module.out_features) for _, module in linear[-3:]) or "none"
        raise InputError(
            f"{who} has no linear layer with {classes} outputs, one for each class (its last linear layers have {have}); "
            "let the function use its argument `classes`"
        )
    name, head = heads[-1]
    trial = torch.linspace(-1, 1, 2 * math.prod(shape)).view(2, *shape)
    net.eval()
    with torch.no_grad():
        whole = _called(net, trial, who)
        above, _, leaf = name.rpartition(".")
        setattr(net.get_submodule(above), leaf, nn.Identity())
        features = _called(net, trial, who)
        if features.dim() != 2 or features.shape[1] != head.in_features or not torch.equal(head(features), whole):
            raise InputError(
                f"{who} does something after its last linear layer {name!r}; return that layer's outputs, the logits"
            )
    if head.bias is None:  # methods set it
        head.bias = nn.Parameter(torch.zeros(classes))
    return Partial(net.train(), head)


def _called(net: nn.Module, images: Tensor, who: str) -> Tensor:
    try:
        found = net(images)
    except Exception as error:
        raise InputError(f"{who} does not take images {list(images.shape)}: {error}; set data.options.image_size") from error
    if not isinstance(found, Tensor) or len(found) != len(images):
        raise InputError(f"{who} returned {type(found).__name__}, expected one row of a tensor for each image")
    return found


def part_trained(net: Split, trainable: str, buffers: str) -> Partial:
    """Return a network of which a part is frozen.

    Args:
        net: the network, with the weights of its frozen part.
        trainable: all; head; lora (a low-rank update of each layer of the body, and the head); or last:N (the last N layers
            that have parameters, and the head).
        buffers: averaged (the running statistics of normalisation layers are part of the model) or frozen (they are not, and
            do not change).
    """
    found = net if isinstance(net, Partial) else Partial(net.body, net.head)
    if trainable == "lora":
        add_lora(found.body)
    owners = [(name, module) for name, module in found.body.named_modules() if [*module.parameters(recurse=False)]]
    live: Collection[str] = [name for name, _ in owners]
    if trainable == "head":
        live = ()
    elif trainable == "lora":
        live = [name for name in live if ".lora_" in name]
    elif trainable != "all":
        live = live[-int(trainable.removeprefix("last:")) :]  # type: ignore[index]
    moves = {"head", *(f"body.{name}" if name else "body" for name in live)}
    follows = set(_followed(found, moves)) if buffers == "averaged" else set()
    names = set(found.state_dict())
    wanted = {name for name, parameter in found.named_parameters() if parameter.requires_grad or trainable == "lora"}
    kept = {name for name in wanted if name.rpartition(".")[0] in moves} | follows
    found.frozen = frozenset(names - kept)
    found.still = tuple(_still(found, moves, tuple(name.rpartition(".")[0] for name in follows)))
    for name, parameter in found.named_parameters():
        parameter.requires_grad_(name in kept)
    return found


def _followed(net: nn.Module, moves: set[str]) -> Iterator[str]:
    """Yield the names of the running statistics of normalisation layers that are trained."""
    for name, module in net.named_modules():
        if isinstance(module, _NormBase) and module.track_running_stats and (name in moves or not module.affine):
            yield from (f"{name}.{statistic}" for statistic in _STATISTICS)


def _still(net: Partial, moves: set[str], followed: Collection[str]) -> Iterator[nn.Module]:
    """Yield the modules that stay in evaluation mode: normalisation with frozen statistics, and all of a frozen body."""
    if not any(name.startswith("body") for name in moves):
        yield net.body
    for name, module in net.named_modules():
        if isinstance(module, _NormBase) and module.track_running_stats and name not in followed:
            yield module


def copied(net: Partial) -> Partial:
    """Return a copy that shares the frozen tensors."""
    state = {**dict(net.named_parameters()), **dict(net.named_buffers())}
    shared = {id(state[name]): state[name] for name in net.frozen if name in state}
    return copy.deepcopy(net, shared)


_EMBEDDED = frozenset(MODELS)


def outside(name: str) -> bool:
    """Return whether a network is not one of the package's."""
    return name not in _EMBEDDED
