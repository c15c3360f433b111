"""Guard of Flower's HTTP servers: limits callers, request sizes and times.

Flower 1.42 serves three interfaces on one port: Fleet (the sites), Control (`flwr run`, `flwr supernode register`) and
Runtime (the worker processes). Only Fleet authenticates requests, after it has read the body. The guard decides before the
body is read:

* A process of the server's own user on the same machine may call every path; the operating system gives its user.
* A site with a registered public key may call Fleet, if it has signed the request's time stamp.
* Every caller may call the health check. All other requests are refused: 401 for Fleet, 403 for all other paths.
"""

import asyncio
import asyncio.sslproto
import ipaddress
import os
import socket
import struct
import sys
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from contextlib import suppress
from typing import Any

import psutil
from uvicorn.protocols.http.h11_impl import H11Protocol

from ..utils.errors import InputError

PATIENCE = 10.0
"""Time limit in seconds of a TLS handshake, and of the head of a request."""
PAUSE = 30.0
"""Time limit in seconds between two parts of a request's body."""
LARGEST = 64 * 2**20
"""Largest body of a request in bytes; Flower sends arrays in parts of 5 MiB."""
STRANGERS, ALL_STRANGERS = 24, 512
"""Most open connections without an accepted request: of one address, and of all."""
STRANGER = b"warmfed-stranger"
"""Header with which a caller waives the rights of the server's user; `warmfed deploy check` tests the guard with it."""
HEALTH = ("GET", "/health")

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]


