"""Many sites in one process: memory and time of FedAvg's rounds, where sites' images are made when a site is at work.

Sites of 20 images 1×8×8 in ten classes, logistic regression, one epoch. Cohorts of equal size from federations of growing
size show whether memory grows with the sites; cohorts of growing size, whether time does with the cohort.

    python benchmarks/scale.py [--sites 100 1000 10000] [--cohorts 10 50] [--whole 10000] [--rounds 10] [--out FILE.json]
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from warmfed.algorithms.fedavg import FedAvg
from warmfed.core import ServerContext
from warmfed.core.rng import stream
from warmfed.core.training import Training
from warmfed.run import run
from warmfed.tasks import Classify
from warmfed.transports.client import Client
from warmfed.transports.in_process import InProcess
from warmfed.utils.files import write_json

TASK = Classify((1, 8, 8), 10, "linear")


@dataclass(frozen=True)
class Sites(Mapping[str, Client]):
    """Workers that are made when they are asked for, and forgotten after."""

    count: int
    algorithm: FedAvg

    def __getitem__(self, name: str) -> Client:
        rng = stream("scale", name)
        image = torch.randint(256, (20, 1, 8, 8), generator=rng, dtype=torch.uint8)
        return Client(name, self.algorithm, TASK, {"train": {"image": image, "label": torch.randint(10, (20,), generator=rng)}})

    def __iter__(self) -> Iterator[str]:
        return (f"site{i:06d}" for i in range(self.count))

    def __len__(self) -> int:
        return self.count


def measured(sites: int, cohort: int, rounds: int) -> dict[str, Any]:
    """Seconds of a round, and what the process has grown by since before the federation was there, in MB."""
    algorithm = FedAvg(rounds=rounds, client_fraction=cohort / sites, local=Training(lr=0.02, batch_size=10))
    before, began = psutil.Process().memory_info().rss, time.perf_counter()
    seconds, grown = [], 0.0
    for done in run(algorithm, ServerContext(TASK, stream(0)), InProcess(Sites(sites, algorithm)), evaluate="never"):
        seconds.append(done.seconds)
        grown = max(grown, (psutil.Process().memory_info().rss - before) / 2**20)
    total = time.perf_counter() - began
    return {
        "sites": sites, "cohort": cohort, "rounds": rounds, "seconds_per_round": round(statistics.median(seconds), 3),
        "seconds": round(total, 1), "grown_mb": round(grown, 1),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sites", type=int, nargs="+", default=[100, 1000, 10000])
    parser.add_argument("--cohorts", type=int, nargs="+", default=[10, 50])
    parser.add_argument("--whole", type=int, default=10000, help="a federation of which every site is asked; 0: none")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    measured(10, 10, 2)  # the first optimizer imports much
    rows = [measured(sites, cohort, args.rounds) for cohort in args.cohorts for sites in args.sites]
    if args.whole:
        rows.append(measured(args.whole, args.whole, args.rounds))
    result = {"machine": f"{platform.machine()}, torch {torch.__version__}", "rows": rows}
    print(json.dumps(result, indent=1))
    if args.out:
        write_json(args.out, result)


if __name__ == "__main__":
    main()
