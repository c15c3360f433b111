"""Every family of pipelines: adaptation, files and samples, against plain diffusers."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pipelines
import pytest
import torch
from diffusers import DDIMScheduler
from peft import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor

from warmfed.core import ClientContext, GeneratorSpec, ServerContext
from warmfed.core.rng import seeded, stream
from warmfed.core.tensors import sha256
from warmfed.core.training import Training
from warmfed.diffusion import lora as lora
from warmfed.diffusion import pipeline
from warmfed.diffusion.concept_inversion import Concepts
from warmfed.diffusion.generator import LatentDiffusion
from warmfed.diffusion.losses import flow_loss
from warmfed.diffusion.sampler import draw, scheduler
from warmfed.runs.generators import build_generator
from warmfed.utils.errors import InputError

pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning",  # diffusers' schedulers, NumPy 2
    "ignore:`num_attention_heads`:UserWarning",
)
KINDS = tuple(pipelines.CLASSES)
PROMPTS = ("a photo of a cat", "a photo of a dog")
TABLE = {
    "image": torch.randint(256, (8, 3, 32, 32), generator=stream("images"), dtype=torch.uint8),
    "label": torch.arange(8) % 2,
}
LABELS = torch.tensor([0, 1, 1])
TRAINING = Training(optimizer="adamw", lr=0.02, epochs=2, batch_size=4, max_grad_norm=1.0)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("bases")
    return {kind: pipelines.write(kind, folder / kind) for kind in KINDS}


@pytest.fixture(scope="module")
def adapters(bases: dict[str, str]) -> dict[str, dict[str, Tensor]]:
    """An adapter of each base, of the denoiser only."""
    return {kind: dict(made(bases[kind]).adapt(local())[0]) for kind in KINDS}


def made(base: str, **changes: Any) -> LatentDiffusion:
    settings = {"rank": 2, "target_modules": "attention", "prompts": False, "training": TRAINING, "steps": 3, "guidance": 2.0}
    return LatentDiffusion(base, **settings | changes)


def conceived(generator: LatentDiffusion, signal: float) -> Concepts:
    return build_generator(generator, GeneratorSpec("concepts", TRAINING, signal))  # type: ignore[return-value]


def local() -> ClientContext:
    return ClientContext(None, {"train": TABLE}, stream("adapt"), "ink", PROMPTS)


def drawn(generator: LatentDiffusion, adapter: dict[str, Tensor] | None) -> Tensor:
    return generator.synthesize(adapter, PROMPTS, LABELS, ServerContext(None, stream("sample")))


def theirs(base: str, kind: str, **options: Any) -> Any:
    """The plain pipeline, sampling from the same seed with the same settings."""
    pipe = pipelines.opened(base, kind)
    pipe.scheduler = scheduler(pipe.scheduler, "dpm++")
    if kind == "sana":
        options |= {"complex_human_instruction": None, "use_resolution_binning": False}
    asked = [PROMPTS[label] for label in LABELS]
    options = {"guidance_scale": 2.0, "height": 32, "width": 32} | options
    return pipe(asked, num_inference_steps=3, generator=stream("sample"), output_type="pt", **options).images


@pytest.mark.parametrize("kind", KINDS)
def test_plain_diffusers_loads_the_adapter_and_draws_the_same_images(
    kind: str, bases: dict[str, str], adapters: dict[str, dict[str, Tensor]], tmp_path: Path
) -> None:
    generator = made(bases[kind])
    generator.check(adapters[kind], PROMPTS, "it")
    generator.write(adapters[kind], tmp_path, "ink")
    pipe = pipelines.opened(bases[kind], kind)
    without = theirs(bases[kind], kind)
    assert (255 * without - drawn(generator, None)).abs().max() < 1.1  # theirs are not yet rounded
    pipe.load_lora_weights(tmp_path, weight_name="ink.safetensors")
    try:
        ours = drawn(generator, adapters[kind])
        assert (255 * theirs(bases[kind], kind) - ours).abs().max() < 2  # whole numbers, and fused against unfused weights
        assert (255 * without - ours).abs().max() > 3
        # the file is what diffusers itself writes of these layers, byte for byte
        net = "transformer" if kind == "sana" else "unet"
        state = get_peft_model_state_dict(getattr(pipe, net), adapter_name="default_0")
        layers = {f"{net}_lora_layers": {name: tensor.half() for name, tensor in state.items()}}
        type(pipe).save_lora_weights(tmp_path / "theirs", **layers)
        written = (tmp_path / "theirs" / "pytorch_lora_weights.safetensors").read_bytes()
        assert written == (tmp_path / "ink.safetensors").read_bytes()
    finally:
        pipe.unload_lora_weights()


@pytest.mark.parametrize("kind", KINDS)
def test_learned_prompts_travel_too(kind: str, bases: dict[str, str], tmp_path: Path) -> None:
    generator = made(bases[kind], prompts=True)
    adapter = generator.adapt(local())[0]
    generator.write(adapter, tmp_path, "ink")
    again = lora.read(tmp_path, "ink")
    assert sha256(again) == sha256(adapter)
    assert sha256(generator.adapt(local())[0]) == sha256(adapter)
    first = drawn(generator, again)
    assert first.shape == (3, 3, 32, 32)
    assert torch.equal(first, drawn(generator, again))
    assert not torch.equal(first, drawn(generator, {**again, "prompts": 0 * again["prompts"]}))


@pytest.mark.parametrize("kind", KINDS)
def test_a_worn_adapter_leaves_no_trace(kind: str, bases: dict[str, str], adapters: dict[str, dict[str, Tensor]]) -> None:
    generator, parts = made(bases[kind]), lora.parts(bases[kind], "cpu")
    before = sha256(parts.denoiser.state_dict())
    fused = drawn(generator, adapters[kind])
    assert sha256(parts.denoiser.state_dict()) == before
    beside = drawn(replace(generator, fuse_lora=False), adapters[kind])
    assert (fused.int() - beside.int()).abs().max() <= 2
    model = lora.adapted(bases[kind], PROMPTS, 2, "attention", "cpu")
    held = {tensor.data_ptr() for tensor in parts.denoiser.parameters()}
    own = [tensor for name, tensor in model.denoiser.named_parameters() if ".lora_" not in name]
    assert all(tensor.data_ptr() in held for tensor in own)  # the base lies in memory once


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("kind", ["sd15", "sana"])
def test_the_base_in_16_bits(kind: str, dtype: str, bases: dict[str, str], adapters: dict[str, dict[str, Tensor]]) -> None:
    half = made(bases[kind], dtype=dtype)
    adapter, info = half.adapt(local())
    assert info["loss"] > 0
    assert {tensor.dtype for tensor in adapter.values()} == {torch.float16}
    assert lora.parts(bases[kind], "cpu", dtype).dtype == pipeline.DTYPES[dtype]
    images, whole = drawn(half, adapters[kind]), drawn(made(bases[kind]), adapters[kind])
    assert (images.float() - whole.float()).abs().mean() < 3
    assert not torch.equal(images, whole)


def test_another_size_than_the_base_was_made_for(bases: dict[str, str], adapters: dict[str, dict[str, Tensor]]) -> None:
    large = made(bases["sd15"], size=48)
    assert large.side == 48
    assert drawn(large, adapters["sd15"]).shape == (3, 3, 48, 48)
    with pytest.raises(InputError, match=r"not a multiple of 4; set generator\.size"):
        drawn(made(bases["sd15"], size=50), None)


def test_the_loss_of_a_flow_is_diffusers() -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    latent, seen = torch.randn(8, 4, 4, 4, generator=stream("latent")), []

    def predict(noisy: Tensor, time: Tensor) -> Tensor:
        seen.append((noisy, time))
        return 0.3 * noisy

    with seeded(stream("loss")):
        found = flow_loss(predict, latent, 3.0, 1000)
    with seeded(stream("loss")):
        level, noise = (torch.arange(8) + torch.rand(8)) / 8, torch.randn(latent.shape)
    ((noisy, time),) = seen
    euler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    sigma = euler.shift * level / (1 + (euler.shift - 1) * level)
    assert torch.allclose(time, 1000 * sigma)
    mixed = sigma.view(-1, 1, 1, 1) * noise + (1 - sigma.view(-1, 1, 1, 1)) * latent
    assert torch.allclose(noisy, mixed, atol=1e-6)
    assert found.item() == pytest.approx((0.3 * mixed - (noise - latent)).square().mean().item(), rel=1e-6)


# samplers


def test_ddim_is_diffusers_own(bases: dict[str, str]) -> None:
    """First-order DPM-Solver++ on the same times, against DDIMScheduler."""
    parts = lora.parts(bases["sd21"], "cpu")
    mine = scheduler(parts.scheduler, "ddim", "trailing")
    own = DDIMScheduler.from_config({**parts.scheduler.config, "timestep_spacing": "trailing", "set_alpha_to_one": True})
    mine.set_timesteps(5)
    own.set_timesteps(5)
    assert mine.timesteps.tolist() == own.timesteps.tolist()
    noise = torch.randn(2, 4, 8, 8, generator=stream("noise"))
    one = two = noise
    for time in own.timesteps:
        one, two = mine.step(0.5 * one, time, one).prev_sample, own.step(0.5 * two, time, two).prev_sample
    assert torch.allclose(one, two, atol=1e-3)


@pytest.mark.parametrize("kind", ["sd15", "sana"])
@pytest.mark.parametrize("sampler", ["dpm++", "ddim", "unipc", "lcm"])
def test_every_sampler_draws(sampler: str, kind: str, bases: dict[str, str]) -> None:
    if (kind, sampler) == ("sana", "lcm"):
        with pytest.raises(InputError, match="lcm needs a diffusion process"):
            drawn(made(bases[kind], sampler=sampler), None)
        return
    generator = made(bases[kind], sampler=sampler)
    first = drawn(generator, None)
    assert torch.equal(first, drawn(generator, None))
    assert first.float().std() > 1


class Noted(torch.nn.Module):
    """A denoiser that returns its conditioning and records the number of rows."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[int] = []

    def forward(self, noisy: Tensor, time: Tensor, condition: dict[str, Tensor]) -> Tensor:
        self.asked.append(len(noisy))
        return 0.1 * noisy + condition["prompt"].view(-1, 1, 1, 1)


