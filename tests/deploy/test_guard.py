"""The guard: which requests it forwards, and its timeouts."""

import http.client
import os
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from typing import Any

import pytest

pytest.importorskip("uvicorn")
import uvicorn

from warmfed.deploy import guard
from warmfed.deploy.guard import SERVED, STRANGER, STRANGERS, Guard, Listener, of_this_user
from warmfed.utils.errors import InputError

FLEET = "/v1/fleet/pull-messages"
ASK = r"""
exec 3<>"/dev/tcp/127.0.0.1/$0"
printf '%s %s HTTP/1.1\r\nhost: x\r\nx-forwarded-for: 127.0.0.1\r\n\r\n' "$1" "$2" >&3
head -1 <&3
"""
"""A request by nothing but bash, which each user of the machine may start."""


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """The application behind the guard; it replies with the number of bytes received."""
    if scope["type"] == "lifespan":
        while True:
            event = await receive()
            await send({"type": f"{event['type']}.complete"})
            if event["type"] == "lifespan.shutdown":
                return
    size, more = 0, True
    while more:
        event = await receive()
        if event["type"] == "http.disconnect":
            return
        size, more = size + len(event.get("body", b"")), event.get("more_body", False)
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": str(size).encode()})


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """A guarded server in a thread, with the accepted key "good" and a timeout of half a second."""
    monkeypatch.setattr(guard, "PATIENCE", 0.5)
    monkeypatch.setattr(guard, "PAUSE", 0.5)

    def authentic(headers: Mapping[bytes, bytes]) -> bool:
        return headers.get(b"key") == b"good"

    held = Listener("127.0.0.1", 0)
    guarded = Guard(echo, frozenset({FLEET}), authentic, listener=held)
    server = uvicorn.Server(uvicorn.Config(guarded, log_level="error", **SERVED))
    thread = threading.Thread(target=server.run, args=([held],), daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield held.getsockname()[1]
    server.should_exit = True
    thread.join()


def asked(port: int, method: str, path: str, body: bytes | None = None, **headers: str) -> int:
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=10)) as connection:
        connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
        return connection.getresponse().status


def stranger(port: int, method: str, path: str, body: bytes | None = None, **headers: str) -> int:
    return asked(port, method, path, body, **{STRANGER.decode(): "1"}, **headers)


def test_the_servers_own_user_may_call_everything(port: int) -> None:
    for method, path in (("POST", "/v1/control/start-run"), ("GET", "/docs"), ("POST", FLEET), ("GET", "/health")):
        assert asked(port, method, path) == 200


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/health", 200),
        ("POST", "/health", 403),
        ("POST", "/v1/control/start-run", 403),
        ("POST", "/v1/runtime/acquire-task", 403),
        ("GET", "/docs", 403),
        ("GET", "/openapi.json", 403),
        ("GET", FLEET, 403),
        ("POST", FLEET, 401),
        ("POST", f"{FLEET}/", 403),
        ("POST", "/v1/fleet/../control/start-run", 403),
        ("POST", "/v1/fleet/%2e%2e/control/start-run", 403),
        ("POST", f"/{FLEET}", 403),
    ],
)
def test_a_stranger_may_ask_for_health_alone(method: str, path: str, status: int, port: int) -> None:
    assert stranger(port, method, path) == status


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="only root can become another user")
def test_another_user_of_the_machine_is_a_stranger(port: int) -> None:
    for method, path, status in (("POST", "/v1/runtime/acquire-task", 403), ("POST", FLEET, 401), ("GET", "/health", 200)):
        words = ["bash", "-c", ASK, str(port), method, path]
        found = subprocess.run(words, capture_output=True, text=True, user=65534, group=65534, cwd="/", check=True)
        assert found.stdout.split()[1] == str(status)


def test_a_site_may_call_fleet_alone(port: int) -> None:
    assert stranger(port, "POST", FLEET, b"x" * 100_000, key="good") == 200
    assert stranger(port, "POST", FLEET, key="bad") == 401
    assert stranger(port, "POST", "/v1/control/start-run", key="good") == 403


