"""Equal work is done once: the cells of a comparison share adapters, samples, and diffusion models of sites alone."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from ..core import AnyContext, ClientContext, Metrics
from ..core.tensors import Tensors, add_prefix, sha256, strip_prefix
from ..utils.files import read_checksummed, write_checksummed

Made = tuple[Tensors, Metrics]


def cached(
    folder: Path | None, what: str, made_of: object, rng: torch.Generator, given: Tensors, make: Callable[[], Made]
) -> Made:
    """What `make` returns; in `folder` it is kept under a digest of all it was made of, and found there the next time.

    So what is found is what would have been made, bit for bit, and leaves the same random numbers for what follows. Only
    the seconds of a run that finds something are shorter.

    Args:
        folder: none: it is made in any case.
        made_of: settings, whose `repr` says all of them; given: tensors; rng: random numbers that `make` draws from.

    Raises:
        InputError: what lies there is damaged.
    """
    if folder is None:
        return make()
    text = repr((made_of, sha256({**given, "rng": rng.get_state()})))
    path = folder / f"{what}-{hashlib.sha256(text.encode()).hexdigest()}.safetensors"
    if path.exists():
        found = load(read_checksummed(path, "what another run of the comparison has made"))
        rng.set_state(found["rng"])
        return strip_prefix(found, "made/"), {name: value.item() for name, value in strip_prefix(found, "metric/").items()}
    made, metrics = make()
    figures = {name: torch.tensor(value, dtype=torch.float64) for name, value in metrics.items()}
    whole: dict[str, Tensor] = {**add_prefix(made, "made/"), **add_prefix(figures, "metric/"), "rng": rng.get_state()}
    write_checksummed(path, save({name: tensor.contiguous() for name, tensor in whole.items()}))
    return made, metrics


@dataclass(frozen=True)
class CachedGenerator:
    """Adapts and samples as `generator` does, each thing `once`: settings, base, images or adapter, prompts, labels tell it."""

    generator: Any
    """A `LatentDiffusion` or `Concepts`."""
    folder: Path

    def adapt(self, ctx: ClientContext) -> Made:
        given = add_prefix(ctx.data["train"], "train/") | add_prefix(ctx.data.get("validation", {}), "validation/")
        return self._once("adapt", ctx, ctx.prompts, given, lambda: self.generator.adapt(ctx))

    def check(self, adapter: Tensors, prompts: Sequence[str], who: str, classes: Sequence[int] = ()) -> None:
        self.generator.check(adapter, prompts, who, classes)

    def write(self, adapter: Tensors, folder: Path, site: str) -> None:
        self.generator.write(adapter, folder, site)

    def synthesize(self, adapter: Tensors | None, prompts: Sequence[str], labels: Tensor, ctx: AnyContext) -> Tensor:
        def make() -> Made:
            return {"image": self.generator.synthesize(adapter, prompts, labels, ctx)}, {}

        return self._once("samples", ctx, prompts, {**(adapter or {}), "labels": labels}, make)[0]["image"]

    def _once(self, what: str, ctx: AnyContext, prompts: Sequence[str], given: Tensors, make: Callable[[], Made]) -> Made:
        made_of = (self.generator, self.generator.fingerprint(), tuple(prompts), ctx.device)
        return cached(self.folder, what, made_of, ctx.rng, given, make)
