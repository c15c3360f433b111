"""Pretrained vision models of transformers as backbones: tiny models, saved as transformers saves them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import toy
import transformers

from warmfed.core.rng import stream
from warmfed.models import network
from warmfed.tasks import Classify
from warmfed.utils.errors import InputError

_SMALL: dict[str, Any] = {
    "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
    "image_size": 32, "patch_size": 16,
}  # fmt: skip
KINDS: dict[str, tuple[str, str, dict[str, Any], int]] = {
    "vit": ("ViTConfig", "ViTModel", _SMALL, 8),
    "dinov2": ("Dinov2Config", "Dinov2Model", _SMALL, 8),
    "clip": ("CLIPVisionConfig", "CLIPVisionModel", _SMALL, 8),
    "siglip": ("SiglipVisionConfig", "SiglipVisionModel", _SMALL, 8),
    "resnet": (
        "ResNetConfig", "ResNetModel",
        {"embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 1], "layer_type": "basic"}, 8,
    ),
    "convnext": ("ConvNextConfig", "ConvNextModel", {"hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1]}, 8),
}  # fmt: skip
PROCESSOR = {"size": {"height": 32, "width": 32}, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}


def saved(folder: Path, kind: str) -> Path:
    config, model, values, _ = KINDS[kind]
    getattr(transformers, model)(getattr(transformers, config)(**values)).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_a_backbone_gives_features_and_a_head_of_the_classes(kind: str, tmp_path: Path) -> None:
    task = Classify(toy.SHAPE, toy.CLASSES, f"backbone:{saved(tmp_path, kind)}", trainable="head", buffers="frozen")
    model = task.init(stream("init"))
    assert {name: tuple(value.shape) for name, value in model.items()} == {
        "head.weight": (3, KINDS[kind][3]),
        "head.bias": (3,),
    }
    table = toy.SITES["a"]["train"]
    features = task.features(model, table)
    assert features.shape == (len(table["image"]), KINDS[kind][3])
    assert torch.allclose(task.embed(task.build().eval(), table), features, atol=1e-5)


def test_pixels_are_resized_and_normalised_as_the_model_wants(tmp_path: Path) -> None:
    net = network(f"backbone:{saved(tmp_path, 'vit')}", (3, 32, 32), 3).eval()
    image = torch.rand(2, 3, 32, 32)
    mean, std = (torch.tensor(PROCESSOR[key]).view(1, 3, 1, 1) for key in ("image_mean", "image_std"))
    wanted = net.body.model((image - mean) / std).last_hidden_state[:, 0]
    assert torch.allclose(net.features(image * 2 - 1), wanted, atol=1e-6)
    assert net.features(torch.zeros(1, 3, 40, 30)).shape == (1, 8)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda f: (f / "model.safetensors").unlink(), "has no model.safetensors"),
        (lambda f: (f / "model.safetensors").write_bytes(b"x" * 40), "cannot load a vision model"),
        (lambda f: (f / "config.json").unlink(), "the model's configuration"),
        (lambda f: (f / "config.json").write_text("{"), "is not JSON"),
        (lambda f: (f / "config.json").write_text("[]"), "is not a JSON object"),
        (lambda f: (f / "config.json").write_text('{"model_type": "bert"}'), "of type 'bert', expected a vision model"),
        (lambda f: (f / "preprocessor_config.json").unlink(), "the model's processing of images"),
        (lambda f: (f / "preprocessor_config.json").write_text("{}"), "has no size, image_mean and image_std"),
    ],
)
def test_a_folder_that_cannot_be_used_is_refused(change: Any, words: str, tmp_path: Path) -> None:
    folder = saved(tmp_path / "vit", "vit")
    change(folder)
    with pytest.raises(InputError, match=words) as error:
        network(f"backbone:{folder}", toy.SHAPE, 3)
    assert "\n" not in str(error.value)


def test_a_backbone_needs_colour(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="needs colour images"):
        network(f"backbone:{saved(tmp_path, 'vit')}", (1, 16, 16), 3)
