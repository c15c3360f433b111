"""An imported file is used as a whole or refused in one line, whatever its tensors and settings are."""

import functools
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pipelines
import pytest
import torch
from adapter_files import PROMPTS, layers, made, taken
from hypothesis import HealthCheck, given
from hypothesis import settings as bounded
from hypothesis import strategies as st
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor

from warmfed.core.rng import stream
from warmfed.diffusion import lora as lora
from warmfed.diffusion.lora_import import imported
from warmfed.utils.errors import InputError

pytestmark = pytest.mark.filterwarnings("ignore:`num_attention_heads`:UserWarning")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return pipelines.write("sd15", tmp_path_factory.mktemp("bases") / "sd15")


def kohya(adapter: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return an adapter with kohya's names and alpha = rank."""
    found = {}
    for name, tensor in adapter.items():
        module, _, part = name.removeprefix("unet.").partition(".lora_")
        flat = f"lora_unet_{module.replace('.', '_')}"
        found[f"{flat}.lora_{'down' if part.startswith('A') else 'up'}.weight"] = tensor
        found[f"{flat}.alpha"] = torch.tensor(float(4))
    return found


def first(adapter: dict[str, Tensor], end: str) -> str:
    return next(name for name in adapter if name.endswith(end))


def renamed(adapter: dict[str, Tensor], end: str, other: str) -> None:
    name = first(adapter, end)
    adapter[name.removesuffix(end) + other] = adapter.pop(name)


def cast(adapter: dict[str, Tensor], end: str, dtype: torch.dtype) -> None:
    adapter[first(adapter, end)] = torch.ones(adapter[first(adapter, end)].shape, dtype=dtype)


def put(adapter: dict[str, Tensor], end: str, tensor: Tensor) -> None:
    adapter[first(adapter, end)] = tensor


def beside(adapter: dict[str, Tensor], end: str, tensor: Tensor | None = None) -> None:
    """Add a tensor of another kind to the first layer."""
    stem = next(iter(adapter)).partition(".lora_")[0]
    adapter[f"{stem}.{end}"] = torch.ones(16, 1) if tensor is None else tensor


HALF_READ: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "kohya's DoRA": (lambda a: beside(a, "dora_scale"), r"dora_scale', .* magnitude of a DoRA"),
    "LoHa": (lambda a: beside(a, "hada_w1_a"), "hada_w1_a', .* part of a LoHa"),
    "LoKr": (lambda a: beside(a, "lokr_w1"), "lokr_w1', .* part of a LoKr"),
    "a Tucker core": (lambda a: beside(a, "lora_mid.weight"), r"lora_mid\.weight', .* Tucker"),
    "OFT": (lambda a: beside(a, "oft_blocks"), "oft_blocks', .* adapter of another kind"),
    "a difference": (lambda a: beside(a, "diff"), r"\.diff', .* difference of whole weights"),
    "a difference of a bias": (lambda a: beside(a, "diff_b"), r"\.diff_b', .* difference of whole weights"),
    "a normalisation": (lambda a: beside(a, "w_norm"), "w_norm', .* normalisation"),
    "a bias": (lambda a: beside(a, "bias"), r"\.bias', .* a bias"),
    "a bias of B": (lambda a: beside(a, "lora_up.bias"), r"lora_up\.bias', .* a bias"),
    "a scalar": (lambda a: beside(a, "scalar"), r"\.scalar', .* learned scale"),
    "bitsandbytes": (lambda a: beside(a, "SCB"), r"\.SCB', .* quantised"),
    "4 bits": (lambda a: beside(a, "absmax"), r"absmax', .* quantised"),
    "a quantisation map": (lambda a: beside(a, "quant_map"), r"quant_map', .* quantised"),
    "scaled float8": (lambda a: beside(a, "scale_weight"), r"scale_weight', .* quantised"),
    "an unknown tensor": (lambda a: beside(a, "extra"), r"\.extra', .* another format"),
    "a text encoder": (
        lambda a: a.update({"lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight": torch.ones(4, 16),
                            "lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_up.weight": torch.ones(16, 4)}),
        "adapts text_encoder; only adapters of unet",
    ),
    "int8": (lambda a: cast(a, "lora_down.weight", torch.int8), "lora_down.weight' is int8, expected a floating type"),
    "uint8": (lambda a: cast(a, "lora_up.weight", torch.uint8), "lora_up.weight' is uint8, expected a floating type"),
    "int64": (lambda a: cast(a, "lora_up.weight", torch.int64), "is int64, expected a floating type"),
    "truth values": (lambda a: cast(a, "lora_up.weight", torch.bool), "is bool, expected a floating type"),
    "complex numbers": (lambda a: cast(a, "lora_up.weight", torch.complex64), "is complex64, expected a floating type"),
    "complex alpha": (lambda a: put(a, ".alpha", torch.tensor(4 + 1j)), "expected one number"),
    "alpha 0": (lambda a: put(a, ".alpha", torch.tensor(0.0)), r"alpha' is 0\.0, expected a finite number other than 0"),
    "alpha NaN": (lambda a: put(a, ".alpha", torch.tensor(math.nan)), "alpha' is nan, expected a finite number other than 0"),
    "alpha ∞": (lambda a: put(a, ".alpha", torch.tensor(math.inf)), "alpha' is inf, expected a finite number"),
    "two alphas": (lambda a: put(a, ".alpha", torch.ones(2)), r"of shape \(2,\), expected one number"),
    "an alpha too few": (lambda a: a.pop(first(a, ".alpha")), "has no alpha of .*, but of other layers"),
    "an alpha too many": (lambda a: a.update({"lora_unet_else.alpha": torch.tensor(1.0)}), "lora_unet_else.alpha"),
    "rank 0": (
        lambda a: [put(a, ".lora_down.weight", torch.ones(0, 16)), put(a, ".lora_up.weight", torch.ones(16, 0))],
        r"have the shapes \(0, 16\) and \(16, 0\); expected .* a rank of at least 1",
    ),
    "two ranks": (lambda a: put(a, ".lora_up.weight", torch.ones(16, 3)), "A and B of .* have the shapes"),
    "a number": (lambda a: put(a, ".lora_up.weight", torch.tensor(1.0)), "A and B of .* have the shapes"),
    "a row": (lambda a: put(a, ".lora_up.weight", torch.ones(4)), "A and B of .* have the shapes"),
    "no B": (lambda a: a.pop(first(a, ".lora_up.weight")), "lora_up"),
    "too large": (lambda a: put(a, ".alpha", torch.tensor(1e30)), "values that 16 bits cannot hold"),
    "names of two kinds": (
        lambda a: a.update({n.replace("down_blocks_0_attentions_0", "input_blocks_1_1"): t.clone() for n, t in a.items()}),
        "input_blocks_1_1.*, which diffusers would leave out",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HALF_READ)
def test_a_file_of_kohya_is_never_read_in_part(name: str, base: str, tmp_path: Path) -> None:
    spoil, words = HALF_READ[name]
    adapter = kohya(layers(base, 4))
    spoil(adapter)
    save_file(adapter, tmp_path / "a.safetensors")
    for dora in (False, True):
        options = made(base, tmp_path / "a.safetensors")
        with pytest.raises(InputError, match=words) as error:
            taken(replace(options, lora=replace(options.lora, dora=dora)))
        assert len(str(error.value).splitlines()) == 1


OF_DIFFUSERS: dict[str, tuple[Callable[[dict[str, Tensor]], object], bool, str]] = {
    "a magnitude too few": (lambda a: a.pop(first(a, "magnitude_vector")), True, "but not for"),
    "a magnitude of the inputs": (
        lambda a: put(a, "attn1.to_q.lora_magnitude_vector", torch.ones(1, 16)), True, r"has shape \(1, 16\), expected \(16,\)"
    ),
    "an infinite magnitude": (lambda a: put(a, "magnitude_vector", torch.full((16,), math.inf)), True, "not finite"),
    "a magnitude of integers": (lambda a: cast(a, "magnitude_vector", torch.int32), True, "is int32, expected a floating type"),
    "a name twice": (
        lambda a: a.update({n.replace("attn1.", "attn1.processor."): t.clone() for n, t in a.items() if "attn1.to_q" in n}),
        False, "lora_[AB].weight' of 'unet.*to_q' twice",
    ),
    "a name inside a name": (lambda a: renamed(a, "to_q.lora_A.weight", "to_q.lora_A.x.lora_A.weight"), False, "lacks A or B"),
    "alpha beside": (lambda a: a.update({first(a, "lora_A.weight")[:-14] + ".alpha": torch.tensor(2.0)}), False, "alpha"),
    "an adapter's name": (lambda a: renamed(a, "to_q.lora_A.weight", "to_q.lora_A.default.weight"), False, "no LoRA or DoRA"),
    "no prefix": (lambda a: renamed(a, "to_q.lora_A.weight", "to_q.lora_A"), False, ""),
}  # fmt: skip


@pytest.mark.parametrize("name", OF_DIFFUSERS)
def test_a_file_of_diffusers_is_never_read_in_part(name: str, base: str, tmp_path: Path) -> None:
    spoil, dora, words = OF_DIFFUSERS[name]
    adapter = layers(base, 4, dora=dora)
    spoil(adapter)
    save_file(adapter, tmp_path / "a.safetensors")
    options = made(base, tmp_path / "a.safetensors")
    options = replace(options, lora=replace(options.lora, dora=dora))
    if not words:
        assert taken(options)
        return
    with pytest.raises(InputError, match=words):
        taken(options)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"lora_alpha": 0}, "lora_alpha=0 in its settings, expected a finite number other than 0"),
        ({"lora_alpha": math.nan}, "lora_alpha=nan in its settings"),
        ({"lora_alpha": True}, "without a number lora_alpha"),
        ({"lora_alpha": None}, "without a number lora_alpha"),
        ({"r": 2}, "has rank 4 at .*, but r=2 in its settings"),
        ({"rank_pattern": {"to_q": 2}}, "rank_pattern="),
        ({"alpha_pattern": {"to_q": 2}}, "alpha_pattern="),
        ({"use_rslora": "false"}, "use_rslora='false', expected true or false"),
        ({"use_dora": True}, "use_dora=True in its settings, but its tensors say the opposite"),
        ({"init_lora_weights": "pissa_niter_16"}, "init_lora_weights='pissa_niter_16'"),
        ({"peft_type": "LOHA"}, "peft_type='LOHA'"),
        ({"bias": "lora_only"}, "bias='lora_only'"),
    ],
)
def test_settings_that_change_the_effect_are_refused(change: dict[str, Any], words: str, base: str, tmp_path: Path) -> None:
    settings = LoraConfig(r=4, lora_alpha=8, target_modules="to_q").to_dict() | change
    names = {f"base_model.model.{name.removeprefix('unet.')}": tensor for name, tensor in layers(base, 4).items()}
    save_file(names, tmp_path / "a.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match=words):
        taken(made(base, tmp_path / "a.safetensors"))
    told = {"lora_adapter_metadata": json.dumps({f"unet.{name}": value for name, value in settings.items()})}
    save_file(layers(base, 4), tmp_path / "b.safetensors", told)
    with pytest.raises(InputError, match=words):
        taken(made(base, tmp_path / "b.safetensors"))


def test_a_file_of_peft_with_other_tensors_is_refused(base: str, tmp_path: Path) -> None:
    adapter = layers(base, 4)
    names = {f"base_model.model.{name.removeprefix('unet.')}": tensor for name, tensor in adapter.items()}
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 4}))
    save_file(names | {first(adapter, "lora_A.weight"): torch.ones(4, 16)}, tmp_path / "a.safetensors")
    with pytest.raises(InputError, match="beside those of peft"):
        taken(made(base, tmp_path / "a.safetensors"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"prompts": torch.ones(2, 24, 16, dtype=torch.int8)}, "'prompts' is int8, expected a floating type"),
        ({"prompts": torch.ones(2, 24, 16), "unet.x.lora_A.weight": torch.ones(1)}, "expected only 'prompts'"),
        ({"prompts": torch.full((2, 24, 16), math.nan)}, "'prompts' holds values that are not finite"),
    ],
)
def test_prompts_beside_a_file_are_checked_too(words: dict[str, Tensor], message: str, base: str, tmp_path: Path) -> None:
    save_file(layers(base, 4), tmp_path / "a.safetensors")
    save_file(words, tmp_path / "a.prompts.safetensors")
    with pytest.raises(InputError, match=message):
        taken(made(base, tmp_path / "a.safetensors", prompts=True))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"<cat>": torch.ones(16), "<dog>": torch.ones(16)}, "has the tokens <cat>, <dog>, expected <NAME-0>"),
        ({"<a-0>": torch.ones(16), "<a-1>": torch.ones(8)}, "several shapes"),
        ({"<a-0>": torch.ones(16), "<a-2>": torch.ones(16)}, "expected <NAME-0>"),
        ({}, "expected <NAME-0>"),
    ],
)
def test_tokens_beside_a_file_are_checked_too(words: dict[str, Tensor], message: str, base: str, tmp_path: Path) -> None:
    save_file(layers(base, 4), tmp_path / "a.safetensors")
    save_file(words, tmp_path / "a.tokens.safetensors")
    with pytest.raises(InputError, match=message):
        taken(made(base, tmp_path / "a.safetensors"))


