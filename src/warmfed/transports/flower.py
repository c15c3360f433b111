"""Channel over Flower: client app, server app and simulation.

A message is sent as one record with the bytes of `messages.encode`, and one record with its kind, size and digest. So the
wire, the disk and the ledger share one codec and one validation. Flower and NumPy do not serialize tensors, and bfloat16
needs no conversion.
"""

import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from logging import ERROR, INFO, WARNING
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common import log
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid, ServerApp

from ..core import Failure
from ..core.messages import KINDS, digest, kind_of
from ..utils.errors import InputError
from .protocol import FINISH, HELLO, REFUSED

_BYTES, _SEAL, _STYPE = "message", "seal", "warmfed.message"
_PASSING = {
    ErrorCode.NODE_UNAVAILABLE,
    ErrorCode.REPLY_MESSAGE_UNAVAILABLE,
    ErrorCode.MESSAGE_UNAVAILABLE,
}
"""Transport errors: the request is retried."""


Node = tuple[int, str]
"""A node's id and its start time: a restarted node has lost its requests."""


def pack(data: bytes) -> RecordDict:
    """Return the records of a message's bytes."""
    array = Array(dtype="uint8", shape=(len(data),), stype=_STYPE, data=data)
    seal = ConfigRecord({"kind": kind_of(data), "bytes": len(data), "sha256": digest(data)})
    return RecordDict({_BYTES: ArrayRecord({_BYTES: array}), _SEAL: seal})


def unpack(records: RecordDict) -> bytes:
    """Return the message's bytes; raise `InputError` if they do not match the declared kind, size or digest."""
    array, seal = records.get(_BYTES), records.get(_SEAL)
    if set(records) != {_BYTES, _SEAL} or not isinstance(array, ArrayRecord) or not isinstance(seal, ConfigRecord):
        raise InputError(f"expected a message record and its seal, got {sorted(records)}")
    if set(array) != {_BYTES} or set(seal) != {"kind", "bytes", "sha256"}:
        raise InputError(f"expected one message with kind, bytes and sha256, got {sorted(array)}, {sorted(seal)}")
    content = array[_BYTES]
    data = content.data
    if content.stype != _STYPE or content.dtype != "uint8" or content.shape not in ((len(data),), [len(data)]):
        raise InputError(f"expected {len(data)} bytes of type {_STYPE}, got {content.stype} {content.shape}")
    if seal["bytes"] != len(data) or seal["sha256"] != digest(data):
        raise InputError("the bytes do not match the declared size or SHA-256")
    if seal["kind"] not in KINDS or kind_of(data) != seal["kind"]:
        raise InputError(f"the kind {seal['kind']!r} is not declared here, or the bytes are of another kind")
    found: bytes = data
    return found


def client_app(stages: Iterable[str], answer: Callable[[Mapping[str, Any], bytes], bytes]) -> ClientApp:
    """Return the sites' app: one action for each stage, and the actions hello, evaluate, finish and refused.

    Args:
        stages: names of the stages.
        answer: answer(node configuration, request bytes) returns the bytes of the answer.
    """
    app = ClientApp()

    def handle(message: Message, context: Context) -> Message:
        return Message(pack(answer(context.node_config, unpack(message.content))), reply_to=message)

    for stage in sorted(set(stages)):
        app.train(stage)(handle)
    app.evaluate()(handle)
    for what in (HELLO, FINISH, REFUSED):
        app.query(what)(handle)
    return app


def server_app(serve: Callable[[Callable[["Handshake"], "FlowerChannel"], Mapping[str, Any]], None]) -> ServerApp:
    """Return the app of the server; serve(connect, run configuration) does the run over connect(handshake)."""
    app = ServerApp()

    @app.main()  # type: ignore[untyped-decorator]
    def main(grid: Grid, context: Context) -> None:
        serve(partial(FlowerChannel, grid), context.run_config)

    return app


@dataclass(frozen=True)
class Handshake:
    """How a server finds out which sites its nodes are, and admits them to a run."""

    name_of: Callable[[bytes], str | None]
    """name_of(public key in PEM) is the name of the site whose key it is; None: nobody's, and the node is sent nothing."""
    introduce: Callable[[str, bytes], None]
    """introduce(site, its answer to hello) raises `InputError` if the site does not take part."""
    hello: bytes
    """The request that a new node is sent."""
    refusal: Callable[[str], bytes]
    """refusal(reason) is the request that names the reason why a node does not take part."""


