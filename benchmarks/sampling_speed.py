"""How fast samples are drawn: ours against a plain call of diffusers' pipeline, and what each option costs and gives.

python benchmarks/sampling_speed.py --out benchmarks/results/sampling_speed.json

On the embedded base, where a classifier of rendered digits says how many samples show the class that was asked for; and on a
U-Net of Stable Diffusion's kind with random weights, at a size that a processor can do. Seconds are of one thread's processor
time, the best of `--repeats` interleaved turns, so that other work on the machine hardly weighs.
"""

import argparse
import json
import platform
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lora_speed import clock
from torch import Tensor

from warmfed.core import ServerContext
from warmfed.core.rng import seeded, stream
from warmfed.core.training import Training
from warmfed.data.rendered_digits import rendered
from warmfed.diffusion import lora as lora
from warmfed.diffusion import pipeline
from warmfed.diffusion.cost import plan
from warmfed.diffusion.generator import LatentDiffusion
from warmfed.diffusion.pipeline_families import stacked
from warmfed.fit import fit
from warmfed.pretraining.captions import digits, tokenizer
from warmfed.tasks import Classify

warnings.simplefilter("ignore")
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PROMPTS = tuple(f"a photo of the digit {word}" for word in DIGITS)
Draw = Callable[[Tensor], Tensor]


def small(folder: Path) -> str:
    """A pipeline of Stable Diffusion's parts with random weights: 7 M parameters, 64 pixels."""
    from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    words = tokenizer(digits("0123456789"))
    with seeded(stream("sampling", "base")):
        unet = UNet2DConditionModel(
            sample_size=8, block_out_channels=(64, 128, 128), layers_per_block=2, norm_num_groups=16, cross_attention_dim=64,
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"), attention_head_dim=4,
        )  # fmt: skip
        vae = AutoencoderKL(
            block_out_channels=(16, 16, 32, 32), down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4, norm_num_groups=8, sample_size=64,
        )  # fmt: skip
        text = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(words), hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
                max_position_embeddings=16, bos_token_id=words.bos_token_id, eos_token_id=words.eos_token_id,
                pad_token_id=words.pad_token_id,
            )
        )  # fmt: skip
    noise = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    scheduler = PNDMScheduler(**noise, skip_prk_steps=True, set_alpha_to_one=False)
    pipeline.save(pipeline.Parts(words, text, unet, vae, scheduler), folder)
    return str(folder)


def plain(base: str, side: int, batch: int, device: str = "cpu", dtype: str = "fp32") -> Draw:
    """diffusers' pipeline as it is called by default: 50 steps, guidance 7.5, the base's scheduler."""
    from diffusers import StableDiffusionPipeline

    kind = pipeline.DTYPES[dtype]
    pipe = StableDiffusionPipeline.from_pretrained(pipeline.find(base), local_files_only=True, torch_dtype=kind).to(device)
    pipe.set_progress_bar_config(disable=True)

    def draw(labels: Tensor) -> Tensor:
        images = []
        for part in labels.split(batch):
            asked = [PROMPTS[label] for label in part]
            images.append(pipe(asked, height=side, width=side, output_type="pt", generator=stream("plain")).images)
        return torch.cat(images).mul(255).round().to(torch.uint8).cpu()

    return draw


def ours(generator: LatentDiffusion, adapter: dict[str, Tensor] | None = None, device: str = "cpu") -> Draw:
    def draw(labels: Tensor) -> Tensor:
        return generator.synthesize(adapter, PROMPTS, labels, ServerContext(None, stream("ours"), device=device))

    return draw


def bare(generator: LatentDiffusion, device: str = "cpu") -> Draw:
    """The denoiser's passes and the decoder alone, at equal steps and batches: nothing is drawn that anybody wants."""
    parts = lora.parts(generator.base, device, generator.dtype)
    made = (generator.base, PROMPTS, generator.rank, generator.target_modules, device, generator.dtype)
    lora.adapted(*made)  # kept for whoever draws next, so not to be made in inference mode

    @torch.inference_mode()
    def draw(labels: Tensor) -> Tensor:
        model = lora.adapted(*made)
        images, net = [], parts.denoiser
        for part in labels.split(generator.batch_size):
            told = model.condition(part.to(device))
            told = told if generator.guidance == 1 else stacked(model.empty, told)
            rows = len(next(iter(told.values())))
            noise = torch.randn(rows, *generator.space(parts)).to(device, parts.dtype)
            for time_ in torch.linspace(999, 0, generator.steps, device=device):
                parts.family.ask(net, noise, time_, told, parts.scale, parts.dtype)
            images.append(parts.decode(noise[: len(part)].float(), generator.batch_size))
        return torch.cat(images)

    return draw


def judge() -> Callable[[Tensor, Tensor], float]:
    """A classifier of rendered digits that never saw a sample: percent of samples in which it finds the class."""
    task, table = Classify((3, 32, 32), 10), rendered(3000, stream("sampling", "judge"))
    training = Training(lr=0.05, epochs=4, batch_size=64, schedule="cosine", weight_decay=5e-4, max_grad_norm=1.0)
    ctx = ServerContext(task, stream("sampling", "judge", "fit"))
    model, _ = fit(ctx, task.init(stream("sampling", "judge", "start")), training, table)

    def share(images: Tensor, labels: Tensor) -> float:
        return 100 * (task.predict(model, {"image": images, "label": labels}).argmax(-1) == labels).double().mean().item()

    return share


