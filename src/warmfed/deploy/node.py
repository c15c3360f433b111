"""The commands `warmfed-superlink FOLDER` and `warmfed-supernode FOLDER`: Flower's two servers, guarded, from a party's folder.

A SuperNode's process also ends when its work has ended. Flower (seen in 1.41) takes a TLS connection that is cut in the
middle (`UNEXPECTED_EOF_WHILE_READING`) for the end, and then neither hears nor exits, as its own server's thread lives on:
nobody would start it again.
"""

import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NoReturn

from ..utils.errors import InputError
from ..utils.files import file_lock
from . import keys
from .guard import SERVED, Guard, Listener
from .project_file import environment, read_project

SERVER, SITE = "server.key", "node"
"""The file of each party's folder that is locked while its server runs."""
BUSY = "is running already in {}; stop that one first"


def superlink() -> NoReturn:
    _main("warmfed-superlink", _superlink)


def supernode() -> NoReturn:
    _main("warmfed-supernode", _supernode)


def _main(name: str, run: Callable[[Path], None]) -> NoReturn:
    os.umask(0o077)  # what Flower writes is this user's alone
    try:
        if len(sys.argv) != 2 or not Path(sys.argv[1]).is_dir():
            raise InputError(f"usage: {name} FOLDER, a folder that `warmfed deploy init` has made")
        run(Path(sys.argv[1]).resolve())
    except InputError as error:
        print(f"{name}: {error}", file=sys.stderr, flush=True)
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
            f"warmfed's app here has SHA-256 {here[:12]}…, {project.app[:12] or 'none'}… was agreed; install the versions "
            "that project.json names"
        )

    def refuse(digest: str) -> None:
        from .site import read_site, refused  # only then: torch takes memory that a waiting process does not need

        reason = f"refused an app with SHA-256 {digest[:12]}…: this site runs warmfed's alone ({project.app[:12]}…)"
        flower.report(reason)
        refused(read_site(folder), "app", reason, digest)

    listener = Listener("127.0.0.1", 0)  # held from the choice of the port on, so that no other program gets it
    words = [
        *("--host", "127.0.0.1", "--port", str(listener.getsockname()[1])),
        *("--superlink", project.address, "--root-certificates", str(folder / "ca.crt")),
        *("--auth-supernode-private-key", str(folder / SITE)),
        *("--node-config", f"site-folder={json.dumps(str(folder))}"),
    ]
    with file_lock(folder / SITE, f"the SuperNode {BUSY.format(folder)}"):
        flower.supernode(words, lambda app: Guard(app, listener=listener), SERVED, listener, project.app, refuse)
