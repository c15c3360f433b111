"""What a finished run's models say of pictures."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .data.images import UnreadableError, decode
from .errors import InputError, suggest
from .runs import read_config, read_summary
from .tasks.classify import Classify, load_model
from .tensors import sha256


def predict(folder: Path, images: Sequence[Path], site: str = "") -> list[dict[str, Any]]:
    """Class and probability of each picture, by a finished run's global model or by a site's own.

    Args:
        images: files of any kind that Pillow reads; they are squeezed as those of a data folder are.
        site: the site whose personal model is asked; empty: the global model.

    Returns:
        For each image {"image", "class", "label", "probability", "probabilities": {class: p}}.

    Raises:
        InputError: no finished run, no such site or model, a damaged model, a picture that does not decode.
    """
    config, summary = read_config(folder), read_summary(folder)
    try:
        classes = tuple(summary["classes"])
        shape = tuple(summary["image"])
        digests = summary["models_sha256"]
        channels, height, width = shape
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{folder}/summary.json is damaged or of another version of warmfed; start the run anew") from error
    if height != width:
        raise InputError(f"pictures are squeezed to squares, but this run's images are {height}×{width}; it cannot be asked so")
    name = f"personal/{site}" if site else "global"
    if name not in digests:
        sites = sorted(key.removeprefix("personal/") for key in digests if key.startswith("personal/"))
        if site:
            raise InputError(f"the run has no personal model of site {site!r}{suggest(site, sites)}")
        raise InputError(f"{summary.get('algorithm')} has no global model; name a site by --site: {', '.join(sites)}")
    task = Classify((channels, height, width), len(classes), config.model.name)
    what = f"the model {name!r}"
    path = folder / "models" / f"{name}.safetensors"
    model = load_model(path, task.init(torch.Generator()), what)
    if sha256(model) != digests[name]:
        raise InputError(f"{what} at {path} is not the one that the run made; restore it or start the run anew")
    pixels = []
    for image in images:
        try:
            if not image.is_file():
                raise UnreadableError("is no file; check the path")
            pixels.append(torch.from_numpy(decode(image, height).copy()))
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