def test_guidance_in_an_interval_costs_half_outside(bases: dict[str, str]) -> None:
    solver, model = scheduler(lora.parts(bases["sd15"], "cpu").scheduler, "dpm++", "trailing"), Noted()
    noise = torch.randn(2, 1, 4, 4, generator=stream("noise"))
    told, empty = {"prompt": torch.tensor([1.0, 2.0])}, {"prompt": torch.tensor([0.5])}

    def run(guidance: float, interval: tuple[float, float]) -> Tensor:
        solver.set_timesteps(4)  # 999, 749, 499, 249
        model.asked.clear()
        return draw(model, solver, noise, told, empty, guidance, interval)

    everywhere = run(3.0, (0.0, 1.0))
    assert model.asked == [4, 4, 4, 4]
    run(3.0, (0.4, 0.8))
    assert model.asked == [2, 4, 4, 2]
    assert torch.equal(run(3.0, (0.0, 0.1)), run(1.0, (0.0, 1.0)))
    assert model.asked == [2, 2, 2, 2]
    # the prediction is linear in what is told, so guidance is a prompt further away: 0.5 + 3·(1 - 0.5), 0.5 + 3·(2 - 0.5)
    told = {"prompt": torch.tensor([2.0, 5.0])}
    assert torch.allclose(everywhere, run(1.0, (0.0, 1.0)), atol=1e-4)


