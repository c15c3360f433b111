"""How good bases of photographs are, from the first steps of their training on: figures, and a picture of what they draw.

    python benchmarks/photos64_quality.py runs/photos runs/photos64-1000 runs/photos64-3000 runs/photos64-8000 runs/photos64 \
        --out benchmarks/results/photos64.json --picture benchmarks/results/photos64.webp

The public classifier of the last base looks at as many samples of each class, drawn as sites' samples are: how many it takes
for their prompt's class, at once and among its first five guesses; and by its features the Fréchet and kernel distance to the
photographs, precision and recall. Beside them stand as many photographs, against all others: the best that can be hoped for
(it has learned from them, so it knows nearly all); and these after the autoencoder, which bounds every base here.
"""

import argparse
import json
import platform
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from warmfed.config import pretraining_tables
from warmfed.core import ServerContext
from warmfed.core.rng import stream
from warmfed.core.tensors import Table, evenly_spaced, select
from warmfed.diffusion import pipeline
from warmfed.diffusion.generator import LatentDiffusion
from warmfed.evaluation.features import Extractor
from warmfed.metrics.images import distances, neighbourhoods
from warmfed.pretraining.captions import pictures
from warmfed.runs.prepare import load_data
from warmfed.tasks import Classify
from warmfed.utils.files import write_json

SHOWN = [
    "goldfish", "king_penguin", "golden_retriever", "monarch_butterfly", "orange_fruit", "sports_car", "school_bus",
    "lighthouse", "suspension_bridge", "computer_keyboard", "backpack", "teapot", "pizza", "seashore",
]  # fmt: skip
"""Classes of the picture, a column each."""
OF_THE_LAST = 4
"""Rows of the picture that the last base fills; the others fill one."""
GUIDANCES = (1.5, 3.0)


def judged(task: Classify, model: Any, look: Extractor, photographs: Table, shown: Table) -> dict[str, float]:
    """What the classifier says of images, and where they lie among the photographs."""
    first = task.predict(model, shown).topk(5).indices == shown["label"][:, None]
    seen, drawn = look(photographs["image"]), look(shown["image"])
    near = neighbourhoods(evenly_spaced({"features": seen}, len(drawn))["features"], drawn, 5)
    return {
        "recognised": 100 * first[:, 0].double().mean().item(),
        "recognised_of_five": 100 * first.any(1).double().mean().item(),
        **distances(seen, drawn),
        **{name: near[name] for name in ("precision", "recall")},
    }


def rows_of(images: Tensor, columns: int) -> Image.Image:
    """Images [n, 3, h, w], row by row."""
    side = images.shape[-1]
    placed = images.view(-1, columns, 3, side, side).permute(0, 3, 1, 4, 2).reshape(-1, columns * side, 3)
    return Image.fromarray(placed.contiguous().numpy())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photographs", type=Path)
    parser.add_argument("bases", type=Path, nargs="+", help="the last one has the classifier that looks")
    parser.add_argument("--each", type=int, default=5, help="samples of each class")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--picture", type=Path, required=True)
    asked = parser.parse_args()

    torch.set_num_threads(1)
    data, _ = pretraining_tables(Path(__file__).with_name("photos64.toml"), {"data.path": str(asked.photographs)})
    public = pictures(load_data(data), 64)
    classes = len(public.classes)
    task, model = Classify.of(asked.bases[-1] / "classifier.safetensors", (3, 64, 64), "the public classifier")

    def look(image: Tensor) -> Tensor:
        return torch.cat([task.features(model, {"image": part}) for part in image.split(500)])

    order = torch.argsort(public.table["label"], stable=True).view(classes, -1)  # as many photographs of each class
    some, rest = (select(public.table, part.flatten()) for part in (order[:, : asked.each], order[:, asked.each :]))
    parts = pipeline.load(asked.bases[-1])
    again = {**some, "image": parts.decode(parts.encode(some["image"])[0])}
    error = (again["image"].double() - some["image"].double()).div(255).square().mean((1, 2, 3))
    rows: list[dict[str, Any]] = [
        {"of": "photographs", **judged(task, model, look, rest, some)},
        {"of": "after the autoencoder", **judged(task, model, look, rest, again)},
    ]
    place = torch.tensor([public.classes.index(name) for name in SHOWN])
    picture = [select(public.table, order[place, 0])["image"]]
    prompts, label = [row[0] for row in public.captions], torch.arange(classes).repeat(asked.each)
    for base in asked.bases:
        for guidance in GUIDANCES:
            generator = LatentDiffusion(str(base), guidance=guidance)
            begun = time.process_time()
            drawn = generator.synthesize(None, prompts, label, ServerContext(None, stream("photos64", "samples")))
            seconds = time.process_time() - begun
            row = {"of": base.name, "guidance": guidance, "images_per_second": len(label) / seconds}
            rows.append(row | judged(task, model, look, rest, {"image": drawn, "label": label}))
            print(json.dumps(rows[-1]), flush=True)
        count = OF_THE_LAST if base == asked.bases[-1] else 1  # of the stronger guidance, whose classes are plainer
        picture.append(drawn.view(asked.each, classes, *drawn.shape[1:])[:count, place].flatten(0, 1))
    asked.picture.parent.mkdir(parents=True, exist_ok=True)
    rows_of(torch.cat(picture), len(SHOWN)).save(asked.picture, "WEBP", quality=85, method=6)

    made = json.loads((asked.bases[-1] / "pretraining.json").read_text())
    told = {key: value for key, value in made.items() if key != "pictures"} | {"images": made["pictures"]["images"]}
    write_json(
        asked.out,
        {
            "pretraining": told,
            "psnr": float(-10 * error.log10().mean()),
            "samples": len(label),
            "steps": generator.steps,
            "rows": rows,
            "machine": f"{platform.machine()}, torch {torch.__version__}, one thread",
            "date": time.strftime("%Y-%m-%d"),
        },
    )
    print(table(rows))


def table(rows: list[dict[str, Any]]) -> str:
    """The figures for a page."""
    lines = [
        "| | guidance | recognised % | among five % | FID | KID | precision % | recall % |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['of']} | {row.get('guidance', '')} | {row['recognised']:.1f} | {row['recognised_of_five']:.1f} | "
        f"{row['fid']:.1f} | {row['kid']:.4f} | {row['precision']:.1f} | {row['recall']:.1f} |"
        for row in rows
    ]
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
