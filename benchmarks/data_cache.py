"""What the cache of decoded images gives: a generated set of JPEG files, read for the first and for the second time.

Each reading is a process of its own, so that its peak of memory is its own; the third trains a little on the mapped tables,
in two worker processes. Memory is what cannot be dropped (anonymous and shared, of all processes); pages of files are
counted beside it.

    python benchmarks/data_cache.py [--images 100000] [--size 64] [--out benchmarks/results/data_cache.json]
"""

import argparse
import json
import multiprocessing
import platform
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image

from warmfed.data import Federation, folder
from warmfed.utils.files import write_json

SITES, CLASSES, SIDE = 4, 10, 96


def generate(root: Path, images: int) -> int:
    """JPEG files root/site/class/number.jpg of 96x96 pixels, no two alike; returns their bytes."""
    random = np.random.RandomState(0)
    written = 0
    for i in range(images):
        path = root / f"site{i % SITES}" / f"class{i // SITES % CLASSES}" / f"{i:06}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(random.randint(0, 256, (6, 6, 3)).astype(np.uint8))
        coarse.resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(path, quality=85)
        written += path.stat().st_size
    return written


def memory(*kinds: str) -> float:
    """MB of this process and of those below it: "RssAnon" and "RssShmem" (their own), "RssFile" (files, may be dropped)."""
    me, total = psutil.Process(), 0
    for process in [me, *me.children(recursive=True)]:
        with suppress(OSError):  # it has just ended
            for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
                total += int(line.split()[1]) if line.split(":")[0] in kinds else 0
    return total / 1e3


def measured(work: Callable[[], Any], pipe: Any) -> None:
    """In a process of its own: seconds, and the most memory meanwhile beyond that before."""
    import torch

    torch.set_num_threads(1)
    own, mapped = ("RssAnon", "RssShmem"), ("RssFile",)
    before, peak, done = memory(*own), {own: 0.0, mapped: 0.0}, threading.Event()

    def watch() -> None:
        while not done.wait(0.1):
            for kinds in peak:
                peak[kinds] = max(peak[kinds], memory(*kinds))

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.perf_counter()
    found = work()
    seconds = time.perf_counter() - began
    done.set()
    watcher.join()
    pipe.send({
        "seconds": round(seconds, 1), "own_memory_before_mb": round(before), "own_memory_peak_mb": round(peak[own]),
        "mapped_peak_mb": round(peak[mapped]), "result": found,
    })  # fmt: skip


class Read:
    """Reads the federation, and its fingerprint where `hashed`; trains an epoch on a site where `trained`."""

    def __init__(self, root: Path, size: int, cache: Path, *, trained: bool = False) -> None:
        self.root, self.size, self.cache, self.trained = root, size, cache, trained

    def __call__(self) -> Any:
        federation = folder(self.root, image_size=self.size, cache=str(self.cache))
        return train(federation) if self.trained else federation.fingerprint


def train(federation: Federation) -> float:
    """Seconds of FedAvg's round of 20 steps on each site, in two worker processes."""
    from warmfed.algorithms.fedavg import FedAvg
    from warmfed.core.training import Training
    from warmfed.runs.backend import simulate
    from warmfed.tasks import Classify

    algorithm = FedAvg(rounds=1, local=Training(lr=0.02, steps=20, batch_size=32))
    task = Classify(federation.shape, len(federation.classes))
    done = list(simulate(algorithm, federation, task, workers=2, evaluate="never"))
    return done[-1].seconds


def alone(work: Callable[[], Any]) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=measured, args=(work, theirs))
    process.start()
    found: dict[str, Any] = ours.recv()
    process.join()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        root, cache = Path(place) / "images", Path(place) / "cache"
        written = generate(root, asked.images)
        result: dict[str, Any] = {
            "machine": f"{platform.machine()}, {multiprocessing.cpu_count()} processors", "images": asked.images,
            "date": time.strftime("%Y-%m-%d"), "jpeg_mb": round(written / 1e6), "size": asked.size,
            "decoded_mb": round(asked.images * 3 * asked.size**2 / 1e6),
        }  # fmt: skip
        for name, work in {
            "first": Read(root, asked.size, cache),
            "second": Read(root, asked.size, cache),
            "train": Read(root, asked.size, cache, trained=True),
        }.items():
            found = alone(work)
            result[name] = found if work.trained else {**found, "images_per_second": round(asked.images / found["seconds"])}
            print(name, json.dumps(result[name]), flush=True)
        result["cache_mb"] = round(sum(file.stat().st_size for file in cache.iterdir()) / 1e6)
    if result["first"]["result"] != result["second"]["result"]:
        raise SystemExit("the two readings differ")
    print(json.dumps(result, indent=1))
    if asked.out:
        write_json(asked.out, result)


if __name__ == "__main__":
    main()