def options(base: str, batch: int, compiled: bool = False) -> dict[str, LatentDiffusion]:
    """The rows of the table: the default, and what each option changes."""
    default = LatentDiffusion(base, batch_size=batch)
    found = {
        "default (dpm++, 8 steps, guidance 1.5)": default,
        "dpm++, 20 steps, guidance 1.5": replace(default, steps=20),
        "dpm++, 4 steps, guidance 1.5": replace(default, steps=4),
        "guidance 3": replace(default, guidance=3.0),
        "guidance 3 in the interval 0.2-0.8": replace(default, guidance=3.0, guidance_interval=(0.2, 0.8)),
        "guidance 1 (none)": replace(default, guidance=1.0),
        "ddim, 8 steps": replace(default, sampler="ddim"),
        "unipc, 8 steps": replace(default, sampler="unipc"),
        "unipc, 4 steps": replace(default, sampler="unipc", steps=4),
        "bf16": replace(default, dtype="bf16"),
        "batch 25": replace(default, batch_size=25),
        "adapter beside the weights (not fused)": replace(default, fuse_lora=False),
    }
    return found | ({"compiled (inductor)": replace(default, compile="inductor")} if compiled else {})


def timed(rows: dict[str, Draw], labels: Tensor, repeats: int, device: str = "cpu") -> dict[str, dict[str, Any]]:
    """Images for each second of this process, or of the device (best of the turns), and the last images."""
    found: dict[str, dict[str, Any]] = {name: {"seconds": []} for name in rows}
    for draw in rows.values():
        draw(labels[:2])  # load, compile
    for _ in range(repeats):
        for name, draw in rows.items():
            begun = clock(device)
            found[name]["images"] = draw(labels)
            found[name]["seconds"].append(round(clock(device) - begun, 3))
    for row in found.values():
        row["images_per_second"] = round(len(labels) / min(row["seconds"]), 2)
    return found


def memory(generator: LatentDiffusion) -> float:
    """MB of the base and of what a sampler's batch holds at once, by count: an allocator keeps what it once had."""
    counts = plan(generator, 10)
    return round((counts.weights + max(counts.sample.peak, counts.decode.peak)) / 1e6, 1)


def compared(rows: dict[str, Draw], labels: Tensor, repeats: int) -> dict[str, Any]:
    """Our samples beside those of a plain pipeline and beside bare passes at equal steps."""
    found = timed(rows, labels, repeats)
    speed = {name: row["images_per_second"] for name, row in found.items()}
    return {
        "images": len(labels),
        "images_per_second": speed,
        "seconds": {name: row["seconds"] for name, row in found.items()},
        "ours_over_diffusers": round(speed["ours"] / speed["diffusers, by default"], 2),
        "ours_over_bare": round(speed["ours"] / speed["bare passes"], 3),
        "drawn": {name: row["images"] for name, row in found.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=100, help="of the embedded base; a tenth of the random one")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--compile", action="store_true", help="also torch.compile, which needs a C++ compiler and minutes")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    record: dict[str, Any] = {"torch": torch.__version__, "machine": platform.machine(), "threads": 1}
    record |= {"date": time.strftime("%Y-%m-%d"), "seconds_are": "of one thread's processor time"}
    share, labels = judge(), torch.arange(asked.samples) % 10

    def keep() -> None:
        asked.out.write_text(json.dumps(record, indent=1) + "\n")

    strong = replace(LatentDiffusion("digits"), guidance=7.5)
    rows: dict[str, Draw] = {
        "diffusers, by default": plain("digits", 32, 100),
        "ours": ours(strong),
        "bare passes": bare(strong),
    }
    found = compared(rows, labels, asked.repeats)
    images = found.pop("drawn")
    found["recognised"] = {name: round(share(images[name], labels), 1) for name in ("diffusers, by default", "ours")}
    record["digits, guidance 7.5"] = found
    keep()

    with tempfile.TemporaryDirectory() as folder:
        base, count = small(Path(folder) / "small"), max(8, asked.samples // 10)
        generator = LatentDiffusion(base, batch_size=8, guidance=7.5, steps=20)
        rows = {"diffusers, by default": plain(base, 64, 8), "ours": ours(generator), "bare passes": bare(generator)}
        record["random weights, Stable Diffusion's kind"] = compared(rows, labels[:count], asked.repeats)
        del record["random weights, Stable Diffusion's kind"]["drawn"]
    keep()

    chosen = options("digits", 100, asked.compile)
    table = timed({name: ours(each) for name, each in chosen.items()}, labels, asked.repeats)
    record["options"] = {
        name: {key: value for key, value in row.items() if key != "images"}
        | {"recognised": round(share(row["images"], labels), 1), "memory_mb": memory(chosen[name])}
        for name, row in table.items()
    }
    keep()
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
