"""A generator that does equal work once: the cells of a comparison share their adapters and samples."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from ..core import Central, Local, Metrics
from ..files import read_sealed, write_sealed
from ..fit import Training
from ..tensors import Tensors, prefixed, sha256, under


@dataclass(frozen=True)
class Once:
    """Adapts and samples as `generator` does, and keeps what was made in `folder`, under a digest of all it was made of.

    That names settings and base, images or adapter, prompts, labels and the state of the random numbers; so what is found
    is what would have been made, bit for bit. Only the seconds of a run that finds something are shorter.
    """

    generator: Any
    """A `LatentDiffusion`, or what it becomes by `describing` or `conceiving`."""
    folder: Path

    def adapt(self, ctx: Local) -> tuple[Tensors, Metrics]:
        def make() -> dict[str, Tensor]:
            tensors, metrics = self.generator.adapt(ctx)
            return {
                **prefixed(tensors, "adapter/"),
                **{f"metric/{name}": torch.tensor(value, dtype=torch.float64) for name, value in metrics.items()},
            }

        found = self._once("adapt", ctx, ctx.prompts, ctx.data["train"], make)
        return under(found, "adapter/"), {name: value.item() for name, value in under(found, "metric/").items()}

    def describing(self, training: Training) -> "Once":
        return Once(self.generator.describing(training), self.folder)

    def conceiving(self, training: Training, signal: float, variation: float) -> "Once":
        return Once(self.generator.conceiving(training, signal, variation), self.folder)

    def check(self, adapter: Tensors, prompts: Sequence[str], who: str) -> None:
        self.generator.check(adapter, prompts, who)

    def write(self, adapter: Tensors, folder: Path, site: str) -> None:
        self.generator.write(adapter, folder, site)

    def synthesize(self, adapter: Tensors | None, prompts: Sequence[str], labels: Tensor, ctx: Local | Central) -> Tensor:
        def make() -> dict[str, Tensor]:
            return {"image": self.generator.synthesize(adapter, prompts, labels, ctx)}

        return self._once("samples", ctx, prompts, {**(adapter or {}), "labels": labels}, make)["image"]

    def _once(
        self, what: str, ctx: Local | Central, prompts: Sequence[str], given: Tensors, make: Callable[[], dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        before = ctx.rng.get_state()
        text = repr(
            (self.generator, self.generator.fingerprint(), tuple(prompts), ctx.device, sha256({**given, "rng": before}))
        )
        path = self.folder / f"{what}-{hashlib.sha256(text.encode()).hexdigest()}.safetensors"
        if path.exists():
            found = load(read_sealed(path, "what another run of the comparison has made"))
            ctx.rng.set_state(found["rng"])
            return found
        made = {name: tensor.contiguous() for name, tensor in make().items()}
        write_sealed(path, save({**made, "rng": ctx.rng.get_state()}))
        return made
