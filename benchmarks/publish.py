"""Commit a finished comparison: its figures as results/NAME.json, its tables at the end of results/NAME.md, and where diffusion
models were compared what they draw as results/NAME.webp.

    python benchmarks/publish.py runs/digits5 digits5

What NAME.md says above the line of MARK is written by hand and stays. Runs that NAME.json holds already and the
comparison does not (other arms, seeds, rounds) stay too, where they had the same data: a study may be made in parts. The
picture is of one comparison, and stays where the next has fewer arms.
"""

import io
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from warmfed import report
from warmfed.experiments.aggregate import aggregate
from warmfed.report.record import read_report_images
from warmfed.utils.files import atomic_write, read_json

RESULTS = Path(__file__).parent / "results"
MARK = "<!-- below: the tables of warmfed compare, put here by benchmarks/publish.py -->\n"
OF_A_CELL = (
    "seed", "holdout", "rounds", "global", "personal", "one_shot", "validation", "quality", "bytes_up_per_site",
    "bytes_down_per_site", "seconds", "peak_memory_mb", "data_sha256", "base_sha256", "history_sha256",
)  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """A run of a comparison, as far as `tabulate` asks."""

    rounds: int
    arm: str
    seed: int
    holdout: str
    settings: Mapping[str, str] = field(default_factory=dict, compare=False)
    name: str = field(default="", compare=False)


def runs(table: Mapping[str, Any]) -> Iterator[tuple[Cell, dict[str, Any]]]:
    """Every run of a comparison, with its scores, costs and hashes."""
    of_all = {name: table[name] for name in ("federation", "measure")}
    for row in table["rows"]:
        for cell in row["cells"]:
            site = (cell.get("holdout") or {}).get("site", "")
            yield Cell(row["rounds"], row["algorithm"], cell["seed"], site, row.get("settings", {})), of_all | cell


def joined(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """The runs of both as one table, the new one's where both have a run; the tests are of the published one's arm."""
    found = dict(runs(old)) | dict(runs(new))
    data = {(cell.holdout, run["data_sha256"]) for cell, run in found.items()}
    if len(data) > len({site for site, _ in data}):
        sys.exit("the comparison and what was published had other data; delete the published figures, or find out why")
    tested = next((test["algorithm"] for table in (old, new) for test in table["tests"]), "")  # none of a single seed
    return aggregate(list(found), list(found.values()), tested)


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


def samples(study: Path, table: Mapping[str, Any]) -> bytes | None:
    """A WebP picture of the grids that the global models drew, each of its arm's first seed, four beside one another."""
    grids: dict[str, Image.Image] = {}
    for cell, run in runs(table):
        if cell.arm in grids or run["quality"]["models"] > 1:
            continue
        if (images := read_report_images(study / run["folder"] / "report_images")) and images.drawn:
            grids[cell.arm] = Image.open(io.BytesIO(images.drawn))
    if not grids:
        return None
    wide, high = (max(sizes) for sizes in zip(*(grid.size for grid in grids.values()), strict=True))
    font, line, gap = ImageFont.load_default(18), 26, 12
    across = min(len(grids), 4)
    size = (across * (wide + gap) + gap, -(-len(grids) // across) * (high + line + gap) + gap)
    picture = Image.new("RGB", size, "white")
    for place, (arm, grid) in enumerate(grids.items()):
        left, top = gap + place % across * (wide + gap), gap + place // across * (high + line + gap)
        ImageDraw.Draw(picture).text((left, top), arm, "black", font)
        picture.paste(grid, (left, top + line))
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=80, method=6)
    return buffer.getvalue()


def main(study: Path, name: str) -> None:
    """Write the files."""
    table, kept = read_json(study / "compare.json", "the comparison"), RESULTS / f"{name}.json"
    picture, arms = samples(study, table) if table["measure"] == "loss" else None, len(table["rows"])
    if kept.exists():
        table = joined(read_json(kept, "what was published"), table)
    if picture and arms == len(table["rows"]):
        atomic_write(RESULTS / f"{name}.webp", picture)
    atomic_write(kept, json.dumps(rounded(figures(table)), separators=(",", ":")) + "\n")
    page = RESULTS / f"{name}.md"
    words, _, _ = (page.read_text() if page.exists() else f"# {name}\n\n").partition(MARK)
    atomic_write(page, f"{words.rstrip()}\n\n{MARK}\n{report.markdown(table)}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