def effect(a: Tensor, b: Tensor) -> Tensor:
    return b.double().flatten(1) @ a.double().flatten(1)


ALPHAS = [None, 0.0, -2.0, 6.0, 1e-6, 1e9, math.nan, math.inf, 4]
TYPES = ["float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int8", "uint8", "bool", "complex64"]
LAYER = st.fixed_dictionaries(
    {"rank": st.integers(0, 5), "other": st.sampled_from([0, 0, 0, 0, 1]), "alpha": st.sampled_from(ALPHAS),
     "a": st.sampled_from(TYPES), "b": st.sampled_from(TYPES), "size": st.sampled_from([1e-9, 1e-3, 1.0, 1e3, 1e6])}
)  # fmt: skip
FINE = st.fixed_dictionaries(
    {"rank": st.integers(1, 4), "other": st.just(0), "alpha": st.sampled_from([-2.0, 6.0, 4]),
     "a": st.sampled_from(TYPES[:5]), "b": st.sampled_from(TYPES[:5]), "size": st.sampled_from([1e-2, 1.0])}
)  # fmt: skip
EXTRA = st.sampled_from([None, None, "dora_scale", "hada_w1_a", "diff", "lora_mid.weight", "SCB", "bias", "x", "lora_C.weight"])


@functools.cache
def blank(base: str) -> dict[str, Tensor]:
    fresh = lora.to_diffusers(lora.fresh(lora.adapted(base, PROMPTS, 4, "attention", "cpu"), stream("fresh")))
    return {name: tensor for name, tensor in fresh.items() if name != lora.PROMPTS}


