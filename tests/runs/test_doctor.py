"""Checks before a run: its estimated cost, and the files that it will read."""

import csv
import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pipelines
import pytest
import torch
from PIL import Image

from warmfed.cli.parser import main
from warmfed.config import parse
from warmfed.core import ClientContext
from warmfed.core.rng import stream
from warmfed.core.training import Training
from warmfed.diffusion.cost import Machine, counted, plan, skeleton
from warmfed.diffusion.generator import LatentDiffusion
from warmfed.diffusion.known_pipelines import KNOWN
from warmfed.diffusion.settings import Lora
from warmfed.runs.dry_run import dry_run

EXAMPLES = Path(__file__).parents[2] / "examples"
SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"


# counting


def test_a_product_is_counted() -> None:
    a, b = torch.empty(64, 128, device="meta"), torch.empty(128, 32, device="meta")
    cost = counted(lambda: a @ b)
    assert cost.flops == 2 * 64 * 128 * 32
    assert cost.calls == 1
    assert cost.peak == 4 * 64 * 32
    assert cost.moved == 4 * (64 * 128 + 128 * 32 + 64 * 32)


def test_the_peak_is_what_is_alive_at_once() -> None:
    def work() -> None:
        first = torch.empty(1000, device="meta") + 1  # two tables of 4,000 bytes: the first goes when the sum is there
        second = first * 2
        del first
        third = second * 2
        del second
        third.sum()

    cost = counted(work)
    assert cost.peak == 8000
    assert cost.times(3).peak == 8000
    assert cost.times(3).calls == 3 * cost.calls


def test_attention_is_fused() -> None:
    """4,096 tokens squared would be 134 MB."""
    q = torch.empty(1, 2, 4096, 8, device="meta")
    cost = counted(lambda: torch.nn.functional.scaled_dot_product_attention(q, q, q))
    assert cost.flops == 4 * 2 * 4096**2 * 8
    assert cost.peak < 1e6


def test_time_is_the_sum_of_three() -> None:
    from warmfed.diffusion.cost import Cost

    assert Machine(100.0, 10.0, 0.5).seconds(Cost(1000.0, 30.0, 4.0)) == 10 + 3 + 2


@pytest.mark.parametrize("kind", list(pipelines.CLASSES))
def test_a_skeleton_tells_what_the_pipeline_tells(kind: str, tmp_path: Path) -> None:
    """A plan without weights knows the adapter of the base that has them, tensor by tensor."""
    from warmfed.diffusion import lora as lora
    from warmfed.diffusion import pipeline

    base = pipelines.write(kind, tmp_path / kind)
    whole = pipeline.load(base)
    for path in tmp_path.rglob("*.safetensors"):
        path.unlink()
    bones = skeleton(base)
    assert {n: tuple(t.shape) for n, t in bones.denoiser.state_dict().items()} == {
        n: tuple(t.shape) for n, t in whole.denoiser.state_dict().items()
    }
    said, told = whole.embed(["a cat", ""]), bones.embed(["a cat", ""])
    assert {n: tuple(t.shape) for n, t in told.items()} == {n: tuple(t.shape) for n, t in said.items()}
    found = plan(LatentDiffusion(base, rank=2, target_modules="attention", training=Training(batch_size=3)), 5)
    model = lora.Adapted(whole, lora.inject(whole.denoiser, 2, "attention"), [""] * 5)
    assert found.learned == sum(p.numel() for n, p in model.named_parameters() if ".lora_" in n or n == "prompts")
    assert found.train.flops > 2 * found.sample.flops / (2 * 100) * 3
    assert min(found.encode.flops, found.decode.flops, found.train.peak) > 0


SIZES = {  # parameters of the denoiser in millions, of its LoRA of rank 1 on attention
    SD15: (859.5, 199_296),
    "stabilityai/stable-diffusion-2-1-base": (865.9, 207_488),
    "stabilityai/stable-diffusion-xl-base-1.0": (2567.5, None),
    "Efficient-Large-Model/Sana_600M_512px_diffusers": (590.0, None),
}


@pytest.mark.parametrize("base", SIZES)
def test_known_bases_have_their_published_size(base: str) -> None:
    millions, rank_one = SIZES[base]
    parts = skeleton(base, "bf16")
    assert sum(p.numel() for p in parts.denoiser.parameters()) / 1e6 == pytest.approx(millions, rel=0.01)
    if rank_one:
        from warmfed.diffusion.lora import inject

        layers = [p for n, p in inject(parts.denoiser, 1, "attention").named_parameters() if ".lora_" in n]
        assert sum(p.numel() for p in layers) == rank_one
    assert set(SIZES) <= set(KNOWN)