def test_a_negative_prompt_is_the_pipelines(bases: dict[str, str]) -> None:
    for kind in KINDS:
        ours = drawn(made(bases[kind], negative_prompt="bad picture"), None)
        said = theirs(bases[kind], kind, negative_prompt="bad picture" if kind == "sana" else ["bad picture"] * 3)
        assert (255 * said - ours).abs().max() < 1.1, kind
        assert not torch.equal(ours, drawn(made(bases[kind]), None))


def test_a_compiled_sampler_draws_the_same(bases: dict[str, str], adapters: dict[str, dict[str, Tensor]]) -> None:
    plain, compiled = made(bases["sd15"]), made(bases["sd15"], compile="eager")
    assert torch.equal(drawn(plain, adapters["sd15"]), drawn(compiled, adapters["sd15"]))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sampler": "euler"}, "sampler must be one of dpm"),
        ({"dtype": "int8"}, "dtype must be one of fp32, bf16, fp16"),
        ({"guidance_interval": (0.8, 0.2)}, "two shares in order"),
        ({"spacing": "even"}, "spacing must be one of"),
        ({"sampler": "lcm", "spacing": "trailing"}, r"remove generator\.spacing"),
        ({"min_snr_gamma": -1.0}, r"generator\.min_snr_gamma must be at least 0"),
        ({"dropout": 1.5}, r"generator\.dropout from 0 to 1"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        made("digits", **changes)


# where bases lie


def test_a_repository_is_looked_for_in_the_hubs_cache_only(
    bases: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        InputError, match=r"the hub's cache has no .*models--lab--base.*`hf download lab/base --include"
    ) as told:
        pipeline.load("lab/base")
    assert str(tmp_path) in str(told.value)
    with pytest.raises(InputError, match="hf download lab/base --revision v2 --include"):
        pipeline.load("lab/base@v2")
    snapshot = tmp_path / "models--lab--base" / "snapshots" / "abc"
    shutil.copytree(bases["sd15"], snapshot)
    (tmp_path / "models--lab--base" / "refs").mkdir()
    (tmp_path / "models--lab--base" / "refs" / "main").write_text("abc")
    assert pipeline.fingerprint("lab/base") == pipeline.fingerprint(bases["sd15"]) == pipeline.fingerprint("lab/base@abc")
    (snapshot / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(InputError, match=r"unet/diffusion_pytorch_model\.safetensors is missing.*hf download lab/base"):
        pipeline.load("lab/base")


def test_weights_in_16_bits_or_in_shards_are_found(bases: dict[str, str], tmp_path: Path) -> None:
    folder, noise = tmp_path / "half", torch.randn(1, 4, 8, 8, generator=stream("noise"))
    shutil.copytree(bases["sd15"], folder)
    for path in list(folder.rglob("*.safetensors")):
        path.rename(path.with_suffix(".fp16.safetensors"))
    (folder / "unet" / "diffusion_pytorch_model.fp16.safetensors").unlink()
    whole = pipeline.load(bases["sd15"]).denoiser
    whole.save_pretrained(folder / "unet", max_shard_size="100KB")
    assert sum(name.startswith("unet/diffusion_pytorch_model-") for name in pipeline.files(folder)) > 1
    parts = pipeline.load(folder)
    told = parts.embed(["a cat"])
    for parameter in [*parts.denoiser.parameters(), *whole.parameters()]:
        parameter.data = parameter.data.clone()  # where a file puts them in memory may change last bits
    assert torch.equal(
        parts.family.ask(parts.denoiser, noise, torch.tensor(9), told, 4, torch.float32),
        parts.family.ask(whole, noise, torch.tensor(9), told, 4, torch.float32),
    )
    next((folder / "unet").glob("*-00002-*")).unlink()
    with pytest.raises(InputError, match="-00002-"):
        pipeline.find(folder)


def test_a_pipeline_of_another_kind_is_told(bases: dict[str, str], tmp_path: Path) -> None:
    shutil.copytree(bases["sd15"], tmp_path / "other")
    index = tmp_path / "other" / "model_index.json"
    index.write_text(index.read_text().replace("StableDiffusionPipeline", "FluxPipeline"))
    with pytest.raises(InputError, match="StableDiffusionXLPipeline, SanaPipeline, got 'FluxPipeline'"):
        pipeline.find(tmp_path / "other")


def test_an_adapter_of_another_family_is_refused(bases: dict[str, str], adapters: dict[str, dict[str, Tensor]]) -> None:
    with pytest.raises(InputError, match="made for another base"):
        made(bases["sana"]).check(adapters["sd15"], PROMPTS, "it")


def test_a_spoiled_file_of_weights_is_told(bases: dict[str, str], tmp_path: Path) -> None:
    shutil.copytree(bases["sana"], tmp_path / "spoiled")
    path = tmp_path / "spoiled" / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    next(iter(tensors.values())).fill_(torch.inf)
    save_file(tensors, path)
    with pytest.raises(InputError, match="is not finite"):
        pipeline.load(tmp_path / "spoiled")


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        ("sd15", {"sampler": "lcm", "steps": 60}, "the sampler lcm cannot take 60 steps with this base"),
        ("sana", {"sampler": "lcm"}, "this base is a flow"),
        ("sd15", {"compile": "indcutor"}, r"no backend 'indcutor'; did you mean 'inductor'"),
    ],
)
def test_what_a_base_cannot_draw_by_is_told_before_anything_learns(
    kind: str, changes: dict[str, Any], words: str, bases: dict[str, str]
) -> None:
    made(bases[kind]).check_settings()
    with pytest.raises(InputError, match=words):
        made(bases[kind], **changes).check_settings()


