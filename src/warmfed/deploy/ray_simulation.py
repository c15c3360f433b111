"""Runs whose sites are nodes of Flower's simulation, on Ray, on this machine or a cluster: `--transport flower-simulation`.

Only the channel differs from a run in process: data, run folder, client states and results are the same.
"""

import tomllib
from collections import abc
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from ..config import Config, build
from ..core import Round, ServerState
from ..core.messages import decode, encode
from ..runs.backend import LOCAL, Backend, Execution, client_states_folder
from ..runs.execute import proceed
from ..runs.prepare import PreparedRun, prepare
from ..runs.progress import RunListener
from ..transports import flower
from ..transports.client import Client
from ..transports.client_state import ClientStates
from ..transports.protocol import Request
from ..transports.remote import Remote
from .site import answered, perform


@dataclass
class RayBackend(Backend):
    """Backend of simulated nodes; images and client states are stored as for a run in process."""

    channel: flower.Nodes

    def prepare(self, config: Config) -> PreparedRun:
        return LOCAL.prepare(config)

    def rounds(self, execution: Execution) -> abc.Generator[Round, None, None]:
        config, images = execution.prepared.config, execution.prepared.images
        transport = Remote(self.channel, tuple(sorted(images.sites)), "", config.toml(), config.server)
        yield from execution.over(transport, images.rows)

    def finish(self, prepared: PreparedRun, folder: Path, server: ServerState) -> tuple[dict[str, str], float | None]:
        return LOCAL.finish(prepared, folder, server)


def simulate_on_ray(config: Config, folder: Path, listener: RunListener) -> dict[str, Any]:
    """Run a configuration into `folder`, or finish its run there; return the summary.

    On a cluster ($RAY_ADDRESS), the folder and the data must have the same absolute paths on every machine.

    Raises:
        InputError: Ray is not installed, or `execute` raises it.
    """
    found: list[dict[str, Any]] = []

    def serve(channel: flower.Nodes) -> None:
        found.append(proceed(config, folder, listener, RayBackend(channel)))

    stages = {stage.name for stage in config.algorithm.stages() if stage.client is not None}
    app = flower.client_app(stages, partial(_answer, client_states_folder(folder.absolute())))
    flower.simulate(serve, app, len(LOCAL.prepare(config).images.sites), config.workers, config.device == "cuda")
    return found[0]


def _answer(client_states: Path, node: Mapping[str, Any], request_bytes: bytes) -> bytes:
    asked = decode(request_bytes, Request, "the request")
    return encode(
        answered(asked, asked.site, lambda: perform(asked, _workers(asked.config)[asked.site], ClientStates(client_states)))
    )


@lru_cache(maxsize=1)
def _workers(config: str) -> dict[str, Client]:
    """Return the clients of a configuration. A Ray process serves many sites, so the cache loads the data once."""
    return prepare(build(tomllib.loads(config)), weights=False).workers()
