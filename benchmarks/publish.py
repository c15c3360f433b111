"""Commit a finished comparison: its figures as results/NAME.json, its tables at the end of results/NAME.md.

    python benchmarks/publish.py runs/digits5 digits5

What NAME.md says above the line of MARK is written by hand and stays.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from warmfed.files import read_json, write_whole

RESULTS = Path(__file__).parent / "results"
MARK = "<!-- below: the tables of warmfed compare, put here by benchmarks/publish.py -->\n"
OF_A_CELL = (
    "seed", "unseen", "rounds", "global", "personal", "one_shot", "quality", "bytes_up_per_site", "bytes_down_per_site",
    "seconds", "peak_memory_mb", "data_sha256", "base_sha256", "history_sha256",
)  # fmt: skip


def figures(table: Mapping[str, Any]) -> dict[str, Any]:
    """What of compare.json is worth keeping: every row, and of every run its scores, costs and hashes."""
    rows = [
        {name: value for name, value in row.items() if value is not None and name not in ("cells", "settings")}
        | {"cells": [{name: cell[name] for name in OF_A_CELL if cell.get(name) is not None} for cell in row["cells"]]}
        for row in table["rows"]
    ]
    return {name: table[name] for name in ("federation", "measure", "seeds", "tests")} | {"rows": rows}


def rounded(value: Any) -> Any:
    """The same with four decimals."""
    match value:
        case float():
            return round(value, 4)
        case dict():
            return {name: rounded(each) for name, each in value.items()}
        case list():
            return [rounded(each) for each in value]
    return value


def main(study: Path, name: str) -> None:
    """Write both files."""
    kept = figures(read_json(study / "compare.json", "the comparison"))
    write_whole(RESULTS / f"{name}.json", json.dumps(rounded(kept), separators=(",", ":")) + "\n")
    page = RESULTS / f"{name}.md"
    words, _, _ = (page.read_text() if page.exists() else f"# {name}\n\n").partition(MARK)
    write_whole(page, f"{words.rstrip()}\n\n{MARK}\n{(study / 'compare.md').read_text()}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
