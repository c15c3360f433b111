"""A real deployment on this machine, as `warmfed deploy init` makes it: a SuperLink and SuperNodes, with TLS and node keys.

Used by tests_deploy/ and by the benchmarks of the Flower transport. Everything is started by the project's own scripts.
"""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import tomli_w

from warmfed.algorithms import ALGORITHMS
from warmfed.deploy.project import init

BIN = Path(sys.executable).parent


def free_port() -> int:
    """A port on which nobody listens, outside the range from which the system takes ports for outgoing connections."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as found, suppress(OSError):
            found.bind(("127.0.0.1", port))
            return port


def arrays(path: Path, sites: Sequence[str]) -> Path:
    """An .npz file of a federation that costs nothing to learn: 12 / 3 / 6 images 3×32×32 of three classes at each site."""
    random, content = np.random.default_rng(0), {}
    for site in sites:
        for split, count in (("train", 12), ("validation", 3), ("test", 6)):
            content[f"{site}_x_{split}"] = random.integers(256, size=(count, 3, 32, 32), dtype=np.uint8)
            content[f"{site}_y_{split}"] = np.arange(count) % 3
    np.savez(path, **content)
    return path


@dataclass
class Deployment:
    """A project in `folder` with its server and sites, on free ports; use it as a context."""

    folder: Path
    config: Path
    """The configuration that the project is made for; its data say what classes and prompts are."""
    sites: tuple[str, ...]
    table: Mapping[str, Any]
    """What each site's site.toml says beside what `init` has written."""
    port: int = field(default_factory=free_port)
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    last_run: str = ""

    def __post_init__(self) -> None:
        init(self.folder, self.sites, "localhost", self.port, self.config)
        self.server = self.folder / "server"
        for place in (self.server, *map(self.site, self.sites)):
            with (place / "environment").open("a") as file:
                file.write(f'WARMFED_BIN="{BIN}"\n')
        for name in self.sites:
            path = self.site(name) / "site.toml"
            table = tomllib.loads(path.read_text()) | self.table
            rules = table["policy"]  # a benchmark has many runs of many kinds
            rules |= {"algorithms": sorted(ALGORITHMS), "max_runs": 1000, "max_requests": 10_000, "max_bytes": 10**12}
            rules["limits"]["algorithm.rounds"] = 1000
            path.write_text(tomli_w.dumps(table))

    def site(self, name: str) -> Path:
        return self.folder / "sites" / name

    def _start(self, name: str, folder: Path, *, again: bool) -> None:
        """Start a folder's script, and again ten seconds after it has ended, as its systemd unit does."""
        script = "while :; do ./start.sh; sleep 10; done" if again else "./start.sh"
        with (self.folder / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                ["sh", "-c", script], cwd=folder, stdin=subprocess.DEVNULL,
                stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def superlink(self, *, wait: bool = True) -> None:
        """Start the SuperLink, and wait until all whose keys are there may connect."""
        log = self.folder / "superlink.log"
        before = len(_lines(log))
        self._start("superlink", self.server, again=False)
        if not wait:
            return
        wanted = {f"site {path.stem} may connect" for path in (self.server / "nodes").glob("*.pub")}
        self.wait(lambda: wanted <= set(_lines(log)[before:]), 90, "the sites are let in")

    def supernode(self, name: str, *, again: bool = True) -> None:
        self._start(name, self.site(name), again=again)

    def command(self, *words: str, seconds: float = 120) -> str:
        """What a command says in the server's environment."""
        done = subprocess.run(
            ["sh", "-c", '. ./env.sh; exec "$@"', "sh", *words],
            cwd=self.server, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=seconds, check=False,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"{' '.join(words)}: {done.stdout}{done.stderr}\n{self.logs()}")
        return done.stdout

    def start(self, config: str, out: str, app: Path | None = None) -> str:
        """Start a run; its number."""
        settings = f'config="{config}" out="{out}"'
        told = self.command("flwr", "run", str(app or "app"), "here", "-c", settings, "--format", "json")
        found = json.loads(told[told.index("{") :])
        if not found.get("success", True):
            raise RuntimeError(f"flwr run: {found}")
        self.last_run = str(found["run-id"])
        return self.last_run

    def status(self, run: str) -> str:
        """What Flower says of a run; empty where none was started by `start`."""
        told = self.command("flwr", "list", "here", "--run-id", run, "--format", "json") if run else "{}"
        return str((json.loads(told[told.index("{") :]).get("runs") or [{"status": ""}])[0]["status"])

    def finished(self, out: str, seconds: float = 300) -> dict[str, Any]:
        """The summary of a run, when it has finished."""
        path, asked = self.server / out / "summary.json", time.monotonic()

        def done() -> bool:
            nonlocal asked
            if not path.exists() and time.monotonic() - asked > 20:
                asked = time.monotonic()
                if self.status(self.last_run).startswith("finished") and not path.exists():
                    raise RuntimeError(f"run {self.last_run} has ended before {out} was done\n{self.logs()}")
            return path.exists()

        self.wait(done, seconds, f"{out} has finished")
        return dict(json.loads(path.read_text()))

    def wait(self, what: Callable[[], object], seconds: float, told: str) -> float:
        """Wait until what() is true; the seconds it took."""
        began = time.monotonic()
        while not what():
            if time.monotonic() - began > seconds:
                raise TimeoutError(f"not within {seconds:g} s: {told}\n{self.logs()}")
            time.sleep(0.1)
        return time.monotonic() - began

    def logs(self, lines: int = 12) -> str:
        return "\n".join(f"--- {path.name}\n" + "\n".join(_lines(path)[-lines:]) for path in sorted(self.folder.glob("*.log")))

    def below(self, name: str, words: str = "") -> list[psutil.Process]:
        """The processes below one of ours whose command line has these words."""
        found = psutil.Process(self.processes[name].pid).children(recursive=True)
        return [process for process in found if words in " ".join(_command(process))]

    def kill(self, name: str) -> None:
        """kill -9 of a process of ours and of all below it."""
        process = self.processes.pop(name)
        if process.poll() is None:
            end([psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)])
        process.wait()

    def close(self) -> None:
        for name in list(self.processes):
            self.kill(name)

    def __enter__(self) -> "Deployment":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _lines(path: Path) -> list[str]:
    return path.read_text(errors="replace").splitlines() if path.exists() else []


def _command(process: psutil.Process) -> list[str]:
    try:
        return list(process.cmdline())
    except psutil.Error:
        return []


def end(processes: Iterable[psutil.Process]) -> None:
    for process in processes:
        with suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)
