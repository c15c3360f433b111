"""Policy of a site: the runs it takes part in, and the data it may send. All other requests are refused.

The site checks every request before it reads an image, and every reply before it records or sends it.
"""

import functools
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import tomli_w
import torch
from torch import Tensor

from ..algorithms import ALGORITHMS
from ..config import Config, resolve
from ..core import Stage
from ..core.messages import Message, tensors_of
from ..core.training import Training
from ..utils.errors import InputError, suggest

_APART = ("seed", "workers", "server", "holdout", "data", "evaluation")
"""Tables and settings of a run that a site replaces or does not use."""
_ALIKE = 0.999
"""Correlation above which a row of a reply counts as an image of the site, for any brightness and contrast."""
_REPLY = 100_000_000
"""Assumed size of a reply in bytes for a new policy, if the run has no limit."""


@dataclass(frozen=True)
class Policy:
    """Settings of `[policy]`. The defaults allow nothing, except `limits`, which default to those of warmfed."""

    algorithms: tuple[str, ...] = ()
    """Algorithms that the site takes part in. Default empty: none."""
    images: bool = False
    """Whether the site may send its images, raw or encoded. Default false."""
    max_runs: int = 0
    """Largest number of answered runs, counted in the site's ledger. Default 0."""
    max_requests: int = 0
    """Largest number of answered requests in one run, evaluations included. Default 0."""
    max_bytes: int = 0
    """Largest number of bytes that the site sends in one run, and largest size of a request. Default 0."""
    min_batch: int = 1
    """Smallest number of images in an optimizer step: the gradient of one image reveals that image. Default 1."""
    limits: Mapping[str, Any] = field(default_factory=dict)
    """Bounds of the run's configuration by dotted key. Default: warmfed's own default of each setting.

    A whole number is the largest value ("algorithm.local.epochs" = 5). A text is the only value of an algorithm's setting
    ("algorithm.private" = "head.")."""

    def __post_init__(self) -> None:
        for name in self.algorithms:
            if name not in ALGORITHMS:
                raise InputError(f"policy.algorithms: unknown algorithm {name!r}{suggest(name, sorted(ALGORITHMS))}")
        if min(self.max_runs, self.max_requests, self.max_bytes) < 0 or self.min_batch < 1:
            raise InputError("max_runs, max_requests and max_bytes must be at least 0, min_batch at least 1; check [policy]")
        known = {key for name in self.algorithms if self.limits for key, _ in _usual(name)}
        for key, value in _leaves(self.limits):
            if not isinstance(value, str) and (type(value) is not int or value < 0):
                raise InputError(f"policy.limits: {key} must be a text, or a whole number of at least 0; got {value!r}")
            if known and key not in known:
                raise InputError(
                    f"policy.limits: these algorithms have no setting {key!r} that is bounded{suggest(key, sorted(known))}"
                )

    def excess(self, config: Config) -> list[str]:
        """Return the violations of the policy in a run's configuration: one text each, with setting, value and bound."""
        if config.name not in self.algorithms:
            there = f"only {', '.join(self.algorithms)} may" if self.algorithms else "the site takes part in no algorithm"
            return [
                f"algorithm.name is {config.name!r}, {there}; if the site agrees, it writes "
                f'algorithms = ["{config.name}"] below [policy] in its site.toml'
            ]
        bounds = dict(_usual(config.name)) | dict(_leaves(self.limits))
        found = [
            f"{key} is {value!r}, {'only' if isinstance(value, str) else 'at most'} {bounds.get(key)!r} is allowed "
            "(policy.limits)"
            for key, value in bounded(config)
            if _beyond(value, bounds.get(key))
        ]
        return found + [
            f"{key} takes {training.batch_size * training.gradient_accumulation_steps} images a step, at least "
            f"{self.min_batch} must be (policy.min_batch)"
            for key, training in trainings(config)
            if training.batch_size * training.gradient_accumulation_steps < self.min_batch
        ]

    def sending(self, plan: Iterable[Stage]) -> list[str]:
        """Return the reasons why the site refuses stages of a plan because of images."""
        found = []
        for stage in dict.fromkeys((stage.name, stage.images) for stage in plan if stage.client is not None):
            name, images = stage
            if images is None:
                found.append(f"stage {name!r} does not declare whether its replies hold images")
            elif images and not self.images:
                found.append(f"stage {name!r} sends images of the site, which needs images = true below [policy]")
        return found


