"""A site that comes when the run is over: it makes a personal model of the released global one, and nothing leaves it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from ..core.tensors import rows, sha256
from ..core.training import Training
from ..fit import fit
from ..runs.folder import read_config, read_summary, write_model
from ..runs.predict import described, released
from ..tasks import Classify
from ..transports.client import Client
from ..utils.errors import InputError
from ..utils.files import atomic_write, write_json
from ..utils.version import __version__
from .site import SiteConfig


def personalize(folder: Path, site: SiteConfig, out: Path | None = None, training: Training | None = None) -> dict[str, Any]:
    """Train a finished run's global model on one site's images, as [holdout] does for a site that took no part.

    Args:
        folder: of the run; its config.toml, summary.json and models/global.safetensors are all that is read.
        site: the site, as its site.toml describes it.
        out: a new folder for the site's models, which `warmfed predict` reads; none: work/runs/late-<name of the run's folder>.
        training: how; none: the run's own `holdout.training`.

    Returns:
        The summary that `out` has then: {"personal": {"accuracy": …}, "global": …} on the site's validation and test images.

    Raises:
        InputError: no finished run, no global model, other classes or images than the run's, or `out` is there already.
    """
    config, summary = read_config(folder), read_summary(folder)
    if config.task != "classify":
        raise InputError(f"the run in {folder} learned to draw, not to classify; there is nothing to personalise")
    classes, shape = described(folder, summary)
    out = out or site.path(site.work) / "runs" / f"late-{folder.resolve().name}"
    if out.exists():
        raise InputError(f"{out} is there already; choose another --out")
    if site.classes not in ((), classes):
        raise InputError(f"site {site.name!r} has classes {list(site.classes)}, the run has {list(classes)}; correct site.toml")
    data = replace(site, classes=classes).federation()
    if data.shape != shape:
        raise InputError(f"images of {shape} were learned, those of site {site.name!r} have {data.shape}; set image_size")
    task = Classify(shape, len(classes), config.model.name)
    model = released(folder, summary, "", task)
    settings = replace(config.holdout, site=site.name, training=training or config.holdout.training)
    tables = data.sites[site.name].splits
    worker = Client(site.name, config.algorithm, task, tables, config.seed, data.prompts, device=site.device)
    tuned, info = fit(worker.local("unseen", 0), model, settings.training, tables["train"])
    models = {"global": model, f"personal/{site.name}": tuned}
    for name, tensors in models.items():
        write_model(out / "models" / f"{name}.safetensors", tensors)
    atomic_write(out / "config.toml", replace(config, data=site.data, device=site.device, holdout=settings).toml())
    measured = {
        name: {
            split: task.metrics(tensors, tables[split], site.device) for split in ("validation", "test") if rows(tables[split])
        }
        for name, tensors in (("global", model), ("personal", tuned))
    }
    found = {
        "warmfed": __version__, "algorithm": config.name, "seed": config.seed, "site": site.name, "loss": info["loss"],
        "models_sha256": {name: sha256(tensors) for name, tensors in models.items()},
        "federation": data.name, "classes": classes, "image": shape, **measured,
    }  # fmt: skip
    write_json(out / "summary.json", found)
    return {**found, "folder": str(out)}
