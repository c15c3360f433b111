"""Project for `flwr run`: two imports and a table of settings; the code is in the installed library."""

from pathlib import Path

from ..utils.files import atomic_write

_APP = """\
\"\"\"One of warmfed's two apps, as Flower looks for it.\"\"\"

from warmfed.{} import app

__all__ = ["app"]
"""
FILES = {
    "pyproject.toml": """\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "warmfed-app"
version = "1.0.0"
description = "warmfed over Flower"
license = "Apache-2.0"
dependencies = ["flwr>=1.41,<1.43"]

[tool.flwr.app]
publisher = "warmfed"

[tool.flwr.app.components]
serverapp = "warmfed_app.server_app:app"
clientapp = "warmfed_app.client_app:app"

[tool.flwr.app.config]
config = ""
out = ""
""",
    "warmfed_app/__init__.py": '"""warmfed over Flower."""\n',
    "warmfed_app/server_app.py": _APP.format("deploy.server_app"),
    "warmfed_app/client_app.py": _APP.format("deploy.client_app"),
}


def write_project(folder: Path) -> Path:
    """Write the project into `folder` and return the folder; raise `InputError` if it cannot be written."""
    for name, text in FILES.items():
        atomic_write(folder / name, text)
    return folder
