"""The Flower app of a site: it answers for the site whose folder the node's configuration names by `site-folder`.

Flower starts a process for each message, so whatever is imported for an answer is paid for each time: no more than it needs.
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
            "the node's configuration has no site-folder; start the SuperNode with --node-config 'site-folder=\"…\"'"
        )
    return Path(folder)


def _app() -> Any:
    gc.set_threshold(50_000)  # what is imported is there to stay: to look for garbage in it takes a sixth of the time
    from ..algorithms import ALGORITHMS
    from ..config import resolve
    from ..transports import flower
    from .site import answer

    # every stage that a site may be asked for is one of theirs: some depend on an algorithm's settings
    presets = (resolve({"algorithm": {"name": name}}).algorithm for name in ALGORITHMS)
    stages = (stage.name for algorithm in presets for stage in algorithm.stages() if stage.client is not None)
    return flower.client_app(stages, lambda node, request_bytes: answer(_folder(node), request_bytes))


app = _app()