def test_stable_diffusion_at_full_size() -> None:
    """Rank 4 on attention is 1.6 MB in 16 bits, also with a learned word for each of ten classes, and a step with checkpoints
    in bf16 stays below 8 GB with all weights."""
    training, options = Training(optimizer="adamw", batch_size=1), Lora(gradient_checkpointing=True, textual_inversion=True)
    generator = LatentDiffusion(
        SD15, dtype="bf16", rank=4, target_modules="attention", prompts=False, training=training, lora=options
    )
    found = plan(generator, 10)
    assert found.learned == 4 * 199_296 + 10 * 768
    assert 1.6e6 < found.adapter < 1.62e6
    assert 2.0e9 < found.weights < 2.2e9
    assert found.weights + found.train.peak < 8e9


def test_checkpoints_trade_memory_for_work(tmp_path: Path) -> None:
    generator = LatentDiffusion(pipelines.write("sd15", tmp_path / "sd15"), size=64, training=Training(batch_size=8))
    kept, again = plan(generator, 3), plan(replace(generator, lora=Lora(gradient_checkpointing=True)), 3)
    assert again.train.flops > 1.2 * kept.train.flops  # what is not kept is computed again
    assert again.train.peak < 0.95 * kept.train.peak
    assert again.sample == kept.sample


@pytest.mark.parametrize(
    ("targets", "options"),
    [("attention", Lora(dora=True)), ("attention", Lora(textual_inversion=True)), ("none", Lora(textual_inversion=True))],
)
def test_what_travels_is_counted_and_so_is_reading(targets: str, options: Lora, tmp_path: Path) -> None:
    """DoRA's magnitudes have 32 bits; for learned words the text encoder runs at each step, also where nothing else learns."""
    base = pipelines.write("sd15", tmp_path / "sd15")
    training = Training(optimizer="adamw", batch_size=2, steps=1)
    generator = LatentDiffusion(base, rank=2, target_modules=targets, prompts=False, training=training, lora=options)
    table = {"image": torch.zeros(2, 3, 32, 32, dtype=torch.uint8), "label": torch.arange(2)}
    adapter, _ = generator.adapt(ClientContext(None, {"train": table}, stream("adapt"), "ink", ("a cat", "a dog")))
    found = plan(generator, 2)
    assert found.adapter == sum(value.nbytes for value in adapter.values())
    assert found.learned == sum(value.numel() for value in adapter.values())
    if options.textual_inversion:
        prompts = plan(replace(generator, prompts=True, lora=Lora()), 2).train  # also back to the prompts, which nobody reads
        assert found.train.calls > prompts.calls + 50
        assert found.train.peak > prompts.peak


# files


def asked(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, Any]:
    code = main(list(arguments))
    out = capsys.readouterr().out
    return code, json.loads(out)


def test_the_demo_needs_its_base_only(capsys: pytest.CaptureFixture[str]) -> None:
    code, files = asked(capsys, "doctor", "--json")
    assert code == 0
    weights = next(each for each in files if each["what"] == "base digits: unet/diffusion_pytorch_model.safetensors")
    content = Path(weights["path"]).read_bytes()
    assert weights["bytes"] == len(content)
    assert weights["sha256"] == hashlib.sha256(content).hexdigest()
    assert len(files) == 11
    assert files[-1]["what"] == "classifier to start from"
    code, files = asked(capsys, "doctor", "--algorithm", "fedavg", "--json")
    assert (code, files) == (0, [])


