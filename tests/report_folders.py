"""Small handwritten run folders and comparisons for the tests of the report."""

import io
import json
from pathlib import Path
from typing import Any

from PIL import Image

SITES = {"ink": (90.0, 94.0), "street": (80.0, 91.0)}  # global and personal accuracy at the end


def measure(accuracy: float) -> dict[str, float]:
    return {
        "accuracy": accuracy, "balanced_accuracy": accuracy - 1, "macro_f1": accuracy - 2, "ece": 3.5, "loss": 0.3, "count": 50,
    }  # fmt: skip


def evaluation(accuracies: dict[str, float]) -> dict[str, Any]:
    return {site: {"validation": measure(value), "test": measure(value)} for site, value in accuracies.items()}


def record(step: int, stage: str, number: int, **values: Any) -> dict[str, Any]:
    empty: dict[str, Any] = {"train": {}, "aggregate": {}, "global": {}, "personal": {}, "union": {}}
    cost = {"seconds": 2.5, "peak_memory_mb": 512.0, "bytes_up": {}, "bytes_down": {}}
    return {"step": step, "stage": stage, "number": number, "cohort": ["ink", "street"], **empty, **cost, **values}


def one_round(step: int, number: int, lost: float, kept: float, share: float | None) -> list[dict[str, Any]]:
    """The two stages of a round of WarmFed; the models are judged after the second."""
    chosen = {} if share is None else {
        "selector_share_recent": share, "selector_share_older": 1 - share, "selector_entropy": 0.6, "selector_temperature": 0.9,
    }  # fmt: skip
    trained = record(
        step, "train", number,
        train={"ink": {"loss": 0.3, **chosen}, "street": {"loss": 0.5, **chosen}},
        aggregate={"tune_loss": 0.5},
        bytes_up={"ink": 1000, "street": 1000}, bytes_down={"ink": 3000, "street": 3000},
    )  # fmt: skip
    decision = {"gate_kept": kept, "gate_strength": kept / 2, "validation_before": 84.0, "validation_after": 84.0 + kept}
    gate = record(step + 1, "gate", number, aggregate=decision | {"validation_tuned": 83.5}, **judged(lost))
    return [trained, gate]


def judged(lost: float) -> dict[str, Any]:
    return {
        "global": evaluation({"ink": 90.0 - lost, "street": 80.0 - lost}),
        "personal": evaluation({"ink": 94.0 - lost, "street": 91.0 - lost}),
        "union": {"global": measure(85.0 - lost)},
    }


WARMFED = [
    record(
        0, "adapt", 0,
        train={
            "ink": {"first_loss": 0.9, "loss": 0.25, "steps": 40, "seconds": 12.0},
            "street": {"first_loss": 0.8, "loss": 0.5, "steps": 40, "seconds": 13.0},
        },
        bytes_up={"ink": 200_000, "street": 200_000},
    ),
    record(
        1, "warm", 0,
        aggregate={
            "samples": 80, "kept": 50, "samples/ink": 40, "kept/ink": 30, "kept/street": 20,
            "recognised/ink": 0.75, "recognised/street": 0.5,
        },
        union={"global": measure(75.0)},
        **{"global": evaluation({"ink": 80.0, "street": 70.0})},
    ),
    *one_round(2, 0, 4.0, 1.0, None),
    *one_round(4, 1, 2.0, 0.0, 0.5),
    *one_round(6, 2, 1.0, 2.0, 0.625),
    record(8, "personalize", 0, **judged(0.0)),
]  # fmt: skip


def message(step: int, stage: str, site: str, direction: str, kind: str, size: int) -> dict[str, Any]:
    return {
        "step": step, "stage": stage, "number": 0, "site": site, "direction": direction,
        "kind": kind, "bytes": size, "tensors": 2, "sha256": "ab" * 32,
    }  # fmt: skip


