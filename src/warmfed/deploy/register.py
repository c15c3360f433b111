"""Registers the sites whose public keys are in a server's `nodes/`."""

import time
from collections.abc import Iterator
from pathlib import Path

from ..transports.flower_processes import Nodes
from ..utils.errors import InputError
from . import keys

PATIENCE, PAUSE = 60.0, 1.0
"""Seconds to wait for the SuperLink in total, and between two attempts."""


def register(folder: Path, superlink: str = "here") -> Iterator[str]:
    """Register the public keys of `folder`/nodes at a SuperLink; yield a line for each site.

    If a file is removed from nodes/, its site is refused at once: the server's guard reads the folder at each request.

    Raises:
        InputError: No SuperLink answers, it refuses, or a key was withdrawn, which is permanent.
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
            f"the key of site {', '.join(withdrawn)} was withdrawn, and Flower never accepts a withdrawn key again; "
            "move the site's folder away and create a new one: warmfed deploy add-site"
        )
