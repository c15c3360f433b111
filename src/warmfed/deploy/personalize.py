"""Personal models of sites that join after a run: they fine-tune the released global model and send nothing."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from ..core.tensors import rows, sha256
from ..core.training import Training
from ..fit import fit
from ..runs.folder import read_config, read_summary, write_model
from ..runs.predict import described, released
from ..runs.prepare import classification
from ..transports.client import Client
from ..utils.errors import InputError
from ..utils.files import atomic_write, write_json
from ..utils.paths import exists, resolved
from ..utils.version import __version__
from .site import SiteConfig


def personalize(folder: Path, site: SiteConfig, out: Path | None = None, training: Training | None = None) -> dict[str, Any]:
    """Fine-tune a finished run's global model on one site's images, as [holdout] does for a held-out site.

    Args:
        folder: run folder with config.toml, summary.json and models/global.safetensors.
        site: the site's configuration.
        out: new folder for the models, for `warmfed predict`. Default None: work/runs/late-<name of the run folder>.
        training: settings of the training. Default None: the run's `holdout.training`.

    Returns:
        The summary in `out`: {"personal": {"accuracy": …}, "global": …} on the site's validation and test images.

    Raises:
        InputError: The run has not finished or has no global model, the site has other classes or images, or `out` exists.
    """
    config, summary = read_config(folder), read_summary(folder)
    if config.task != "classify":
        raise InputError(f'the run in {folder} has no classifier to personalise; choose a run with task = "classify"')
    classes, shape = described(folder, summary)
    out = out or site.path(site.work) / "runs" / f"late-{resolved(folder).name}"
    if exists(out):
        raise InputError(f"{out} exists already; choose another --out")
    if site.classes not in ((), classes):
        raise InputError(f"site {site.name!r} has classes {list(site.classes)}, the run has {list(classes)}; correct site.toml")
    data = replace(site, classes=classes).federation()
    if data.shape != shape:
        raise InputError(f"the run has images of {shape}, those of site {site.name!r} have {data.shape}; set image_size")
    task = classification(config, shape, len(classes))
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
