"""A run on this machine or a cluster whose sites are the nodes of Flower's simulation, on Ray: `--transport flower-simulation`.

Everything but the way to the sites is as in a run in process: the same data, run folder, memories of the sites and bytes.
"""

import tomllib
from collections import abc
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from ..config import Config, build
from ..core import Generator, Round, ServerState
from ..core.messages import decode, encode
from ..run import run
from ..runs.execute import HERE, Place, Watcher, memories_folder, proceed, server_side
from ..runs.prepare import Ready, prepare
from ..transports import flower
from ..transports.client import Worker
from ..transports.client_state import Memories
from ..transports.protocol import Request
from ..transports.remote import Remote
from .site import answered, perform


@dataclass
class OnRay(Place):
    """The sites are nodes of a simulation; their images and memories are where those of a run in process are."""

    post: flower.Nodes

    def prepare(self, config: Config) -> Ready:
        return HERE.prepare(config)

    def rounds(
        self, ready: Ready, folder: Path, start: tuple[int, ServerState] | None, generator: Generator | None, watcher: Watcher
    ) -> abc.Generator[Round, None, None]:
        config = ready.config
        transport = Remote(self.post, tuple(sorted(ready.images.sites)), "", config.toml(), config.border)
        images = ready.images
        central = server_side(ready.task, transport, images.prompts, generator, config.device, folder, watcher, images.rows)
        yield from run(
            config.method, central, transport, config.seed, start=start, evaluate=config.evaluate, border=config.border
        )

    def finish(self, ready: Ready, folder: Path, server: ServerState) -> tuple[dict[str, str], float | None]:
        return HERE.finish(ready, folder, server)


def simulate_on_ray(config: Config, folder: Path, watcher: Watcher) -> dict[str, Any]:
    """Run a configuration into `folder`, or finish its run that the folder holds; returns the summary.

    On a cluster ($RAY_ADDRESS) every machine must see the folder and the data under the same absolute paths.

    Raises:
        InputError: Ray is not installed, or what `execute` raises.
    """
    found: list[dict[str, Any]] = []

    def serve(post: flower.Nodes) -> None:
        found.append(proceed(config, folder, watcher, OnRay(post)))

    stages = {stage.name for stage in config.algorithm.stages() if stage.client is not None}
    app = flower.client_app(stages, partial(_answer, memories_folder(folder.absolute())))
    flower.simulate(serve, app, len(HERE.prepare(config).images.sites), config.workers, config.device == "cuda")
    return found[0]


def _answer(memories: Path, node: Mapping[str, Any], letter: bytes) -> bytes:
    asked = decode(letter, Request, "the request")
    return encode(answered(asked, asked.site, lambda: perform(asked, _workers(asked.config)[asked.site], Memories(memories))))


@lru_cache(maxsize=1)
def _workers(config: str) -> dict[str, Worker]:
    """The workers of a configuration; one of Ray's processes answers for many sites, and loads the data once."""
    return prepare(build(tomllib.loads(config)), weights=False).workers()
