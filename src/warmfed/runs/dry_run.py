"""Cost estimate of a run (`warmfed run --dry-run`): builds and checks everything except the base's weights.

Steps and memory are counted. Time is estimated from three measured speeds of this machine; see `diffusion.cost`.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from ..config import Config
from ..core.training import Training
from ..data import Federation
from ..diffusion import pipeline
from ..diffusion.cost import Cost, Plan, counted, machine
from ..diffusion.cost import plan as plan_generator
from ..tasks import Classify
from ..tasks.denoising import Denoise
from ..utils.paths import is_file
from .prepare import PreparedRun, prepare


@dataclass(frozen=True)
class Work:
    """One kind of work of a run."""

    what: str
    where: str
    """Place of the work: sites or server."""
    count: int
    """Number of units."""
    unit: str
    """Unit: steps, images, …"""
    seconds: float
    """Seconds of all units, run one after another."""
    memory: float
    """Peak memory of one process, in bytes."""


def dry_run(config: Config) -> dict[str, Any]:
    """Return the work and the cost of a run, without running it.

    Returns:
        {"algorithm", "sites", "images", "classes", "stages": names with counts, "work": rows as `Work`, "seconds" (with the
        configured workers), "timed_on": device of the measured speeds, "memory" (bytes of all processes), "adapter"
        (bytes that a site sends) and "base": its name, bytes and whether its weights exist}.

    Raises:
        InputError: The configuration is not valid; missing weights of the base are allowed.
    """
    absent = config.device == "cuda" and not torch.cuda.is_available()
    config = replace(config, device="cpu") if absent else config
    prepared = prepare(config, weights=False)
    stages = dict(Counter(stage.name for stage in config.algorithm.stages()))
    assert isinstance(prepared.federation, Federation)
    rows = {site: counts["train"] for site, counts in prepared.federation.rows.items()}
    found: dict[str, Any] = {
        "algorithm": config.name,
        "sites": len(rows),
        "images": sum(sum(counts.values()) for counts in prepared.federation.rows.values()),
        "classes": len(prepared.federation.classes),
        "stages": stages,
        "timed_on": "cpu, as this machine has no GPU" if absent else config.device,
        "adapter": 0,
        "base": None,
    }
    pairs = sum(len(classes) for classes in prepared.federation.present.values())
    work = list(_trained(prepared, rows, pairs))
    weights = 0
    if config.algorithm.needs_generator is not None:
        costs = plan_generator(config.generator, len(prepared.federation.classes))
        weights = costs.weights
        work = [*_generated(prepared, rows, pairs, stages, costs), *work]
        found |= {"adapter": costs.adapter * ("adapt" in stages)}
        found["base"] = {"name": config.generator.base, "bytes": weights, "there": _there(config.generator.base)}
    processes = max(1, min(config.workers, len(rows)))
    seconds = sum(each.seconds / (processes if each.where == "sites" else 1) for each in work)
    data = sum(table["image"].nbytes for site in prepared.federation.sites.values() for table in site.splits.values())
    memory = data + processes * (weights + max((each.memory for each in work), default=0.0))
    return found | {"work": [asdict(each) for each in work], "seconds": seconds, "memory": memory}


def _there(base: str) -> bool:
    files = pipeline.files(base)
    return len(files) > 1 and all(is_file(path) for path in files.values())


def _generated(prepared: PreparedRun, rows: dict[str, int], pairs: int, stages: dict[str, int], costs: Plan) -> Iterator[Work]:
    """Yield the generator's work: latents and adapters at the sites, samples at the server.

    Args:
        prepared: the run.
        rows: training images by site.
        pairs: number of pairs of a site and a class that it holds.
        stages: number of stages by name.
        costs: the generator's costs per unit.
    """
    config, generator = prepared.config, prepared.config.generator
    speed = machine(config.device, generator.dtype)

    def row(what: str, where: str, count: int, unit: str, cost: Cost) -> Work:
        return Work(what, where, count, unit, speed.seconds(cost), cost.peak)

    if "adapt" in stages:
        images = sum(rows.values()) * generator.views * (2 if generator.lora.flip else 1)
        steps = sum(generator.training.count(n) for n in rows.values())
        yield row("latents", "sites", images, "images", costs.encode.times(images))
        yield row("adapters", "sites", steps, f"steps of {generator.training.batch_size}", costs.train.times(steps))
    samples = pairs * config.algorithm.samples_per_class
    batches = -(-samples // generator.batch_size)
    drawn = costs.sample.times(batches * generator.steps) + costs.decode.times(batches)
    yield row("samples", "sites", samples, f"images of {generator.steps} steps", drawn)


def _trained(prepared: PreparedRun, rows: dict[str, int], pairs: int) -> Iterator[Work]:
    """Yield the work of the trainings that the algorithm names, without those of no step."""
    for each in prepared.config.algorithm.workload(rows, pairs):
        if each.steps:
            yield _learned(prepared, each.what, each.where, each.steps, each.training)


def _learned(prepared: PreparedRun, what: str, where: str, steps: int, training: Training) -> Work:
    cost = _step(prepared.task, training)
    seconds = machine(prepared.config.device, "fp32").seconds(cost.times(steps))
    return Work(what, where, steps, f"steps of {training.batch_size}", seconds, cost.peak)


def _step(task: Classify | Denoise, training: Training) -> Cost:
    """Return the counted cost of one training step."""
    model = task.build().to("meta").train()
    image = torch.zeros(training.batch_size, *task.shape, dtype=torch.uint8)
    table = task.encoded({"image": image, "label": torch.zeros(training.batch_size).long()}) if isinstance(task, Denoise) else {
        "image": image, "label": torch.zeros(training.batch_size).long()
    }  # fmt: skip
    batch = {name: column.to("meta") for name, column in table.items()}
    live = list(model.parameters())
    return counted(lambda: torch.autograd.grad(task.loss(model, batch), live))
