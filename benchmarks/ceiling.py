"""How much is there to win on `digits4`? What the classifier reaches with all sites' images in one place, with and without S.

    warmfed run --out runs/warmfed --seed 0
    python benchmarks/ceiling.py runs/warmfed [--seeds 0 1 2 3 4] [--out benchmarks/results/ceiling.json]

No federated method may see what these rows see. What they reach is the room that a margin over a baseline has to fit into.
"""

import argparse
import platform
from pathlib import Path
from statistics import fmean, stdev

import torch
from safetensors.torch import load_file

from warmfed.algorithms.shared.synthetic_data import Synthesis
from warmfed.core import ServerContext
from warmfed.core.rng import stream
from warmfed.core.tensors import Table, join, select
from warmfed.core.training import Training
from warmfed.data.readers.digits4 import digits4
from warmfed.fit import fit
from warmfed.tasks import Classify
from warmfed.utils.files import write_json

BUDGET = Training(lr=0.02, epochs=25, max_grad_norm=1.0)
COSINE = Training(lr=0.02, epochs=25, max_grad_norm=1.0, schedule="cosine")
LONG = Training(lr=0.02, epochs=60, max_grad_norm=1.0, schedule="cosine")
MIXED = Training(lr=0.02, epochs=15, max_grad_norm=1.0, schedule="cosine")


def rows(task: Classify, real: Table, synthetic: Table, test: Table, seed: int) -> dict[str, float]:
    """Accuracy in percent on the union of the test sets, by what was trained on what."""
    ctx = ServerContext(task, stream("ceiling", seed))
    start = task.init(stream("ceiling", seed, "init"))
    warm = fit(ctx, start, Synthesis().training, synthetic)[0]
    models = {
        "S": warm,
        "real, 25 epochs": fit(ctx, start, BUDGET, real)[0],
        "real, 60 epochs, cosine": fit(ctx, start, LONG, real)[0],
        "S, then real, 25 epochs": fit(ctx, warm, BUDGET, real)[0],
        "S, then real, 25 epochs, cosine": fit(ctx, warm, COSINE, real)[0],
        "S and three times real together": fit(ctx, start, MIXED, join([synthetic, real, real, real]))[0],
    }
    return {name: task.metrics(model, test)["accuracy"] for name, model in models.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a WarmFed run on digits4")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    federation = digits4()
    task = Classify(federation.shape, len(federation.classes))
    drawn = load_file(args.run / "synthetic" / "samples.safetensors")
    kept = select(drawn, drawn["kept"])
    real = join(site.train for site in federation.sites.values())
    test = join(site.test for site in federation.sites.values())
    found = []
    for seed in args.seeds:
        found.append(rows(task, real, {"image": kept["image"], "label": kept["label"]}, test, seed))
        print(seed, {name: round(value, 1) for name, value in found[-1].items()}, flush=True)
    table = {
        name: {"mean": fmean(f[name] for f in found), "std": stdev(f[name] for f in found) if len(found) > 1 else 0.0}
        for name in found[0]
    }
    for name, row in table.items():
        print(f"{name:34} {row['mean']:5.1f} ± {row['std']:.1f}")
    if args.out:
        write_json(
            args.out, {"seeds": args.seeds, "machine": f"{platform.machine()}, torch {torch.__version__}", "rows": table}
        )


if __name__ == "__main__":
    main()
