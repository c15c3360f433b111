"""Flower app of a site; `site-folder` in the node's configuration is the folder of the site.

Flower starts a process for each message, so each import costs time for each message. Import only what an answer needs.
"""

import gc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..utils.errors import InputError


def _folder(node: Mapping[str, Any]) -> Path:
    folder = str(node.get("site-folder", ""))
    if not folder:
        raise InputError(
            "the node's configuration lacks site-folder; start the SuperNode with --node-config 'site-folder=\"…\"'"
        )
    return Path(folder)


def _app() -> Any:
    gc.set_threshold(50_000)  # imported objects stay alive; collecting garbage among them takes a sixth of the time
    from ..algorithms import ALGORITHMS
    from ..config import resolve
    from ..transports import flower
    from .site import answer

    # every stage of a request is one of these; some depend on an algorithm's settings
    presets = (resolve({"algorithm": {"name": name}}).algorithm for name in ALGORITHMS)
    stages = (stage.name for algorithm in presets for stage in algorithm.stages() if stage.client is not None)
    return flower.client_app(stages, lambda node, request_bytes: answer(_folder(node), request_bytes))


app = _app()
