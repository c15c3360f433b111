"""Read a run folder or a comparison, and check the type of every value.

*Shapes* describe the content of each file: a type, `{"key": shape}` (a key ending in "?" may be absent),
`[shape]` for lists, `Each(shape)` for mappings with any keys, `Maybe(shape)` where null is allowed.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from warmfed.utils.errors import InputError
from warmfed.utils.files import read_bytes, read_json, read_lines
from warmfed.utils.paths import exists, is_folder


@dataclass(frozen=True)
class Each:
    shape: Any


@dataclass(frozen=True)
class Maybe:
    shape: Any


MEASURE = {
    "accuracy?": float,
    "balanced_accuracy?": float,
    "macro_f1?": float,
    "ece?": float,
    "held_accuracy?": float,
    "lacking_accuracy?": float,
    "lacking_count?": float,
    "loss?": float,
    "count?": int,
}
QUALITY = {
    "features": str,
    "samples": int,
    **dict.fromkeys(
        ("fid", "kid", "precision", "recall", "density", "coverage", "memorization_rate", "floor_fid", "floor_kid"), float
    ),
    "cas?": float,
    "models?": int,
}
EVALUATION = Each({"validation?": MEASURE, "test": MEASURE})
ROUND = {
    "step": int,
    "stage": str,
    "number": int,
    "quality?": QUALITY,
    "cohort": [str],
    "train": Each(Each(Maybe(float))),
    "aggregate": Each(Maybe(float)),
    "global?": Maybe(EVALUATION),
    "personal?": Maybe(EVALUATION),
    "union?": Maybe({"global?": Maybe(MEASURE), "personal?": Maybe(Each(MEASURE))}),
    "seconds": float,
    "peak_memory_mb?": float,
    "bytes_up": Each(int),
    "bytes_down": Each(int),
    "absent?": Each(str),
}
MESSAGE = {
    "stage": str,
    "number": int,
    "site": str,
    "direction": str,
    "kind": str,
    "bytes": int,
    "tensors": int,
    "seconds?": float,
}
STAGE = {"stage": str, "number": int, "seconds": float, "peak_memory_mb?": float}
_HOLDING = {f"{name}{worst}?": Maybe(float) for name in ("held", "lacking") for worst in ("", "_worst")}
GLOBAL = {"union?": Maybe(float), "site_mean?": Maybe(float), "site_worst?": Maybe(float), **_HOLDING}
PERSONAL = {"mean?": Maybe(float), "worst?": Maybe(float), "std?": Maybe(float), "union?": Maybe(float), **_HOLDING}
SUMMARY = {
    "warmfed": str,
    "algorithm": str,
    "task?": str,
    "measure?": str,
    "quality?": Maybe(QUALITY),
    "seed": int,
    "rounds": int,
    "federation": str,
    "data_sha256": str,
    "base_sha256?": Maybe(str),
    "global?": Maybe(GLOBAL),
    "personal?": Maybe(PERSONAL),
    "one_shot?": Maybe({"global?": Maybe(GLOBAL), "personal?": Maybe(PERSONAL)}),
    "validation?": Maybe({"global?": Maybe(float), "personal?": Maybe(float)}),
    "holdout?": Maybe({"site": str, "global": float, "tuned": float}),
    "sites": Each({"global?": Maybe(float), "personal?": Maybe(float), "train": int, "validation": int, "test": int}),
    "bytes_up_per_site": float,
    "bytes_down_per_site": float,
    "seconds": float,
    "seconds_by_stage?": Each(float),
    "peak_memory_mb": float,
    "history_sha256": str,
    "models_sha256?": Maybe(Each(str)),
}
POINT = {"site": str, "kind": str, "class": int, "x": float, "y": float}
REPORT_IMAGES = {
    "classes": [str],
    "sites": Each({"real?": Maybe(str), "synthetic?": Maybe(str)}),
    "features?": Maybe([POINT]),
    "adapters?": Maybe(Each(Each(float))),
    "features_sha256?": Maybe(str),
}
COMPARISON = {
    "rows": [
        {
            "algorithm": str,
            "cells": [{"seed": int, "folder?": Maybe(str)}],
            "global_mean?": Maybe(float),
            "global_std?": Maybe(float),
            "global_worst_mean?": Maybe(float),
            "personal_mean?": Maybe(float),
            "personal_std?": Maybe(float),
            "personal_worst_mean?": Maybe(float),
            "holdout_mean?": Maybe(float),
            "holdout_std?": Maybe(float),
            "holdout_tuned_mean?": Maybe(float),
            "holdout_tuned_std?": Maybe(float),
            **{
                f"{model}_{name}_mean?": Maybe(float)
                for model in ("global", "personal")
                for name in ("site_mean", "balanced_accuracy", "macro_f1", "held", "lacking", "lacking_worst")
            },
            "validation_mean?": Maybe(float),
            "validation_personal_mean?": Maybe(float),
            **{f"{key}_{of}?": Maybe(float) for key in ("fid", "kid", "coverage", "cas") for of in ("mean", "std")},
            "bytes_up?": Maybe(float),
            "seconds?": Maybe(float),
            "settings?": Each(str),
        }
    ],
    "tests?": [
        {"metric": str, "algorithm": str, "against": str, "difference": Maybe(float), "p": Maybe(float)},
    ],
    "measure?": str,
    "federation": str,
    "seeds": [int],
    "rounds": int,
    "holdout?": [str],
    "swept?": [str],
}

DRAWN = "drawn by the model"
"""Key of a diffusion model's samples in the report images, in place of a site's name."""
KINDS = {float: ("a number", (int, float)), int: ("a whole number", (int,)), str: ("text", (str,))}


def check(value: Any, shape: Any, where: str) -> None:
    """Raise `InputError`, with the position, if `value` is not of `shape`."""
    match shape:
        case Maybe():
            if value is not None:
                check(value, shape.shape, where)
        case Each():
            _is(value, dict, "an object", where)
            for key, item in value.items():
                check(item, shape.shape, f"{where}: {key}")
        case list():
            _is(value, list, "a list", where)
            for place, item in enumerate(value):
                check(item, shape[0], f"{where}[{place}]")
        case dict():
            _is(value, dict, "an object", where)
            for key, item in shape.items():
                name = key.removesuffix("?")
                if name in value:
                    check(value[name], item, f"{where}: {name}")
                elif not key.endswith("?"):
                    raise InputError(
                        f"{where} has no {name!r}; it is damaged or of another version of warmfed; "
                        "restore it or start the run again"
                    )
        case _:
            expected, types = KINDS[shape]
            _is(value, types, expected, where)


def _is(value: Any, types: type | tuple[type, ...], expected: str, where: str) -> None:
    if not isinstance(value, types):
        raise InputError(
            f"{where}: expected {expected}; found {str(value)[:40]!r}; "
            "the file is damaged or of another version of warmfed; restore it or start the run again"
        )


@dataclass(frozen=True)
class ReportImages:
    """The images and features of a run for its report."""

    classes: tuple[str, ...]
    """Class names."""
    images: Mapping[str, Mapping[str, bytes]]
    """PNG grids with one row per class: site -> {"real" | "synthetic": bytes}."""
    features: tuple[Mapping[str, Any], ...]
    """Points of the feature map: {"site", "kind", "class", "x", "y"}."""
    adapters: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Scores of each site's adapter."""
    features_sha256: str = ""
    """SHA-256 of the feature extractor of these scores."""

    @property
    def drawn(self) -> bytes:
        """PNG grid of a diffusion model's samples; empty if there is none."""
        return self.images.get(DRAWN, {}).get("synthetic", b"")