def build(names: list[str], like: dict[str, Tensor], found: list[dict[str, Any]], style: str) -> tuple[dict, dict]:
    """Return the tensors of a file, and the effect of each layer by its mathematics."""
    file: dict[str, Tensor] = {}
    told: dict[str, Tensor] = {}
    ends = {"diffusers": (".lora_A", ".lora_B"), "old": (".lora.down", ".lora.up"), "kohya": (".lora_down", ".lora_up")}[style]
    for module, layer in zip(names, found, strict=False):
        a, b = like[f"{module}.lora_A.weight"], like[f"{module}.lora_B.weight"]
        rng, rank = stream(module, str(layer)), layer["rank"]
        shapes = (rank, *a.shape[1:]), (len(b), rank + layer["other"], *b.shape[2:])
        one, two = (
            (torch.randn(s, generator=rng) * layer["size"]).to(getattr(torch, layer[k]))
            for s, k in zip(shapes, "ab", strict=True)
        )
        stem = module if style != "kohya" else f"lora_unet_{module.removeprefix('unet.').replace('.', '_')}"
        file[f"{stem}{ends[0]}.weight"], file[f"{stem}{ends[1]}.weight"] = one, two
        scale = 1.0
        if style == "kohya" and layer["alpha"] is not None:
            file[f"{stem}.alpha"] = torch.tensor(layer["alpha"])
            scale = layer["alpha"] / max(rank, 1)
        if one.is_floating_point() and two.is_floating_point() and not layer["other"]:
            told[module] = effect(one, two) * scale
    return file, told