@dataclass
class FlowerChannel:
    """A `Channel` over Flower's Grid. A site is identified by the public key of its node, never by Flower's node id."""

    grid: Grid
    handshake: Handshake
    pause: float = 0.5
    """Seconds between two polls for answers."""
    look: float = 3.0
    """Seconds between two polls for nodes."""
    tell_every: float = 15.0
    """Seconds between two log lines about sites that the run waits for."""
    _names: dict["Node", str | None] = field(default_factory=dict, init=False)
    _asked: dict[str, "Node"] = field(default_factory=dict, init=False)
    _proved: dict["Node", str] = field(default_factory=dict, init=False)
    _why: dict[str, str] = field(default_factory=dict, init=False)

    def present(self, names: Iterable[str], needed: int, seconds: float) -> tuple[str, ...]:
        """Wait for sites and return the names of the connected ones, sorted.

        Args:
            names: sites to wait for; empty: all nodes that are connected.
            needed: number of sites that suffices when the time is over; without `names`, at any time.
            seconds: time limit.

        Raises:
            InputError: Fewer than `needed` sites are connected within the time limit.
        """
        end, names = time.monotonic() + seconds, set(names)
        told = time.monotonic()
        while True:
            found = self._sites()
            if found.keys() >= names if names else len(found) >= max(needed, 1) and not self._asked:
                return tuple(sorted(found))
            missing = sorted(names - found.keys())
            if time.monotonic() >= end:
                if len(found) >= max(needed, 1):
                    return tuple(sorted(found))
                lacking = ", ".join(map(self._reason, missing or sorted(self._why))) or "none is known"
                raise InputError(
                    f"{len(found)} sites have connected within {seconds:g} s ({', '.join(sorted(found)) or 'none'}), "
                    f"{max(needed, 1)} are needed; missing: {lacking}; start their SuperNodes, or lower server.min_sites"
                )
            if time.monotonic() >= told + self.tell_every:
                told = time.monotonic()
                log(
                    INFO,
                    "waiting for %s; %d sites are connected",
                    ", ".join(map(self._reason, missing)) or "more sites",
                    len(found),
                )
            time.sleep(self.pause)

    def _reason(self, site: str) -> str:
        return f"{site} ({self._why[site]})" if site in self._why else site

    def ask(self, action: str, requests: Mapping[str, bytes], seconds: float) -> Iterator[tuple[str, bytes | Failure]]:
        end, looked = time.monotonic() + seconds, float("-inf")
        todo, why = dict(requests), dict.fromkeys(requests, "it is not connected")
        sent: dict[str, Node] = {}
        pending: dict[str, str] = {}  # site of each message
        while todo and time.monotonic() < end:
            if time.monotonic() >= looked + self.look:
                looked, here = time.monotonic(), self._sites()
                for site in [s for s in todo if s in self._why and s not in here]:
                    del todo[site]
                    yield site, Failure(self._why[site])
                for site in [s for s in todo if s in here and sent.get(s) != here[s]]:
                    node = here[site][0]
                    ids = self._push(Message(pack(todo[site]), node, action, ttl=max(end - time.monotonic(), 1.0) + 60))
                    if ids is not None:
                        pending[ids], sent[site], why[site] = site, here[site], "it has not answered in time"
            for reply in self._pull(pending):
                site = pending.pop(reply.metadata.reply_to_message_id)
                if site not in todo:
                    continue
                answer = _content(reply)
                if answer is None:
                    sent.pop(site, None)
                    why[site] = f"its answer was lost in transit ({reply.error.reason})"
                    continue
                del todo[site]
                yield site, answer
            if todo:
                time.sleep(self.pause)
        for site in todo:
            yield site, Failure(f"{why[site]} ({seconds:g} s)")

    def _sites(self) -> dict[str, "Node"]:
        """Return the connected sites and their nodes.

        A new node with a site's key is sent hello. A node with any other key is sent nothing.
        """
        here = {(node.node_id, node.last_activated_at): bytes(node.public_key) for node in self.grid.get_nodes()}
        for node in here.keys() - self._names.keys() - self._proved.keys():
            name = self.handshake.name_of(here[node])
            if name is None:
                self._names[node] = None
                log(WARNING, "node %s is refused: its key is not registered", node[0])
            else:
                self._proved[node] = name
        self._asked = {message: node for message, node in self._asked.items() if node in here}
        for reply in self._pull(self._asked):
            node, answer = self._asked.pop(reply.metadata.reply_to_message_id), _content(reply)
            if answer is not None:  # else it is sent hello again
                self._names[node] = self._named(node, answer)
        for node in sorted(here.keys() - self._names.keys() - set(self._asked.values())):
            asked = self._push(Message(pack(self.handshake.hello), node[0], f"query.{HELLO}", ttl=600))
            if asked is not None:
                self._asked[asked] = node
        sites: dict[str, Node] = {}
        for node in sorted(here):
            name = self._names.get(node)
            if name is not None and name in sites:
                raise InputError(f"two nodes are site {name!r}; stop one of them, or give it its own key")
            if name is not None:
                sites[name] = node
        return sites

    def _named(self, node: "Node", answer: bytes | Failure) -> str | None:
        """Return the name of a node's site, or None if it is refused; both logs then give the reason."""
        proved = self._proved[node]
        try:
            if isinstance(answer, Failure):
                raise InputError(answer.reason)
            self.handshake.introduce(proved, answer)
        except InputError as error:
            log(WARNING, "site %s (node %s) is refused: %s", proved, node[0], error)
            self._why[proved] = f"refused: {error}"
            if not isinstance(answer, Failure):
                self._push(Message(pack(self.handshake.refusal(str(error))), node[0], f"query.{REFUSED}", ttl=600))
            return None
        log(INFO, "node %s is site %s", node[0], proved)
        self._why.pop(proved, None)
        return proved

    def tell(self, reason: str, seconds: float = 30.0) -> None:
        """Notify all connected sites that the run does not start, with the reason; wait for their answers."""
        request_bytes, end = self.handshake.refusal(reason), time.monotonic() + seconds
        nodes = [node for (node, _), name in self._names.items() if name is not None]
        sent = [self._push(Message(pack(request_bytes), node, f"query.{REFUSED}", ttl=600)) for node in nodes]
        pending = dict.fromkeys(filter(None, sent))
        while pending and time.monotonic() < end:
            for reply in self._pull(pending):
                del pending[reply.metadata.reply_to_message_id]
            time.sleep(self.pause)

    def _push(self, message: Message) -> str | None:
        return next(iter(self.grid.push_messages([message])), None)

    def _pull(self, pending: Mapping[str, Any]) -> list[Message]:
        replies = self.grid.pull_messages(list(pending)) if pending else []
        return [reply for reply in replies if reply.metadata.reply_to_message_id in pending]


