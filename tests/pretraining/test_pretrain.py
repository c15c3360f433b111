"""Pre-training: it writes a complete pipeline folder that diffusers opens; damaged folders give an error of one line."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import tomli_w
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from warmfed.cli.parser import main
from warmfed.core.rng import seeded, stream
from warmfed.data import Federation, arrays
from warmfed.data.rendered_digits import rendered
from warmfed.diffusion import pipeline
from warmfed.diffusion.pipeline_families import STABLE
from warmfed.pretraining.captions import ImageSet, digits, pictures, tokenizer
from warmfed.pretraining.pretrain import Pretraining, build, pretrain, principal_patches
from warmfed.utils.errors import InputError

TINY = Pretraining(
    images=64, channels=4, decoder_width=8, decoder_steps=2, decoder_batch_size=8, widths=(16, 16), text_width=16,
    text_layers=1, steps=3, batch_size=16, warmup=1, classifier_epochs=1,
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
    images = rendered(3, stream("images"))["image"]
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
    images = rendered(256, stream("patches"))["image"]
    with seeded(stream("weights")):
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


@pytest.mark.parametrize(("value", "dtype"), [(torch.nan, "fp32"), (-torch.inf, "bf16"), (1e5, "fp16")])
def test_weights_that_are_not_finite_are_told(copy: Path, value: float, dtype: str) -> None:
    path = copy / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["conv_in.bias"][0] = value
    save_file(tensors, path)
    with pytest.raises(InputError, match=r"conv_in\.bias is not finite"):
        pipeline.load(copy, dtype=dtype)


def test_the_embedded_base_is_small_and_says_how_it_was_made() -> None:
    folder = pipeline.find("digits")
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 16e6
    assert json.loads((folder / "pretraining.json").read_text())["settings"]["seed"] == 0


# Images of one's own


PHOTOS = replace(TINY, side=64, flip=True)


@pytest.fixture(scope="module")
def pets() -> ImageSet:
    return pictures(public(64), 64)


def public(side: int) -> Federation:
    """Two sites with a third of their images public."""
    draw = torch.Generator().manual_seed(0)
    images = {site: torch.randint(256, (30, 3, side, side), generator=draw, dtype=torch.uint8) for site in ("home", "shelter")}
    label = torch.arange(30) % 2
    return arrays({s: (table, label) for s, table in images.items()}, classes=("cat", "guinea_pig"), public=0.33)


def test_what_a_base_learns_of_pictures_is_what_is_public(pets: ImageSet) -> None:
    federation = public(64)
    assert federation.public is not None
    assert sorted(i.sum().item() for i in pets.table["image"]) == sorted(i.sum().item() for i in federation.public["image"])
    assert pets.captions[1][0] == "a photo of a guinea_pig"
    assert pets.captions[1][-1] == "an image of guinea pig"
    assert {len(captions) for captions in pets.captions} == {6}
    whole = replace(federation, public=None)
    assert len(pictures(whole, 64).table["label"]) == 60 - len(federation.public["label"])
    with pytest.raises(InputError, match="64×64"):
        pictures(public(32), 64)


@pytest.mark.parametrize(
    ("classes", "template", "words"),
    [
        (("犬", "猫"), "a photo of a {}", "classes '犬' and '猫' have a caption with equal tokens: the letters 犬 猫"),
        (("cat", "dog"), "a very long sentence of many words before the only word that is different {}", "it reads 16 tokens"),
        (("a photo of a cat", "cat"), "a {}", "classes 'a photo of a cat' and 'cat'"),
    ],
)
def test_classes_with_a_caption_of_equal_tokens_are_refused(
    classes: tuple[str, str], template: str, words: str, tmp_path: Path
) -> None:
    images = pictures(replace(public(64), classes=classes, template=template), 64)
    with pytest.raises(InputError, match=words):
        pretrain(PHOTOS, tmp_path / "base", work=tmp_path / "work", pictures=images)
    assert not list(tmp_path.iterdir())


def test_a_base_of_pictures_draws_at_their_size(pets: ImageSet, tmp_path: Path) -> None:
    record = pretrain(PHOTOS, tmp_path / "pets", pictures=pets)
    assert record["pictures"]["classes"] == ["cat", "guinea_pig"]
    assert pipeline.side(tmp_path / "pets") == 64
    parts = pipeline.load(tmp_path / "pets")
    latents = parts.encode(pets.table["image"][:2])[0]
    assert latents.shape == (2, 4, 8, 8)
    assert parts.decode(latents).shape == (2, 3, 64, 64)
    assert parts.tokenizer.tokenize("guinea pig") == ["guinea</w>", "pig</w>"]
    head = load_file(tmp_path / "pets" / "classifier.safetensors")["head.weight"]
    assert head.shape == (2, 128)


def test_principal_patches_are_the_components_of_large_patches_too(pets: ImageSet) -> None:
    """On images whose patches lie in the span of four components, the projection and back lose nothing."""
    basis = torch.randn(4, 192, generator=stream("basis"))
    patches = (torch.randn(50, 8, 8, 4, generator=stream("weights")) @ basis).reshape(50, 8, 8, 3, 8, 8)
    images = patches.permute(0, 3, 1, 4, 2, 5).reshape(50, 3, 64, 64)
    images = ((images - images.min()) / (images.max() - images.min()) * 255).round().to(torch.uint8)
    with seeded(stream("weights")):
        encoder = build(PHOTOS).vae.encoder
    principal_patches(encoder, images)
    with torch.no_grad():
        latents = encoder(images.float() / 127.5 - 1).permute(0, 2, 3, 1).reshape(-1, 4)
    cells = images.float().reshape(50, 3, 8, 8, 8, 8).permute(0, 2, 4, 1, 3, 5).reshape(-1, 192)
    cells = cells - cells.mean(0)
    left = cells - latents @ torch.linalg.lstsq(latents, cells).solution
    assert left.square().mean() < 1e-2 * cells.square().mean()


def test_a_pretraining_that_is_killed_goes_on_to_the_same_bytes(pets: ImageSet, tmp_path: Path) -> None:
    settings = replace(PHOTOS, steps=6, snapshot=2, at=(1, 5))
    pretrain(settings, tmp_path / "whole", pictures=pets)
    steps: list[int] = []

    class Killed(BaseException): ...

    def kill(phase: str, step: int, total: int) -> None:
        if phase == "denoiser":
            steps.append(step)
            if len(steps) == 5:
                raise Killed

    with pytest.raises(Killed):
        pretrain(settings, tmp_path / "base", kill, tmp_path / "work", pictures=pets)
    pretrain(settings, tmp_path / "base", kill, tmp_path / "work", pictures=pets)
    assert steps == [1, 2, 3, 4, 5, 5, 6]
    made = [pipeline.fingerprint(tmp_path / f"whole{when}") for when in ("-1", "-5", "")]
    assert made == [pipeline.fingerprint(tmp_path / f"base{when}") for when in ("-1", "-5", "")]
    assert len(set(made)) == 3
    told = [json.loads((tmp_path / name / "pretraining.json").read_text()) for name in ("whole", "base")]
    assert told[0].keys() == told[1].keys()  # phases of the first call too
    assert told[0]["decoder_loss"] == told[1]["decoder_loss"]
    bases = ("whole", "whole-1", "base-5", "base")
    assert len({(tmp_path / name / "classifier.safetensors").read_bytes() for name in bases}) == 1
    before = tiny.digest(tmp_path)
    with pytest.raises(InputError, match="other settings or images"):
        pretrain(replace(settings, steps=7), tmp_path / "other", work=tmp_path / "work", pictures=pets)
    assert tiny.digest(tmp_path) == before
    phase = tmp_path / "work" / "latents.safetensors"
    phase.write_bytes(phase.read_bytes()[:-9])
    with pytest.raises(InputError, match=r"latents\.safetensors is damaged .*; remove it to repeat this phase"):
        pretrain(settings, tmp_path / "other", work=tmp_path / "work", pictures=pets)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"side": 48}, "side must be 16, 32, 64 or 128"),
        ({"side": 16, "channels": 13}, "has 12 values; set channels"),
        ({"at": (1, 3)}, "at must have steps above 0 and below 3"),
        ({"characters": "12a"}, "characters must be digits"),
        ({"characters": ""}, "characters must be digits"),
        ({"widths": (20, 32)}, "widths must be multiples of 16"),
        ({"text_width": 18}, "text_width must be a multiple of 4"),
        ({"threads": 0}, "threads must be at least 1"),
        ({"channels": 0}, "channels must be at least 1"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"dropout": 2.0}, "dropout must be from 0 to 1"),
        ({"snapshot": -1}, "snapshot at least 0"),
        ({"lr": -1e-3}, "lr and decoder_lr must be above 0"),
        ({"decoder_noise": float("nan")}, "decoder_noise at least 0"),
    ],
)
def test_settings_that_no_base_can_have(bad: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        replace(TINY, **bad)


def test_the_same_command_goes_on_with_a_base_that_was_begun(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings, base, work = TINY, tmp_path / "base", tmp_path / "work"

    def interrupt(phase: str, step: int, total: int) -> None:
        if (phase, step) == ("classifier", 1):  # the denoiser is there, and what is written last is not
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pretrain(settings, base, interrupt, work)
    assert json.loads((base / "pretraining.json").read_text())["denoiser_steps"] == 3
    changed = [(f.name, getattr(settings, f.name)) for f in fields(settings) if getattr(settings, f.name) != f.default]
    asked = [
        "pretrain",
        "--quiet",
        "--out",
        str(base),
        "--set",
        *(f"{n}={list(v) if isinstance(v, tuple) else v}" for n, v in changed),
    ]
    assert main(asked) == 2
    assert "exists already" in capsys.readouterr().err
    assert main([*asked, "--work", str(work)]) == 0
    assert (base / "classifier.safetensors").exists()
    assert main([*asked, "--work", str(work)]) == 2


def test_a_file_says_what_a_base_is_made_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.pictures(tmp_path / "pets", {"home": {"cat": 30, "dog": 30}})
    few = {name: value for name, value in asdict(TINY).items() if value != getattr(Pretraining(), name)}
    study = {"compare": {"seeds": [0]}, "pretraining": few, "data": {"source": "folder", "options": {"image_size": 32}}}
    (tmp_path / "study.toml").write_text(tomli_w.dumps(study))
    asked = ["pretrain", str(tmp_path / "study.toml"), "--out", str(tmp_path / "base"), "--set", "steps=2"]
    assert main([*asked, f"data.path={tmp_path / 'pets'}"]) == 0
    written = json.loads((tmp_path / "base" / "pretraining.json").read_text())
    assert (written["settings"]["steps"], written["settings"]["batch_size"], written["pictures"]["images"]) == (2, 16, 60)
    again = [
        "pretrain",
        str(tmp_path / "study.toml"),
        "--out",
        str(tmp_path / "other"),
        "--set",
        f"data.path={tmp_path / 'pets'}",
    ]
    for more, words in ((["side=24"], "16, 32, 64 or 128"), (["side=64"], "64×64"), (["data.options.channels=1"], "colour")):
        capsys.readouterr()
        assert main([*again, *more]) == 2
        assert words in capsys.readouterr().err
    assert not (tmp_path / "other").exists()
    capsys.readouterr()
    assert main(["pretrain", "--out", str(tmp_path / "other"), "--set", "side=64"]) == 2
    assert "set your own images" in capsys.readouterr().err
