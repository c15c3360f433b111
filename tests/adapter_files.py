"""Adapters in files, and the generator of a run that imports one for the site `ink`."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from warmfed.core import ClientContext
from warmfed.core.rng import stream
from warmfed.diffusion import lora as lora
from warmfed.diffusion.generator import LatentDiffusion

PROMPTS = ("a photo of a cat", "a photo of a dog")


def made(base: str, file: Path, **changes: Any) -> LatentDiffusion:
    settings = {"rank": 4, "target_modules": "transformer", "prompts": False, "steps": 3, "adapters": {"ink": str(file)}}
    return LatentDiffusion(base, **settings | changes)


def taken(generator: LatentDiffusion) -> dict[str, Tensor]:
    """Return the adapter of a site without images."""
    adapter, info = generator.adapt(ClientContext(None, {}, stream("adapt"), "ink", PROMPTS))
    assert info == {"imported": 1.0}
    generator.check(adapter, PROMPTS, "it")
    return dict(adapter)


def layers(base: str, rank: int, targets: str = "transformer", dora: bool = False) -> dict[str, Tensor]:
    """Return random layers with diffusers' names."""
    model = lora.adapted(base, PROMPTS, rank, targets, "cpu", dora=dora)
    blank = lora.to_diffusers(lora.fresh(model, stream("fresh")))
    return {n: t + torch.randn(t.shape, generator=stream(n)).to(t.dtype) / 4 for n, t in blank.items() if ".lora_" in n}
