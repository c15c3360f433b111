"""Starts Flower's SuperLink and SuperNode behind a guard, and restricts SuperNodes to warmfed's app.

Flower has no setting for this, so this module replaces names in Flower's modules before it starts. If a name is missing,
the start fails with one line (`_replace`). So an unsupported version of Flower never runs without the guard.
"""

import hashlib
import socket
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from importlib import import_module
from inspect import signature
from io import StringIO
from types import ModuleType, SimpleNamespace
from typing import Any

from flwr.cli.build import build_fab_from_files
from flwr.cli.flower_config import read_superlink_connection
from flwr.cli.utils import init_http_client_from_connection
from flwr.common import log
from flwr.common.constant import TIMESTAMP_HEADER
from flwr.proto.control_pb2 import ListNodesRequest, RegisterNodeRequest, UnregisterNodeRequest
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.protobuf.translation import PROTOBUF_REQUEST_TYPES

from ..utils.errors import InputError
from .flower_project import FILES

PATHS = tuple(sorted(path for _, path in PROTOBUF_REQUEST_TYPES))
"""Every path of Flower's interfaces."""
FLEET = frozenset(path for path in PATHS if path.startswith("/v1/fleet/"))
"""Paths that a SuperNode calls."""
KEY, SIGNATURE, SIGNED = (
    header.lower().encode() for header in (FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER, TIMESTAMP_HEADER)
)
"""Headers of a request to Fleet: the SuperNode's public key, its signature, and the signed time stamp."""
Wrap = Callable[[Any], Any]


def app_sha256() -> str:
    """Return the SHA-256 of warmfed's app as `flwr build` bundles it; sites run no other app."""
    bundle, _ = build_fab_from_files({name: text.encode() for name, text in FILES.items()})
    return hashlib.sha256(bundle).hexdigest()


def superlink(words: Sequence[str], guarded: Wrap, settings: Mapping[str, Any], listener: socket.socket) -> None:
    """Run Flower's SuperLink until it ends.

    Args:
        words: command-line arguments of `flower-superlink`.
        guarded: guarded(application) returns the ASGI application that is served instead.
        settings: further settings of uvicorn.
        listener: listening socket.
    """
    cli = import_module("flwr.superlink.cli.flower_superlink")
    uvicorn = _attribute(cli, "uvicorn")

    def run(app: Any, **options: Any) -> None:
        uvicorn.Server(uvicorn.Config(guarded(app), **_known(uvicorn, options), **settings)).run(sockets=[listener])

    _replace(cli, "uvicorn", SimpleNamespace(run=run))
    sys.argv = ["flower-superlink", *words]
    cli.flower_superlink()


def supernode(
    words: Sequence[str],
    guarded: Wrap,
    settings: Mapping[str, Any],
    listener: socket.socket,
    agreed: str,
    refused: Callable[[str], None],
) -> None:
    """Run Flower's SuperNode until it ends.

    Args:
        words: command-line arguments of `flower-supernode`.
        guarded, settings, listener: as in `superlink`, for the server that the site's own processes call.
        agreed: SHA-256 of the only app that runs here.
        refused: refused(sha256) is called if the server sends another app, which is not run.
    """
    cli, node = import_module("flwr.supernode.cli.flower_supernode"), import_module("flwr.supernode.start_client_internal")
    uvicorn, start, connection = (
        _attribute(cli, "uvicorn"),
        _attribute(cli, "start_client_internal"),
        _attribute(node, "http_request_response"),
    )

    class Held(uvicorn.Server):  # type: ignore[name-defined,misc]
        def run(self, sockets: list[socket.socket] | None = None) -> None:
            super().run(sockets=[listener])

    def config(app: Any, **options: Any) -> Any:
        return uvicorn.Config(guarded(app), **_known(uvicorn, options), **settings)

    def verified(fab: Any, trusted: Mapping[str, str]) -> bool:
        found = hashlib.sha256(fab.content).hexdigest()
        if found == fab.hash_str == agreed:
            return True
        refused(found)
        return False

    @contextmanager
    def connected(*arguments: Any, **options: Any) -> Iterator[tuple[Any, ...]]:
        with connection(*arguments, **options) as (number, receive, send, get_run, get_fab, *rest):

            def get_marked(*asked: Any) -> Any:
                fab = get_fab(*asked)
                fab.verifications = {"valid_license": "warmfed"}  # Flower refuses apps that its hub has not signed
                return fab

            yield number, receive, send, get_run, get_marked, *rest

    _replace(cli, "uvicorn", SimpleNamespace(Config=config, Server=Held))
    _replace(cli, "start_client_internal", lambda **given: start(**{**given, "trusted_entities": {"warmfed": agreed}}))
    _replace(node, "http_request_response", connected)
    _replace(node, "_verify_fab", verified)
    sys.argv = ["flower-supernode", *words]
    cli.flower_supernode()


def _known(uvicorn: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of `uvicorn.run` that `uvicorn.Config` accepts."""
    return {name: value for name, value in options.items() if name in signature(uvicorn.Config).parameters}


def _attribute(module: ModuleType, name: str) -> Any:
    if name not in vars(module):
        raise InputError(f"this version of Flower has no {module.__name__}.{name}; install the version in project.json")
    return getattr(module, name)


def _replace(module: ModuleType, name: str, value: Any) -> None:
    _attribute(module, name)
    setattr(module, name, value)


class Nodes:
    """SuperNodes registered at a SuperLink, by public key in PEM; Flower keeps withdrawn ones, too.

    Args:
        superlink: name of a connection in Flower's config.toml ($FLWR_HOME).

    Raises:
        ConnectionError: The SuperLink does not answer.
    """

    def __init__(self, superlink: str) -> None:
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):  # Flower prints the name of the connection
            self._client = init_http_client_from_connection(read_superlink_connection(superlink))

    def all(self) -> list[tuple[bytes, str, int, str]]:
        """Return (key, name, number, status) of each; the status is registered, online, offline or unregistered."""
        found = self._asked(self._client.ListNodes, ListNodesRequest()).nodes_info
        return [(bytes(node.public_key), str(node.name), int(node.node_id), str(node.status)) for node in found]

    def register(self, key: bytes, name: str) -> None:
        """Register a key; do nothing if it is registered."""
        self._asked(self._client.RegisterNode, RegisterNodeRequest(public_key=key, name=name), known="already in use")

    def withdraw(self, number: int) -> None:
        self._asked(self._client.UnregisterNode, UnregisterNodeRequest(node_id=number))

    def _asked(self, call: Callable[[Any], Any], request: Any, known: str = "") -> Any:
        import httpx

        try:
            return call(request)
        except httpx.HTTPStatusError as error:
            said = " ".join(error.response.text.split())[:200]
            if known and known in said:
                return None
            raise InputError(
                f"the SuperLink refuses the request ({error.response.status_code}: {said}); run the command as its user"
            ) from error
        except httpx.TransportError as error:
            raise ConnectionError(str(error)) from error


def report(line: str) -> None:
    """Write a line to Flower's log."""
    from logging import ERROR

    log(ERROR, "%s", line)
