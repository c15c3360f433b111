"""A site's own policy: which runs it takes part in, and what may leave it. What the policy does not allow is refused.

The site checks every request against its policy before it reads an image, and every reply before it records or sends it.
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
"""Tables and settings of a run that a site replaces by its own or does not use."""
_ALIKE = 0.999
"""Correlation from which a row of a reply is an image of the site, whatever its brightness and contrast."""
_REPLY = 100_000_000
"""Bytes of a reply that a new policy reckons with, if the run does not bound them."""


@dataclass(frozen=True)
class Policy:
    """What a site allows. Every default allows nothing, but for `limits`, whose defaults are those of warmfed."""

    algorithms: tuple[str, ...] = ()
    """The algorithms that the site takes part in; empty: none."""
    images: bool = False
    """Whether the site's images may leave, raw or encoded."""
    max_runs: int = 0
    """Runs that are answered at the most, as the site's ledger counts them."""
    max_requests: int = 0
    """Requests of one run that are answered at the most; a measurement is one, too."""
    max_bytes: int = 0
    """Bytes that may leave in one run; no single request may be larger either."""
    min_batch: int = 1
    """Fewest images of an optimizer step: a gradient of one image tells that image."""
    limits: Mapping[str, Any] = field(default_factory=dict)
    """Bounds of the run's configuration: the largest value of a whole number ("algorithm.local.epochs" = 5), the only value of
    an algorithm's text ("algorithm.private" = "head."). What is not listed is bounded by warmfed's default."""

    def __post_init__(self) -> None:
        for name in self.algorithms:
            if name not in ALGORITHMS:
                raise InputError(f"policy.algorithms: there is no algorithm {name!r}{suggest(name, sorted(ALGORITHMS))}")
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
        """Return what of a run's configuration is outside the policy: setting, asked value and bound, one text each."""
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
        """Return why stages of a plan may not be asked of the site, as far as images are concerned."""
        found = []
        for stage in dict.fromkeys((stage.name, stage.images) for stage in plan if stage.client is not None):
            name, images = stage
            if images is None:
                found.append(f"stage {name!r} does not declare whether its replies hold images")
            elif images and not self.images:
                found.append(f"stage {name!r} sends images of the site; they leave only with images = true below [policy]")
        return found


def bounded(config: Config) -> Iterator[tuple[str, Any]]:
    """Yield the settings that a policy bounds, by their dotted names: whole numbers (of a list, the largest), and the texts of
    the algorithm, which say what stays at a site."""
    table = {key: value for key, value in tomllib.loads(config.toml()).items() if key not in _APART}
    table["algorithm"] = {key: value for key, value in table["algorithm"].items() if key != "name"}
    for key, value in _leaves(table):
        whole = [item for item in (value if isinstance(value, list) else [value]) if type(item) is int]
        if whole:
            yield key, max(whole)
        elif isinstance(value, str) and key.startswith("algorithm."):
            yield key, value


def _beyond(value: Any, bound: Any) -> bool:
    """Whether a setting is outside its bound: another text, or a larger number."""
    return value != bound if isinstance(value, str) else type(bound) is not int or value > bound


def _leaves(table: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values in nested tables by their dotted names."""
    for name, value in table.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{above}{name}.")
        else:
            yield f"{above}{name}", value


def trainings(settings: Any, above: str = "") -> Iterator[tuple[str, Training]]:
    """Yield every training in a configuration by its dotted name, but for those of no concern to a site."""
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
    """The bounds of an algorithm's settings that no policy has to list: warmfed's defaults."""
    return tuple(bounded(resolve({"algorithm": {"name": name}})))


def images_in(reply: Message, tables: Iterable[Tensor]) -> str:
    """Return the name of a tensor that holds images of the site, whatever their scale and offset; empty: there is none.

    Args:
        reply: what is to leave.
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
    """Whether the last dimensions of a tensor hold so many numbers together."""
    size = 1
    for length in reversed(tensor.shape):
        size *= length
        if size == width:
            return bool(tensor.numel())
    return False


def _standard(rows: Tensor) -> Tensor:
    """Rows of mean 0 and norm 1; constant rows become zeros."""
    plain = rows.detach().cpu().float().nan_to_num(0.0, 0.0, 0.0)
    plain = plain - plain.mean(1, keepdim=True)
    norm = plain.norm(dim=1, keepdim=True)
    return torch.where(norm > 1e-6, plain / norm.clamp_min(1e-12), torch.zeros(()))


def agreed(config: Config) -> Policy:
    """Return the policy that allows a run with these very settings, and no images."""
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
    "images": "Whether images of this site may leave it, raw or encoded. Only the site itself writes true here.",
    "max_runs": "Runs that are answered, counted in work/ledger.jsonl.",
    "max_requests": "Requests of one run that are answered; the server repeats requests after a failure.",
    "max_bytes": "Bytes that may leave in one run.",
    "min_batch": "Fewest images of a training step: what is learned from one image alone tells that image.",
    "limits": "Largest numbers, and texts, of the run's settings, as agreed. What is not listed: warmfed's own default.",
}


def table(policy: Policy) -> dict[str, Any]:
    """Return a policy as the table of site.toml that says the same."""
    found = {f.name: getattr(policy, f.name) for f in fields(policy)}
    return {**found, "algorithms": list(policy.algorithms), "limits": dict(_leaves(policy.limits))}


def toml(policy: Policy) -> str:
    """Return a policy as the commented text that `warmfed deploy init` writes into site.toml."""
    text = (
        "# What the server may ask of this site. What is not allowed here is refused; `warmfed site-report .` shows refusals.\n"
    )
    text += "[policy]\n"
    for name, value in table(policy).items():
        head = f"# {_COMMENTS[name]}\n"
        text += f"\n{head}[policy.limits]\n{tomli_w.dumps(value)}" if name == "limits" else head + tomli_w.dumps({name: value})
    return text
