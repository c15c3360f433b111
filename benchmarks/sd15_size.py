"""Stable Diffusion 1.5 at full size, random weights: adapter, shapes and memory of a LoRA step, beside what was counted.

python benchmarks/sd15_size.py --out benchmarks/results/sd15_size.json

Nothing is downloaded; the architecture is that of `warmfed.diffusion.known_pipelines`. It takes minutes and about 8 GB.
"""

import argparse
import json
import platform
import time
from dataclasses import asdict, replace
from pathlib import Path

import psutil
import torch
from safetensors.torch import save

from warmfed.core.rng import seeded, stream
from warmfed.core.training import Training
from warmfed.diffusion import lora as lora
from warmfed.diffusion import pipeline
from warmfed.diffusion.cost import plan, told
from warmfed.diffusion.generator import LatentDiffusion
from warmfed.diffusion.known_pipelines import build, outline
from warmfed.diffusion.lora_training import LoraTask
from warmfed.diffusion.settings import Lora
from warmfed.utils.memory import MemoryMonitor, now

BASE = "stable-diffusion-v1-5/stable-diffusion-v1-5"


def parts(dtype: str) -> pipeline.Parts:
    """Every part with random weights, in 16 bits."""
    kind, made = outline(BASE)
    torch.set_default_dtype(pipeline.DTYPES[dtype])
    with seeded(stream("sd15", "weights")):
        loaded = {part: build(*made[part]).requires_grad_(False).eval() for part in kind.models}
    torch.set_default_dtype(torch.float32)
    loaded |= {"tokenizer": None, "scheduler": build(*made["scheduler"])}
    shapes = told(kind, made)

    def embed(parts: object, prompts: list[str]) -> dict[str, torch.Tensor]:
        return {name: torch.randn(len(prompts), *shape, generator=stream("prompts")) for name, shape in shapes.items()}

    return pipeline.assemble(replace(kind, embed=embed), loaded, {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--side", type=int, default=512, help="pixels")
    options = parser.parse_args()
    training = Training(optimizer="adamw", lr=1e-4, batch_size=1, steps=1)
    generator = LatentDiffusion(
        BASE,
        dtype="bf16",
        size=options.side,
        rank=4,
        target_modules="attention",
        prompts=False,
        views=1,
        training=training,
        lora=Lora(gradient_checkpointing=True),
    )
    record: dict[str, object] = {"base": BASE, "side": options.side, "torch": torch.__version__}
    record |= {"machine": platform.machine(), "threads": torch.get_num_threads(), "date": time.strftime("%Y-%m-%d")}
    counts = plan(generator, 10)
    record["counted"] = {
        "weights_mb": counts.weights / 1e6,
        "step_mb": counts.train.peak / 1e6,
        "tflops": counts.train.flops / 1e12,
    }
    before = now()
    base = parts("bf16")
    record["weights_mb"] = round(now() - before, 1)
    denoiser = lora.inject(base.denoiser, generator.rank, generator.target_modules)
    model = lora.Adapted(base, denoiser, [""] * 10).requires_grad_(False)
    live = {name: value.requires_grad_(True) for name, value in model.named_parameters() if ".lora_" in name}
    adapter = lora.to_diffusers({name: value.detach() for name, value in live.items()})
    record["adapter_bytes"] = len(save(adapter))
    record["adapter_numbers"] = sum(value.numel() for value in live.values())
    denoiser.enable_gradient_checkpointing()
    task = LoraTask(model.train(), generator, base)
    batch = {"latent": torch.randn(1, 1, *generator.space(base), generator=stream("latent")), "label": torch.zeros(1).long()}
    held = now()
    with MemoryMonitor() as meter:
        begun = time.time()
        loss = task.loss(model, task.draw(batch))
        gradients = torch.autograd.grad(loss, list(live.values()))
        record["step_seconds"] = round(time.time() - begun, 1)
        record["step_mb"] = round(meter.peak() - held, 1)
    record["peak_mb"] = round(float(record["step_mb"]) + held, 1)  # type: ignore[arg-type]
    record["finite"] = all(bool(each.isfinite().all()) for each in gradients)
    record["process_mb_before"] = round(before, 1)
    record["memory_of_machine_mb"] = round(psutil.virtual_memory().total / 1e6)
    record["counted_all"] = asdict(counts.train)
    options.out.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
