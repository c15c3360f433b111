"""What all parties of a deployment must have in common, and the values of a party's file `environment`.

Without torch: a SuperNode that waits for work reads both.
"""

import platform
import shlex
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from ..utils.errors import InputError
from ..utils.files import read_bytes, read_json
from ..utils.settings import construct
from ..utils.version import __version__


@dataclass(frozen=True)
class Project:
    """What all parties of a deployment must have in common; project.json, of which each has a copy."""

    host: str = ""
    """Name or address by which the sites reach the server."""
    port: int = 8000
    sites: tuple[str, ...] = ()
    python: str = ""
    """Major and minor version."""
    warmfed: str = ""
    torch: str = ""
    flwr: str = ""
    app: str = ""
    """SHA-256 of the Flower app that the sites run; they run no other."""
    classes: tuple[str, ...] = ()
    """In the order of their labels."""
    prompts: str = ""
    """The template, with one {} for the class."""
    side: int = 0
    """Height and width of the images in pixels; 0: not known when the project was made."""
    base: str = ""
    """SHA-256 of the generator's base; empty: the algorithm draws no images."""
    base_name: str = ""
    """Of a base that is installed with warmfed; empty: a folder, which each party has a copy of."""
    start: str = ""
    """SHA-256 of the classifier to start from; empty: random weights."""

    @property
    def address(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def versions() -> dict[str, str]:
    """Of python, warmfed, torch and flwr, without importing them; empty: not installed."""
    found = {"python": ".".join(platform.python_version_tuple()[:2]), "warmfed": __version__}
    for name in ("torch", "flwr"):
        try:
            found[name] = version(name).partition("+")[0]
        except PackageNotFoundError:
            found[name] = ""
    return found


def read_project(folder: Path) -> Project:
    """The project that `folder`, or a party's folder of it, belongs to; raises `InputError`."""
    table = read_json(folder / "project.json", "the project")
    if not isinstance(table, dict):
        raise InputError(f"{folder / 'project.json'} is damaged; restore it from the coordinator's copy")
    return construct(Project, table, "")


def environment(folder: Path) -> dict[str, str]:
    """Return the values of a folder's file `environment`; raises `InputError` if a line or the server's port is invalid."""
    path = folder / "environment"
    try:
        words = shlex.split(read_bytes(path, "the environment").decode(), comments=True)
    except ValueError as error:
        raise InputError(f"{path} is damaged ({error}); restore it from the coordinator's copy") from error
    values = {"WARMFED_BIN": "", "WARMFED_LISTEN": "0.0.0.0", **dict(word.split("=", 1) for word in words if "=" in word)}
    port = values.get("WARMFED_PORT", "")
    if (folder / "server.crt").exists() and not (port.isdecimal() and 1 <= int(port) <= 65535):
        raise InputError(f"{path}: WARMFED_PORT must be from 1 to 65535; got {port!r}")
    return values