@dataclass(frozen=True)
class Run:
    """A finished run, read from its folder."""

    summary: Mapping[str, Any]  # summary.json
    rounds: tuple[Mapping[str, Any], ...]  # lines of rounds.jsonl
    messages: tuple[Mapping[str, Any], ...]  # lines of ledger.jsonl: messages on the wire
    stages: tuple[Mapping[str, Any], ...]  # lines of ledger.jsonl: seconds and peak memory
    config: str  # config.toml
    report_images: ReportImages | None

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the sites, sorted."""
        return tuple(sorted(self.summary["sites"]))


def read_run(folder: Path, summary: Mapping[str, Any] | None = None) -> Run:
    """Return the run in `folder`.

    Args:
        folder: the run folder.
        summary: content of summary.json, if the file is not written yet.

    Raises:
        InputError: if a file is missing or damaged, or the run has not finished.
    """
    if not is_folder(folder):
        raise InputError(f"expected a run folder; {folder} is not a folder; set the folder of a `warmfed run`")
    path = folder / "summary.json"
    if summary is None and not exists(path):
        raise InputError(
            f"{path} does not exist: the run has not finished, or this is not a run folder; "
            f"`warmfed resume {folder}` finishes a run"
        )
    summary = read_json(path, "the run's summary") if summary is None else summary
    check(summary, SUMMARY, str(path))
    rounds = read_rounds(folder)
    path = folder / "ledger.jsonl"
    ledger = read_lines(path, "the run's ledger")
    for number, line in enumerate(ledger, 1):
        is_message = isinstance(line, dict) and "direction" in line
        check(line, MESSAGE if is_message else STAGE, f"{path} line {number}")
    return Run(
        summary=summary,
        rounds=rounds,
        messages=tuple(line for line in ledger if "direction" in line),
        stages=tuple(line for line in ledger if "direction" not in line),
        config=read_bytes(folder / "config.toml", "the run's configuration").decode(errors="replace"),
        report_images=read_report_images(folder / "report_images"),
    )


def read_rounds(folder: Path) -> tuple[Mapping[str, Any], ...]:
    """Return the round records of the run in `folder`, in order; raise `InputError` if they are damaged."""
    path = folder / "rounds.jsonl"
    rounds = read_lines(path, "the run's rounds")
    for number, line in enumerate(rounds, 1):
        check(line, ROUND, f"{path} line {number}")
    if not rounds:
        raise InputError(f"{path} is empty; expected a line per round; restore it or start the run again")
    return tuple(rounds)


def read_report_images(folder: Path) -> ReportImages | None:
    """Return the images in `folder`, or None if the run kept none; raise `InputError` if they are damaged."""
    path = folder / "report_images.json"
    if not exists(path):
        return None
    found = read_json(path, "the run's report images")
    check(found, REPORT_IMAGES, str(path))
    images = {
        site: {kind: _read_picture(folder, site, name) for kind, name in named.items() if name is not None}
        for site, named in sorted(found["sites"].items())
    }
    features = tuple(found.get("features") or ())
    for place, point in enumerate(features):
        if not 0 <= point["class"] < len(found["classes"]):
            raise InputError(
                f"{path}: features[{place}]: expected a class from 0 to {len(found['classes']) - 1}; "
                f"found {point['class']}; restore it or start the run again"
            )
    return ReportImages(
        tuple(found["classes"]), images, features, found.get("adapters") or {}, found.get("features_sha256") or ""
    )


def _read_picture(folder: Path, site: str, name: str) -> bytes:
    """Return the bytes of a PNG file in the folder of report_images.json; raise `InputError` for other paths."""
    if Path(name).name != name:
        raise InputError(
            f"{folder / 'report_images.json'}: expected the name of a PNG file beside it; "
            f"found {name!r}; restore it or start the run again"
        )
    return read_bytes(folder / name, f"the images of site {site!r}")


def read_comparison(folder: Path) -> Mapping[str, Any]:
    """Return compare.json of `folder`; raise `InputError` if it is missing or damaged."""
    path = folder / "compare.json"
    if not exists(path):
        raise InputError(f"{path} does not exist; `warmfed compare --out {folder}` writes it")
    compare = read_json(path, "the comparison")
    check(compare, COMPARISON, str(path))
    if not compare["rows"]:
        raise InputError(f"{path} compares nothing; expected a row per algorithm; run the comparison again")
    return compare
