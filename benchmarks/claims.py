"""What the comparison on digits4 says of WarmFed's claims, paired over the seeds.

    warmfed compare benchmarks/digits4.toml --out runs/digits4
    python benchmarks/claims.py runs/digits4/compare.json

One-shot figures are those of the same runs right after the warm start. The best baseline is the federated method (not
local or centralized training) with the highest mean; its margin is that of the mean over seeds, not of each seed's best.
"""

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from warmfed.experiments.aggregate import paired
from warmfed.utils.files import read_json

Values = Mapping[int, float]
OURS, REFERENCES = "warmfed", ("local", "centralized")


def values(table: Mapping[str, Any], arm: str, rounds: int, get: Callable[[Mapping[str, Any]], Any]) -> Values:
    """By seed, a figure of an arm's cells; cells that have none are left out."""
    (row,) = (row for row in table["rows"] if (row["algorithm"], row["rounds"]) == (arm, rounds))
    return {cell["seed"]: value for cell in row["cells"] if (value := get(cell)) is not None}


def figure(model: str, key: str) -> Callable[[Mapping[str, Any]], Any]:
    return lambda cell: (cell.get(model) or {}).get(key)


def best(table: Mapping[str, Any], rounds: int, get: Callable[[Mapping[str, Any]], Any]) -> tuple[str, Values]:
    """The best baseline by this figure."""
    arms = dict.fromkeys(row["algorithm"] for row in table["rows"])
    found = {arm: values(table, arm, rounds, get) for arm in arms if arm != OURS and not arm.startswith(REFERENCES)}
    arm = max((arm for arm in found if found[arm]), key=lambda arm: fmean(found[arm].values()))
    return arm, found[arm]


def row(claim: str, ours: Values, other: Values, name: str, wanted: float) -> str:
    """A line of the table: the figure, the difference and what was wanted of it."""
    differences = [ours[seed] - other[seed] for seed in sorted(ours.keys() & other.keys())]
    p = paired(differences) if len(differences) > 1 else None
    spread = f" ± {stdev(differences):.1f}" if len(differences) > 1 else ""
    met = "yes" if fmean(differences) >= wanted else "**no**"
    shown = "–" if p is None else f"{p:.3f}"
    return (
        f"| {claim} | {fmean(ours.values()):.1f} | {name} {fmean(other.values()):.1f} "
        f"| {fmean(differences):+.1f}{spread} | {wanted:+g} | {met} | {shown} |"
    )


def main() -> None:
    table = read_json(Path(sys.argv[1]), "the comparison")
    union, mean, worst = figure("global", "union"), figure("personal", "mean"), figure("personal", "worst")
    centralized = values(table, "centralized", 5, union)

    def one_shot(cell: Mapping[str, Any]) -> float:
        return cell["one_shot"]["global"]["union"]

    shot = values(table, OURS, 5, one_shot)
    lines = [
        "| claim | WarmFed | against | difference | wanted | met | p |",
        "|---|---|---|---|---|---|---|",
        row("one-shot global", shot, {s: 0.93 * v for s, v in centralized.items()}, "93 % of centralized,", 0),
        row("one-shot global", shot, values(table, "fedavg-public", 1, union), "fedavg-public after one round,", 8),
        row("one-shot global", shot, values(table, "fgl", 5, one_shot), "fgl's one shot,", 0),
    ]
    for rounds in (1, 5):
        for claim, get, wanted in (
            ("global", union, 2.0), ("personal, mean", mean, 1.0), ("personal, worst site", worst, 2.0),
        ):  # fmt: skip
            arm, other = best(table, rounds, get)
            lines.append(
                row(f"{rounds} round{'s' * (rounds > 1)}: {claim}", values(table, OURS, rounds, get), other, f"{arm},", wanted)
            )
    lines.append(row("5 rounds: global", values(table, OURS, 5, union), centralized, "centralized,", -1))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
