"""A run folder as such: a new one, who may work on it, its configuration and its summary."""

from contextlib import AbstractContextManager
from itertools import count
from pathlib import Path
from typing import Any

from safetensors.torch import save

from ..config import Config, build
from ..core.tensors import Tensors
from ..utils.errors import InputError
from ..utils.files import atomic_write, file_lock, loads_toml, make_folder, read_bytes, read_json


def claim_run_folder(config: Config) -> Path:
    """A new, empty folder: runs/<algorithm>-<seed>, or the first free of -2, -3, … after it."""
    for number in count(1):
        folder = Path("runs") / (f"{config.name}-{config.seed}" + (f"-{number}" if number > 1 else ""))
        try:
            make_folder(folder.parent)
            folder.mkdir(0o700)
            return folder
        except FileExistsError:
            continue
        except OSError as error:
            raise InputError(f"cannot make {folder}: {error.strerror}; choose another place by --out") from error
    raise AssertionError("there is no end of numbers")


def lock_run_folder(folder: Path) -> AbstractContextManager[None]:
    """Keep other processes from a run folder meanwhile."""
    return file_lock(folder / "config.toml", f"another process is at work on {folder}; wait until it has ended")


_TOLD = ("warmfed", "algorithm", "seed", "classes", "models_sha256")
_OF_A_RUN = ("task", "sites", "seconds", "history_sha256")
"""What every summary says, and that of a run beside it: `personalize` has none of these."""


def read_config(folder: Path) -> Config:
    """The configuration of a run folder."""
    data = read_bytes(folder / "config.toml", "the run's configuration (is this a run folder?)")
    try:
        return build(loads_toml(data))
    except InputError as error:
        raise InputError(f"{folder / 'config.toml'}: {error}") from error
    except ValueError as error:
        raise InputError(f"{folder / 'config.toml'} is damaged ({error}); restore it or start the run anew") from error


def read_summary(folder: Path) -> dict[str, Any]:
    """The summary of a finished run; raises `InputError` where it has not finished."""
    path = folder / "summary.json"
    if not path.exists() and (folder / "config.toml").exists():
        raise InputError(f"the run in {folder} has not finished; `warmfed resume {folder}` finishes it")
    summary = read_json(path, "the run's summary (is this a run folder?)")
    found = summary if isinstance(summary, dict) else {}
    lacking = [name for name in (_TOLD if "site" in found else _TOLD + _OF_A_RUN) if name not in found]
    if lacking:
        raise InputError(f"{path} is damaged (it lacks {', '.join(lacking)}); restore it or start the run anew")
    return found


def write_model(path: Path, model: Tensors) -> None:
    atomic_write(path, save({name: tensor.clone().contiguous() for name, tensor in model.items()}))