@given(data=st.data(), style=st.sampled_from(["diffusers", "old", "kohya"]), fine=st.booleans())
@bounded(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_file_has_its_own_effect_or_is_refused(data: st.DataObject, style: str, fine: bool, base: str) -> None:
    """The import of random layers, types, ranks, alphas and further tensors against B·A·alpha/rank in 64 bits."""
    like = blank(base)
    names = sorted({name.partition(".lora_")[0] for name in like if ".lora_" in name})
    chosen = data.draw(st.lists(st.sampled_from(names), min_size=1, max_size=3, unique=True))
    found = data.draw(st.lists(FINE if fine else LAYER, min_size=len(chosen), max_size=len(chosen)))
    file, told = build(chosen, like, found, style)
    extra = None if fine else data.draw(EXTRA)
    if extra:
        file[f"{next(iter(file)).partition('.lora_')[0]}.{extra}"] = torch.ones(16, 1)
    path = Path(base).parent / "random.safetensors"
    save_file(file, path)
    try:
        adapter = imported(path, like, lora.parts(base, "cpu"), made(base, path), "ink")
    except InputError as error:
        if fine or "\n" in str(error):
            raise
        return
    assert not extra
    assert told.keys() == set(chosen)
    for module in names:
        a, b = adapter[f"{module}.lora_A.weight"], adapter[f"{module}.lora_B.weight"]
        wanted = told.get(module, torch.zeros(()))
        assert (effect(a, b) - wanted).norm() <= 0.02 * effect(a, b).norm() + 1e-12, module
