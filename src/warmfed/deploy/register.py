"""Let the sites whose public keys lie in a server's `nodes/` connect."""

import time
from collections.abc import Iterator
from pathlib import Path

from ..transports.flower_processes import Nodes
from ..utils.errors import InputError
from . import keys

PATIENCE, PAUSE = 60.0, 1.0
"""Seconds to wait for the SuperLink in all, and between two attempts."""


def register(folder: Path, superlink: str = "here") -> Iterator[str]:
    """Register the public keys of `folder`/nodes at a SuperLink; yield a line for each site.

    A file taken out of nodes/ keeps its site out by itself: the server's guard reads the folder at each request.

    Raises:
        InputError: no SuperLink answers, it refuses, or a key was withdrawn from it, which is for ever.
    """
    wanted = keys.registered(folder / "nodes")
    end, nodes = time.monotonic() + PATIENCE, Nodes(superlink)
    while True:
        try:
            known = {keys.openssh(key): (name, status) for key, name, _, status in nodes.all()}
            break
        except ConnectionError as error:
            if time.monotonic() > end:
                raise InputError(f"no SuperLink answers ({error}); start it: ./start.sh") from error
            time.sleep(PAUSE)
    withdrawn = [name for key, name in wanted.items() if known.get(key, ("", ""))[1] == "unregistered"]
    for key, name in wanted.items():
        if name in withdrawn:
            continue
        if key not in known:
            nodes.register(keys.pem(key), name)
        yield f"site {name} may connect"
    if withdrawn:
        raise InputError(
            f"the key of site {', '.join(withdrawn)} was withdrawn, and Flower never lets a withdrawn key in again; "
            "move the site's folder away and make it a new one: warmfed deploy add-site"
        )
