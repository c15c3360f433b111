"""Four sites' folders and a server's, with a loop-back Grid of Flower's between them."""

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tomli_w

pytest.importorskip("flwr")
from flwr.app import Message
from loopback import Loopback

from warmfed.algorithms import ALGORITHMS
from warmfed.core.messages import decode, encode
from warmfed.deploy import client_app as clientapp
from warmfed.deploy import keys
from warmfed.deploy import server_app as serverapp
from warmfed.runs.folder import read_summary
from warmfed.transports.flower import FlowerChannel, pack, unpack
from warmfed.transports.protocol import Answer
from warmfed.utils.files import read_lines

SITES = "abcd"


SETTINGS: dict[str, Any] = {
    "algorithm": {"name": "ditto", "rounds": 2, "local": {"epochs": 1}, "personal": {"epochs": 1}},
    "model": {"name": "linear"},
    "workers": 1,
    "server": {"sites": list(SITES), "stage_timeout": 5.0},
}


def settings(path: Path, **changes: Any) -> Path:
    path.write_text(tomli_w.dumps(SETTINGS | changes))
    return path


OPEN: dict[str, Any] = {
    "algorithms": sorted(ALGORITHMS), "images": True, "max_runs": 9, "max_requests": 99, "max_bytes": 10**9,
}  # fmt: skip
"""A policy that lets a site take part in everything here."""


class Consortium:
    """Four sites' folders, and a server's, below one folder."""

    def __init__(self, folder: Path, data: Path, **border: Any) -> None:
        self.folder = folder
        self.folders = {977 * (7 - i): self.site(name, data={"source": str(data)}) for i, name in enumerate(SITES)}
        self.config = settings(folder / "server.toml", server=SETTINGS["server"] | border)

    def site(self, name: str, **config: Any) -> Path:
        folder = self.folder / f"site-{name}"
        folder.mkdir(exist_ok=True)
        (folder / "site.toml").write_text(tomli_w.dumps({"name": name, "policy": OPEN, **config}))
        if not (folder / "node.pub").exists():
            (folder / "node.pub").write_bytes(keys.node()[1])
            (self.folder / "nodes").mkdir(exist_ok=True)
            shutil.copy(folder / "node.pub", self.folder / "nodes" / f"{name}.pub")
        return folder

    def serve(
        self, tamper: Callable[[int, Message, Message], Message | None] | None = None, out: str = "run"
    ) -> dict[str, Any]:
        grid = Loopback(clientapp.app, self.folders, **({"tamper": tamper} if tamper else {}))
        connect = partial(FlowerChannel, grid, pause=0.01, look=0.02)
        serverapp.serve(connect, {"config": self.config.name, "out": out}, self.folder)
        return read_summary(self.folder / out)

    def records(self, out: str = "run") -> list[dict[str, Any]]:
        return read_lines(self.folder / out / "rounds.jsonl", "records")

    def node(self, name: str) -> int:
        return next(number for number, folder in self.folders.items() if folder.name == f"site-{name}")


def tampered(reply: Message, data: bytes) -> Message:
    reply.content = pack(data)
    return reply


def spoil(change: Callable[[Answer], Answer]) -> Callable[[Message, Message], Message]:
    return lambda message, reply: tampered(reply, encode(change(decode(unpack(reply.content), Answer))))
