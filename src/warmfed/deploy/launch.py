"""Starts a run over Flower from the command line and follows it: `flwr run` on a named SuperLink of this machine."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from ..config import Config
from ..runs.folder import read_summary
from ..runs.progress import RunListener
from ..transports.flower_project import write_project
from ..utils.errors import InputError
from ..utils.files import atomic_write
from ..utils.paths import exists, resolved

_LOOK, _ASK = 0.5, 15.0


def launch(config: Config, folder: Path, superlink: str, listener: RunListener) -> dict[str, Any]:
    """Run a configuration over the sites of a SuperLink, or finish the run in `folder`; return the summary.

    Args:
        config: the configuration.
        folder: the run folder.
        superlink: name of a connection in Flower's config.toml ($FLWR_HOME); its SuperLink must write to this machine's disks.
        listener: callbacks of the run.

    Raises:
        InputError: flwr is not installed, the connection is unknown, or the run has failed.
    """
    with tempfile.TemporaryDirectory(prefix="warmfed-app-") as temporary:
        app = write_project(Path(temporary) / "app")
        atomic_write(Path(temporary) / "run.toml", config.toml())
        settings = {"config": str(Path(temporary) / "run.toml"), "out": str(resolved(folder))}
        words = " ".join(f"{key}={json.dumps(value)}" for key, value in settings.items())
        run = str(_flwr("run", str(app), superlink, "-c", words)["run-id"])
        reported, asked = _follow(folder, 10**9, listener), time.monotonic()
        listener.plan(folder, config, config.server.sites, ())
        while not exists(folder / "summary.json"):
            reported = _follow(folder, reported, listener)
            if time.monotonic() - asked > _ASK:
                asked = time.monotonic()
                state = str(_flwr("list", superlink, "--run-id", run)["runs"][0]["status"])
                if state.startswith("finished") and not exists(folder / "summary.json"):
                    raise InputError(
                        f"the run {run} has ended ({state}) before it finished; see `flwr log {run} {superlink}` for the "
                        f"reason, and resume with the same command and --out {folder}"
                    )
            time.sleep(_LOOK)
        _follow(folder, reported, listener)
    return read_summary(folder)


def _follow(folder: Path, reported: int, listener: RunListener) -> int:
    """Report new records to the listener; return the number of reported records."""
    path = folder / "rounds.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()] if exists(path) else []
    for record in records[reported:]:
        listener.round(record)
    return len(records)


def _flwr(*words: str) -> Any:
    """Run a command of flwr and return its JSON output; raise `InputError` if it fails."""
    program = shutil.which("flwr", path=str(Path(sys.executable).parent)) or shutil.which("flwr")
    if program is None:
        raise InputError("Flower is not installed here; pip install 'warmfed[flower]', or activate the environment that has it")
    quiet = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", **os.environ}
    done = subprocess.run([program, *words, "--format", "json"], capture_output=True, text=True, env=quiet)
    try:
        found = json.loads(done.stdout[done.stdout.index("{") :])
    except ValueError:
        found = {"success": False, "error-message": f"{done.stdout} {done.stderr}".strip()}
    if done.returncode or not found.get("success", True):
        raise InputError(f"flwr {words[0]}: {found.get('error-message', done.stderr)}")
    return found
