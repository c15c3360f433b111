"""Kill WarmFed at random moments with SIGKILL, resume it each time, and compare it with a run that was left alone.

A run that comes to its end before all kills are spent is compared, and the next one begins.

python benchmarks/kill_resume.py [--kills 10] [--seed 0] [--set key=value …] [--out benchmarks/results/kill_resume.json]
"""

import argparse
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from warmfed.utils.files import read_json, write_json

SMALL = ["generator.training.epochs=1", "generator.views=1", "algorithm.synthesis.per_class=6", "generator.steps=4"]


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "warmfed", *words]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--set", nargs="*", default=SMALL, help="settings of the run; the default is a short one")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    moments = random.Random(args.seed)
    settings = ["--set", *args.set]
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "whole"
        began = time.perf_counter()
        subprocess.run(command("run", "--quiet", "--out", str(whole), *settings), check=True)
        length = time.perf_counter() - began
        wanted = read_json(whole / "summary.json", "the summary")
        killed: list[dict[str, float]] = []
        same: list[dict[str, bool]] = []
        while len(killed) < args.kills:
            broken = Path(folder) / f"broken-{len(same)}"
            words = ("run", "--quiet", "--out", str(broken), *settings)
            while not (broken / "summary.json").exists():
                process = subprocess.Popen(command(*words), start_new_session=True)
                try:
                    # the longest stage must fit between two kills, or the run would never end
                    moment = moments.uniform(0.05, 1.0) * length
                    process.wait(moment if len(killed) < args.kills else None)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
                    records = broken / "rounds.jsonl"
                    done = len(records.read_text().splitlines()) if records.exists() else 0
                    killed.append({"run": len(same), "after_seconds": round(moment, 1), "stages_done": done})
                    print(killed[-1], flush=True)
                if (broken / "config.toml").exists():
                    words = ("resume", "--quiet", str(broken))
            found = read_json(broken / "summary.json", "the summary")
            same.append({key: wanted[key] == found[key] for key in ("history_sha256", "models_sha256")})
    result = {
        "machine": platform.machine(), "settings": args.set, "seconds_uninterrupted": round(length, 1),
        "kills": killed, "history_sha256": wanted["history_sha256"], "equal": same,
    }  # fmt: skip
    print(result)
    if args.out:
        write_json(args.out, result)
    sys.exit(not all(all(equal.values()) for equal in same))


if __name__ == "__main__":
    main()
