"""Run folders: creation, lock, configuration and summary."""

from contextlib import AbstractContextManager
from itertools import count
from pathlib import Path
from typing import Any

from safetensors.torch import save

from ..config import Config, build
from ..core.tensors import Tensors
from ..utils.errors import InputError
from ..utils.files import atomic_write, file_lock, loads_toml, make_folder, read_bytes, read_json
from ..utils.paths import exists


def claim_run_folder(config: Config) -> Path:
    """Create and return a new folder: runs/<algorithm>-<seed>, or with -2, -3, … if it exists."""
    for number in count(1):
        folder = Path("runs") / (f"{config.name}-{config.seed}" + (f"-{number}" if number > 1 else ""))
        try:
            make_folder(folder.parent)
            folder.mkdir(0o700)
            return folder
        except FileExistsError:
            continue
        except OSError as error:
            raise InputError(f"cannot create {folder}: {error.strerror}; choose another folder with --out") from error
    raise AssertionError("unreachable")


def lock_run_folder(folder: Path) -> AbstractContextManager[None]:
    """Lock a run folder within this context; raise `InputError` if another process has locked it."""
    return file_lock(folder / "config.toml", f"another process uses {folder}; wait until it has ended")


_KEYS = ("warmfed", "algorithm", "seed", "classes", "models_sha256")
_RUN_KEYS = ("task", "sites", "seconds", "history_sha256")
"""Keys of every summary, and further keys of a run's; the summary of `personalize` has only the former."""


def read_config(folder: Path) -> Config:
    """Return the configuration of a run folder; raise `InputError` if it is missing or damaged."""
    data = read_bytes(folder / "config.toml", "the run's configuration (is this a run folder?)")
    try:
        return build(loads_toml(data))
    except InputError as error:
        raise InputError(f"{folder / 'config.toml'}: {error}") from error
    except ValueError as error:
        raise InputError(f"{folder / 'config.toml'} is damaged ({error}); restore it or start a new run") from error


def read_summary(folder: Path) -> dict[str, Any]:
    """Return the summary of a finished run; raise `InputError` if it has not finished or is damaged."""
    path = folder / "summary.json"
    if not exists(path) and exists(folder / "config.toml"):
        raise InputError(f"the run in {folder} has not finished; finish it with `warmfed resume {folder}`")
    summary = read_json(path, "the run's summary (is this a run folder?)")
    found = summary if isinstance(summary, dict) else {}
    lacking = [name for name in (_KEYS if "site" in found else _KEYS + _RUN_KEYS) if name not in found]
    if lacking:
        raise InputError(f"{path} is damaged (it lacks {', '.join(lacking)}); restore it or start a new run")
    return found


def write_model(path: Path, model: Tensors) -> None:
    atomic_write(path, save({name: tensor.clone().contiguous() for name, tensor in model.items()}))