LEDGER: list[dict[str, Any]] = [
    *(message(0, "adapt", site, "up", "WarmFed.Adapter", 200_000) for site in SITES),
    *(message(2, "train", site, "down", "WarmFed.Start", 3000) for site in SITES),
    *(message(2, "train", site, "up", "WarmFed.Update", 1000) for site in SITES),
    {"step": 0, "stage": "adapt", "number": 0, "seconds": 25.0, "peak_memory_mb": 900.0},
    {"step": 1, "stage": "warm", "number": 0, "seconds": 70.0, "peak_memory_mb": 1100.0},
    {"step": 2, "stage": "train", "number": 0, "seconds": 5.0, "peak_memory_mb": 700.0},
]
SUMMARY: dict[str, Any] = {
    "warmfed": "0.1.0", "algorithm": "warmfed", "seed": 7, "rounds": 3, "federation": "digits4",
    "data_sha256": "da" * 32, "base_sha256": "ba" * 32, "history_sha256": "15" * 32, "models_sha256": {"global": "60" * 32},
    "global": {"union": 85.0, "site_mean": 85.0, "site_worst": 80.0},
    "personal": {"mean": 92.5, "worst": 91.0, "std": 1.5, "union": 70.0},
    "one_shot": {"global": {"union": 75.0}, "personal": None},
    "sites": {
        site: {"global": both[0], "personal": both[1], "train": 225, "validation": 45, "test": 180}
        for site, both in SITES.items()
    },
    "bytes_up_per_site": 203_000, "bytes_down_per_site": 9_000, "seconds": 161.0,
    "seconds_by_stage": {"adapt": 25.0, "warm": 70.0, "train": 5.0}, "peak_memory_mb": 1100.0,
}  # fmt: skip
POINTS = [
    {"site": site, "kind": kind, "class": label, "x": place + 4.0 * label, "y": place - 3.0 * label}
    for place, (site, kind) in enumerate([("ink", "real"), ("ink", "synthetic"), ("street", "real"), ("street", "synthetic")])
    for label in (0, 1)
]


def png(shade: int, size: tuple[int, int] = (256, 64)) -> bytes:
    target = io.BytesIO()
    Image.new("RGB", size, (shade, 120, 160)).save(target, "PNG")
    return target.getvalue()


def write_lines(path: Path, values: list[dict[str, Any]]) -> None:
    path.write_text("".join(f"{json.dumps(value)}\n" for value in values))


def run_folder(
    folder: Path,
    records: list[dict[str, Any]] = WARMFED,
    ledger: list[dict[str, Any]] = LEDGER,
    classes: tuple[str, str] = ("zero", "one"),
    *,
    images: bool = True,
    **summary: Any,
) -> Path:
    """A finished run in `folder`; by default WarmFed over two sites, two classes and three rounds, with all there is."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "summary.json").write_text(json.dumps(SUMMARY | summary))
    (folder / "config.toml").write_text('algorithm = "warmfed"\nseed = 7\n')
    write_lines(folder / "rounds.jsonl", records)
    write_lines(folder / "ledger.jsonl", ledger)
    if images:
        (folder / "report_images").mkdir(exist_ok=True)
        named = {site: {kind: f"{kind}-{site}.png" for kind in ("real", "synthetic")} for site in SITES}
        for place, name in enumerate(name for names in named.values() for name in names.values()):
            (folder / "report_images" / name).write_bytes(png(40 * place))
        content = {"classes": classes, "sites": named, "features": POINTS}
        (folder / "report_images" / "report_images.json").write_text(json.dumps(content))
    return folder


def row(name: str, both: tuple[float | None, float | None], upload: int, **more: Any) -> dict[str, Any]:
    values: dict[str, Any] = {"algorithm": name, "cells": [{"seed": 0}, {"seed": 1}], "bytes_up": upload, "seconds": 30.0}
    for kind, mean in zip(("global", "personal"), both, strict=True):
        values |= {f"{kind}_mean": mean, f"{kind}_std": mean and 0.5, f"{kind}_worst_mean": mean and mean - 2}
    return values | more


COMPARE: dict[str, Any] = {
    "federation": "digits4", "seeds": [0, 1], "rounds": 5,
    "rows": [
        row("centralized", (97.0, None), 0),
        row("fedavg", (93.0, None), 900_000),
        row("warmfed", (96.0, 97.5), 1_200_000, seconds=150.0, cells=[{"seed": 0, "folder": "warmfed-0"}]),
        row("ditto", (93.0, 95.0), 900_000),
    ],
    "tests": [{"metric": "global", "algorithm": "warmfed", "against": "fedavg", "difference": 3.0, "p": 0.0004}],
}  # fmt: skip


def comparison_folder(folder: Path, **values: Any) -> Path:
    run_folder(folder / "warmfed-0")
    (folder / "compare.json").write_text(json.dumps(COMPARE | values))
    return folder
