"""What bounds a generator that was learned in latents: of a finished run, by the features that measured it.

    python benchmarks/latent_floor.py runs/mnist_generators/cells/fedddpm-rounds10-seed0

Fréchet distances to all training images: of test images; and of as many as the run was measured with, evenly spread, of
training images that went through the autoencoder and back, and of the auxiliary set where the run has one. And which share of
the network's numbers each of its parts has.
"""

import json
import sys
from collections import Counter
from pathlib import Path

import torch

from warmfed.core.tensors import evenly_spaced, join
from warmfed.evaluation.features import extractor
from warmfed.metrics.images import distances
from warmfed.runs.folder import read_config
from warmfed.runs.prepare import prepare
from warmfed.runs.report_images import read_synthetic
from warmfed.tasks.denoising import Denoise


def main(folder: Path) -> dict[str, float]:
    """The figures of the run in `folder`."""
    config = read_config(folder)
    ready = prepare(config)
    task, sites = ready.task, ready.images.sites.values()
    if not isinstance(task, Denoise):
        sys.exit(f"{folder} did not learn a diffusion model; give a run with task = denoise")
    look, _ = extractor(config.evaluation.features, config.denoising.latent or "digits", task.shape)
    train, test = join(site.train for site in sites), join(site.test for site in sites)
    seen = look(train["image"])
    shown = {
        "test images": test["image"],
        "through the autoencoder": task.decoded(task.encoded(evenly_spaced(train, config.evaluation.samples))["latent"]),
    }
    if auxiliary := read_synthetic(folder):
        shown["auxiliary set"] = evenly_spaced(join(auxiliary.values()), config.evaluation.samples)["image"]
    found = {name: distances(seen, look(image))["fid"] for name, image in shown.items()}
    with torch.device("meta"):
        network = task.build().state_dict()
    sizes = Counter[str]()
    for name, tensor in network.items():
        sizes[task.part(name)] += tensor.numel()
    return found | {f"share of the {part}": count / sizes.total() for part, count in sizes.items()}


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1])), indent=1))
