"""Stable Diffusion 1.5's size on a graphics card: LoRA training and sampling beside diffusers' own way and the chip's peak.

    python benchmarks/gpu.py --out benchmarks/results/gpu.json

Random weights in 16 bits, nothing is downloaded. Training: the loop of diffusers' LoRA script under `--mixed_precision bf16`
beside `LatentDiffusion.adapt` (`lora_speed`). Sampling: a plain call of diffusers' pipeline beside ours, and bare passes of
denoiser and decoder (`sampling_speed`). Seconds are of the wall, after all work on the chip is done. A share is what `plan`
counts of useful work (in training the U-Net's, without what checkpoints compute again), over the chip's peak: of a large
product measured here, and of the data sheet. What fails leaves its error under its name, and the rest goes on.
"""

import argparse
import gc
import math
import platform
import shutil
import statistics
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import lora_speed
import sampling_speed
import torch

from warmfed.diffusion import lora as lora
from warmfed.diffusion import pipeline
from warmfed.diffusion.cost import plan
from warmfed.diffusion.generator import LatentDiffusion
from warmfed.utils.files import write_json

DATA_SHEET = 989e12
"""Dense bf16 FLOP/s of an H100 SXM and of an H200."""
SETTINGS = {"8 steps, guidance 1.5": (8, 1.5), "20 steps, guidance 7.5": (20, 7.5)}
"""Of our samples: our defaults, and a guidance that is usual elsewhere."""
PASSES = 51
"""Of the denoiser in 50 steps of PNDM, Stable Diffusion 1.5's own sampler."""


def peak(device: str) -> float:
    """FLOP/s of a large matrix product in bf16: the median of twenty."""
    side = 512 if device == "cpu" else 8192
    first, second = (torch.randn(side, side, device=device).bfloat16() for _ in range(2))
    out, seconds = torch.empty_like(first), list[float]()
    for _ in range(30):
        if device == "cpu":
            begun = time.perf_counter()
            torch.mm(first, second, out=out)
            seconds.append(time.perf_counter() - begun)
            continue
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        torch.mm(first, second, out=out)
        end.record()
        torch.cuda.synchronize(device)
        seconds.append(start.elapsed_time(end) / 1e3)
    return 2 * side**3 / statistics.median(seconds[10:])


def chip(device: str) -> dict[str, Any]:
    found: dict[str, Any] = {
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "python": platform.python_version(),
    }
    if device != "cpu":
        card = torch.cuda.get_device_properties(device)
        found |= {"name": card.name, "memory_gb": card.total_memory / 1e9, "cuda": torch.version.cuda}
    return {**found, "peak_tflops": peak(device) / 1e12, "data_sheet_tflops": DATA_SHEET / 1e12}


def counted(base: str, side: int) -> dict[str, float]:
    """TFLOP for one image: a step of training, a step of the sampler with guidance, and the decoder."""
    found = plan(replace(lora_speed.generator(base, side, 1, 1, "bf16"), batch_size=1), len(lora_speed.PROMPTS))
    return {
        "train": found.train.flops / 1e12, "sample": found.sample.flops / 1e12,
        "decode": found.decode.flops / 1e12, "encode": found.encode.flops / 1e12,
    }  # fmt: skip


def clean(device: str, whole: bool = False) -> None:
    """Free what nobody holds, with our loaded base if `whole`; memory is looked at from here on."""
    if whole:
        lora._injected.cache_clear()
        lora._loaded.cache_clear()
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def held(device: str) -> dict[str, float]:
    """The most memory since `clean`."""
    return {} if device == "cpu" else {"peak_gb": torch.cuda.max_memory_allocated(device) / 1e9}


def trained(arm: str, base: str, batch: int, asked: argparse.Namespace, checkpointing: bool = False) -> dict[str, Any]:
    """An arm of training, as `lora_speed` has it."""
    table, device = lora_speed.pictures(max(*asked.batches, asked.alone), asked.side), asked.device
    options: dict[str, Any] = {"device": device, "warm": asked.warm}
    if arm == "ours":
        options["checkpointing"] = checkpointing
        lora.parts(base, device, "bf16").encode(table["image"][:2])  # loads, and warms the encoder
    clean(device)
    found = getattr(lora_speed, arm)(base, table, batch, asked.steps, "bf16", **options)
    finite = math.isfinite(found["loss"])
    result: dict[str, Any] = {"batch": batch, "images_per_second": batch / found["step"], **held(device), "finite": finite}
    result["loss"] = found["loss"] if finite else None
    if arm == "ours":
        whole = found["step"] + batch * found["encoding"] / 12
        result |= {"encoding_seconds": found["encoding"], "with_encoding_over_12_epochs": batch / whole}
    return result


def sampled(make: Callable[..., sampling_speed.Draw], *of: Any, count: int, repeats: int, device: str) -> dict[str, Any]:
    """A way to draw images, as `sampling_speed` has it."""
    clean(device)
    row = sampling_speed.timed({"": make(*of, device=device)}, torch.arange(count) % 10, repeats, device)[""]
    images = row.pop("images")
    # what is not a number has become 0; and those of random weights are grey
    return {"images": count, **row, **held(device), "finite": bool((images.flatten(1).amax(1) > 0).all())}


