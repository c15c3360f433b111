"""Images per second and peak memory of learning an adapter, beside the loop of diffusers' own LoRA script.

The script's loop (train_text_to_image_lora.py of diffusers 0.42) without accelerate: at each step the autoencoder encodes the
batch and the text encoder its captions, then the U-Net of peft's layers (rank 4 on attention) takes a step of AdamW with the
gradient clipped. Its data loader, which decodes and crops pictures, is left out: images come as tensors to both. Ours is
`LatentDiffusion.adapt` with the same layers, batch, optimizer and number of steps. Each measurement is a process of its own.
Seconds are those of the processor, by one thread, so that other work on the machine counts little. Memory is looked at from
outside, ten times a second: peaks are short.

    python benchmarks/lora_speed.py [--repeats 3] [--large 64 128] [--dtypes fp32 bf16] [--out FILE.json]

`--large`: sides in pixels for a U-Net of Stable Diffusion 1.5's size with random weights, its text encoder and autoencoder.
bf16 is the script's `--mixed_precision bf16` (frozen weights in 16 bits, layers in 32, the U-Net under autocast), and our
`dtype` and `training.mixed_precision`.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import torch
import torch.nn.functional as F
import transformers
from peft import LoraConfig

from warmfed.core import ClientContext
from warmfed.core.rng import seeded, stream
from warmfed.core.tensors import rows
from warmfed.core.training import Training
from warmfed.diffusion import pipeline
from warmfed.diffusion.cost import plan
from warmfed.diffusion.generator import LatentDiffusion
from warmfed.diffusion.lora_training import latents
from warmfed.utils.files import read_json, write_json
from warmfed.utils.memory import MemoryMonitor, now

SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
PROMPTS = tuple(f"a photo of the digit {word}" for word in ("zero", "one", "two", "three", "four"))
SHAPES: dict[str, dict[str, Any]] = {
    "unet": {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
    "vae": {
        "block_out_channels": (128, 256, 512, 512), "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4, "layers_per_block": 2, "sample_size": 512,
    },
    "text": {
        "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
        "max_position_embeddings": 77, "vocab_size": 49408, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1,
    },
}  # fmt: skip
"""Stable Diffusion 1.5's configurations, where they differ from the classes' defaults."""


def clock(device: str = "cpu") -> float:
    """Seconds: of the processor; on a graphics card those of the wall, when all that it was given is done."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


def large(folder: Path, device: str = "cpu", dtype: str = "fp32") -> None:
    """A pipeline of SD-1.5's shape with random weights; its tokenizer is that of the embedded base at 77 tokens.

    Args:
        device: where the weights are drawn.
        dtype: type of the weights in the files.
    """
    with seeded(stream("large")), torch.device(device):
        unet = diffusers.UNet2DConditionModel(**SHAPES["unet"])
        vae = diffusers.AutoencoderKL(**SHAPES["vae"])
        text = transformers.CLIPTextModel(transformers.CLIPTextConfig(**SHAPES["text"]))
    for model in (unet, vae, text):
        model.to("cpu", pipeline.DTYPES[dtype])
    words = pipeline.load("digits").tokenizer
    words.model_max_length = 77
    noise: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    scheduler = diffusers.PNDMScheduler(**noise, skip_prk_steps=True, set_alpha_to_one=False)
    pipe = diffusers.StableDiffusionPipeline(
        vae, text, words, unet, scheduler, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    pipe.save_pretrained(folder)


def pictures(count: int, side: int) -> dict[str, torch.Tensor]:
    image = torch.randint(256, (count, 3, side, side), generator=stream("pictures"), dtype=torch.uint8)
    return {"image": image, "label": torch.arange(count) % len(PROMPTS)}


def script(
    base: str, table: dict[str, torch.Tensor], batch: int, steps: int, dtype: str, device: str = "cpu", warm: int = 1
) -> dict[str, float]:
    """Seconds of a step of the script's loop, without the first ones; with bf16 as under `--mixed_precision bf16`."""
    kind = pipeline.DTYPES[dtype]
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(pipeline.find(base), local_files_only=True)
    unet, vae, text, words = pipe.unet, pipe.vae, pipe.text_encoder, pipe.tokenizer
    noise_scheduler = diffusers.DDPMScheduler.from_config(pipe.scheduler.config)
    for model in (unet, vae, text):
        model.requires_grad_(False).to(device, kind)
    unet.add_adapter(
        LoraConfig(r=4, lora_alpha=4, init_lora_weights="gaussian", target_modules=["to_k", "to_q", "to_v", "to_out.0"])
    )
    diffusers.training_utils.cast_training_params(unet, dtype=torch.float32)
    layers = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(layers, lr=1e-4, betas=(0.9, 0.999), weight_decay=1e-2, eps=1e-08)
    rate = diffusers.optimization.get_scheduler("constant", optimizer=optimizer)
    pixel_values = table["image"].float().div(127.5).sub(1).to(device, kind)
    ids = words(
        [PROMPTS[label] for label in table["label"]],
        max_length=words.model_max_length, padding="max_length", truncation=True, return_tensors="pt",
    ).input_ids.to(device)  # fmt: skip
    unet.train()
    began, loss = 0.0, torch.zeros(())
    for step in range(steps + warm):
        if step == warm:
            began = clock(device)
        chosen = torch.randperm(len(ids))[:batch].to(device)
        encoded = vae.encode(pixel_values[chosen])
        sample = encoded.latents if isinstance(vae, diffusers.AutoencoderTiny) else encoded.latent_dist.sample()
        sample = sample * vae.config.scaling_factor
        noise = torch.randn_like(sample)
        timesteps = torch.randint(0, noise_scheduler.config.num_train_timesteps, (batch,), device=device).long()
        noisy = noise_scheduler.add_noise(sample, noise, timesteps)
        states = text(ids[chosen], return_dict=False)[0]
        if noise_scheduler.config.prediction_type == "epsilon":
            target = noise
        else:
            target = noise_scheduler.get_velocity(sample, noise, timesteps)
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=dtype == "bf16"):
            predicted = unet(noisy, timesteps, states, return_dict=False)[0]
        loss = F.mse_loss(predicted.float(), target.float(), reduction="mean")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(layers, 1.0)
        optimizer.step()
        rate.step()
        optimizer.zero_grad()
    return {"step": (clock(device) - began) / steps, "loss": loss.item()}


