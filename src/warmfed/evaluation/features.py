"""Feature extractors for metrics of images, selected by the setting `features`.

Inception's weights need a download, so the user selects the features. The results name the extractor by its fingerprint.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import models
from ..data.readers.archives import DAMAGE, Archive
from ..diffusion import pipeline
from ..tasks.classification import Classify
from ..utils.errors import InputError
from ..utils.files import read_bytes
from ..utils.paths import is_folder

Extractor = Callable[[Tensor], Tensor]
"""Function from uint8 images [n, 3, h, w] to features, float [n, width]."""


def extractor(features: str, base: str, shape: tuple[int, int, int]) -> tuple[Extractor, str]:
    """Return a feature extractor and its fingerprint.

    Args:
        features: "public", a .safetensors or .npz file, or a folder (`Evaluation.features`).
        base: the base whose public classifier "public" selects.
        shape: (channels, height, width) of an image.

    Returns:
        The extractor, and the SHA-256 of its file or the name of its folder.

    Raises:
        InputError: if the file or folder is missing, damaged, or holds no supported network.
    """
    path = pipeline.find(base) / pipeline.PUBLIC_CLASSIFIER if features == "public" else Path(features)
    if is_folder(path):
        return _hugging(path), f"{path.name}"
    data = read_bytes(path, "the network whose features measure samples")
    digest = hashlib.sha256(data).hexdigest()
    if path.suffix == ".npz":
        return _arrays(path), digest
    task, model = Classify.of(path, shape, "the classifier whose features measure samples")
    return lambda image: _batched(lambda part: task.features(model, {"image": part}), image), digest


def _batched(extract: Extractor, image: Tensor, batch: int = 256) -> Tensor:
    with torch.inference_mode():
        return torch.cat([extract(part) for part in image.split(batch)]).clone()


def _arrays(path: Path) -> Extractor:
    """Return the network of `models.FEATURE_EXTRACTORS` that the names in an .npz file identify."""
    try:
        held = Archive(path)
        weights = {name: torch.from_numpy(held[name]) for name in held.files}
    except DAMAGE as error:
        raise InputError(f"{path} is damaged or not an .npz file of arrays ({error}); restore it") from error
    for build in models.FEATURE_EXTRACTORS.values():
        net = build()
        if {key for key in net.state_dict() if not key.endswith("num_batches_tracked")} == weights.keys():
            net.load_state_dict(weights, strict=False)
            net.eval().requires_grad_(False)
            return lambda image: _batched(net, image)
    raise InputError(
        f"{path} holds none of the networks {', '.join(models.FEATURE_EXTRACTORS)}; "
        f"its tensors are {', '.join(sorted(weights)[:4])}, …; set evaluation.features to another file"
    )


def _hugging(folder: Path) -> Extractor:
    from transformers import AutoImageProcessor, AutoModel

    own: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        net = AutoModel.from_pretrained(folder, use_safetensors=True, **own).eval().requires_grad_(False)
        processor = AutoImageProcessor.from_pretrained(folder, **own)
    except Exception as error:  # each model raises its own errors; all of them mean that the folder is not usable
        raise InputError(f"cannot load a vision model from {folder} ({str(error).splitlines()[0]}); save it again") from error

    def features(part: Tensor) -> Tensor:
        inputs = processor(images=list(part), return_tensors="pt")
        found = net(**inputs)
        pooled = getattr(found, "pooler_output", None)
        return pooled if pooled is not None else found.last_hidden_state.mean(1)

    return lambda image: _batched(features, image, 64)
