"""Start a run over Flower from the command line and follow it: `flwr run` on a named SuperLink of this machine."""

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
from ..runs.execute import RunListener
from ..runs.folder import read_summary
from ..transports.flower_project import write_project
from ..utils.errors import InputError
from ..utils.files import atomic_write

_LOOK, _ASK = 0.5, 15.0


def launch(config: Config, folder: Path, superlink: str, listener: RunListener) -> dict[str, Any]:
    """Run a configuration over the sites of a SuperLink, or finish the run in `folder`; its summary.

    Args:
        superlink: a connection in Flower's config.toml ($FLWR_HOME), to a SuperLink that writes to this machine's disks.

    Raises:
        InputError: flwr is not installed, does not know the connection, or the run has failed.
    """
    with tempfile.TemporaryDirectory(prefix="warmfed-app-") as temporary:
        app = write_project(Path(temporary) / "app")
        atomic_write(Path(temporary) / "run.toml", config.toml())
        settings = {"config": str(Path(temporary) / "run.toml"), "out": str(folder.resolve())}
        words = " ".join(f"{key}={json.dumps(value)}" for key, value in settings.items())
        run = str(_flwr("run", str(app), superlink, "-c", words)["run-id"])
        told, asked = _follow(folder, 10**9, listener), time.monotonic()
        listener.plan(folder, config, config.server.sites, ())
        while not (folder / "summary.json").exists():
            told = _follow(folder, told, listener)
            if time.monotonic() - asked > _ASK:
                asked = time.monotonic()
                state = str(_flwr("list", superlink, "--run-id", run)["runs"][0]["status"])
                if state.startswith("finished") and not (folder / "summary.json").exists():
                    raise InputError(
                        f"the run {run} has ended ({state}) before it was done; `flwr log {run} {superlink}` says why, "
                        f"and the same command with --out {folder} goes on"
                    )
            time.sleep(_LOOK)
        _follow(folder, told, listener)
    return read_summary(folder)


def _follow(folder: Path, told: int, listener: RunListener) -> int:
    """Tell the listener of new records; how many it has been told."""
    path = folder / "rounds.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    for record in records[told:]:
        listener.round(record)
    return len(records)


def _flwr(*words: str) -> Any:
    """What a command of flwr answers, as JSON."""
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
