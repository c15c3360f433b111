"""Images of the report: grids of real and synthetic samples, and a t-SNE of their classifier features.

They are written at the end of a run, so that the report needs no model. In a deployment, no site's images are shown.
"""

import io
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from ..core.rng import stream
from ..core.tensors import Table, Tensors, evenly_spaced, rows, select, sha256
from ..data import Federation
from ..evaluation.features import extractor
from ..evaluation.generators import Evaluation, adapter_scores
from ..report.record import DRAWN
from ..tasks import Classify
from ..tasks.denoising import Denoise
from ..utils.errors import InputError
from ..utils.files import atomic_write, read_bytes, read_json, write_json
from ..utils.paths import exists

_COLUMNS = 8
_POINTS = 60


def write_report_images(
    folder: Path, federation: Federation, task: Classify, model: Tensors, evaluation: Evaluation | None = None, base: str = ""
) -> None:
    """Write report_images.json and PNG grids of each site's real and synthetic images, with a row for each class.

    Args:
        folder: the run folder.
        federation: sites with their images.
        task: task of the model.
        model: classifier whose features are plotted.
        evaluation: settings for the evaluation of each adapter's samples; None: no evaluation.
        base: base with the public classifier of `evaluation.features`.
    """
    synthetic = read_synthetic(folder)
    scores: dict[str, Any] = {}
    if evaluation is not None and evaluation.adapters and synthetic:
        if evaluation.features == "global":
            extract, digest = (lambda image: task.features(model, {"image": image})), sha256(model)
        else:
            extract, digest = extractor(evaluation.features, base, federation.shape)
        scores = {"adapters": adapter_scores(extract, federation, synthetic, evaluation.neighbours), "features_sha256": digest}
    sites, features, points = {}, [], []
    for name, site in federation.sites.items():
        tables = {"real": site.test}
        if name in synthetic:
            mine = synthetic[name]
            tables["synthetic"] = select({"image": mine["image"], "label": mine["label"]}, mine["kept"])
        shown: dict[str, Any] = {"synthetic": None}
        for kind, table in tables.items():
            if not rows(table):
                continue
            shown[kind] = f"{kind}-{name}.png"
            atomic_write(folder / "report_images" / shown[kind], grid(table, len(federation.classes)))
            part = evenly_spaced(table, _POINTS)
            features.append(task.features(model, part))
            points += [{"site": name, "kind": kind, "class": int(label)} for label in part["label"]]
        sites[name] = shown
    for point, (x, y) in zip(points, _flat(torch.cat(features)), strict=True):
        point |= {"x": round(x, 3), "y": round(y, 3)}
    shown_all = {"classes": list(federation.classes), "sites": sites, "features": points}
    write_json(folder / "report_images" / "report_images.json", shown_all | scores)


def write_samples(folder: Path, federation: Federation, task: Denoise, model: Tensors, seed: int) -> None:
    """Write report_images.json and PNG grids of a diffusion model's samples, and of the auxiliary set if there is one."""
    synthetic, shown = read_synthetic(folder), dict[str, dict[str, str | None]]()
    label = torch.arange(len(federation.classes)).repeat_interleave(_COLUMNS)
    drawn = {"image": task.decoded(task.sample(model, label, stream(seed, "panel"))), "label": label}
    grids: dict[str, dict[str, Table]] = {DRAWN: {"synthetic": drawn}}
    for name, site in federation.sites.items():
        grids[name] = {"real": site.train}
        if name in synthetic:
            grids[name]["synthetic"] = synthetic[name]
    for number, (name, tables) in enumerate(grids.items()):
        shown[name] = {"synthetic": None}
        for kind, table in tables.items():
            if rows(table):
                shown[name][kind] = file = f"{kind}-{number}.png"
                atomic_write(folder / "report_images" / file, grid(table, len(federation.classes)))
    write_json(
        folder / "report_images" / "report_images.json", {"classes": list(federation.classes), "sites": shown, "features": []}
    )


def read_synthetic(folder: Path) -> dict[str, Table]:
    """Return the synthetic samples of a run, {"image", "label", "kept"} by the adapter's site; empty if there are none."""
    path = folder / "synthetic" / "samples.safetensors"
    if not exists(path):
        return {}
    sites = read_json(folder / "synthetic" / "manifest.json", "the synthetic set's manifest")["sites"]
    try:
        table = load(read_bytes(path, "the synthetic set"))
    except SafetensorError as error:
        raise InputError(f"the synthetic set at {path} is damaged ({error}); restore it or start a new run") from error
    of = table.pop("site")
    return {name: select(table, of == place) for place, name in enumerate(sites)}


def grid(table: Table, classes: int, columns: int = _COLUMNS) -> bytes:
    """Return a PNG with a row for each class; missing images are white."""
    from PIL import Image

    image = table["image"]
    places = torch.full((classes, columns, *image.shape[1:]), 255, dtype=torch.uint8)
    for c in range(classes):
        found = image[table["label"] == c][:columns]
        places[c, : len(found)] = found
    image = places.permute(2, 0, 3, 1, 4).reshape(-1, classes * image.shape[2], columns * image.shape[3]).expand(3, -1, -1)
    buffer = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _flat(features: Tensor) -> list[list[float]]:
    """Return the t-SNE embedding in two dimensions (van der Maaten and Hinton 2008, scikit-learn), n pairs."""
    from sklearn.manifold import TSNE

    perplexity = min(30.0, (len(features) - 1) / 3)
    return TSNE(perplexity=perplexity, init="pca", random_state=0, max_iter=500).fit_transform(features.numpy()).tolist()
