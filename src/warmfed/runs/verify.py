"""Verifies a run folder: reruns its configuration and compares the results."""

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load

from ..config import Config
from ..core.tensors import sha256
from ..utils.errors import InputError
from ..utils.files import read_bytes, read_lines
from ..utils.paths import is_file, matching
from ..utils.version import __version__
from .execute import execute
from .folder import read_config, read_summary
from .prepare import prepare
from .progress import RunListener
from .summary import history_sha256, results


class DifferenceError(Exception):
    """First difference between the rerun and the recorded run."""


class _Compare(RunListener):
    """Forwards all events to another listener; raises `DifferenceError` at the first record that differs."""

    def __init__(self, records: list[dict[str, Any]], inner: RunListener) -> None:
        self._records, self._inner = records, inner

    def plan(self, folder: Path, config: Config, sites: tuple[str, ...], records: Sequence[Mapping[str, Any]]) -> None:
        self._inner.plan(folder, config, sites, records)
        stages = config.algorithm.stages()
        if len(stages) != len(self._records):
            raise DifferenceError(f"stages: {len(self._records)} in the folder, {len(stages)} by its configuration")

    def progress(self, site: str, what: str, done: int, total: int) -> None:
        self._inner.progress(site, what, done, total)

    def round(self, record: Mapping[str, Any]) -> None:
        self._inner.round(record)
        kept = self._records[record["step"]]
        found = first_difference(results(kept), json.loads(json.dumps(results(record))))
        if found:
            field, was, now = found
            where = f"step {record['step']} ({record['stage']} {record['number'] + 1})"
            raise DifferenceError(f"{where}, {field}: {was} in the folder, {now} now")


def first_difference(a: Any, b: Any, path: str = "") -> tuple[str, Any, Any] | None:
    """Return (path, value in `a`, value in `b`) of the first difference of two JSON values, or None."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in sorted(a.keys() | b.keys()):
            found = first_difference(a.get(key, "nothing"), b.get(key, "nothing"), f"{path}/{key}" if path else key)
            if found:
                return found
        return None
    # in JSON text, NaN equals NaN
    return None if json.dumps(a) == json.dumps(b) else (path, a, b)


def verify(folder: Path, listener: RunListener | None = None, workers: int = 0) -> str:
    """Rerun a finished run's configuration in a temporary folder and return its history hash if all is identical.

    Args:
        folder: the run folder.
        listener: callbacks of the rerun.
        workers: number of worker processes; results do not depend on it. Default 0: as in the configuration.

    Raises:
        DifferenceError: A record, model, message, adapter or file of samples differs.
        InputError: The run has not finished, is of another version, or its data or base is missing.
    """
    summary, config = read_summary(folder), read_config(folder)
    if summary.get("warmfed") != __version__:
        raise InputError(
            f"{folder} was made with warmfed {summary.get('warmfed')}, this is {__version__}; verify it with that version"
        )
    records = read_lines(folder / "rounds.jsonl", "the run's records")
    if history_sha256(records) != summary.get("history_sha256"):
        raise DifferenceError("rounds.jsonl: its hash differs from summary.json; it has changed since the run")
    models = summary.get("models_sha256", {})
    for name, digest in models.items():
        if _model_sha256(folder / "models" / f"{name}.safetensors") != digest:
            raise DifferenceError(f"models/{name}.safetensors: its hash differs from summary.json; it has changed")
    config = replace(config, workers=workers or config.workers)
    prepared = prepare(config)
    for what, was, now in (
        ("data_sha256", summary.get("data_sha256"), prepared.federation.fingerprint),
        ("base_sha256", summary.get("base_sha256") or "", prepared.base),
    ):
        if was != now:
            raise DifferenceError(f"{what}: {was} in the folder, {now} now")
    with tempfile.TemporaryDirectory(prefix="warmfed-verify-") as temporary:
        again = execute(config, Path(temporary) / "run", _Compare(records, listener or RunListener()))
        found = first_difference(models, again["models_sha256"])
        if found:
            raise DifferenceError(f"model {found[0]}: {found[1]} in the folder, {found[2]} now")
        _compare_sent(folder, Path(temporary) / "run")
    return str(again["history_sha256"])


def _compare_sent(folder: Path, again: Path) -> None:
    """Raise `DifferenceError` if the ledger, an adapter or a file of samples differs from the rerun's."""
    lines = zip_longest(*(_messages(run) for run in (folder, again)), fillvalue="nothing")
    for number, (kept, now) in enumerate(lines, 1):
        found = first_difference(kept, now)
        if found:
            raise DifferenceError(f"ledger.jsonl, message {number}, {found[0]}: {found[1]} in the folder, {found[2]} now")
    for path in (path for part in ("adapters", "synthetic") for path in matching(again / part, "*.*")):
        name = path.relative_to(again)
        if not is_file(folder / name) or (folder / name).read_bytes() != path.read_bytes():
            raise DifferenceError(f"{name}: it is missing or differs from the rerun; it has changed since the run")


def _messages(run: Path) -> list[dict[str, Any]]:
    """Return the messages in a run's ledger, without times."""
    return [results(line) for line in read_lines(run / "ledger.jsonl", "the run's ledger") if "sha256" in line]


def _model_sha256(path: Path) -> str:
    try:
        return sha256(load(read_bytes(path, "a model of the run")))
    except SafetensorError:
        return "damaged"