def generator(base: str, side: int, batch: int, steps: int, dtype: str = "fp32") -> LatentDiffusion:
    training = Training(
        optimizer="adamw", lr=1e-4, weight_decay=1e-2, steps=steps, batch_size=batch, max_grad_norm=1.0, mixed_precision=dtype
    )
    return LatentDiffusion(
        base, size=side, rank=4, target_modules="attention", prompts=False, views=1, training=training, dtype=dtype
    )


def ours(
    base: str, table: dict[str, torch.Tensor], batch: int, steps: int, dtype: str,
    device: str = "cpu", warm: int = 1, checkpointing: bool = False,
) -> dict[str, float]:  # fmt: skip
    """Seconds of a step, without the first ones; and of encoding one image, which is done once."""
    marks: list[float] = []

    def progress(what: str, done: int, total: int) -> None:
        if done in (warm, total):  # no more often: a graphics card would wait for the processor after each
            marks.append(clock(device))

    learner = generator(base, table["image"].shape[-1], batch, steps + warm, dtype)
    learner = replace(learner, lora=replace(learner.lora, gradient_checkpointing=checkpointing))
    ctx = ClientContext(None, {"train": table}, stream("ours"), "a", PROMPTS, device=device, progress=progress)
    parts = learner._parts(device)
    began = clock(device)
    latents(ctx, "train", learner, parts)
    encoding = (clock(device) - began) / rows(table)
    _, info = learner.adapt(ctx)
    return {"step": (marks[-1] - marks[0]) / steps, "encoding": encoding, "loss": info["loss"]}


def measured(arm: str, base: str, dtype: str, side: int, batch: int, steps: int, images: int) -> dict[str, float]:
    """One arm in this process, and what memory it had after its imports: the libraries, which both import alike."""
    table, before = pictures(images, side), now()
    run = ours if arm == "ours" else script
    return {**run(base, table, batch, steps, dtype), "libraries_mb": before}


def compared(base: str, side: int, batch: int, steps: int, images: int, repeats: int, dtype: str = "fp32") -> dict[str, Any]:
    """Both arms in turn, each in a process of its own."""
    found: dict[str, list[dict[str, float]]] = {"script": [], "ours": []}
    for _ in range(repeats):
        for arm, seen in found.items():
            command = [sys.executable, __file__, "--arm", arm, base, dtype, *map(str, (side, batch, steps, images))]
            with (
                subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process,
                MemoryMonitor(process.pid, 0.1) as meter,
            ):
                result = json.loads(process.stdout.read().splitlines()[-1])
                seen.append({**result, "peak_mb": meter.peak() - result["libraries_mb"]})
            print(base, dtype, side, arm, seen[-1], flush=True)
    step = {arm: statistics.median(each["step"] for each in seen) for arm, seen in found.items()}
    encoding = statistics.median(each["encoding"] for each in found["ours"])
    return {
        "dtype": dtype, "side": side, "batch": batch, "steps": steps,
        "images_per_second": {arm: batch / seconds for arm, seconds in step.items()},
        "with_encoding_over_12_epochs": batch / (step["ours"] + batch * encoding / 12),
        "speedup": step["script"] / step["ours"],
        "speedup_with_encoding": step["script"] / (step["ours"] + batch * encoding / 12),
        "peak_mb": {arm: max(each["peak_mb"] for each in seen) for arm, seen in found.items()},
    }  # fmt: skip


