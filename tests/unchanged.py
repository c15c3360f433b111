"""Whether a change of the code left every result as it was: one digest for each method's toy run, in one JSON file.

A digest covers the records, the server's state, the sites' states and what crossed. Beside them stand two short runs on the
embedded federation, with a digest of each file of the run folder: records, ledger, models, adapters, samples and summary.

    python tests/unchanged.py --out before.json      # before the change
    python tests/unchanged.py --against before.json  # after it
"""

import argparse
import hashlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import toy

from warmfed import execute, parse
from warmfed.algorithms import ALGORITHMS, entry
from warmfed.core.messages import encode

QUICK = {
    "warmfed": {
        "algorithm.rounds": 1,
        "algorithm.local.epochs": 1,
        "algorithm.personal.epochs": 1,
        "algorithm.synthesis.per_class": 6,
        "algorithm.synthesis.subset": 40,
        "algorithm.synthesis.training.epochs": 2,
        "algorithm.synthesis.filter_training.epochs": 1,
        "generator.training.epochs": 1,
        "generator.steps": 2,
    },
    "scaffold": {"algorithm.rounds": 2, "algorithm.local.epochs": 1, "model.name": "linear"},
}
"""Settings of the runs in folders."""
_TIMES = {"seconds", "seconds_by_stage", "peak_memory_mb"}


def method(name: str) -> str:
    """The digest of a method's toy run in memory."""
    outcome = toy.play(toy.quick(name), task=toy.task_of(name))
    parts = [json.dumps(outcome.results, sort_keys=True).encode(), encode(outcome.server)]
    for site in sorted(toy.SITES):
        state = outcome.transport.state(site)
        parts.append(b"" if state is None else encode(state))
    parts += [json.dumps([e.kind, e.bytes, e.sha256]).encode() for r in outcome.rounds for e in r.exchanges]
    return digest(parts)


def run(name: str, folder: Path) -> dict[str, str]:
    """The digests of what a run leaves in its folder, by file; without times."""
    execute(parse(None, {"algorithm.name": name, **QUICK[name]}), folder)
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.suffix in (".safetensors", ".json", ".jsonl")):
        content = path.read_bytes()
        if path.suffix != ".safetensors":
            values = [json.loads(line) for line in content.splitlines()] if path.suffix == ".jsonl" else json.loads(content)
            content = json.dumps(timeless(values), sort_keys=True).encode()
        found[f"{name}/{path.relative_to(folder)}"] = digest([content])
    return found


def timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: timeless(each) for key, each in value.items() if key not in _TIMES}
    return [timeless(each) for each in value] if isinstance(value, list) else value


def digest(parts: list[bytes]) -> str:
    return hashlib.sha256(b"".join(len(part).to_bytes(8, "big") + part for part in parts)).hexdigest()


def main() -> int:
    parser = argparse.ArgumentParser(description="Digests of every method's results, to compare two versions of the code.")
    parser.add_argument("--out", type=Path, help="write the digests to this file")
    parser.add_argument("--against", type=Path, help="compare with the digests in this file; exit code 1 if one differs")
    asked = parser.parse_args()
    found = {}
    for name in sorted(ALGORITHMS):
        if entry(name).settings.get("model.start") != "public":
            found[name] = method(name)
            print(f"{name:20} {found[name][:16]}", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        for name in QUICK:
            found |= run(name, Path(temporary) / name)
    if asked.out:
        asked.out.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    if not asked.against:
        return 0
    before = json.loads(asked.against.read_text())
    differing = sorted(key for key in before.keys() | found.keys() if before.get(key) != found.get(key))
    print("\n".join(f"differs: {key}" for key in differing) or f"all {len(found)} digests are equal")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
