"""The quality of a base: do its samples show what their prompts say, and how far are they from rendered characters?

The judge is a classifier trained on rendered characters that the base was not trained on; it has never seen a sample.
Samples are drawn by diffusers' own `StableDiffusionPipeline` from the folder as it is shipped, not by our sampler.

recognised: share of samples that the judge takes for the prompt's digit (beside it: the judge on real renderings).
distance: Fréchet distance between the judge's features of the samples and of as many held-out renderings; `floor` is the
same between two held-out sets. FID's formula with other features: compare within this table only.

    python benchmarks/base_quality.py [--base digits] [--samples 1000] [--out benchmarks/results/base_quality.json]
                                      [--picture docs/images/base.png]
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from warmfed.core import ServerContext
from warmfed.core.rng import stream
from warmfed.core.tensors import Table, Tensors
from warmfed.core.training import Training
from warmfed.data.readers.digits4 import CLASSES, TEMPLATE
from warmfed.data.rendered_digits import rendered
from warmfed.diffusion import pipeline
from warmfed.fit import fit
from warmfed.tasks import Classify
from warmfed.utils.files import atomic_write, write_json

GUIDANCES = (1.0, 2.0, 4.0)
STEPS = (8, 12, 25)
SHOWN = (2.0, 12)
"""Guidance and steps of the samples in the picture."""
JUDGE = Training(
    optimizer="adamw", lr=2e-3, epochs=6, batch_size=64, schedule="cosine", warmup=100, weight_decay=0.01, max_grad_norm=1.0
)


def judge(task: Classify, images: int) -> Tensors:
    """A classifier of rendered characters."""
    rng = stream("base_quality", "judge")
    data = rendered(images, stream("base_quality", "judge's images"))
    return fit(ServerContext(task, rng), task.init(rng), JUDGE, data)[0]


def frechet(one: Tensor, other: Tensor) -> float:
    """|μ₁ - μ₂|² + tr(Σ₁ + Σ₂ - 2(Σ₁Σ₂)^½) of features [n, width]."""
    a, b = one.double(), other.double()
    first, second = a.T.cov(), b.T.cov()
    root = torch.linalg.eigvals(first @ second).real.clamp_min(0).sqrt().sum()
    return float((a.mean(0) - b.mean(0)).square().sum() + first.trace() + second.trace() - 2 * root)


def sample(pipe: Any, label: Tensor, guidance: float, steps: int, batch: int = 100) -> Tensor:
    """One image for each label, uint8 [n, 3, h, w]."""
    rng, drawn = stream("base_quality", "samples"), []
    for part in label.split(batch):
        prompts = [TEMPLATE.format(CLASSES[digit]) for digit in part.tolist()]
        images = pipe(prompts, num_inference_steps=steps, guidance_scale=guidance, generator=rng, output_type="np").images
        drawn.append(torch.from_numpy(images).mul(255).round().to(torch.uint8).permute(0, 3, 1, 2))
    return torch.cat(drawn)


def fidelity(base: str, images: Tensor) -> dict[str, float]:
    """The autoencoder alone: peak signal-to-noise ratio in dB (mean over the images), and images decoded per second."""
    parts = pipeline.load(base)
    latents, _ = parts.encode(images)
    began = time.perf_counter()
    again = parts.decode(latents)
    seconds = time.perf_counter() - began
    error = (again.double() - images.double()).div(255).square().mean((1, 2, 3))
    return {"psnr": float(-10 * error.log10().mean()), "decoded_per_second": len(images) / seconds}


def picture(images: Tensor, columns: int, path: Path) -> None:
    """A PNG with the images in rows."""
    rows = len(images) // columns
    grid = images.view(rows, columns, 3, *images.shape[2:]).permute(0, 3, 1, 4, 2).reshape(rows * 32, columns * 32, 3)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.ascontiguousarray(grid.numpy())).save(path, optimize=True)


def markdown(result: dict[str, Any]) -> str:
    """The result as a page."""
    lines = [
        "# Quality of the embedded base",
        "",
        f"`python benchmarks/base_quality.py`, {result['samples']} samples per row, {result['threads']} thread(s). The judge "
        f"recognises {result['judge']['accuracy']:.1f} % of held-out renderings; "
        f"the distance between two held-out sets is {result['floor']:.2f}.",
        f"Autoencoder: {result['autoencoder']['psnr']:.1f} dB on held-out renderings, of which the judge then recognises "
        f"{result['autoencoder']['recognised']:.1f} %.",
        "",
        "| guidance | steps | recognised % | worst digit | distance | images/s |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        worst = min(row["by_class"], key=row["by_class"].get)
        lines.append(
            f"| {row['guidance']:g} | {row['steps']} | {row['recognised']:.1f} | {worst} {row['by_class'][worst]:.0f} | "
            f"{row['distance']:.2f} | {row['images_per_second']:.1f} |"
        )
    return "\n".join([*lines, ""])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="digits")
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--judge-images", type=int, default=20_000)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/base_quality.json"))
    parser.add_argument("--picture", type=Path, default=Path("docs/images/base.png"))
    options = parser.parse_args(arguments)

    from diffusers import StableDiffusionPipeline

    torch.set_num_threads(1)
    task = Classify((3, 32, 32), 10)
    model = judge(task, options.judge_images)
    real, other = (rendered(options.samples, stream("base_quality", "held out", part)) for part in (0, 1))
    features = task.features(model, real)

    def recognised(table: Table) -> Tensor:
        return (task.predict(model, table).argmax(1) == table["label"]).double() * 100

    pipe = StableDiffusionPipeline.from_pretrained(pipeline.find(options.base), local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    label = torch.arange(options.samples) % 10
    rows = []
    for guidance in GUIDANCES:
        for steps in STEPS:
            began = time.perf_counter()
            images = sample(pipe, label, guidance, steps)
            seconds = time.perf_counter() - began
            right = recognised({"image": images, "label": label})
            row = {
                "guidance": guidance,
                "steps": steps,
                "recognised": float(right.mean()),
                "by_class": {name: float(right[label == digit].mean()) for digit, name in enumerate(CLASSES)},
                "distance": frechet(task.features(model, {"image": images}), features),
                "images_per_second": options.samples / seconds,
            }
            rows.append(row)
            print(json.dumps(row), flush=True)
            if (guidance, steps) == SHOWN:
                columns = min(20, options.samples // 10)
                picture(
                    images[: 10 * columns].unflatten(0, (columns, 10)).transpose(0, 1).flatten(0, 1), columns, options.picture
                )

    again = pipeline.load(options.base)
    rebuilt = {"image": again.decode(again.encode(real["image"])[0]), "label": real["label"]}
    result = {
        "base": options.base,
        "base_sha256": pipeline.fingerprint(options.base),
        "samples": options.samples,
        "threads": torch.get_num_threads(),
        "judge": task.metrics(model, other),
        "floor": frechet(task.features(model, other), features),
        "autoencoder": fidelity(options.base, real["image"]) | {"recognised": float(recognised(rebuilt).mean())},
        "rows": rows,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(options.out, result)
    atomic_write(options.out.with_suffix(".md"), markdown(result))


if __name__ == "__main__":
    main()
