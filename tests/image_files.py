"""Small pictures on disk, and checks of error messages."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from warmfed.data import Federation
from warmfed.utils.errors import InputError


def picture(seed: int, height: int = 8, width: int = 8) -> Image.Image:
    return Image.fromarray(np.random.RandomState(seed).randint(0, 256, (height, width, 3)).astype(np.uint8))


def pets(root: Path, sites: tuple[str, ...] = ("home", "shelter"), each: int = 10, start: int = 0) -> Path:
    """root/site/{cat,dog}/00.png … with noise, no two alike."""
    for s, site in enumerate(sites):
        for c, name in enumerate(("cat", "dog")):
            (root / site / name).mkdir(parents=True)
            for i in range(each):
                picture(start + 1000 * s + 100 * c + i).save(root / site / name / f"{i:02}.png")
    return root


def sizes(federation: Federation) -> dict[str, tuple[int, ...]]:
    return {name: tuple(len(t["label"]) for t in site.splits.values()) for name, site in federation.sites.items()}


def refused(call: object, *words: str) -> None:
    with pytest.raises(InputError) as caught:
        call()  # type: ignore[operator]
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message