def compared(result: dict[str, Any], asked: argparse.Namespace) -> dict[str, Any]:
    """Ratios of what there is."""

    def over(one: str, other: str, key: str = "images_per_second", below: str = "") -> float | None:
        first, second = result.get(one, {}).get(key), result.get(other, {}).get(below or key)
        return round(first / second, 3) if first and second else None

    found: dict[str, Any] = {}
    for batch in asked.batches:
        pair = f"train, ours, batch {batch}", f"train, script, batch {batch}"
        found[f"train, batch {batch}"] = {
            "speedup": over(*pair),
            "speedup_with_encoding": over(*pair, "with_encoding_over_12_epochs", "images_per_second"),
            "memory": over(*pair, "peak_gb"),
        }
    for name in SETTINGS:
        found[f"sample, {name}"] = {
            f"ours_over_{other}": over(f"sample, ours, {name}", f"sample, {other}{rest}")
            for other, rest in (("plain bf16", ""), ("plain fp32", ""), ("bare", f", {name}"))
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--side", type=int, default=512, help="pixels")
    parser.add_argument(
        "--batches", type=int, nargs="+", default=[1, 4, 16], help="of training; the last one also with checkpoints"
    )
    parser.add_argument("--alone", type=int, default=32, help="a batch of ours without a counterpart, if memory allows")
    parser.add_argument("--steps", type=int, default=20, help="measured, of training")
    parser.add_argument("--warm", type=int, default=4, help="steps before these")
    parser.add_argument("--images", type=int, default=32, help="samples")
    parser.add_argument("--draw", type=int, default=16, help="samples of a batch")
    parser.add_argument("--repeats", type=int, default=2, help="turns of sampling, of which the best counts")
    parser.add_argument("--small", action="store_true", help="7 M parameters for 64 pixels, to try this on a processor")
    asked = parser.parse_args()
    pipeline.quiet()
    warnings.simplefilter("ignore")
    device, side, count = asked.device, asked.side, {"count": asked.images, "repeats": asked.repeats, "device": asked.device}
    result: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "asked": {name: value for name, value in vars(asked).items() if name != "out"},
    }
    failed: list[str] = []

    def told(name: str, work: Callable[..., dict[str, Any]], *of: Any, tflop: float = 0.0, **more: Any) -> None:
        """Do a part and keep it; `tflop`: what one image needs."""
        begun = time.perf_counter()
        try:
            found = work(*of, **more)
            if tflop and found:
                rate = tflop * found["images_per_second"]
                best = {what: result["chip"].get(f"{what}_tflops") for what in ("peak", "data_sheet")}
                found |= {"tflops": rate, **{f"share_of_{what}": rate / most for what, most in best.items() if most}}
            if not found.get("finite", True):
                failed.append(name)
        except Exception as error:
            found = {"error": f"{type(error).__name__}: {error}"[:1000], "at": traceback.format_tb(error.__traceback__)[-4:]}
            if not (isinstance(error, torch.OutOfMemoryError) and "alone" in name):
                failed.append(name)
        result[name] = {**found, "part_seconds": round(time.perf_counter() - begun, 1)}
        write_json(asked.out, result)
        print(f"{name}: {result[name]}", flush=True)

    told("chip", chip, device)
    shared = Path("/dev/shm")
    place = shared if shared.is_dir() and shutil.disk_usage(shared).free > 2**32 else None
    with tempfile.TemporaryDirectory(dir=place) as folder:
        base = str(Path(folder) / "base")

        def build() -> dict[str, Any]:
            _ = sampling_speed.small(Path(base)) if asked.small else lora_speed.large(Path(base), device, "bf16")
            return {"small": asked.small}

        told("base", build)
        clean(device)
        told("tflop_of_an_image", counted, base, side)

        def needs(what: str) -> float:
            return float(result["tflop_of_an_image"].get(what, 0))

        for batch in asked.batches:
            told(f"train, script, batch {batch}", trained, "script", base, batch, asked, tflop=needs("train"))
        for batch in asked.batches:
            told(f"train, ours, batch {batch}", trained, "ours", base, batch, asked, tflop=needs("train"))
        last = asked.batches[-1]
        told(f"train, ours, checkpoints, batch {last}", trained, "ours", base, last, asked, True, tflop=needs("train"))
        told(f"train, ours alone, batch {asked.alone}", trained, "ours", base, asked.alone, asked, tflop=needs("train"))
        for name, (steps, guidance) in SETTINGS.items():
            learner = LatentDiffusion(base, "bf16", side, batch_size=asked.draw, steps=steps, guidance=guidance)
            tflop = steps * needs("sample") + needs("decode")
            told(f"sample, bare, {name}", sampled, sampling_speed.bare, learner, **count, tflop=tflop)
            told(f"sample, ours, {name}", sampled, sampling_speed.ours, learner, None, **count, tflop=tflop)
        clean(device, whole=True)
        for dtype in ("bf16", "fp32"):
            if dtype == "fp32":  # one call: it is slow
                count |= {"count": asked.draw, "repeats": 1}
            make, tflop = partial(sampling_speed.plain, dtype=dtype), PASSES * needs("sample") + needs("decode")
            told(f"sample, plain {dtype}", sampled, make, base, side, asked.draw, **count, tflop=tflop)
    result["compared"] = compared(result, asked)
    result["failed"] = failed
    write_json(asked.out, result)
    table(result)
    sys.exit(bool(failed))


def table(result: dict[str, Any]) -> None:
    print(f"\n{'':44}{'images/s':>10}{'TFLOP/s':>10}{'of peak':>10}{'GB':>8}")
    for name, row in result.items():
        if isinstance(row, dict) and "images_per_second" in row:
            numbers = (row["images_per_second"], row.get("tflops", 0), row.get("share_of_peak", 0), row.get("peak_gb", 0))
            print("{:44}{:10.2f}{:10.2f}{:10.1%}{:8.2f}".format(name, *numbers))
    for name, ratios in result["compared"].items():
        print(name, ratios)
    print("failed:", ", ".join(result["failed"]) or "nothing")


if __name__ == "__main__":
    main()
