"""The cost of drawing: our batch sampler beside the denoiser's bare forward passes, and what surrounds them.

For each denoiser a batch is drawn with as many steps as its settings say. `bare` are the same forward passes and nothing
else, `sampler` is `Denoise.sample` (building the network, loading its weights, noise, scheduler). The shares of scheduler and
decoder are of sampler and decoder together. An average of the weights costs nothing in drawing; its share is of training.
Seconds are the processor's, of one thread: what else the machine does counts little.

    python benchmarks/sampling.py [--repeats 5] [--images 250] [--out benchmarks/results/sampling.json]
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from warmfed.core import ServerContext
from warmfed.core.rng import stream
from warmfed.core.training import Training
from warmfed.diffusion.networks import DenoiserSettings, noise_scheduler
from warmfed.fit import fit
from warmfed.tasks.denoising import Denoise
from warmfed.utils.files import write_json

DENOISERS = {
    "dit, latents": Denoise((3, 32, 32), 10, DenoiserSettings()),
    "dit, pixels": Denoise((1, 28, 28), 10, DenoiserSettings(latent="", patch=4, width=96, depth=4)),
    "unet, latents": Denoise((3, 32, 32), 10, DenoiserSettings(denoiser="unet", width=64, depth=1)),
}


def seconds(work: Callable[[], object]) -> float:
    """Of the processor."""
    began = time.process_time()
    work()
    return time.process_time() - began


def measured(task: Denoise, images: int, repeats: int) -> dict[str, float]:
    """Median seconds of each kind of work."""
    model, label = task.init(stream("sampling")), torch.arange(images) % task.classes
    latent = torch.randn((images, *task.space), generator=stream("latent"))
    net = task.build().eval()
    net.load_state_dict(dict(model))
    scheduler = type(noise_scheduler(task.settings)).from_config(noise_scheduler(task.settings).config)
    table = {"latent": latent, "label": label}
    ctx = ServerContext(task, stream("train"))

    def bare() -> None:
        with torch.inference_mode():
            for step in range(task.settings.steps):
                net(latent, torch.full((images,), step), label)

    def schedule() -> None:
        scheduler.set_timesteps(task.settings.steps)
        now = latent
        with torch.inference_mode():
            for moment in scheduler.timesteps:
                now = scheduler.step(latent, moment, now).prev_sample

    def train(ema: float) -> None:
        fit(
            replace(ctx, rng=stream("train")),
            model,
            Training(optimizer="adam", lr=1e-3, steps=10, batch_size=32, ema_decay=ema),
            table,
        )

    works: dict[str, Callable[[], object]] = {
        "bare": bare,
        "sampler": lambda: task.sample(model, label, stream("draw")),
        "scheduler": schedule,
        "decoder": lambda: task.decoded(latent),
        "train": lambda: train(0.0),
        "train_ema": lambda: train(0.99),
    }
    # in turn, so that a drift of the machine's speed meets all alike; the first turn warms up
    rows = [{name: seconds(work) for name, work in works.items()} for _ in range(repeats + 1)][1:]
    return {name: statistics.median(row[name] for row in rows) for name in works}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--images", type=int, default=250)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    result: dict[str, object] = {"machine": f"{platform.machine()}, torch {torch.__version__}", "images": args.images}
    for name, task in DENOISERS.items():
        took = measured(task, args.images, args.repeats)
        drawn = took["sampler"] + took["decoder"]
        result[name] = {
            "seconds": took,
            "steps": task.settings.steps,
            "images_per_second": args.images / drawn,
            "forward_passes_per_second": {
                "bare": args.images * task.settings.steps / took["bare"],
                "sampler": args.images * task.settings.steps / took["sampler"],
            },
            "sampler_over_bare": took["bare"] / took["sampler"],
            "share": {
                "scheduler": took["scheduler"] / drawn,
                "decoder": took["decoder"] / drawn,
                "ema": 1 - took["train"] / took["train_ema"],
            },
        }
        print(name, json.dumps(result[name], indent=1), flush=True)
    if args.out:
        write_json(args.out, result)


if __name__ == "__main__":
    main()
