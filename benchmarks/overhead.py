"""The cost of the engine: FedAvg in memory against a plain PyTorch loop doing the same arithmetic.

Two works of PFLlib's and pfl-research's comparisons, on random data of the same shapes (the arithmetic is the same):
cnn: 20 clients × 2,625 images 1×28×28, the CNN of 582,026 parameters, one epoch, batch 64;
small: 100 clients × 50 images, logistic regression, one epoch, batch 10.

    python benchmarks/overhead.py [--repeats 3] [--images 2625] [--out benchmarks/results/overhead.json]
"""

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from warmfed.algorithms.fedavg import FedAvg
from warmfed.core import ServerContext
from warmfed.core.rng import stream
from warmfed.core.tensors import Table
from warmfed.core.training import Training
from warmfed.run import run
from warmfed.tasks import Classify
from warmfed.transports.client import Client
from warmfed.transports.in_process import InProcess
from warmfed.utils.files import write_json

WORKS = {"cnn": (20, 2625, 64, "pfllib-cnn", 1), "small": (100, 50, 10, "linear", 10)}
"""clients, images of each, batch, model, rounds that are timed together"""


def data(clients: int, images: int) -> dict[str, Table]:
    rng = stream("overhead")
    return {
        f"client{i:03d}": {
            "image": torch.randint(256, (images, 1, 28, 28), generator=rng, dtype=torch.uint8),
            "label": torch.randint(10, (images,), generator=rng),
        }
        for i in range(clients)
    }


def floor(tables: dict[str, Table], task: Classify, batch: int, rounds: int) -> float:
    """The plain loop: the same epochs, shuffles, conversions of pixels and weighted average, and nothing else."""
    server = dict(task.init(stream("floor")))
    began = time.perf_counter()
    for _ in range(rounds):
        total = {name: torch.zeros_like(value) for name, value in server.items()}
        count = 0
        for table in tables.values():
            model = task.build()
            model.load_state_dict(server)
            optimizer = torch.optim.SGD(model.parameters(), 0.02, 0.9)
            for index in torch.randperm(len(table["label"])).split(batch):
                optimizer.zero_grad()
                image = table["image"][index].float().div_(127.5).sub_(1)
                F.cross_entropy(model(image), table["label"][index]).backward()
                optimizer.step()
            n = len(table["label"])
            for name, value in model.state_dict().items():
                total[name] += n * value
            count += n
        server = {name: value / count for name, value in total.items()}
    return (time.perf_counter() - began) / rounds


def ours(tables: dict[str, Table], task: Classify, batch: int, rounds: int, processes: int) -> float:
    """Seconds of a round in steady state: the first round (start of the processes) is not counted."""
    algorithm = FedAvg(rounds=rounds + 1, local=Training(lr=0.02, batch_size=batch))
    workers = {name: Client(name, algorithm, task, {"train": table}) for name, table in tables.items()}
    with InProcess(workers, processes) as transport:
        seconds = [r.seconds for r in run(algorithm, ServerContext(task, stream(0)), transport, evaluate="never")]
    return statistics.mean(seconds[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--images", type=int, default=WORKS["cnn"][1], help="images of each client of the cnn work")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    result: dict[str, object] = {"machine": f"{platform.machine()}, torch {torch.__version__}", "images": args.images}
    for work, (clients, images, batch, model, rounds) in WORKS.items():
        tables = data(clients, args.images if work == "cnn" else images)
        task = Classify((1, 28, 28), 10, model)
        rows = []
        for _ in range(args.repeats):  # in turn, so that a drift of the machine's speed meets all alike
            row = {"floor": floor(tables, task, batch, rounds)}
            row["serial"] = ours(tables, task, batch, rounds, 1)
            row["two_processes"] = ours(tables, task, batch, rounds, 2)
            rows.append(row)
            print(work, {name: round(seconds, 3) for name, seconds in row.items()}, flush=True)
        result[work] = {
            "seconds_per_round": {name: statistics.median(r[name] for r in rows) for name in rows[0]},
            "serial_over_floor": statistics.median(r["serial"] / r["floor"] for r in rows),
            "serial_over_two_processes": statistics.median(r["serial"] / r["two_processes"] for r in rows),
        }
    print(json.dumps(result, indent=1))
    if args.out:
        write_json(args.out, result)


if __name__ == "__main__":
    main()