@pytest.mark.parametrize(
    ("kind", "changes", "signal", "words"),
    [
        ("sd15", {"sampler": "unipc"}, 0.1, "the sampler unipc cannot take 3 steps from time"),
        ("sd15", {}, 0.9995, "only 1 times are left"),
        ("sana", {}, 0.1, "needs a diffusion process"),
        ("sd15", {"adapters": {"ink": "ink.safetensors"}}, 0.1, "send latents, not adapters"),
    ],
)
def test_so_is_what_noised_latents_cannot_be_drawn_by(
    kind: str, changes: dict[str, Any], signal: float, words: str, bases: dict[str, str]
) -> None:
    conceived(made(bases["sd15"]), 0.1).check_settings()
    with pytest.raises(InputError, match=words):
        conceived(made(bases[kind], **changes), signal).check_settings()


@pytest.mark.parametrize(
    ("file", "setting", "words"),
    [
        ("unet/config.json", {"time_cond_proj_dim": 8}, "take the guidance as an input"),
        ("vae/config.json", {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}, "by its own mean"),
        ("vae/config.json", {"_class_name": "AsymmetricAutoencoderKL"}, "is of an AsymmetricAutoencoderKL"),
        ("scheduler/scheduler_config.json", {"_class_name": "EDMEulerScheduler", "sigma_data": 0.5}, "EDMEulerScheduler"),
    ],
)
def test_a_base_that_would_be_drawn_wrongly_is_refused(
    file: str, setting: dict[str, Any], words: str, bases: dict[str, str], tmp_path: Path
) -> None:
    shutil.copytree(bases["sd15"], tmp_path / "base")
    config = json.loads((tmp_path / "base" / file).read_text())
    (tmp_path / "base" / file).write_text(json.dumps(config | setting))
    with pytest.raises(InputError, match=f"{file} .*{words}.*set another base"):
        pipeline.find(tmp_path / "base")


def test_a_tokenizer_that_does_not_say_its_length_reads_as_far_as_its_encoder(bases: dict[str, str], tmp_path: Path) -> None:
    shutil.copytree(bases["sd15"], tmp_path / "base")
    file = tmp_path / "base" / "tokenizer" / "tokenizer_config.json"
    config = json.loads(file.read_text())
    del config["model_max_length"]
    file.write_text(json.dumps(config))
    found, wanted = (pipeline.load(base).embed(PROMPTS)["prompt"] for base in (tmp_path / "base", bases["sd15"]))
    assert torch.equal(found, wanted)
