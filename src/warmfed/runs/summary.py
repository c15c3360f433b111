"""Builds summary.json: the main figures of a run, from its records and models."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch

from ..config import Config
from ..data import Federation, FederationInfo
from ..utils.version import __version__

_ASIDE = ("seconds", "peak_memory_mb", "quality")
Record = Mapping[str, Any]


def results(record: Record) -> dict[str, Any]:
    """Return the part of a record that is equal in every rerun: without seconds, memory and generator quality."""
    return {key: value for key, value in record.items() if key not in _ASIDE}


def history_sha256(records: list[dict[str, Any]]) -> str:
    """Return the SHA-256 of the results of all records."""
    lines = [json.dumps(results(record), sort_keys=True) for record in records]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def summarize(
    config: Config,
    federation: Federation | FederationInfo,
    measure: str,
    base: str,
    records: list[dict[str, Any]],
    models: Mapping[str, str],
    union: float | None,
) -> dict[str, Any]:
    """Return the summary of a finished run; accuracies are of the last record, in percent.

    Args:
        config: the configuration.
        federation: the participating sites.
        measure: main metric of a model: accuracy or loss.
        base: SHA-256 of the generator's base; empty if the algorithm uses none.
        records: records of all stages.
        models: SHA-256 of the models: "global", "personal/<site>".
        union: mean accuracy (or loss) of the personal models on the union of test sets. None: not measured, as neither images
            nor personal models leave their sites.
    """
    last = records[-1]
    shared, own = _sums(last, measure)
    if own is not None and union is not None:
        own["union"] = union
    seconds: dict[str, float] = {}
    for record in records:
        seconds[record["stage"]] = round(seconds.get(record["stage"], 0.0) + record["seconds"], 3)
    return {
        "warmfed": __version__,
        "algorithm": config.name,
        "task": config.task,
        "measure": measure,
        "seed": config.seed,
        "rounds": config.algorithm.rounds,
        "federation": federation.name,
        "classes": list(federation.classes),
        "prompts": list(federation.prompts),
        "image": list(federation.shape),
        "data_sha256": federation.fingerprint,
        "base_sha256": base or None,
        "global": shared,
        "personal": own,
        "one_shot": _one_shot(records, measure),
        "quality": next((record["quality"] for record in reversed(records) if "quality" in record), None),
        "validation": {model: _validation(last[model], measure) for model in ("global", "personal")},
        "sites": {
            name: {
                "global": _at(last["global"], name, measure),
                "personal": _at(last["personal"], name, measure),
                **counts,
            }
            for name, counts in federation.rows.items()
        },
        **{f"{key}_per_site": _mean_bytes(records, key, len(federation.sites)) for key in ("bytes_up", "bytes_down")},
        "seconds": round(sum(seconds.values()), 3),
        "seconds_by_stage": seconds,
        "peak_memory_mb": max(record["peak_memory_mb"] for record in records),
        "history_sha256": history_sha256(records),
        "models_sha256": dict(sorted(models.items())),
    }


def _validation(views: Mapping[str, Any], measure: str) -> float | None:
    """Return the mean over the sites, for the choice of settings without the test sets."""
    found = [view["validation"][measure] for view in views.values() if "validation" in view]
    return sum(found) / len(found) if found else None


def _at(views: Mapping[str, Any], site: str, measure: str) -> float | None:
    return views[site]["test"][measure] if site in views else None


def _mean_bytes(records: list[dict[str, Any]], key: str, sites: int) -> int:
    return round(sum(sum(record[key].values()) for record in records) / sites)


def _sums(record: Record, measure: str) -> tuple[dict[str, float] | None, dict[str, float] | None]:
    """Return global and personal test accuracies (or losses) of one record; None if it has none."""
    shared, own = ([views["test"][measure] for views in record[model].values()] for model in ("global", "personal"))
    everywhere = personal = None
    worst = min if measure == "accuracy" else max
    if shared:
        union = record["union"]["global"][measure]
        everywhere = {"union": union, "site_mean": sum(shared) / len(shared), "site_worst": worst(shared)} | _even(
            record["global"]
        )
        everywhere |= _by_holding(record["global"])
    if own:
        values = torch.tensor(own, dtype=torch.float64)
        personal = {"mean": values.mean().item(), "worst": worst(own), "std": values.std(correction=0).item()}
        personal |= _even(record["personal"]) | _by_holding(record["personal"])
    return everywhere, personal


def _even(views: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics with equal weights for all classes, means over the sites."""
    tests = [view["test"] for view in views.values()]
    return {
        name: sum(test[name] for test in tests) / len(tests)
        for name in ("balanced_accuracy", "macro_f1")
        if all(name in test for test in tests)
    }


def _by_holding(views: Mapping[str, Any]) -> dict[str, float]:
    """Return the accuracies on the classes that a site holds and on those that it lacks: means over the sites, and worst."""
    found: dict[str, float] = {}
    for name in ("held", "lacking"):
        values = [view["test"][f"{name}_accuracy"] for view in views.values() if f"{name}_accuracy" in view["test"]]
        if values:
            found |= {name: sum(values) / len(values), f"{name}_worst": min(values)}
    return found


def _one_shot(records: list[dict[str, Any]], measure: str) -> dict[str, Any] | None:
    """Return the results of the one shot before the rounds: global after that stage, personal after the first training."""
    warm = next((i for i, record in enumerate(records) if record["stage"] in ("warm", "describe")), None)
    if warm is None or not records[warm]["global"] or any(record["stage"] == "train" for record in records[:warm]):
        return None
    first = next((record for record in records[warm + 1 :] if record["personal"]), None)
    return {"global": _sums(records[warm], measure)[0], "personal": _sums(first, measure)[1] if first else None}
