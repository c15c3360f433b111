"""Imported adapters: the run and plain diffusers sample the same images from one file."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pipelines
import pytest
import tiny
import torch
from adapter_files import PROMPTS, layers, made, taken
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from warmfed.config import parse
from warmfed.core import ClientContext
from warmfed.core.rng import seeded, stream
from warmfed.core.tensors import sha256
from warmfed.deploy.policy import Policy
from warmfed.deploy.site import SiteConfig, _local
from warmfed.diffusion import lora as lora
from warmfed.diffusion.generator import LatentDiffusion
from warmfed.diffusion.result_cache import CachedGenerator
from warmfed.runs.prepare import prepare
from warmfed.utils.errors import InputError

pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning",  # diffusers' schedulers, NumPy 2
    "ignore:`num_attention_heads`:UserWarning",
)
NOISY, TIME = torch.randn(2, 4, 8, 8, generator=stream("noisy")), torch.tensor([10, 500])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return pipelines.write("sd15", tmp_path_factory.mktemp("bases") / "sd15")


def predicted(generator: LatentDiffusion, adapter: dict[str, Tensor]) -> Tensor:
    model = generator._model(PROMPTS, "cpu")
    with torch.no_grad(), lora.applied(model, {**lora.fresh(model, stream("fresh")), **lora.to_peft(adapter)}):
        return model(NOISY, TIME, model.condition(torch.tensor([0, 1])))


def as_diffusers(adapter: dict[str, Tensor], file: Path) -> None:
    """Write a file with alpha in the header, as diffusers does."""
    modules = sorted({name.removeprefix("unet.").partition(".lora_")[0] for name in adapter})
    config = LoraConfig(r=2, lora_alpha=6, target_modules=modules).to_dict() | {"target_modules": modules}
    told = {f"unet.{name}": value for name, value in config.items()}
    save_file(adapter, file, {"format": "pt", "lora_adapter_metadata": json.dumps(told, default=str)})


def as_old_diffusers(adapter: dict[str, Tensor], file: Path) -> None:
    names = {".lora_A.weight": ".lora.down.weight", ".lora_B.weight": ".lora.up.weight"}
    save_file({n.replace(old, new): t for n, t in adapter.items() for old, new in names.items() if old in n}, file)


def as_kohya(adapter: dict[str, Tensor], file: Path) -> None:
    found: dict[str, Tensor] = {}
    for name, tensor in adapter.items():
        module, _, part = name.removeprefix("unet.").partition(".lora_")
        flat = f"lora_unet_{module.replace('.', '_')}"
        found[f"{flat}.lora_{'down' if part.startswith('A') else 'up'}.weight"] = tensor
        found[f"{flat}.alpha"] = torch.tensor(6.0)
    save_file(found, file)


@pytest.mark.parametrize(
    ("write", "scale"), [(as_diffusers, 3.0), (as_old_diffusers, 1.0), (as_kohya, 3.0)], ids=["diffusers", "old", "kohya"]
)
def test_a_file_of_diffusers_or_kohya_is_a_sites_adapter(write: Callable, scale: float, base: str, tmp_path: Path) -> None:
    """An adapter of rank 2 with alpha 6 in a run of rank 4, against plain diffusers."""
    file, adapter = tmp_path / "theirs.safetensors", layers(base, 2)
    write(adapter, file)
    generator = made(base, file)
    found = taken(generator)
    for name, tensor in adapter.items():
        padded = found[name][:, :2] if ".lora_B." in name else found[name][:2]
        assert torch.allclose(padded, tensor * scale if ".lora_B." in name else tensor, rtol=2e-3)
        assert found[name].count_nonzero() == padded.count_nonzero()
    pipe = pipelines.opened(base, "sd15")
    pipe.load_lora_weights(tmp_path, weight_name="theirs.safetensors")
    with torch.no_grad():
        theirs = pipe.unet(NOISY, TIME, generator._model(PROMPTS, "cpu").prompts).sample
    pipe.unload_lora_weights()
    ours = predicted(generator, found)
    assert torch.allclose(ours, theirs, atol=5e-3)
    assert not torch.allclose(ours, predicted(generator, {}), atol=0.05)


@pytest.mark.parametrize("rslora", [False, True])
def test_a_folder_of_peft_is_a_sites_adapter(rslora: bool, base: str, tmp_path: Path) -> None:
    config = LoraConfig(r=4, lora_alpha=2, target_modules=["to_q", "to_v"], use_rslora=rslora)
    with seeded(stream("peft")):
        model: Any = get_peft_model(pipelines.opened(pipelines.write("sd15", tmp_path / "base"), "sd15").unet, config)
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.data.normal_(std=0.5)
    model.save_pretrained(tmp_path / "theirs")
    generator = made(base, tmp_path / "theirs" / "adapter_model.safetensors")
    found = taken(generator)
    assert {name for name, tensor in found.items() if tensor.any()} == {
        name for name in found if ".to_q." in name or ".to_v." in name
    }
    with torch.no_grad():
        theirs = model(NOISY, TIME, generator._model(PROMPTS, "cpu").prompts).sample
    assert torch.allclose(predicted(generator, found), theirs, atol=5e-3)
    settings = tmp_path / "theirs" / "adapter_config.json"
    for damaged in ("[1]", '{"lora_alpha": "two"}'):
        settings.write_text(damaged)
        with pytest.raises(InputError, match="without a number lora_alpha"):
            taken(generator)
    settings.unlink()
    with pytest.raises(InputError, match=r"cannot read the settings of the adapter of site 'ink'"):
        taken(generator)


@pytest.mark.parametrize("dora", [False, True])
def test_what_a_site_wrote_comes_in_again_bit_for_bit(dora: bool, base: str, tmp_path: Path) -> None:
    options = made(base, tmp_path / "ink.safetensors", prompts=True)
    generator = replace(options, lora=replace(options.lora, dora=dora))
    adapter = {**layers(base, 4, dora=dora), "prompts": torch.randn(2, 24, 16, generator=stream("prompts")).half()}
    generator.write(adapter, tmp_path, "ink")
    assert sha256(taken(generator)) == sha256(adapter)


def test_without_learned_prompts_the_bases_hold(base: str, tmp_path: Path) -> None:
    save_file(layers(base, 4), tmp_path / "a.safetensors")
    generator = made(base, tmp_path / "a.safetensors", prompts=True)
    assert torch.equal(taken(generator)["prompts"], generator._parts("cpu").embed(PROMPTS)["prompt"].half())


REFUSED: dict[str, tuple[Callable[[dict[str, Tensor]], object], dict[str, Any], str]] = {
    "a higher rank": (lambda a: None, {"rank": 2}, r"has rank 4 at 'unet\.[\w.]+', this run has 2; set generator\.rank=4"),
    "more layers": (
        lambda a: None,
        {"target_modules": "attention"},
        r"adapts 'unet\.[\w.]+' and \d+ more, .*set more target_modules",
    ),
    "a text encoder": (
        lambda a: a.update({"text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(4, 16)}),
        {},
        "adapts text_encoder; only adapters of unet are supported",
    ),
    "no layers": (lambda a: a.clear(), {}, "has no layers"),
    "half a layer": (lambda a: a.pop(next(iter(a))), {}, "lacks A or B of"),
    "another base": (
        lambda a: a.update({n: torch.cat([t, t], 1) for n, t in a.items() if "lora_A" in n}),
        {},
        "has shape .* it was made for another base or rank",
    ),
    "not finite": (lambda a: next(iter(a.values())).fill_(torch.nan), {}, "not finite"),
    "something else": (lambda a: a.update({"unet.conv_in.hada_w1": torch.ones(2, 2)}), {}, "no LoRA or DoRA adapter"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused(name: str, base: str, tmp_path: Path) -> None:
    spoil, changes, words = REFUSED[name]
    adapter = layers(base, 4)
    spoil(adapter)
    save_file(adapter, tmp_path / "a.safetensors")
    with pytest.raises(InputError, match=words) as error:
        taken(made(base, tmp_path / "a.safetensors", **changes))
    assert str(error.value).startswith("the adapter of site 'ink'")


@pytest.mark.parametrize("dora", [False, True])
def test_dora_must_be_the_runs_choice_too(dora: bool, base: str, tmp_path: Path) -> None:
    save_file(layers(base, 4, dora=not dora), tmp_path / "a.safetensors")
    options = made(base, tmp_path / "a.safetensors")
    with pytest.raises(InputError, match=rf"set generator\.lora\.dora={str(not dora).lower()}"):
        taken(replace(options, lora=replace(options.lora, dora=dora)))


def test_a_pickle_is_no_adapter(base: str, tmp_path: Path) -> None:
    torch.save(layers(base, 4), tmp_path / "a.safetensors")
    with pytest.raises(InputError, match="damaged or not a safetensors file"):
        taken(made(base, tmp_path / "a.safetensors"))


def test_the_file_is_checked_before_anything_starts(base: str, tmp_path: Path) -> None:
    data = str(tiny.arrays(tmp_path / "data.npz", side=32))
    save_file(layers(base, 4), tmp_path / "a.safetensors")
    settings = {"data.source": data, "generator.base": base, "generator.rank": 4, "generator.target_modules": "transformer"}

    def ready(**adapters: str) -> str:
        return prepare(parse(None, {**settings, "generator.adapters": adapters})).base

    assert ready() == ready(a=str(tmp_path / "a.safetensors"))
    with pytest.raises(InputError, match="cannot read the adapter of site 'b'"):
        ready(b=str(tmp_path / "nowhere.safetensors"))
    elsewhere = parse(None, {**settings, "generator.adapters": {"b": str(tmp_path / "nowhere.safetensors")}})
    with pytest.raises(InputError, match="cannot read the adapter of site 'b'"):
        prepare(elsewhere, weights=False)  # as a rehearsal does
    with pytest.raises(InputError, match=r"generator\.adapters names the site 'aa'; did you mean 'a'"):
        ready(aa=str(tmp_path / "a.safetensors"))


def test_what_is_shared_between_runs_knows_the_files_content(base: str, tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    once, ctx = (
        CachedGenerator(made(base, file), tmp_path / "shared"),
        ClientContext(None, {"train": {}}, stream("adapt"), "ink", PROMPTS),
    )
    save_file(layers(base, 4), file)
    first = once.adapt(ctx)[0]
    assert sha256(once.adapt(ctx)[0]) == sha256(first)
    save_file({name: 2 * tensor for name, tensor in load_file(file).items()}, file)
    assert sha256(once.adapt(ctx)[0]) != sha256(first)


def test_in_a_deployment_a_site_names_its_own_file(tmp_path: Path) -> None:
    site = SiteConfig(name="ink", adapter="mine.safetensors", policy=Policy(algorithms=("warmfed",)), folder=tmp_path)
    assert _local(site, parse().toml()).generator.adapters == {"ink": str(tmp_path / "mine.safetensors")}
    assert _local(replace(site, adapter=""), parse().toml()).generator.adapters == {}
    with pytest.raises(InputError, match=r"set adapter in site\.toml"):
        _local(site, parse(None, {"generator.adapters.ink": "a.safetensors"}).toml())
