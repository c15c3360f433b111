"""Adapters, samplers and losses against those of diffusers, on a pipeline with random weights."""

import functools
import pickle
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from warmfed.core import ClientContext, ServerContext
from warmfed.core.rng import seeded, stream
from warmfed.core.tensors import sha256
from warmfed.core.training import Training
from warmfed.diffusion import lora as lora
from warmfed.diffusion import pipeline
from warmfed.diffusion.generator import LatentDiffusion
from warmfed.diffusion.losses import denoising_loss
from warmfed.utils.errors import InputError

with warnings.catch_warnings():
    # diffusers and transformers import modules of their own that are deprecated
    warnings.simplefilter("ignore")
    from diffusers import AutoencoderKL, DDPMScheduler, DPMSolverMultistepScheduler, StableDiffusionPipeline
    from diffusers.training_utils import compute_snr

    from warmfed.pretraining.pretrain import Pretraining, build

pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"  # diffusers' schedulers, NumPy 2
)
PROMPTS = ("a photo of the digit zero", "a photo of the digit one", "a photo of the digit two")
IMAGES = torch.randint(256, (12, 3, 32, 32), generator=stream("images"), dtype=torch.uint8)
TABLE = {"image": IMAGES, "label": torch.arange(12) % 3}
LABELS = torch.tensor([0, 1, 2, 1])


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Two pipeline folders, tiny and untrained: the embedded base's kind, and one with Stable Diffusion's autoencoder."""
    folder = tmp_path_factory.mktemp("bases")
    with seeded(stream("tiny")):
        parts = build(Pretraining(channels=4, decoder_width=8, widths=(16, 32), text_width=16, text_layers=1))
        autoencoder = AutoencoderKL(
            block_out_channels=(8, 8, 8),
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            norm_num_groups=4,
        )
    pipeline.save(parts, folder / "own")
    pipeline.save(replace(parts, vae=autoencoder), folder / "stable")
    return {name: str(folder / name) for name in ("own", "stable")}


@pytest.fixture(scope="module")
def base(bases: dict[str, str]) -> str:
    return bases["own"]


TRAINING = Training(optimizer="adamw", lr=0.02, epochs=2, batch_size=6, max_grad_norm=1.0)


@pytest.fixture(scope="module")
def generator(base: str) -> LatentDiffusion:
    return LatentDiffusion(base, rank=2, training=TRAINING, steps=3, guidance=2.0, batch_size=3)


def local(purpose: str = "adapt") -> ClientContext:
    return ClientContext(None, {"train": TABLE}, stream(purpose), "ink", PROMPTS)


def central(purpose: str = "sample") -> ServerContext:
    return ServerContext(None, stream(purpose))


@functools.cache
def adapted(generator: LatentDiffusion) -> dict[str, Tensor]:
    return dict(generator.adapt(local())[0])


def digest(generator: LatentDiffusion) -> list[str]:
    parts = lora.parts(generator.base, "cpu")
    return [sha256(model.state_dict()) for model in (parts.denoiser, parts.vae, parts.text_encoder)]


def test_adapting_twice_gives_the_same_bytes_and_leaves_the_base_alone(generator: LatentDiffusion) -> None:
    before = digest(generator)
    first, info = generator.adapt(local())
    generator.synthesize(first, PROMPTS, LABELS, central())
    second, again = generator.adapt(local())
    assert sha256(first) == sha256(second)
    assert info == again
    assert digest(generator) == before
    assert info["steps"] == 4
    assert sha256(generator.adapt(local("other"))[0]) != sha256(first)


def test_an_adapter_travels_in_16_bits_under_diffusers_names(generator: LatentDiffusion) -> None:
    adapter = adapted(generator)
    assert all(tensor.dtype == torch.float16 for tensor in adapter.values())
    assert {name.rpartition(".lora_")[2] for name in adapter if name != "prompts"} == {"A.weight", "B.weight"}
    assert all(name.startswith("unet.") and ".default." not in name for name in adapter if name != "prompts")
    assert adapter["prompts"].shape == (3, 16, 16)
    assert not torch.equal(adapter["prompts"], lora.parts(generator.base, "cpu").embed(PROMPTS)["prompt"].half())
    assert any(tensor.abs().max() > 0 for name, tensor in adapter.items() if ".lora_B." in name)


def test_samples_have_the_layout_of_images_that_were_read(generator: LatentDiffusion) -> None:
    assert generator.synthesize(None, PROMPTS, LABELS, ServerContext(None, stream("layout"))).is_contiguous()


def test_samples_depend_on_the_adapter_and_on_the_name_of_the_stream_only(generator: LatentDiffusion) -> None:
    first = generator.synthesize(adapted(generator), PROMPTS, LABELS, central())
    assert first.shape == (4, 3, 32, 32)
    assert first.dtype == torch.uint8
    plain = generator.synthesize(None, PROMPTS, LABELS, central())
    assert torch.equal(first, generator.synthesize(adapted(generator), PROMPTS, LABELS, central()))
    assert not torch.equal(first, plain)
    assert torch.equal(plain, generator.synthesize(None, PROMPTS, LABELS, central()))


def test_an_adapter_that_changes_nothing_is_the_base(generator: LatentDiffusion) -> None:
    model = lora.adapted(generator.base, PROMPTS, generator.rank, generator.target_modules, "cpu")
    neutral = lora.to_diffusers(lora.fresh(model, stream("fresh")))
    neutral["prompts"] = model.prompts.detach().clone()  # in 16 bits they would be rounded
    a = generator.synthesize(neutral, PROMPTS, LABELS, central())
    assert torch.equal(a, generator.synthesize(None, PROMPTS, LABELS, central()))


def test_without_learned_prompts_none_travel(generator: LatentDiffusion) -> None:
    silent = replace(generator, prompts=False)
    adapter = adapted(silent)
    assert "prompts" not in adapter
    silent.check(adapter, PROMPTS, "it")
    with pytest.raises(InputError, match="unknown tensor 'prompts'"):
        silent.check(adapted(generator), PROMPTS, "it")


# beside diffusers


@pytest.mark.parametrize("kind", ["own", "stable"])
def test_a_stable_diffusion_pipeline_loads_the_adapter_and_draws_the_same_images(
    kind: str, bases: dict[str, str], tmp_path: Path
) -> None:
    stable = StableDiffusionPipeline.from_pretrained(bases[kind], local_files_only=True)
    stable.set_progress_bar_config(disable=True)
    plain = LatentDiffusion(bases[kind], rank=2, prompts=False, training=TRAINING, steps=3, guidance=1.0)
    adapter = adapted(plain)
    plain.write(adapter, tmp_path, "ink")
    assert [path.name for path in tmp_path.iterdir()] == ["ink.safetensors"]
    noise = torch.randn(4, 4, 8, 8, generator=stream("sample"))

    def theirs(output: str) -> Tensor:
        asked = [PROMPTS[label] for label in LABELS]
        return stable(
            asked, latents=noise, num_inference_steps=3, guidance_scale=1.0, output_type=output, height=32, width=32
        ).images

    without = theirs("latent")
    stable.load_lora_weights(tmp_path, weight_name="ink.safetensors")
    model = lora.adapted(bases[kind], PROMPTS, 2, plain.target_modules, "cpu")
    with lora.applied(model, lora.to_peft(adapter)):
        ours = plain.denoise(
            model, lora.parts(bases[kind], "cpu"), noise, model.condition(LABELS), model.empty, stream("noise")
        )
    assert torch.allclose(theirs("latent"), ours, atol=1e-3, rtol=1e-3)
    assert (without - ours).abs().mean() > 0.1
    images = plain.synthesize(adapter, PROMPTS, LABELS, central())
    assert (255 * theirs("pt") - images).abs().max() < 2  # whole numbers, and merged against unmerged weights


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_the_sampler_is_a_plain_loop_of_diffusers_scheduler(generator: LatentDiffusion, guidance: float) -> None:
    parts = lora.parts(generator.base, "cpu")
    model = lora.adapted(generator.base, PROMPTS, generator.rank, generator.target_modules, "cpu")
    noise = torch.randn(4, 4, 8, 8, generator=stream("noise"))
    scheduler = DPMSolverMultistepScheduler.from_config(parts.scheduler.config)
    scheduler.set_timesteps(5)
    latents = noise * scheduler.init_noise_sigma
    with lora.applied(model, lora.to_peft(adapted(generator))), torch.no_grad():
        prompts, empty = model.prompts[LABELS], parts.embed([""])["prompt"].expand(4, -1, -1)
        for time in scheduler.timesteps:
            guided, plain = model.unet(latents, time, prompts).sample, model.unet(latents, time, empty).sample
            latents = scheduler.step(plain + guidance * (guided - plain), time, latents).prev_sample
        ours = replace(generator, steps=5, guidance=guidance).denoise(
            model, parts, noise, model.condition(LABELS), model.empty, stream("noise")
        )
    assert torch.allclose(ours, latents, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("gamma", [0.0, 5.0])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_loss_is_diffusers(prediction: str, gamma: float) -> None:
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type=prediction)
    latent, seen = torch.randn(8, 4, 4, 4, generator=stream("latent")), []

    def predict(noisy: Tensor, time: Tensor) -> Tensor:
        seen.append((noisy, time))
        return 0.3 * noisy

    with seeded(stream("loss")):
        found = denoising_loss(predict, latent, scheduler.alphas_cumprod, prediction, gamma)
    with seeded(stream("loss")):
        torch.rand(8)
        noise = torch.randn(latent.shape)
    ((noisy, time),) = seen
    assert all(125 * i <= t < 125 * (i + 1) for i, t in enumerate(time.tolist()))
    assert torch.allclose(noisy, scheduler.add_noise(latent, noise, time), atol=1e-6)
    target = noise if prediction == "epsilon" else scheduler.get_velocity(latent, noise, time)
    # the weight of the clean image's error: the ratio for noise, the ratio plus one for v, and never above gamma
    clean = compute_snr(scheduler, time) + (prediction == "v_prediction")
    weight = clean.clamp(max=gamma) / clean if gamma else torch.ones(8)
    wanted = (weight * (0.3 * noisy - target).square().mean((1, 2, 3))).mean()
    assert found.item() == pytest.approx(wanted.item(), abs=1e-6, rel=1e-5)


def test_an_unknown_prediction_is_refused() -> None:
    with pytest.raises(InputError, match="got 'sample'"):
        denoising_loss(lambda noisy, time: noisy, torch.zeros(2, 4, 2, 2), torch.linspace(0.9, 0.1, 10), "sample", 5.0)


# files


def test_an_adapter_survives_its_files(generator: LatentDiffusion, tmp_path: Path) -> None:
    adapter = adapted(generator)
    generator.write(adapter, tmp_path, "ink")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ink.prompts.safetensors", "ink.safetensors"]
    assert sha256(lora.read(tmp_path, "ink")) == sha256(adapter)
    assert "prompts" not in load_file(tmp_path / "ink.safetensors")


@pytest.mark.parametrize(
    "damage",
    [lambda data: data[:-9], lambda data: data[:50], lambda data: b"", lambda data: pickle.dumps({"unet": [1.0]})],
    ids=["truncated", "half of a header", "empty", "a pickle renamed"],
)
def test_a_damaged_file_is_refused(damage: Callable[[bytes], bytes], generator: LatentDiffusion, tmp_path: Path) -> None:
    generator.write(adapted(generator), tmp_path, "ink")
    path = tmp_path / "ink.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(InputError, match=r"adapter of site 'ink' at .* is damaged"):
        lora.read(tmp_path, "ink")


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot read the adapter of site 'ink'"):
        lora.read(tmp_path, "ink")


NAME = "unet.conv_in.lora_A.weight"
SPOILED: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "not a number": (lambda a: a.update({NAME: a[NAME] * torch.nan}), "not finite"),
    "infinite": (lambda a: a.update({NAME: a[NAME].clone().fill_(torch.inf)}), "not finite"),
    "one infinite prompt": (lambda a: a["prompts"][0, 0].fill_(-torch.inf), "'prompts' holds values that are not finite"),
    "another shape": (lambda a: a.update({NAME: a[NAME][..., :1]}), "has shape"),
    "another rank": (lambda a: a.update({NAME: a[NAME][:1]}), "has shape"),
    "a tensor less": (lambda a: a.pop(NAME), "lacks tensor"),
    "a tensor more": (lambda a: a.update({"unet.other.lora_A.weight": torch.ones(1)}), "unknown tensor"),
    "other classes": (lambda a: a.update({"prompts": a["prompts"][:2]}), "has shape"),
    "nothing": (lambda a: a.clear(), "lacks tensor"),
}


@pytest.mark.parametrize("name", SPOILED)
def test_a_spoiled_adapter_is_refused(name: str, generator: LatentDiffusion) -> None:
    spoil, words = SPOILED[name]
    adapter = {key: value.clone() for key, value in adapted(generator).items()}
    generator.check(adapter, PROMPTS, "the adapter of site 'ink'")
    spoil(adapter)
    with pytest.raises(InputError, match=words) as error:
        generator.check(adapter, PROMPTS, "the adapter of site 'ink'")
    assert str(error.value).startswith("the adapter of site 'ink'")


def test_an_adapter_of_another_rank_or_choice_of_layers_is_refused(generator: LatentDiffusion) -> None:
    for other in (replace(generator, rank=3), replace(generator, target_modules="attention")):
        with pytest.raises(InputError, match="another base"):
            other.check(adapted(generator), PROMPTS, "it")


def test_settings_that_cannot_be_are_refused() -> None:
    with pytest.raises(InputError, match="no target_modules 'atention'; did you mean 'attention'"):
        LatentDiffusion(target_modules="atention")
    with pytest.raises(InputError, match="at least 1"):
        LatentDiffusion(rank=0)


def test_the_base_folder_is_checked(base: str, tmp_path: Path) -> None:
    for name, spoil in {
        "nowhere": lambda folder: None,
        "empty": lambda folder: folder.mkdir(),
        "pickled": lambda folder: _copy(base, folder, "unet", lambda path: path.rename(path.with_suffix(".bin"))),
        "infinite": lambda folder: _copy(base, folder, "vae", _infinite),
    }.items():
        spoil(tmp_path / name)
        with pytest.raises(InputError):
            pipeline.load(tmp_path / name)


def _copy(base: str, folder: Path, part: str, spoil: Callable[[Path], object]) -> None:
    for path in Path(base).rglob("*"):
        if path.is_file():
            target = folder / path.relative_to(base)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    spoil(next((folder / part).glob("*.safetensors")))


def _infinite(path: Path) -> None:
    tensors = load_file(path)
    next(iter(tensors.values())).fill_(torch.inf)
    path.write_bytes(save(tensors))