class Guard:
    """ASGI application that forwards permitted requests and refuses all others.

    Args:
        app: the guarded application.
        fleet: the paths of Fleet; a site may POST to them.
        authentic: authentic(headers by lower-case name) returns whether a registered site has signed the request.
        own: own(client's address, server's address) returns whether the caller runs as the server's user.
        listener: socket that accepts the connections; it is notified of each accepted request.
    """

    def __init__(
        self,
        app: Application,
        fleet: frozenset[str] = frozenset(),
        authentic: Callable[[Mapping[bytes, bytes]], bool] = lambda headers: False,
        own: Callable[[tuple[str, int], tuple[str, int]], bool] | None = None,
        listener: "Listener | None" = None,
    ) -> None:
        self.app, self.fleet, self.authentic, self.own = app, fleet, authentic, own or of_this_user
        self.listener = listener

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] == "http" and self._own(scope):
            return await self._pass(scope, receive, send)
        if scope["type"] != "http":
            return await send({"type": "websocket.close", "code": 1008})
        headers, asked = dict(scope["headers"]), (scope["method"], scope["path"])
        if asked == HEALTH:
            return await self.app(scope, _timed(receive), send)
        if scope["path"] not in self.fleet or scope["method"] != "POST":
            return await _refuse(send, 403, b"only the server's own user may call this path")
        if not self.authentic(headers):
            return await _refuse(send, 401, b"this key is not registered, or the signature is not its own")
        length = headers.get(b"content-length", b"")
        if not length.isdigit():
            return await _refuse(send, 411, b"the request must have a content-length header")
        if len(length) > 12 or int(length) > LARGEST:
            return await _refuse(send, 413, b"the request is too large")
        return await self._pass(scope, _timed(receive), send)

    async def _pass(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.listener is not None:
            self.listener.prove(tuple(scope["client"]))
        await self.app(scope, receive, send)

    def _own(self, scope: Scope) -> bool:
        if any(name == STRANGER for name, _ in scope["headers"]) or not (scope["client"] and scope["server"]):
            return False
        return self.own(tuple(scope["client"]), tuple(scope["server"]))


async def _refuse(send: Send, status: int, reason: bytes) -> None:
    headers = [(b"content-type", b"text/plain"), (b"content-length", b"%d" % len(reason)), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": reason})


def _timed(receive: Receive) -> Receive:
    """Return `receive` with a time limit: a caller that pauses for `PAUSE` seconds within a body counts as disconnected."""
    more = True

    async def timed() -> MutableMapping[str, Any]:
        nonlocal more
        try:
            event = await (asyncio.wait_for(receive(), PAUSE) if more else receive())
        except TimeoutError:
            return {"type": "http.disconnect"}
        more = event.get("more_body", False)
        return event

    return timed


def of_this_user(client: tuple[str, int], server: tuple[str, int]) -> bool:
    """Return whether the client's end of a connection belongs to a process of this user on this machine.

    On Linux, the kernel's table of connections has the owner of each end. A caller on another machine has no entry.
    A closed end has no owner, so only established connections count.
    """
    if sys.platform != "linux":
        return _of_a_process(client, server)
    wanted, user = (_address(*client), _address(*server)), str(os.geteuid())
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with suppress(OSError), open(table, encoding="ascii") as file:
            for fields in (line.split() for line in file):
                # sl local_address rem_address st tx_queue:rx_queue tr:tm->when retrnsmt uid
                ours = len(fields) > 7 and fields[3] == "01" and fields[7] == user
                if ours and (_entry(fields[1]), _entry(fields[2])) == wanted:
                    return True
    return False


def _entry(text: str) -> tuple[str, int]:
    """Return address and port of an entry like 0100007F:1F40, in words of four bytes in the machine's byte order."""
    host, port = text.split(":")
    words = (int(host[i : i + 8], 16) for i in range(0, len(host), 8))
    packed = b"".join(struct.pack("=I", word) for word in words)
    return _address(str(ipaddress.ip_address(packed)), int(port, 16))


def _address(host: str, port: int) -> tuple[str, int]:
    """Return the canonical address and the port; an IPv4-mapped IPv6 address becomes the IPv4 address."""
    found = ipaddress.ip_address(host.partition("%")[0])
    mapped = found.ipv4_mapped if isinstance(found, ipaddress.IPv6Address) else None
    return str(mapped or found), port


def _of_a_process(client: tuple[str, int], server: tuple[str, int]) -> bool:
    """Return the same from the open connections of this user's processes; slower, for systems without such a table."""
    wanted, user = (_address(*client), _address(*server)), psutil.Process().username()
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.username() == user and any(
                c.raddr and (_address(*c.laddr), _address(*c.raddr)) == wanted for c in process.net_connections("tcp")
            ):
                return True
    return False


class Listener(socket.socket):
    """Listening socket that limits the connections without an accepted request.

    A connection above the limit is closed at once. A connection takes about 70 kB before its first byte.
    """

    def __init__(self, host: str, port: int) -> None:
        super().__init__(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
        self._unproved: dict[tuple[str, int], _Accepted] = {}
        try:
            self.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self.bind((host, port))
        except OSError as error:
            self.close()
            raise InputError(f"cannot listen on port {port} of {host}: {error.strerror}; end what uses it") from error

    def accept(self) -> tuple[socket.socket, Any]:
        while True:
            plain, address = super().accept()
            caller = tuple(address[:2])
            made = _Accepted(plain, lambda caller=caller: self._unproved.pop(caller, None))  # type: ignore[misc]
            same = sum(host == caller[0] for host, _ in self._unproved)
            if same >= STRANGERS or len(self._unproved) >= ALL_STRANGERS:
                made.close()
                continue
            self._unproved[caller] = made
            return made, address

    def prove(self, caller: tuple[str, int]) -> None:
        """Exclude a caller's connection from the limit, after an accepted request."""
        self._unproved.pop(caller, None)


class _Accepted(socket.socket):
    """Accepted connection with a callback on close."""

    def __init__(self, plain: socket.socket, closed: Callable[[], object]) -> None:
        super().__init__(plain.family, plain.type, plain.proto, fileno=plain.detach())
        self._closed = closed

    def close(self) -> None:
        self._closed()
        super().close()


class PatientProtocol(H11Protocol):
    """uvicorn's HTTP protocol with a time limit of `PATIENCE` seconds for the head of each request.

    uvicorn closes connections that are idle between two requests, but not those without any byte or with a partial head.
    """

    _ends: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._unwatch()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is None or self.cycle.response_complete:
            self._watch()
        else:
            self._unwatch()

    def _watch(self) -> None:
        if self._ends is None and not self.transport.is_closing():
            self._ends = self.loop.call_later(PATIENCE, self._end)

    def _unwatch(self) -> None:
        if self._ends is not None:
            self._ends.cancel()
            self._ends = None

    def _end(self) -> None:
        self._ends = None
        if self.cycle is None or self.cycle.response_complete:
            self.transport.abort()


class _Loop(asyncio.SelectorEventLoop):
    """asyncio's event loop with a time limit of `PATIENCE` seconds for TLS handshakes, instead of a minute."""

    async def create_server(self, *args: Any, **options: Any) -> Any:
        patience = {"ssl_handshake_timeout": PATIENCE} if options.get("ssl") else {}
        return await super().create_server(*args, **{**options, **patience})


def loop() -> asyncio.AbstractEventLoop:
    """Return the event loop of a guarded server; uvicorn calls it by name."""
    asyncio.sslproto.SSLProtocol.max_size = 16_384  # read buffer of each TLS connection in bytes; 262,144 by default
    return _Loop()


SERVED: Mapping[str, Any] = {
    "http": PatientProtocol,
    "ws": "none",
    "loop": f"{__name__}:loop",
    "proxy_headers": False,  # else a caller could forge its address
    "server_header": False,
    "h11_max_incomplete_event_size": 32_768,
    "backlog": 512,
}
"""Settings of uvicorn for a guarded server."""
