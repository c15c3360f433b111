"""Answers that no honest site gives, fed to the server of every algorithm: each must be refused, or leave a usable state.

An answer is changed in its bits, its length, its header (values, keys, kinds), its tensors and its numbers, and then taken
through the transport, the border and the stage's server function on the toy federation of the tests. The first answer that
raises another error, leaves a state that is not finite, leaves out an honest site, or costs more than 2 s of processor time or
200 MB ends the program.

    python benchmarks/fuzz_replies.py [--number 100000] [--seed 0] [--out benchmarks/results/fuzz_replies.json]
"""

import argparse
import platform
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import torch

from warmfed.utils.files import write_json

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import fuzz


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--number", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    began, cases = time.process_time(), fuzz.corpus()
    counts: dict[str, dict[str, int]] = {case.name: {"refused": 0, "taken": 0} for case in cases}
    piece = 500
    for first in range(0, args.number, piece):
        done = fuzz.attack(cases, range(first, min(first + piece, args.number)), args.seed)
        for name, found in done.items():
            counts[name] = {key: counts[name][key] + found[key] for key in found}
        print(f"{min(first + piece, args.number)} of {args.number}", flush=True)
        if args.out:
            result = {
                "command": f"python benchmarks/fuzz_replies.py --number {args.number} --seed {args.seed}",
                "date": datetime.now(UTC).strftime("%Y-%m-%d"),
                "machine": f"{platform.machine()}, torch {torch.__version__}, Python {platform.python_version()}",
                "seed": args.seed,
                "answers": sum(sum(found.values()) for found in counts.values()),
                "refused_share": round(fuzz.share_of(counts), 4),
                "failures": 0,
                "processor_seconds": round(time.process_time() - began),
                "kinds": fuzz.kinds_of(cases),
                "cases": counts,
            }
            write_json(args.out, result)


if __name__ == "__main__":
    main()
