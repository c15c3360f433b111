"""Options of an adapter's training, on a Stable Diffusion with random weights."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pipelines
import psutil
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from warmfed.algorithms.warmfed import WarmFed
from warmfed.config import parse
from warmfed.core import ClientContext, Empty, ServerContext
from warmfed.core.messages import Message
from warmfed.core.rng import seeded, stream
from warmfed.core.tensors import Table, Tensors, sha256
from warmfed.core.training import Training
from warmfed.diffusion import lora as lora
from warmfed.diffusion import lora_training as adapting
from warmfed.diffusion.cost import micro_batch, plan
from warmfed.diffusion.generator import LatentDiffusion
from warmfed.diffusion.lora_training import LoraTask, latents
from warmfed.diffusion.losses import denoising_loss, drawn
from warmfed.diffusion.settings import Lora
from warmfed.transports.client import Client
from warmfed.transports.in_process import InProcess
from warmfed.utils.errors import InputError

pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning",  # diffusers' schedulers, NumPy 2
    "ignore:`num_attention_heads`:UserWarning",
)
PROMPTS = ("a photo of a cat", "a photo of a dog")
LABELS = torch.tensor([0, 1, 1])


def table(name: str, count: int) -> dict[str, Tensor]:
    image = torch.randint(256, (count, 3, 32, 32), generator=stream(name), dtype=torch.uint8)
    return {"image": image, "label": torch.arange(count) % 2}


TRAIN, HELD = table("train", 8), table("held", 5)
TRAINING = Training(optimizer="adamw", lr=0.02, epochs=2, batch_size=4, max_grad_norm=1.0)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return pipelines.write("sd15", tmp_path_factory.mktemp("bases") / "sd15")


@pytest.fixture(scope="module")
def plain(base: str) -> LatentDiffusion:
    return LatentDiffusion(
        base, rank=2, target_modules="attention", prompts=False, views=1, training=TRAINING, steps=3, guidance=1.0
    )


def local(**more: Any) -> ClientContext:
    return ClientContext(None, {"train": TRAIN, "validation": HELD}, stream("adapt"), "ink", PROMPTS, **more)


def with_(generator: LatentDiffusion, **options: Any) -> LatentDiffusion:
    return replace(generator, lora=replace(generator.lora, **options))


def task(generator: LatentDiffusion, prior: Table | None = None) -> LoraTask:
    return LoraTask(generator._model(PROMPTS, "cpu"), generator, generator._parts("cpu"), prior)


def batch(of: LoraTask) -> dict[str, Tensor]:
    with seeded(stream("batch")):
        return of.draw(latents(local(), "train", of.settings, of.base))


def close(a: Tensors, b: Tensors, atol: float) -> bool:
    return a.keys() == b.keys() and all(torch.allclose(a[name].float(), b[name].float(), atol=atol) for name in a)


# the layers


def test_the_scale_is_alpha_over_the_rank_or_over_its_root() -> None:
    assert Lora().scale(4) == 1
    assert Lora(alpha=8).scale(4) == 2
    assert Lora(alpha=8, rslora=True).scale(4) == 4
    assert Lora(rslora=True).scale(4) == 2


def test_an_adapter_leaves_with_its_scale_in_it(plain: LatentDiffusion) -> None:
    """The scaled layers of the training predict the same as the model with the sent adapter."""
    model, noisy = plain._model(PROMPTS, "cpu"), torch.randn(2, 4, 8, 8, generator=stream("noisy"))
    inner = {
        name: torch.randn(value.shape, generator=stream(name)) / 4
        for name, value in lora.fresh(model, stream("fresh")).items()
        if ".lora_" in name
    }
    condition, time = model.condition(torch.tensor([0, 1])), torch.tensor([10, 500])
    with torch.no_grad():
        with lora.scaled(model, 3.0):
            model.load_state_dict(inner, strict=False)
            learned = model(noisy, time, condition)
        with lora.applied(model, {name: value.float() for name, value in lora.to_peft(lora.to_diffusers(inner, 3.0)).items()}):
            worn = model(noisy, time, condition)
        with lora.applied(model, inner):
            unscaled = model(noisy, time, condition)
    assert torch.allclose(learned, worn, atol=5e-3)
    assert not torch.allclose(learned, unscaled, atol=0.05)


def test_alpha_changes_what_is_learned(plain: LatentDiffusion) -> None:
    first = plain.adapt(local())[0]
    assert sha256(with_(plain, alpha=2.0).adapt(local())[0]) == sha256(first)
    assert sha256(with_(plain, alpha=8.0).adapt(local())[0]) != sha256(first)
    assert sha256(with_(plain, rslora=True).adapt(local())[0]) != sha256(first)
    assert sha256(plain.adapt(local())[0]) == sha256(first)  # the shared model is as it was


@pytest.mark.parametrize("targets", ["attention", "transformer", "all"])
def test_targets_choose_the_layers(targets: str, plain: LatentDiffusion) -> None:
    attention = r"to_[qkv]|to_out\.0"
    transformer = attention + r"|net\.0\.proj|net\.2|proj_in|proj_out"
    convolutions = transformer + r"|conv1|conv2|conv_shortcut|time_emb_proj|conv_in|conv_out"
    kinds = {"attention": attention, "transformer": transformer, "all": convolutions}
    wanted = {
        name
        for name, module in plain._parts("cpu").denoiser.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and re.search(rf"(^|\.)({kinds[targets]})$", name)
    }
    found = {
        name.removeprefix("unet.").removesuffix(".lora_A.weight")
        for name in replace(plain, target_modules=targets).adapt(local())[0]
        if "lora_A" in name
    }
    assert found == wanted
    assert len(found) == {"attention": 32, "transformer": 48, "all": len(wanted)}[targets]


@pytest.mark.parametrize("targets", ["attention", "all"])
def test_dora_has_a_magnitude_for_each_output_and_plain_diffusers_draws_the_same(
    targets: str, base: str, plain: LatentDiffusion, tmp_path: Path
) -> None:
    generator = with_(replace(plain, target_modules=targets), dora=True)
    blank = lora.to_diffusers(lora.fresh(generator._model(PROMPTS, "cpu"), stream("fresh")))
    unchanged = generator.synthesize({n: t for n, t in blank.items() if n != "prompts"}, PROMPTS, LABELS, drawing())
    assert (unchanged.int() - generator.synthesize(None, PROMPTS, LABELS, drawing()).int()).abs().max() <= 1
    adapter, _ = generator.adapt(local())
    layers = [name for name in adapter if name.endswith(".lora_A.weight")]
    for name in layers:
        magnitude = adapter[name.replace(".lora_A.weight", ".lora_magnitude_vector")]
        assert magnitude.dtype == torch.float32
        assert magnitude.numel() == len(adapter[name.replace("lora_A", "lora_B")])
    assert len(adapter) == 3 * len(layers)
    generator.check(adapter, PROMPTS, "it")
    generator.write(adapter, tmp_path, "ink")
    assert sha256(lora.read(tmp_path, "ink")) == sha256(adapter)
    pipe = pipelines.opened(base, "sd15")
    pipe.load_lora_weights(tmp_path, weight_name="ink.safetensors")
    noisy, time = torch.randn(2, 4, 8, 8, generator=stream("noisy")), torch.tensor([10, 500])
    model = generator._model(PROMPTS, "cpu")
    with torch.no_grad():
        theirs = pipe.unet(noisy, time, model.prompts).sample
        with lora.applied(model, lora.to_peft(adapter)):
            ours = model(noisy, time, model.condition(torch.tensor([0, 1])))
    pipe.unload_lora_weights()
    assert torch.allclose(theirs, ours, atol=1e-3)


def drawing() -> ServerContext:
    return ServerContext(None, stream("draw"))


def test_a_learned_token_stands_in_the_place_of_the_last_word(base: str, plain: LatentDiffusion, tmp_path: Path) -> None:
    generator = replace(plain, target_modules="none", lora=Lora(textual_inversion=True))
    before = sha256(generator._parts("cpu").text_encoder.state_dict())
    adapter, info = generator.adapt(local())
    assert {name: tuple(value.shape) for name, value in adapter.items()} == {"tokens": (2, 16)}
    assert info["steps"] == 4
    assert sha256(generator._parts("cpu").text_encoder.state_dict()) == before
    start = lora.fresh(generator._model(PROMPTS, "cpu"), stream("fresh"))["tokens"]
    assert not torch.equal(adapter["tokens"], start.half())
    assert torch.equal(
        generator.synthesize({"tokens": start}, PROMPTS, LABELS, drawing()),
        plain.synthesize(None, PROMPTS, LABELS, drawing()),
    )
    generator.check(adapter, PROMPTS, "it")
    generator.write(adapter, tmp_path, "ink")
    assert [path.name for path in tmp_path.iterdir()] == ["ink.tokens.safetensors"]
    assert sha256(lora.read(tmp_path, "ink")) == sha256(adapter)
    # plain diffusers, a file's tokens one by one
    pipe = pipelines.opened(pipelines.write("sd15", tmp_path / "own"), "sd15")
    for name, word in load_file(tmp_path / "ink.tokens.safetensors").items():
        pipe.load_textual_inversion({name: word.float()})
    ids = pipe.tokenizer(PROMPTS[0], padding="max_length", return_tensors="pt").input_ids
    ids[0, ids[0].tolist().index(pipe.tokenizer.eos_token_id) - 1] = pipe.tokenizer.convert_tokens_to_ids("<ink-0>")
    model = generator._model(PROMPTS, "cpu")
    model.load_state_dict({"tokens": adapter["tokens"].float()}, strict=False)
    with torch.no_grad():
        assert torch.allclose(pipe.text_encoder(ids)[0][0], model.condition(torch.tensor([0]))["prompt"][0], atol=1e-5)


def test_tokens_are_for_one_clip_text_encoder(tmp_path: Path, plain: LatentDiffusion) -> None:
    generator = with_(replace(plain, base=pipelines.write("sdxl", tmp_path / "sdxl")), textual_inversion=True)
    with pytest.raises(InputError, match="textual_inversion needs one CLIP text encoder, Stable Diffusion XL has others"):
        generator.adapt(local())


# the loss


def test_offset_noise_moves_whole_channels() -> None:
    latent = torch.zeros(64, 4, 8, 8)
    with seeded(stream("offset")):
        place, noise = drawn(latent)
    with seeded(stream("offset")):
        same_place, moved = drawn(latent, 0.5)
    assert torch.equal(place, same_place)
    shift = moved - noise
    assert torch.allclose(shift, shift[:, :, :1, :1].expand_as(shift), atol=1e-6)
    assert shift[:, :, 0, 0].std().item() == pytest.approx(0.5, abs=0.06)


def test_prior_preservation_is_the_weighted_sum_of_two_losses(plain: LatentDiffusion) -> None:
    generator = with_(plain, prior_loss_weight=0.3, prior_images=3)
    samples = adapting.prior_samples(local(), generator, generator._parts("cpu"), generator.drawn_latents)
    assert samples["label"].tolist() == [0, 0, 0, 1, 1, 1]
    both, alone = task(generator, samples), task(plain)
    found = batch(both)
    model, parts = both.model, generator._parts("cpu")
    model.load_state_dict(dict(lora.to_peft(plain.adapt(local())[0])), strict=False)
    told = parts.embed(PROMPTS)["prompt"][found["prior/label"]]

    def predict(noisy: Tensor, time: Tensor) -> Tensor:
        return model(noisy, time, {"prompt": told})

    scheduler, at = parts.scheduler, (found["prior/place"], found["prior/noise"])
    kept = denoising_loss(predict, found["prior/latent"], scheduler.alphas_cumprod, "epsilon", generator.min_snr_gamma, at)
    with torch.no_grad():
        assert both.loss(model, found).item() == pytest.approx(alone.loss(model, found).item() + 0.3 * kept.item(), rel=1e-6)
    assert kept.item() > 0


def test_the_prior_is_drawn_by_the_base_alone_and_costs_no_random_number(plain: LatentDiffusion) -> None:
    generator, ctx = with_(plain, prior_loss_weight=1.0, prior_images=2), local()
    before = ctx.rng.get_state()
    first = adapting.prior_samples(ctx, generator, generator._parts("cpu"), generator.drawn_latents)
    assert torch.equal(ctx.rng.get_state(), before)
    assert torch.equal(
        first["latent"], adapting.prior_samples(ctx, generator, generator._parts("cpu"), generator.drawn_latents)["latent"]
    )
    adapter = generator.adapt(local())[0]
    assert sha256(adapter) == sha256(generator.adapt(local())[0])
    assert sha256(adapter) != sha256(plain.adapt(local())[0])


# the data


def test_flips_double_the_table(plain: LatentDiffusion) -> None:
    generator = replace(plain, views=2)
    parts = plain._parts("cpu")
    shifted, both = (latents(local(), "train", each, parts)["latent"] for each in (generator, with_(generator, flip=True)))
    assert shifted.shape == (8, 2, 4, 8, 8)
    assert both.shape == (8, 4, 4, 8, 8)
    assert torch.allclose(both[:, :2], shifted, atol=1e-5)
    mirrored = parts.encode(TRAIN["image"].flip(-1))[0]
    assert torch.allclose(both[:, 2], mirrored, atol=1e-5)
    held = latents(local(), "validation", with_(generator, flip=True), parts)
    assert held["latent"].shape == (5, 1, 4, 8, 8)


def test_latents_on_disk_are_those_in_memory_and_are_made_once(
    plain: LatentDiffusion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WARMFED_CACHE", str(tmp_path))
    generator = with_(replace(plain, views=2), cache="disk")
    wanted = replace(plain, views=2).adapt(local())
    assert sha256(generator.adapt(local())[0]) == sha256(wanted[0])
    (path,) = tmp_path.iterdir()
    assert path.stat().st_size == 16 * 4 * 8 * 8 * 4
    assert path.name.startswith("latents-")
    made = path.stat().st_mtime_ns
    assert generator.adapt(local())[1] == wanted[1]
    assert path.stat().st_mtime_ns == made
    other = ClientContext(None, {"train": HELD}, stream("adapt"), "ink", PROMPTS)
    generator.adapt(other)
    assert len(list(tmp_path.iterdir())) == 2


def test_latents_of_large_images_on_disk_are_made_in_the_same_batches(
    plain: LatentDiffusion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At 48 pixels the autoencoder's batch is 28; batches of 64 would change the last bits."""
    monkeypatch.setenv("WARMFED_CACHE", str(tmp_path))
    image = torch.randint(256, (80, 3, 48, 48), generator=stream("large"), dtype=torch.uint8)
    ctx = replace(local(), data={"train": {"image": image, "label": torch.arange(80) % 3}})
    kept, made = (latents(ctx, "train", with_(plain, cache=where), plain._parts("cpu")) for where in ("disk", "memory"))
    assert torch.equal(kept["latent"], made["latent"])


