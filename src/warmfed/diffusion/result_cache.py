"""Cache of results that the cells of a comparison share: adapters, samples and diffusion models of single sites."""

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
from ..utils.paths import exists

Made = tuple[Tensors, Metrics]


def cached(
    folder: Path | None, what: str, made_of: object, rng: torch.Generator, given: Tensors, make: Callable[[], Made]
) -> Made:
    """Return the result of `make`, from the cache if it is there.

    The key is a digest of all inputs. A cached result equals a new one bit for bit and leaves the same state of `rng`.

    Args:
        folder: the cache; None: no cache.
        what: kind of the result, the prefix of its file.
        made_of: settings with a complete `repr`.
        rng: random stream of `make`.
        given: tensors that `make` uses.
        make: computes the result.

    Raises:
        InputError: if the cached file is damaged.
    """
    if folder is None:
        return make()
    text = repr((made_of, sha256({**given, "rng": rng.get_state()})))
    path = folder / f"{what}-{hashlib.sha256(text.encode()).hexdigest()}.safetensors"
    if exists(path):
        found = load(read_checksummed(path, "a cached result of the comparison"))
        rng.set_state(found["rng"])
        return strip_prefix(found, "made/"), {name: value.item() for name, value in strip_prefix(found, "metric/").items()}
    made, metrics = make()
    figures = {name: torch.tensor(value, dtype=torch.float64) for name, value in metrics.items()}
    whole: dict[str, Tensor] = {**add_prefix(made, "made/"), **add_prefix(figures, "metric/"), "rng": rng.get_state()}
    write_checksummed(path, save({name: tensor.contiguous() for name, tensor in whole.items()}))
    return made, metrics


@dataclass(frozen=True)
class CachedGenerator:
    """Adapt and sample as `generator` does, through the cache.

    The key covers the settings, the base, the images or the adapter, the prompts and the labels.
    """

    generator: Any
    """`LatentDiffusion` or `Concepts`."""
    folder: Path
    """Folder of the cache."""

    def adapt(self, ctx: ClientContext) -> Made:
        """Return the site's adapter and its metrics, from the cache if it is there."""
        given = add_prefix(ctx.data["train"], "train/") | add_prefix(ctx.data.get("validation", {}), "validation/")
        return self._once("adapt", ctx, ctx.prompts, given, lambda: self.generator.adapt(ctx))

    def check(self, adapter: Tensors, prompts: Sequence[str], who: str, classes: Sequence[int] = ()) -> None:
        """Check an adapter, as the generator does."""
        self.generator.check(adapter, prompts, who, classes)

    def write(self, adapter: Tensors, folder: Path, site: str) -> None:
        """Write an adapter, as the generator does."""
        self.generator.write(adapter, folder, site)

    def synthesize(self, adapter: Tensors | None, prompts: Sequence[str], labels: Tensor, ctx: AnyContext) -> Tensor:
        """Return one image per label, uint8 [n, 3, h, w], from the cache if they are there."""

        def make() -> Made:
            return {"image": self.generator.synthesize(adapter, prompts, labels, ctx)}, {}

        return self._once("samples", ctx, prompts, {**(adapter or {}), "labels": labels}, make)[0]["image"]

    def _once(self, what: str, ctx: AnyContext, prompts: Sequence[str], given: Tensors, make: Callable[[], Made]) -> Made:
        made_of = (self.generator, self.generator.fingerprint(), tuple(prompts), ctx.device)
        return cached(self.folder, what, made_of, ctx.rng, given, make)