def test_what_is_missing_is_told(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    (tmp_path / "data" / "a").mkdir(parents=True)
    (tmp_path / "data" / "a" / "one.png").write_bytes(b"12345")
    config = str(EXAMPLES / "domainnet_sd15.toml")
    code, files = asked(capsys, "doctor", config, "--json", "--set", f"data.path={tmp_path / 'data'}")
    assert code == 2
    assert {each["what"].partition(": ")[2]: each["there"] for each in files if "base" in each["what"]} == {
        "model_index.json": False, "tokenizer/": False, "text_encoder/model.safetensors": False,
        "unet/diffusion_pytorch_model.safetensors": False, "vae/diffusion_pytorch_model.safetensors": False,
        "scheduler/": False,
    }  # fmt: skip
    assert all("hf download stable-diffusion-v1-5/stable-diffusion-v1-5" in each["note"] for each in files if not each["there"])
    assert files[-1]["what"] == "data (1 files)"
    assert files[-1]["bytes"] == 5
    assert main(["doctor", config]) == 2
    shown = capsys.readouterr().out
    assert "missing" in shown
    assert "data.path is empty" in shown


def test_a_missing_part_of_a_folder(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    base = pipelines.write("sana", tmp_path / "sana")
    code, files = asked(capsys, "doctor", "--json", "--set", f"generator.base={base}", "model.start=public")
    missing = [each for each in files if not each["there"]]
    assert code == 2
    assert [each["what"] for each in missing] == ["classifier to start from"]
    (tmp_path / "sana" / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    code, files = asked(capsys, "doctor", "--json", "--set", f"generator.base={base}")
    missing = [each for each in files if not each["there"]]
    assert [each["what"].partition(": ")[2] for each in missing] == ["vae/diffusion_pytorch_model.safetensors"]
    adapter = f'generator.adapters={{ink = "{tmp_path / "ink.safetensors"}"}}'
    code, files = asked(capsys, "doctor", "--json", "--set", adapter)
    assert (code, [each["what"] for each in files if not each["there"]]) == (2, ["adapter of ink"])


# rehearsals


def pictures(folder: Path, sites: list[str], classes: list[str], each: int = 4) -> Path:
    for site in sites:
        for name in classes:
            (folder / site / name).mkdir(parents=True)
            for number in range(each):
                pixels = torch.randint(256, (6, 6, 3), generator=stream(site, name, number), dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(folder / site / name / f"{number}.jpg")
    return folder


def domainnet(folder: Path) -> Path:
    config = parse(EXAMPLES / "domainnet_sd15.toml")
    sites, classes = config.data.options["sites"], config.data.options["classes"][:3]
    pictures(folder, sites, classes)
    for site in sites:
        lines = [f"{site}/{name}/{number}.jpg {label}" for label, name in enumerate(classes) for number in range(4)]
        (folder / f"{site}_train.txt").write_text("\n".join(line for line in lines if "/3.jpg" not in line))
        (folder / f"{site}_test.txt").write_text("\n".join(line for line in lines if "/3.jpg" in line))
    return folder


def office(folder: Path) -> Path:
    return pictures(folder, ["amazon", "caltech", "dslr", "webcam"], ["back_pack", "bike", "calculator"])


def camelyon(folder: Path) -> Path:
    rows = []
    for center in range(3):
        for slide in range(6):
            for tumor in (0, 1):
                stem = f"patient_{center:03d}_node_{slide}"
                (folder / "patches" / stem).mkdir(parents=True, exist_ok=True)
                name = f"patch_{stem}_x_{tumor}_y_0.png"
                pixels = torch.randint(256, (6, 6, 3), generator=stream(stem, tumor), dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(folder / "patches" / stem / name)
                rows.append([f"{center:03d}", slide, tumor, 0, tumor, 10 * center + slide, center, 0])
    with (folder / "metadata.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["patient", "node", "x_coord", "y_coord", "tumor", "slide", "center", "split"])
        table.writerows(rows)
    return folder


REAL = {
    "domainnet_sd15.toml": (domainnet, 6, 3, 512),
    "office_caltech10_sd15.toml": (office, 4, 3, 224),
    "camelyon17_sd21.toml": (camelyon, 3, 2, 224),
}


@pytest.mark.parametrize("name", REAL)
def test_the_configurations_for_the_real_thing(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    make, sites, classes, side = REAL[name]
    data = make(tmp_path / "data")
    fewer = {"data.options.classes": ["bird", "feather", "headphones"]} if make is domainnet else {}  # pictures of 512 pixels
    config = parse(EXAMPLES / name, {"data.path": str(data)} | fewer)
    assert config.generator.size in (0, side)
    assert config.data.options["image_size"] == side
    found = dry_run(config)
    assert (found["sites"], found["classes"]) == (sites, classes)
    assert found["stages"]["adapt"] == found["stages"]["warm"] == 1
    assert found["stages"]["train"] == 5
    assert 1.5e6 < found["adapter"] < 2e6
    assert found["base"] == {"name": config.generator.base, "bytes": pytest.approx(2.3e9, rel=0.15), "there": False}
    work = {row["what"]: row for row in found["work"]}
    assert work["adapters"]["count"] == sites * config.generator.training.steps
    assert work["samples"]["count"] == sites * classes * config.algorithm.synthesis.per_class
    assert all(row["seconds"] > 0 for row in found["work"])
    assert found["memory"] > found["base"]["bytes"]
    assert found["timed_on"] == ("cuda" if torch.cuda.is_available() else "cpu, as this machine has no GPU")
    assert not list(tmp_path.glob("runs*"))


def test_a_rehearsal_on_the_command_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["run", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "adapt, warm, train × 5" in shown
    assert "its weights are there" in shown
    assert list(tmp_path.iterdir()) == []
