"""The golden run: WarmFed on the toy federation, compared record by record with `golden.json`.

A change that alters it must say so, and write it anew: python tests/runs/test_golden.py
Accuracies are compared exactly (a count of images decides them), other numbers to 1e-4: another processor may round
differently.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import toy

GOLDEN = Path(__file__).with_name("golden.json")
EXACT = {"accuracy", "count", "bytes_up", "bytes_down", "samples", "kept", "gate_strength", "step", "number"}


def records() -> list[dict[str, Any]]:
    return toy.play(toy.quick("warmfed")).results


def differences(expected: Any, found: Any, path: str = "") -> list[str]:
    if isinstance(expected, dict) and isinstance(found, dict):
        keys = sorted(expected.keys() | found.keys())
        return [d for key in keys for d in differences(expected.get(key), found.get(key), f"{path}/{key}")]
    if isinstance(expected, list) and isinstance(found, list) and len(expected) == len(found):
        return [d for i, (a, b) in enumerate(zip(expected, found, strict=True)) for d in differences(a, b, f"{path}/{i}")]
    exact = not isinstance(expected, float) or any(part in EXACT for part in path.split("/"))
    same = expected == found if exact else expected == pytest.approx(found, rel=1e-4, abs=1e-6)
    return [] if same else [f"{path}: golden {expected!r}, now {found!r}"]


def test_the_golden_run_is_as_it_was() -> None:
    assert differences(json.loads(GOLDEN.read_text()), json.loads(json.dumps(records()))) == []


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(records(), indent=1, sort_keys=True) + "\n")