@dataclass
class Nodes:
    """A `Channel` over the nodes of Flower's simulation. Each node can do the work of any site; the request names the site."""

    grid: Grid
    pause: float = 0.02
    """Seconds between two polls for answers."""
    stopped: bool = False

    def ask(self, action: str, requests: Mapping[str, bytes], seconds: float) -> Iterator[tuple[str, bytes | Failure]]:
        end = time.monotonic() + seconds
        nodes = sorted(self.grid.get_node_ids())
        messages = [Message(pack(data), nodes[i % len(nodes)], action) for i, data in enumerate(requests.values())]
        pending = dict(zip(self.grid.push_messages(messages), requests, strict=True))
        while pending and time.monotonic() < end and not self.stopped:
            for reply in self.grid.pull_messages(list(pending)):
                answer = _content(reply)
                yield (
                    pending.pop(reply.metadata.reply_to_message_id),
                    Failure(f"it was lost ({_first(reply.error)})") if answer is None else answer,
                )
            time.sleep(self.pause)
        for site in pending.values():
            yield (
                site,
                Failure("the simulation was stopped" if self.stopped else f"it has not answered in time ({seconds:g} s)"),
            )


def simulate(serve: Callable[[Nodes], None], app: ClientApp, nodes: int, workers: int, cards: bool) -> None:
    """Run serve(channel) with Flower's simulation of `nodes` nodes, on Ray: on this machine, or on the cluster $RAY_ADDRESS.

    Args:
        serve: function of the server.
        app: app of the sites.
        nodes: number of nodes.
        workers: number of worker processes on this machine; a cluster has as many as it has CPUs or GPUs.
        cards: whether each process needs its own GPU.

    Raises:
        InputError: Ray is not installed, or serve raises it.
    """
    if find_spec("ray") is None:
        raise InputError("Flower's simulation needs Ray, which is not installed; pip install 'warmfed[simulation]'")
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "FLWR_TELEMETRY_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    logging.getLogger("flwr").setLevel(ERROR)
    from flwr.simulation import run_simulation

    channels: list[Nodes] = []
    server = ServerApp()

    @server.main()  # type: ignore[untyped-decorator]
    def main(grid: Grid, context: Context) -> None:
        channels.append(Nodes(grid))
        serve(channels[0])

    begin = {"log_to_driver": False, "logging_level": ERROR} | ({} if "RAY_ADDRESS" in os.environ else {"num_cpus": workers})
    resources = {"num_cpus": 1, "num_gpus": 1.0 if cards else 0.0}
    try:
        run_simulation(server, app, nodes, backend_config={"init_args": begin, "client_resources": resources})
    finally:
        for channel in channels:
            channel.stopped = True


def _content(reply: Message) -> bytes | Failure | None:
    """Return the bytes of a reply, or a `Failure`; None if it was lost in transit."""
    if reply.has_error():
        if reply.error.code in _PASSING:
            return None
        if reply.error.code == ErrorCode.INVALID_FAB:
            return Failure("it has another version of warmfed's app; install the versions in project.json")
        log(WARNING, "a site's app has failed: %s", reply.error.reason)
        return Failure(f"its app has failed: {_first(reply.error)}")
    try:
        return unpack(reply.content)
    except InputError as error:
        return Failure(f"its answer is not valid: {error}")


def _first(error: Error) -> str:
    return " ".join(str(error.reason or error.code).split())[:300]
