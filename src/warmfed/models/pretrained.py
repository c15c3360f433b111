"""Pretrained vision models of transformers as classifiers, and low-rank updates of a classifier by peft.

Both libraries are imported only if a run uses them. Weights are safetensors in a local folder or in the hub's cache; nothing is
downloaded, and a repository's own code never runs.
"""

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..utils.errors import InputError
from ..utils.files import read_bytes
from ..utils.paths import is_file

BACKBONE = "backbone:"
"""Prefix of the name of a classifier on a pretrained vision model, `backbone:FOLDER`."""
LORA_RANK = 8
"""Rank of the low-rank updates of a classifier's layers."""
_VISION = {
    "clip": "CLIPVisionModel",
    "clip_vision_model": "CLIPVisionModel",
    "siglip": "SiglipVisionModel",
    "siglip_vision_model": "SiglipVisionModel",
}
"""Class of the vision tower, by the type of a model of images and text."""
_MODELS = {
    "convnext", "convnextv2", "deit", "dinov2", "efficientnet", "mobilenet_v1", "mobilenet_v2", "regnet", "resnet",
    "swin", "vit",
}  # fmt: skip
"""Other supported types of models."""


class VisionModel(nn.Module):
    """A vision model of transformers that returns one feature vector for each image."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, size: int, mean: list[float], std: list[float]) -> None:
        super().__init__()
        self.model, self.size = model, size
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Return features, float [n, width], of images float [n, 3, h, w] in [-1, 1], resized to the model's size."""
        pixels = (images + 1) / 2
        if images.shape[-2:] != (self.size, self.size):
            pixels = F.interpolate(pixels, (self.size, self.size), mode="bilinear", antialias=True).clamp(0, 1)
        found = self.model((pixels - self.mean) / self.std)
        pooled = getattr(found, "pooler_output", None)
        features: Tensor = pooled.flatten(1) if pooled is not None else found.last_hidden_state[:, 0]
        return features


def vision_model(folder: Path, shape: tuple[int, int, int]) -> tuple[VisionModel, int]:
    """Return a pretrained vision model and the width of its features.

    Args:
        folder: its folder, with config.json, model.safetensors and preprocessor_config.json.
        shape: (channels, height, width) of an image.

    Raises:
        InputError: A file is missing or damaged, or the model is not supported.
    """
    kind = _json(folder / "config.json", "the model's configuration").get("model_type")
    if kind not in _MODELS and kind not in _VISION:
        known = ", ".join(sorted(_MODELS | _VISION.keys()))
        raise InputError(f"{folder} holds a model of type {kind!r}, expected a vision model: {known}; choose another backbone")
    if not is_file(folder / "model.safetensors"):
        raise InputError(f"{folder} has no model.safetensors (other formats of weights are not read); save the model again")
    size, mean, std = _processing(folder)
    if shape[0] != 3:
        raise InputError("a pretrained backbone needs colour images, these are grey; set data.options.channels to 3")
    import transformers

    transformers.utils.logging.disable_progress_bar()
    own: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False, "use_safetensors": True}
    loader: Any = getattr(transformers, _VISION.get(kind, "AutoModel"))
    more = {"add_pooling_layer": False} if kind in ("vit", "deit") else {}
    try:
        net = loader.from_pretrained(folder, dtype=torch.float32, **more, **own).eval()
        found = VisionModel(net, size, mean, std).eval()
        with torch.no_grad():
            width = found(torch.zeros(1, 3, size, size)).shape[1]
    except Exception as error:  # each model raises its own errors; all of them mean that the folder is not usable
        raise InputError(f"cannot load a vision model from {folder} ({str(error).splitlines()[0]}); save it again") from error
    return found, width


def _processing(folder: Path) -> tuple[int, list[float], list[float]]:
    """Return the size in pixels, and mean and standard deviation of the channels, that the model wants."""
    settings = _json(folder / "preprocessor_config.json", "the model's processing of images")
    size = settings.get("crop_size") or settings.get("size") or 0
    if isinstance(size, dict):
        size = size.get("height") or size.get("shortest_edge") or 0
    mean, std = ([x for x in settings.get(key) or () if isinstance(x, int | float)] for key in ("image_mean", "image_std"))
    if not isinstance(size, int) or size < 1 or len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise InputError(
            f"{folder}/preprocessor_config.json has no size, image_mean and image_std of three channels; save it again"
        )
    return size, [float(x) for x in mean], [float(x) for x in std]


def _json(path: Path, what: str) -> dict[str, Any]:
    try:
        found = json.loads(read_bytes(path, what, 2**20))
    except ValueError as error:
        raise InputError(f"{what} at {path} is not JSON ({error}); save the model again") from error
    if not isinstance(found, dict):
        raise InputError(f"{what} at {path} is not a JSON object; save the model again")
    return found


def add_lora(body: nn.Module) -> None:
    """Add low-rank updates (LoRA, arXiv:2106.09685) to each linear layer and ungrouped convolution of a body, in place."""
    from peft import LoraConfig, inject_adapter_in_model

    layers = [(name, module) for name, module in body.named_modules() if isinstance(module, nn.Linear | nn.Conv2d) and name]
    names = [name for name, module in layers if getattr(module, "groups", 1) == 1]
    if not names:
        raise InputError("model.trainable is lora, but the body has no linear or convolution layer inside; choose another")
    inject_adapter_in_model(LoraConfig(r=LORA_RANK, lora_alpha=LORA_RANK, target_modules=names), body)
