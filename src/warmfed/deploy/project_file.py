"""Values that are equal for all parties of a deployment (project.json), and the values of a party's file `environment`.

This module does not import torch, because an idle SuperNode reads both.
"""

import platform
import shlex
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from ..utils.errors import InputError
from ..utils.files import read_bytes, read_json
from ..utils.paths import exists
from ..utils.settings import construct
from ..utils.version import __version__


@dataclass(frozen=True)
class Project:
    """Values that are equal for all parties of a deployment; each party has a copy of project.json."""

    host: str = ""
    """Name or address of the server, as the sites reach it."""
    port: int = 8000
    sites: tuple[str, ...] = ()
    python: str = ""
    """Major and minor version of Python."""
    warmfed: str = ""
    torch: str = ""
    flwr: str = ""
    app: str = ""
    """SHA-256 of the Flower app that the sites run; they refuse any other."""
    classes: tuple[str, ...] = ()
    """Class names in the order of their labels."""
    prompts: str = ""
    """Template of the prompts, with one {} for the class."""
    side: int = 0
    """Height and width of the images in pixels. Default 0: unknown."""
    base: str = ""
    """SHA-256 of the generator's base; empty if the algorithm has no generator."""
    base_name: str = ""
    """Name of a base that is installed with warmfed; empty if the base is a folder, of which each party has a copy."""
    start: str = ""
    """SHA-256 of the initial classifier; empty for random weights."""

    @property
    def address(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def versions() -> dict[str, str]:
    """Return the versions of python, warmfed, torch and flwr, without importing them; empty if not installed."""
    found = {"python": ".".join(platform.python_version_tuple()[:2]), "warmfed": __version__}
    for name in ("torch", "flwr"):
        try:
            found[name] = version(name).partition("+")[0]
        except PackageNotFoundError:
            found[name] = ""
    return found


def read_project(folder: Path) -> Project:
    """Return the project of a project folder or of a party's folder; raise `InputError` if it is missing or damaged."""
    table = read_json(folder / "project.json", "the project")
    if not isinstance(table, dict):
        raise InputError(f"{folder / 'project.json'} is damaged; restore it from the coordinator's copy")
    return construct(Project, table, "")


def environment(folder: Path) -> dict[str, str]:
    """Return the values of a folder's file `environment`; raise `InputError` if a line or the server's port is not valid."""
    path = folder / "environment"
    try:
        words = shlex.split(read_bytes(path, "the environment").decode(), comments=True)
    except ValueError as error:
        raise InputError(f"{path} is damaged ({error}); restore it from the coordinator's copy") from error
    values = {"WARMFED_BIN": "", "WARMFED_LISTEN": "0.0.0.0", **dict(word.split("=", 1) for word in words if "=" in word)}
    port = values.get("WARMFED_PORT", "")
    if exists(folder / "server.crt") and not (port.isdecimal() and 1 <= int(port) <= 65535):
        raise InputError(f"{path}: WARMFED_PORT must be from 1 to 65535; got {port!r}")
    return values