def bounded(config: Config) -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) of the settings that a policy bounds.

    These are whole numbers (of a list, the largest), and the algorithm's texts, which determine the data that stay at a site.
    """
    table = {key: value for key, value in tomllib.loads(config.toml()).items() if key not in _APART}
    table["algorithm"] = {key: value for key, value in table["algorithm"].items() if key != "name"}
    for key, value in _leaves(table):
        whole = [item for item in (value if isinstance(value, list) else [value]) if type(item) is int]
        if whole:
            yield key, max(whole)
        elif isinstance(value, str) and key.startswith("algorithm."):
            yield key, value


def _beyond(value: Any, bound: Any) -> bool:
    """Return whether a setting exceeds its bound: another text, or a larger number."""
    return value != bound if isinstance(value, str) else type(bound) is not int or value > bound


def _leaves(table: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) of nested tables."""
    for name, value in table.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{above}{name}.")
        else:
            yield f"{above}{name}", value


def trainings(settings: Any, above: str = "") -> Iterator[tuple[str, Training]]:
    """Yield (dotted key, training) of a configuration, except trainings that a site does not use."""
    for f in fields(settings):
        value, key = getattr(settings, f.name), f"{above}{f.name}"
        if key in _APART:
            continue
        if isinstance(value, Training):
            yield key, value
        elif is_dataclass(value) and not isinstance(value, type):
            yield from trainings(value, f"{key}.")


@functools.cache
def _usual(name: str) -> tuple[tuple[str, Any], ...]:
    """Return the default bounds of an algorithm's settings: warmfed's defaults."""
    return tuple(bounded(resolve({"algorithm": {"name": name}})))


def images_in(reply: Message, tables: Iterable[Tensor]) -> str:
    """Return the name of a tensor with images of the site, at any scale and offset; empty if there is none.

    Args:
        reply: the message to send.
        tables: the site's images, uint8 [n, c, h, w] each.
    """
    for images in tables:
        if not images.numel():
            continue
        width = images[0].numel()
        for name, tensor in tensors_of(reply).items():
            if not _ends_in(tensor, width):
                continue
            sent = _standard(tensor.reshape(-1, width))
            for part in images.split(1024):
                held = _standard(part.reshape(len(part), width))
                if any(bool(((rows @ held.T).abs() > _ALIKE).any()) for rows in sent.split(1024)):
                    return name
    return ""


def _ends_in(tensor: Tensor, width: int) -> bool:
    """Return whether the last dimensions of a tensor hold `width` numbers together."""
    size = 1
    for length in reversed(tensor.shape):
        size *= length
        if size == width:
            return bool(tensor.numel())
    return False


def _standard(rows: Tensor) -> Tensor:
    """Return rows with mean 0 and norm 1; constant rows become zeros."""
    plain = rows.detach().cpu().float().nan_to_num(0.0, 0.0, 0.0)
    plain = plain - plain.mean(1, keepdim=True)
    norm = plain.norm(dim=1, keepdim=True)
    return torch.where(norm > 1e-6, plain / norm.clamp_min(1e-12), torch.zeros(()))


def agreed(config: Config) -> Policy:
    """Return the policy that allows runs with these settings, and no images."""
    usual = dict(_usual(config.name))
    limits = {
        key: value
        for key, value in bounded(config)
        if key.rpartition(".")[2] in ("rounds", "epochs") or _beyond(value, usual.get(key))
    }
    asked = sum(stage.client is not None for stage in config.algorithm.stages())
    return Policy(
        algorithms=(config.name,),
        max_runs=10,
        max_requests=10 * (2 * asked + 2),
        max_bytes=asked * (config.server.max_reply_bytes or _REPLY),
        min_batch=min(
            (training.batch_size * training.gradient_accumulation_steps for _, training in trainings(config)), default=1
        ),
        limits=limits,
    )


_COMMENTS = {
    "algorithms": "Algorithms that this site takes part in. Empty: none.",
    "images": "Whether this site may send its images, raw or encoded. Only the site itself sets this to true.",
    "max_runs": "Largest number of answered runs, counted in work/ledger.jsonl.",
    "max_requests": "Largest number of answered requests in one run; the server repeats requests after a failure.",
    "max_bytes": "Largest number of bytes that this site sends in one run.",
    "min_batch": "Smallest number of images in a training step: the gradient of one image reveals that image.",
    "limits": "Agreed bounds of the run's settings: largest numbers, and texts. Default: warmfed's own defaults.",
}


def table(policy: Policy) -> dict[str, Any]:
    """Return a policy as a table of site.toml."""
    found = {f.name: getattr(policy, f.name) for f in fields(policy)}
    return {**found, "algorithms": list(policy.algorithms), "limits": dict(_leaves(policy.limits))}


def toml(policy: Policy) -> str:
    """Return a policy as commented TOML, which `warmfed deploy init` writes into site.toml."""
    text = "# Requests that this site answers. All others are refused; `warmfed site-report .` lists refusals.\n"
    text += "[policy]\n"
    for name, value in table(policy).items():
        head = f"# {_COMMENTS[name]}\n"
        text += f"\n{head}[policy.limits]\n{tomli_w.dumps(value)}" if name == "limits" else head + tomli_w.dumps({name: value})
    return text