# memory


def test_checkpointing_changes_no_bit(plain: LatentDiffusion) -> None:
    whole, less = plain.adapt(local()), with_(plain, gradient_checkpointing=True).adapt(local())
    assert sha256(whole[0]) == sha256(less[0])
    assert whole[1] == less[1]


def peak(generator: LatentDiffusion, rows: int) -> float:
    """Return the bytes of a micro-batch of this size."""
    return plan(replace(generator, training=replace(TRAINING, batch_size=rows)), 2).train.peak


def test_the_bytes_of_a_pass_grow_with_its_rows_and_not_with_the_batch(plain: LatentDiffusion) -> None:
    one, two, four = (peak(plain, n) for n in (1, 2, 4))
    assert four - two == pytest.approx(2 * (two - one), rel=0.1)
    micro = plan(replace(plain, training=replace(TRAINING, batch_size=4, micro_batch_size=2)), 2).train
    assert micro.peak == pytest.approx(two)
    assert micro.flops == pytest.approx(plan(replace(plain, training=replace(TRAINING, batch_size=4)), 2).train.flops, rel=0.05)


def free_memory(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=size))


def test_the_batch_is_split_to_fit_into_half_of_the_free_memory(
    plain: LatentDiffusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = peak(plain, 1), peak(plain, 2)
    found, automatic = {}, with_(plain, auto_micro_batch=True)
    for room in (1, 2, 3, 4):
        free_memory(monkeypatch, int(2 * (one + (room - 0.9) * (two - one))))
        found[room] = micro_batch(automatic, 2, "cpu").training.micro_batch_size
    assert found == {1: 1, 2: 2, 3: 2, 4: 0}  # three fit, but two and two are as quick as three and one
    free_memory(monkeypatch, int(one))
    with pytest.raises(InputError, match=r"one image of a batch needs .* set generator\.lora\.gradient_checkpointing"):
        micro_batch(automatic, 2, "cpu")


def test_an_automatic_batch_learns_the_same_but_for_rounding(plain: LatentDiffusion, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, info = plain.adapt(local())
    free_memory(monkeypatch, 10**12)
    roomy, told = with_(plain, auto_micro_batch=True).adapt(local())
    assert sha256(roomy) == sha256(whole)
    assert told == info | {"micro": 0.0}
    free_memory(monkeypatch, int(2.1 * peak(plain, 2)))
    tight, told = with_(plain, auto_micro_batch=True).adapt(local())
    assert told["micro"] == 2
    assert close(tight, whole, 2e-3)
    assert told["loss"] == pytest.approx(info["loss"], rel=1e-3)


# the end


def test_an_early_stop_returns_the_best_epochs_adapter(plain: LatentDiffusion) -> None:
    """With such a large learning rate, the validation loss soon rises."""
    bold = with_(replace(plain, training=replace(TRAINING, lr=0.2, epochs=12)), patience=2)
    adapter, info = bold.adapt(local())
    epochs = int(info["best_step"]) // 2
    assert info["steps"] == info["best_step"] + 4 < 24
    best = replace(plain, training=replace(TRAINING, lr=0.2, epochs=epochs)).adapt(local())[0]
    assert sha256(adapter) == sha256(best)
    of = task(plain)
    of.model.load_state_dict(dict(lora.to_peft(adapter)), strict=False)
    judge = of.judge(latents(local(), "validation", plain, of.base), "cpu")
    with torch.no_grad():
        assert judge(of.model.eval()) == pytest.approx(info["judged"], rel=1e-3)  # in 16 bits
        assert judge(of.model) == judge(of.model)


def test_an_early_stop_needs_validation_images(plain: LatentDiffusion) -> None:
    alone = ClientContext(None, {"train": TRAIN}, stream("adapt"), "ink", PROMPTS)
    with pytest.raises(InputError, match="site 'ink' has no validation images for early stopping"):
        with_(plain, patience=1).adapt(alone)


class Died(BaseException):
    """A process that is killed."""


def dying(at: int) -> Callable[[str, int, int], None]:
    def progress(what: str, done: int, total: int) -> None:
        if done == at:
            raise Died

    return progress


def test_a_killed_site_goes_on_from_its_snapshot(plain: LatentDiffusion, tmp_path: Path) -> None:
    generator = with_(replace(plain, training=replace(TRAINING, epochs=4, schedule="cosine", ema_decay=0.9)), snapshots=3)
    wanted = generator.adapt(local())
    path, seen = tmp_path / "ink.unfinished", []
    with pytest.raises(Died):
        generator.adapt(local(snapshot_path=path, progress=dying(5)))
    assert path.exists()
    again = generator.adapt(local(snapshot_path=path, progress=lambda what, done, total: seen.append(done)))
    assert seen == [4, 5, 6, 7, 8]
    assert sha256(again[0]) == sha256(wanted[0])
    assert again[1] == wanted[1]


def test_a_killed_run_goes_on_within_a_sites_training(plain: LatentDiffusion, tmp_path: Path) -> None:
    generator = with_(plain, snapshots=3)

    def answered(folder: Path | None, at: int = 0) -> tuple[Message, list[int]]:
        seen: list[int] = []

        def progress(site: str, what: str, done: int, total: int) -> None:
            if what == "train":
                seen.append(done)
                dying(at)(what, done, total)

        worker = Client("ink", WarmFed(), None, local().data, 0, PROMPTS, generator)
        with InProcess({"ink": worker}, folder=folder, progress=progress) as transport:
            ((_, reply, _),) = transport.send(0, "adapt", 0, {"ink": Empty()})
        return reply.message, seen

    wanted, _ = answered(None)
    with pytest.raises(Died):
        answered(tmp_path, at=4)
    assert [path.name for path in tmp_path.iterdir()] == ["ink.unfinished"]
    again, seen = answered(tmp_path)
    assert seen == [4]
    assert sha256(again.adapter) == sha256(wanted.adapter)
    assert [path.name for path in tmp_path.iterdir()] == ["ink.safetensors"]


# settings


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"generator.lora.alpha": -1.0}, "at least 0"),
        ({"generator.lora.patience": -1}, "at least 0"),
        ({"generator.lora.prior_images": 0}, "prior_images 1"),
        ({"generator.lora.cache": "tape"}, "cache must be one of memory, disk"),
        ({"generator.lora.textual_inversion": True}, r"set generator\.prompts=false"),
        ({"generator.lora.dorra": True}, r"unknown key 'generator\.lora\.dorra'; did you mean 'dora'"),
        ({"generator.lora.dora": 1}, r"generator\.lora\.dora must be of type bool"),
        ({"generator.adapters.ink": 1}, "a file for each site"),
        ({"generator.training.micro_batch_size": -1}, "micro_batch_size at least 0"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        parse(None, settings)


def test_every_option_is_in_the_record(tmp_path: Path) -> None:
    config = parse(None, {"generator.lora.dora": True, "generator.lora.alpha": 2, "generator.adapters.ink": "a.safetensors"})
    (tmp_path / "config.toml").write_text(config.toml())
    again = parse(tmp_path / "config.toml")
    assert again.generator == config.generator
    assert (again.generator.lora.alpha, again.generator.adapters) == (2.0, {"ink": "a.safetensors"})
