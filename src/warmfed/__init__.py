"""Federated learning that gives every site a strong global and a strong personal image classifier in one to five rounds."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .utils.version import __version__ as __version__

if TYPE_CHECKING:
    from .algorithms import ALGORITHMS, WarmFed
    from .config import Config, parse
    from .core.training import Training
    from .data import Federation, digits4, load
    from .diffusion.generator import LatentDiffusion
    from .fit import fit
    from .runs.backend import simulate
    from .runs.execute import execute, resume
    from .tasks import Classify
    from .utils.errors import InputError

_HOME = {
    "ALGORITHMS": "algorithms",
    "Classify": "tasks",
    "Config": "config",
    "Federation": "data",
    "InputError": "utils.errors",
    "LatentDiffusion": "diffusion.generator",
    "Training": "core.training",
    "WarmFed": "algorithms",
    "digits4": "data",
    "execute": "runs.execute",
    "fit": "fit",
    "load": "data",
    "parse": "config",
    "resume": "runs.execute",
    "simulate": "runs.backend",
}
__all__ = [
    "ALGORITHMS",
    "Classify",
    "Config",
    "Federation",
    "InputError",
    "LatentDiffusion",
    "Training",
    "WarmFed",
    "digits4",
    "execute",
    "fit",
    "load",
    "parse",
    "resume",
    "simulate",
]


def __getattr__(name: str) -> Any:
    # torch is imported with the first name that needs it: `warmfed --help` is instant
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)