def test_a_request_says_its_length_and_is_not_too_large(port: int) -> None:
    for length in (str(guard.LARGEST + 1), "9" * 500, "-1", "x"):
        with closing(socket.create_connection(("127.0.0.1", port), 10)) as raw:
            head = (
                f"POST {FLEET} HTTP/1.1\r\nhost: x\r\n{STRANGER.decode()}: 1\r\nkey: good\r\ncontent-length: {length}\r\n\r\n"
            )
            raw.sendall(head.encode())
            assert raw.recv(100).split()[1] in (b"400", b"411", b"413")
    with closing(socket.create_connection(("127.0.0.1", port), 10)) as raw:
        head = f"POST {FLEET} HTTP/1.1\r\nhost: x\r\n{STRANGER.decode()}: 1\r\nkey: good\r\ntransfer-encoding: chunked\r\n\r\n"
        raw.sendall(head.encode())
        assert raw.recv(100).split()[1] == b"411"


@pytest.mark.parametrize(
    "begin",
    [
        "",
        "POST /v1",
        f"POST {FLEET} HTTP/1.1\r\nhost: x\r\n",
        f"GET /health HTTP/1.1\r\nhost: x\r\n{STRANGER.decode()}: 1\r\n\r\nGET /heal",
        f"POST {FLEET} HTTP/1.1\r\nhost: x\r\n{STRANGER.decode()}: 1\r\nkey: good\r\ncontent-length: 10\r\n\r\nabc",
    ],
)
def test_a_connection_that_stays_silent_is_ended(begin: str, port: int) -> None:
    with closing(socket.create_connection(("127.0.0.1", port), 10)) as raw:
        raw.sendall(begin.encode())
        began = time.monotonic()
        while raw.recv(1000):
            pass
        assert time.monotonic() - began < 8  # after a whole request uvicorn waits 5 s by itself


def test_a_head_without_end_is_refused(port: int) -> None:
    with closing(socket.create_connection(("127.0.0.1", port), 10)) as raw:
        raw.sendall(b"GET /health HTTP/1.1\r\nx: " + b"y" * 100_000)
        assert raw.recv(100).split()[1] == b"400"


def test_an_end_of_a_connection_belongs_to_its_user() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, closing(socket.create_connection(server.getsockname())) as mine:
        assert of_this_user(mine.getsockname(), server.getsockname())
        assert not of_this_user(("127.0.0.1", 1), server.getsockname())
        assert not of_this_user(mine.getsockname(), ("127.0.0.1", 1))
        assert not of_this_user(("10.0.0.1", mine.getsockname()[1]), server.getsockname())
    with (
        socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True) as both,
        closing(socket.create_connection(("127.0.0.1", both.getsockname()[1]))),
        both.accept()[0] as peer,  # whose addresses are written as IPv6 ones
    ):
        assert of_this_user(peer.getpeername()[:2], peer.getsockname()[:2])


def test_strangers_hold_few_connections_and_members_any_number(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "PATIENCE", 60.0)
    members = [http.client.HTTPConnection("127.0.0.1", port, timeout=10) for _ in range(2 * STRANGERS)]
    for member in members:  # each of them proves itself and stays
        member.request("POST", FLEET, b"x", headers={STRANGER.decode(): "1", "key": "good"})
        assert member.getresponse().read() == b"1"
    held = [socket.create_connection(("127.0.0.1", port), 10) for _ in range(3 * STRANGERS)]
    time.sleep(0.5)
    ended = []
    for raw in held:
        raw.setblocking(False)
        try:
            ended.append(raw.recv(1) == b"")
        except BlockingIOError:
            ended.append(False)
    assert ended.count(False) == STRANGERS
    for raw in held:
        raw.close()
    time.sleep(0.5)
    assert stranger(port, "GET", "/health") == 200
    for member in members:
        member.close()


def test_a_port_that_is_taken_is_told_in_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(InputError, match="end what uses it"):
        Listener("127.0.0.1", taken.getsockname()[1])