OPTIONS: dict[str, dict[str, Any]] = {
    "attention, rank 4": {},
    "rank 16": {"rank": 16},
    "targets transformer": {"target_modules": "transformer"},
    "targets all": {"target_modules": "all"},
    "learned prompts": {"prompts": True},
    "lora.textual_inversion": {"lora.textual_inversion": True},
    "lora.dora": {"lora.dora": True},
    "lora.prior_loss_weight": {"lora.prior_loss_weight": 1.0},
    "lora.gradient_checkpointing": {"lora.gradient_checkpointing": True},
    "training.micro_batch_size 8": {"training.micro_batch_size": 8},
    "training.ema_decay": {"training.ema_decay": 0.99},
    "training.mixed_precision bf16": {"training.mixed_precision": "bf16"},
    "lora.patience": {"lora.patience": 100},
}


def changed(settings: Any, key: str, value: Any) -> Any:
    field, _, rest = key.partition(".")
    return replace(settings, **{field: changed(getattr(settings, field), rest, value) if rest else value})


def option(name: str) -> dict[str, float]:
    """An option on the embedded base: its speed, the peak memory of a step by count, and the adapter's size."""
    settings = generator("digits", 32, 32, 9)
    for key, value in OPTIONS[name].items():
        settings = changed(settings, key, value)
    marks: list[float] = []
    data = {"train": pictures(64, 32), "validation": pictures(32, 32)}
    ctx = ClientContext(None, data, stream("option"), "a", PROMPTS, progress=lambda what, *_: marks.append(time.process_time()))
    adapter, _ = settings.adapt(ctx)
    marks = marks[-9:]
    return {
        "images_per_second": 32 * 8 / (marks[-1] - marks[0]),
        "peak_mb": plan(settings, len(PROMPTS)).train.peak / 1e6,
        "adapter_kb": sum(tensor.nbytes for tensor in adapter.values()) / 1e3,
    }


def by_count(side: int) -> Iterator[dict[str, Any]]:
    """SD-1.5 with an adapter: bytes of its weights, and of a step beside them, with the optimizer's state."""
    for targets, rank, dtypes in (("attention", 4, ("fp32", "bf16")), ("attention", 16, ("bf16",)), ("all", 4, ("bf16",))):
        for dtype in dtypes:
            for checkpointing in (False, True):
                for batch in (1, 4) if rank == 4 and targets == "attention" else (1,):
                    settings = replace(generator(SD15, side, batch, 1), target_modules=targets, rank=rank, dtype=dtype)
                    found = plan(changed(settings, "lora.gradient_checkpointing", checkpointing), len(PROMPTS))
                    yield {
                        "targets": targets, "rank": rank, "dtype": dtype, "checkpointing": checkpointing, "batch": batch,
                        "adapter_mb": found.adapter / 1e6, "weights_gb": found.weights / 1e9,
                        "step_gb": found.train.peak / 1e9, "total_gb": (found.weights + found.train.peak) / 1e9,
                    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--large", type=int, nargs="*", default=[64, 128])
    parser.add_argument("--dtypes", nargs="*", choices=("fp32", "bf16"), default=["fp32"])
    parser.add_argument("--only-large", action="store_true", help="leave what else --out holds as it is")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--arm", nargs=7, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only_large and not args.out:
        parser.error("--only-large adds to the figures that --out holds; name it")
    pipeline.quiet()
    warnings.simplefilter("ignore")  # diffusers and transformers tell of modules and settings of their own
    torch.set_num_threads(1)
    if args.arm:
        arm, base, dtype, *numbers = args.arm
        side, batch, steps, images = map(int, numbers)
        print(json.dumps(measured(arm, base, dtype, side, batch, steps, images)))
        return
    result: dict[str, Any] = read_json(args.out, "the figures") if args.only_large else {}

    def told(name: str, value: Any) -> None:
        result[name] = value
        if args.out:
            write_json(args.out, result)

    told("machine", f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}")
    with tempfile.TemporaryDirectory() as folder:
        if args.large:
            large(Path(folder) / "sd15")
        for dtype in args.dtypes:
            name = "sd15" if dtype == "fp32" else f"sd15_{dtype}"
            told(name, [compared(str(Path(folder) / "sd15"), side, 1, 3, 4, 1, dtype) for side in args.large])
    if args.only_large:
        return
    told("tiny", compared("digits", 32, 32, 30, 256, args.repeats))
    told("sd15_by_count_512", list(by_count(512)))
    options: dict[str, dict[str, float]] = {}
    for name in OPTIONS:
        options[name] = option(name)
        print(name, options[name], flush=True)
        told("options", options)


if __name__ == "__main__":
    main()
