"""What learning from frozen models costs: local training of the methods that have teachers beside plain training, same steps.

    python benchmarks/teachers.py [--model cnn] [--side 32] [--rows 1024] [--repeats 5] [--out benchmarks/results/teachers.json]

One thread, random images, five epochs. FedBSD's are one of the head and four of the backbone.
"""

import argparse
import platform
import statistics
import time
from pathlib import Path

import torch

from warmfed.algorithms.fedbsd import FedBSD
from warmfed.algorithms.moon import MOON
from warmfed.algorithms.pfedsd import PFedSD
from warmfed.algorithms.shared.base import Model, Personal
from warmfed.algorithms.shared.distillation import Distillation, dynamic
from warmfed.core import ClientContext
from warmfed.core.tensors import only
from warmfed.core.training import Training
from warmfed.fit import fit
from warmfed.tasks import Classify
from warmfed.utils.files import write_json


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="cnn")
    parser.add_argument("--side", type=int, default=32)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    task, training = Classify((3, args.side, args.side), 10, args.model), Training(lr=0.02, epochs=5, max_grad_norm=1.0)
    image = torch.randint(256, (args.rows, 3, args.side, args.side), dtype=torch.uint8)
    data = {"train": {"image": image, "label": torch.arange(args.rows) % 10}}
    shared, last, older = (task.init(torch.Generator().manual_seed(seed)) for seed in range(3))
    backbone = only(shared, FedBSD().shared(task))

    def site() -> ClientContext:
        return ClientContext(task, data, torch.Generator().manual_seed(5), "site", ())

    methods = {
        "plain": lambda: fit(site(), shared, training, data["train"]),
        "fedbsd": lambda: FedBSD().train(Model(backbone), Model(last), site()),
        "pfedsd": lambda: PFedSD().train(Model(shared), Personal(last), site()),
        "moon": lambda: MOON().train(Model(shared), Personal(last), site()),
        "warmfed": lambda: dynamic(site(), shared, training, (last, older), None, Distillation(), 0, 100),
    }
    times: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(args.repeats):
        for name, method in methods.items():
            begun = time.perf_counter()
            method()
            times[name].append(time.perf_counter() - begun)
    seconds = {name: statistics.median(each) for name, each in times.items()}
    for name, each in seconds.items():
        print(f"{name:8} {each:7.2f} s, {each / seconds['plain']:.2f} × plain training")
    if args.out:
        of = {"model": args.model, "side": args.side, "rows": args.rows, "repeats": args.repeats}
        machine = f"{platform.machine()}, torch {torch.__version__}"
        write_json(args.out, {**of, "machine": machine, "date": time.strftime("%Y-%m-%d"), "median_seconds": seconds})


if __name__ == "__main__":
    main()
