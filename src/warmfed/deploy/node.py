"""Commands `warmfed-superlink FOLDER` and `warmfed-supernode FOLDER`: start Flower's servers behind a guard.

The process of a SuperNode exits when its main thread ends. Flower (seen in 1.41) stops its main thread if a TLS connection is
cut (`UNEXPECTED_EOF_WHILE_READING`), but its server thread keeps the process alive. Then no service manager would restart it.
"""

import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NoReturn

from ..utils.errors import InputError, demand_text, printable
from ..utils.files import file_lock
from ..utils.output import complain, prepare_output
from ..utils.paths import is_folder, resolved
from . import keys
from .guard import SERVED, Guard, Listener
from .project_file import environment, read_project

SERVER, SITE = "server.key", "node"
"""File in each party's folder that is locked while its server runs."""
BUSY = "is running already in {}; stop it first"


def superlink() -> NoReturn:
    _main("warmfed-superlink", _superlink)


def supernode() -> NoReturn:
    _main("warmfed-supernode", _supernode)


def _main(name: str, run: Callable[[Path], None]) -> NoReturn:
    prepare_output()
    os.umask(0o077)  # Flower's files are private to this user
    try:
        if len(sys.argv) != 2 or not is_folder(Path(sys.argv[1])):
            raise InputError(f"usage: {name} FOLDER; FOLDER is a folder of `warmfed deploy init`")
        folder = resolved(Path(sys.argv[1]))
        demand_text(str(folder), "the path of the folder, which Flower stores,")
        run(folder)
    except InputError as error:
        complain(f"{name}: {printable(str(error), 4000)}")
        os._exit(2)
    os._exit(1)


def _superlink(folder: Path) -> None:
    from ..transports import flower_processes as flower

    values, nodes = environment(folder), folder / "nodes"

    def authentic(headers: Mapping[bytes, bytes]) -> bool:
        return keys.signed(nodes, *(headers.get(name, b"") for name in (flower.KEY, flower.SIGNED, flower.SIGNATURE)))

    certificates = {"--ssl-ca-certfile": "ca.crt", "--ssl-certfile": "server.crt", "--ssl-keyfile": "server.key"}
    words = [
        *("--host", values["WARMFED_LISTEN"], "--port", values["WARMFED_PORT"], "--database", str(folder / "superlink.db")),
        *(word for option, name in certificates.items() for word in (option, str(folder / name))),
        *("--enable-supernode-auth", "--disable-runtime-dependency-installation"),
    ]
    with file_lock(folder / SERVER, f"the SuperLink {BUSY.format(folder)}"):
        listener = Listener(values["WARMFED_LISTEN"], int(values["WARMFED_PORT"]))
        flower.superlink(words, lambda app: Guard(app, flower.FLEET, authentic, listener=listener), SERVED, listener)


def _supernode(folder: Path) -> None:
    from ..transports import flower_processes as flower

    project = read_project(folder)
    if (here := flower.app_sha256()) != project.app:
        raise InputError(
            f"warmfed's app has SHA-256 {here[:12]}…, expected {project.app[:12] or 'none'}…; install the versions "
            "in project.json"
        )

    def refuse(digest: str) -> None:
        from .site import read_site, refused  # imported late: an idle process does not need torch's memory

        reason = f"refused an app with SHA-256 {digest[:12]}…: this site runs warmfed's app only ({project.app[:12]}…)"
        flower.report(reason)
        refused(read_site(folder), "app", reason, digest)

    listener = Listener("127.0.0.1", 0)  # bound from now on, so that no other program gets the port
    words = [
        *("--host", "127.0.0.1", "--port", str(listener.getsockname()[1])),
        *("--superlink", project.address, "--root-certificates", str(folder / "ca.crt")),
        *("--auth-supernode-private-key", str(folder / SITE)),
        *("--node-config", f"site-folder={json.dumps(str(folder))}"),
    ]
    with file_lock(folder / SITE, f"the SuperNode {BUSY.format(folder)}"):
        flower.supernode(words, lambda app: Guard(app, listener=listener), SERVED, listener, project.app, refuse)
