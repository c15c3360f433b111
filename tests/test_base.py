"""Bases: pre-training writes a whole pipeline folder that diffusers opens, and a damaged one is told in one line."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from warmfed.data.rendered import rendered
from warmfed.diffusion import pipeline
from warmfed.diffusion.families import STABLE
from warmfed.diffusion.lessons import digits, tokenizer
from warmfed.diffusion.pretrain import Pretraining, build, pretrain, principal_patches
from warmfed.errors import InputError
from warmfed.randomness import named, seeded

TINY = Pretraining(
    images=64, channels=4, decoder_width=8, decoder_steps=2, decoder_batch=8, widths=(16, 16), text_width=16, text_layers=1,
    steps=3, batch=16, warmup=1, classifier_epochs=1, checkpoint=0,
)  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Mapping[str, Any]]:
    folder = tmp_path_factory.mktemp("base") / "tiny"
    return folder, pretrain(TINY, folder)


@pytest.fixture
def copy(made: tuple[Path, Mapping[str, Any]], tmp_path: Path) -> Path:
    return Path(shutil.copytree(made[0], tmp_path / "copy"))


def test_the_folder_says_how_it_was_made(made: tuple[Path, Mapping[str, Any]]) -> None:
    folder, record = made
    written = json.loads((folder / "pretraining.json").read_text())
    assert written["settings"]["steps"] == 3
    assert written["settings"]["seed"] == 0
    assert 0 < written["loss"] == record["loss"]
    assert not list(folder.parent.glob("*.partial")) + list(folder.parent.glob("*.old"))


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers with NumPy 2.4
def test_diffusers_own_pipeline_opens_it_and_draws(made: tuple[Path, Mapping[str, Any]]) -> None:
    pipe = StableDiffusionPipeline.from_pretrained(made[0], local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    images = pipe(["a photo of the digit two", "3"], num_inference_steps=2, guidance_scale=2.0, output_type="np").images
    assert images.shape == (2, 32, 32, 3)


def test_parts_are_frozen_and_turn_text_and_images_into_tensors(made: tuple[Path, Mapping[str, Any]]) -> None:
    parts = pipeline.load(made[0])
    assert not any(p.requires_grad for name in STABLE.models for p in parts.part(name).parameters())
    assert {p.dtype for name in STABLE.models for p in parts.part(name).parameters()} == {torch.float32}
    assert parts.embed(["a photo of the digit two", ""])["prompt"].shape == (2, 16, 16)
    images = rendered(3, named("images"))["image"]
    latents, deviation = parts.encode(images)
    assert latents.shape == deviation.shape == (3, 4, 8, 8)
    assert parts.decode(latents).shape == images.shape
    assert parts.decode(latents).dtype == torch.uint8


def test_the_same_settings_make_the_same_base(made: tuple[Path, Mapping[str, Any]], tmp_path: Path) -> None:
    pretrain(TINY, tmp_path / "again")
    assert pipeline.fingerprint(tmp_path / "again") == pipeline.fingerprint(made[0])


def test_a_finished_phase_is_not_repeated(tmp_path: Path) -> None:
    phases: list[str] = []
    for _ in range(2):
        pretrain(TINY, tmp_path / "base", lambda phase, done, total: phases.append(phase), tmp_path / "work")
    assert phases.count("images") == phases.count("latents") == 1
    assert phases.count("denoiser") == 6


def test_latents_are_uncorrelated_and_the_coarsest_come_first() -> None:
    images = rendered(256, named("patches"))["image"]
    with seeded(named("weights")):
        encoder = build(TINY).vae.encoder
    principal_patches(encoder, images)
    with torch.no_grad():
        latents = encoder(images.float() / 127.5 - 1)
    covariance = latents.transpose(0, 1).flatten(1).cov()
    deviation = covariance.diagonal().sqrt()
    assert (covariance / deviation / deviation[:, None] - torch.eye(4)).abs().max() < 0.01
    assert deviation.tolist() == sorted(deviation.tolist(), reverse=True)
    assert latents.mean((0, 2, 3)).abs().max() < 0.01


def test_the_tokenizer_reads_captions_as_words_and_any_text_at_all() -> None:
    words = tokenizer(digits("0123456789"))
    assert words.tokenize("A photo of the digit three") == ["a</w>", "photo</w>", "of</w>", "the</w>", "digit</w>", "three</w>"]
    assert words.tokenize("xy") == ["x", "y</w>"]
    longest = max(len(words(text).input_ids) for texts in digits("0123456789") for text in texts)
    assert longest <= words.model_max_length == 16


def test_what_is_no_base_is_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="embedded base"):
        pipeline.load(tmp_path / "absent")
    with pytest.raises(InputError, match="model_index"):
        pipeline.load(tmp_path)


def test_a_cut_off_file_is_told(copy: Path) -> None:
    weights = copy / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(InputError, match="cannot load unet"):
        pipeline.load(copy)


def test_weights_in_another_format_are_not_read(copy: Path) -> None:
    weights = copy / "vae" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(InputError, match="safetensors"):
        pipeline.load(copy)


def test_weights_that_are_not_finite_are_told(copy: Path) -> None:
    path = copy / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["conv_in.bias"][0] = torch.nan
    save_file(tensors, path)
    with pytest.raises(InputError, match=r"conv_in\.bias is not finite"):
        pipeline.load(copy)


def test_the_embedded_base_is_small_and_says_how_it_was_made() -> None:
    folder = pipeline.find("digits")
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 16e6
    assert json.loads((folder / "pretraining.json").read_text())["settings"]["seed"] == 0
