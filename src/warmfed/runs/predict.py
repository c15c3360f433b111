"""Classifies image files with the models of a finished run."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..core import Task
from ..core.tensors import Tensors, sha256
from ..data.image_io import UnreadableError, decode
from ..tasks.classification import load_model
from ..utils.errors import InputError, suggest
from ..utils.names import plain_name
from ..utils.paths import is_file
from .folder import read_config, read_summary
from .prepare import classification


def described(folder: Path, summary: Mapping[str, Any]) -> tuple[tuple[str, ...], tuple[int, int, int]]:
    """Return the class names and the image shape of a finished run."""
    try:
        channels, height, width = summary["image"]
        return tuple(summary["classes"]), (channels, height, width)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{folder}/summary.json is damaged or of another version of warmfed; start a new run") from error


def released(folder: Path, summary: Mapping[str, Any], site: str, task: Task) -> Tensors:
    """Return a finished run's global model, or a site's personal model, checked against the summary's SHA-256.

    Raises:
        InputError: The run has no such model, or it is damaged.
    """
    name, digests = f"personal/{site}" if site else "global", summary.get("models_sha256") or {}
    if name not in digests:
        sites = sorted(key.removeprefix("personal/") for key in digests if key.startswith("personal/"))
        if site:
            raise InputError(f"the run has no personal model of site {site!r}{suggest(site, sites)}")
        raise InputError(f"{summary.get('algorithm')} has no global model; choose a site with --site: {', '.join(sites)}")
    path, what = folder / "models" / f"{name}.safetensors", f"the model {name!r}"
    model = load_model(path, lambda found: task.fitting(found).init(torch.Generator()), what, datastore=True)
    if sha256(model) != digests[name]:
        raise InputError(f"{what} at {path} has changed since the run; restore it or start a new run")
    return model


def predict(folder: Path, images: Sequence[Path], site: str = "") -> list[dict[str, Any]]:
    """Return the class and the probabilities of each image, by a finished run's global or personal model.

    Args:
        folder: the run folder.
        images: files in any format that Pillow reads; they are resized like the images of a data folder.
        site: site of the personal model; empty: the global model.

    Returns:
        For each image {"image", "class", "label", "probability", "probabilities": {class: p}}.

    Raises:
        InputError: The run has not finished, the site or model does not exist or is damaged, or an image does not decode.
    """
    site = plain_name(site)
    config, summary = read_config(folder), read_summary(folder)
    if config.task != "classify":
        raise InputError(f"the run in {folder} has no classifier; sample images with `warmfed synthesize {folder}`")
    classes, (channels, height, width) = described(folder, summary)
    if height != width:
        raise InputError(f"predict resizes images to squares, but this run has images of {height}×{width} pixels")
    task = classification(config, (channels, height, width), len(classes))
    model = released(folder, summary, site, task)
    max_value = int(config.data.options.get("max_value", 0))
    pixels = []
    for image in images:
        try:
            if not is_file(image):
                raise UnreadableError("is not a file; check the path")
            pixels.append(torch.from_numpy(decode(image, height, channels, max_value).copy()))
        except UnreadableError as error:
            raise InputError(f"{image} {error}") from error
    found = task.predict(model, {"image": torch.stack(pixels)}).double().softmax(-1)
    return [
        {
            "image": str(image),
            "class": classes[int(row.argmax())],
            "label": int(row.argmax()),
            "probability": row.max().item(),
            "probabilities": dict(zip(classes, row.tolist(), strict=True)),
        }
        for image, row in zip(images, found, strict=True)
    ]
