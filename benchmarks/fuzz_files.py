"""Damaged and odd files of every kind that warmfed reads: each must be read or refused in one line.

Pictures, CSV tables, Parquet (with the extra "data"), .npz, idx, split lists, TOML, adapters and run folders are changed in
their bits, pieces, words, numbers and headers. The first file that raises another error, or costs more than 2 s of processor
time or 500 MB, ends the program.

    python benchmarks/fuzz_files.py [--number 10000] [--seed 0] [--only READER …] [--out benchmarks/results/fuzz_files.json]
"""

import argparse
import platform
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import torch

from warmfed.utils.files import read_json, write_json

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import fuzz_files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--number", type=int, default=10_000, help="inputs of each reader")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", default=[])
    parser.add_argument("--out", type=Path, help="JSON file; readers in it are replaced or added")
    args = parser.parse_args()
    fuzz_files.quiet()
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        for name, target in fuzz_files.targets(root).items():
            if args.only and name not in args.only:
                continue
            began = time.process_time()
            counts = fuzz_files.attack(target, root / "attack", range(args.number), args.seed)
            seconds = round(time.process_time() - began)
            print(f"{name}: {counts}, {seconds} s of processor time", flush=True)
            if args.out:
                found = read_json(args.out, "the results") if args.out.exists() else {"readers": {}}
                result = {
                    "command": f"python benchmarks/fuzz_files.py --number {args.number} --seed {args.seed}",
                    "date": datetime.now(UTC).date().isoformat(),
                    "machine": f"{platform.machine()}, torch {torch.__version__}, Python {platform.python_version()}",
                    "readers": found["readers"]
                    | {name: counts | {"inputs": args.number, "broken": 0, "processor_seconds": seconds}},
                }
                write_json(args.out, result)


if __name__ == "__main__":
    main()
