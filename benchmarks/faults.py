"""Faults in a real deployment on this machine (SuperLink and four SuperNodes, TLS and node keys), one run for each.

A fault where recovery is claimed must leave the history and the models of the run in process, which nothing disturbed. A reply
that is refused must leave those of a run in process in which that site gave none in that round.

The full disk needs root, for a small tmpfs.

    python benchmarks/faults.py [--only NAME …] [--out benchmarks/results/faults]
"""

import argparse
import fcntl
import os
import platform
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import tomli_w
from deployment import Deployment, arrays, end, free_port

from warmfed.config import parse
from warmfed.core import Failure, Round
from warmfed.runs.backend import LOCAL, Backend, Execution, client_states_folder
from warmfed.runs.execute import execute
from warmfed.runs.prepare import PreparedRun
from warmfed.transports.flower_project import write_project
from warmfed.transports.in_process import InProcess
from warmfed.utils.files import atomic_write, read_json, read_lines, write_json

SITES = ("a", "b", "c", "d")
SITE = "a"
"""Who has the fault."""
COMMON = {"evaluate": "last", "workers": 1, "server": {"sites": list(SITES), "stage_timeout": 300.0}}
WARMFED = {
    **COMMON,
    "algorithm": {
        "name": "warmfed",
        "rounds": 1,
        "local": {"epochs": 1},
        "synthesis": {"per_class": 6},
        "personal": {"epochs": 1},
    },
    "generator": {"steps": 4, "views": 1, "training": {"epochs": 10}},
}
TUNED = {
    **COMMON,
    "algorithm": {"name": "fedavg-finetune", "rounds": 2, "local": {"epochs": 1}, "personal": {"epochs": 1}},
    "server": {**COMMON["server"], "min_sites": 3, "max_reply_bytes": 5_000_000},
}
SPOILT = 1
"""The step whose reply is spoilt: the second round of training."""
_CLIENT = """\
import json
from dataclasses import replace
from pathlib import Path

import torch
from warmfed.algorithms import ALGORITHMS
from warmfed.messages import decode, encode
from warmfed.site import answer
from warmfed.transports import flower
from warmfed.transports.wire import Answer


def spoilt(node, request_bytes):
    folder = Path(node["site-folder"])
    data = answer(folder, request_bytes)
    how = json.loads((folder / "fault.json").read_text()) if (folder / "fault.json").exists() else {}
    made = decode(data, Answer)
    if made.stage != "train" or not how:
        return data
    kept = folder / "earlier.safetensors"
    if made.step != how["step"]:
        kept.write_bytes(data)
        return data
    model = dict(made.body.message.model)
    match how["kind"]:
        case "nan":
            model = {name: tensor * float("nan") for name, tensor in model.items()}
        case "shape":
            model = {name: tensor[:1] for name, tensor in model.items()}
        case "oversized":
            model["more"] = torch.zeros(2_000_000)
        case "replayed":
            return kept.read_bytes()
    message = type(made.body.message)(model)
    return encode(replace(made, body=replace(made.body, message=message)))


app = flower.client_app(
    {stage.name for entry in ALGORITHMS.values() for stage in entry.cls().stages() if stage.client is not None}, spoilt
)
"""
"""The client app of sites one of which is not honest: it is what a consortium cannot rule out."""


class Without(Backend):
    """All sites in process, one of which gives no usable reply in one step."""

    def __init__(self, step: int, reason: str) -> None:
        self.step, self.reason = step, reason

    def prepare(self, config: Any) -> PreparedRun:
        return LOCAL.prepare(config)

    def finish(self, prepared: PreparedRun, folder: Path, server: Any) -> Any:
        return LOCAL.finish(prepared, folder, server)

    def rounds(self, execution: Execution) -> Generator[Round, None, None]:
        prepared = execution.prepared
        with InProcess(prepared.workers(), folder=client_states_folder(execution.folder)) as transport:
            send = transport.send

            def sent(step: int, *rest: Any) -> Iterator[Any]:
                for site, answer, crossed in send(step, *rest):
                    yield (site, Failure(self.reason), ()) if (site, step) == (SITE, self.step) else (site, answer, crossed)

            transport.send = sent  # type: ignore[method-assign]
            yield from execution.over(transport, prepared.images.rows)


@dataclass
class Proxy:
    """Carries bytes between a site and the server, in a process of its own that can be stopped: a network that is cut."""

    to: int
    port: int = field(default_factory=free_port)

    def __enter__(self) -> "Proxy":
        words = [sys.executable, __file__, "--proxy", str(self.port), str(self.to)]
        self.process = subprocess.Popen(words)
        return self

    def cut(self, seconds: float) -> None:
        self.process.send_signal(signal.SIGSTOP)
        time.sleep(seconds)
        self.process.send_signal(signal.SIGCONT)

    def break_off(self, seconds: float) -> None:
        self.process.send_signal(signal.SIGUSR1)
        time.sleep(seconds)
        self.process.send_signal(signal.SIGUSR1)

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.wait()


def carry(here: int, there: int) -> None:
    """The proxy's own process; SIGUSR1 makes it break off all connections, and the next one carry them again."""
    broken, open_ = threading.Event(), list[socket.socket]()

    def turn(*_: object) -> None:
        if broken.is_set():
            return broken.clear()
        broken.set()
        while open_:
            with suppress(OSError):
                open_.pop().shutdown(socket.SHUT_RDWR)

    signal.signal(signal.SIGUSR1, turn)

    def pump(source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
        for end_ in (source, target):
            with suppress(OSError):
                end_.shutdown(socket.SHUT_RDWR)

    with socket.create_server(("127.0.0.1", here)) as server:
        while True:
            near, _ = server.accept()
            if broken.is_set():
                near.recv(65536)  # the client's greeting, which gets no answer
                near.close()
                continue
            try:
                far = socket.create_connection(("127.0.0.1", there))
            except OSError:  # the server is down
                near.close()
                continue
            open_ += [near, far]
            for pair in ((near, far), (far, near)):
                threading.Thread(target=pump, args=pair, daemon=True).start()


@dataclass
class Trial:
    """A run in the deployment, and what a fault needs to know of it."""

    deployment: Deployment
    config: dict[str, Any]
    name: str
    proxy: Proxy
    app: Path | None = None
    reference: dict[str, Any] = field(default_factory=dict)
    hit: float = 0.0
    """When the fault struck."""
    expected: list[dict[str, Any]] = field(default_factory=list)
    """The records of `reference`."""
    number: str = ""
    """Flower's number of the run."""

    @property
    def out(self) -> Path:
        return self.deployment.server / "runs" / self.name

    def start(self) -> None:
        atomic_write(self.deployment.server / f"{self.name}.toml", tomli_w.dumps(self.config))
        self.number = self.deployment.start(f"{self.name}.toml", f"runs/{self.name}", self.app)

    def records(self) -> list[dict[str, Any]]:
        path = self.out / "rounds.jsonl"
        return read_lines(path, "records") if path.exists() else []

    def wait_records(self, count: int) -> None:
        self.deployment.wait(lambda: len(self.records()) >= count, 300, f"{count} records")

    def wait_work(self, step: int) -> None:
        """Wait until the site is at work on a step."""
        self.wait_records(step)
        self.deployment.wait((self.out / "checkpoint" / "sites.json").exists, 120, "the run has begun")
        lock = self.deployment.site(SITE) / "work" / ".lock"

        def held() -> bool:
            with lock.open("w") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    return True
            return False

        self.deployment.wait(held, 120, "the site is at work")
        time.sleep(0.5)

    def strike(self) -> None:
        self.hit = time.monotonic()


def node(moment: Callable[[Trial], None]) -> Callable[[Trial], str]:
    """kill -9 of a site's SuperNode and all below it at a moment; it is started again after five seconds."""

    def fault(trial: Trial) -> str:
        trial.start()
        moment(trial)
        trial.strike()
        trial.deployment.kill(SITE)
        before = len(trial.records())
        time.sleep(5)
        trial.deployment.supernode(SITE)
        return f"killed with {before} stages done, started again 5 s later; the server asked it again"

    return fault


def server_app(trial: Trial) -> str:
    trial.start()
    trial.wait_work(2)
    trial.strike()
    found = trial.deployment.below("superlink", "flwr-serverapp")
    end(found)
    time.sleep(5)
    trial.start()
    return "killed in the middle of a round; the same `run.sh` again went on from the last checkpoint"


def superlink(trial: Trial) -> str:
    trial.start()
    trial.wait_work(2)
    trial.strike()
    trial.deployment.kill("superlink")
    time.sleep(5)
    trial.deployment.superlink()
    trial.start()
    return (
        "killed with the ServerApp in the middle of a round; `start.sh` and `run.sh` again, the sites came back by themselves"
    )


def disk(trial: Trial) -> str:
    """A full disk at a site: its work folder is a small tmpfs with a file that fills it."""
    work = trial.deployment.site(SITE) / "work"
    work.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(work)], check=True)
    filler = work / "filler"
    trial.start()
    trial.deployment.wait((work / "ledger.jsonl").exists, 120, "the site has said who it is")
    trial.wait_records(2)
    trial.strike()
    with suppress(OSError), filler.open("wb") as file:
        while True:
            file.write(bytes(2**16))
    log = ""
    while "No space left" not in log:
        time.sleep(5)
        log = trial.deployment.command("flwr", "log", trial.number, "here", "--show")
    line = next(line for line in log.splitlines() if "No space left" in line)
    told = line[line.index("cannot write") : line.index(" on device")].replace(str(trial.deployment.folder), "…")
    time.sleep(2)
    filler.unlink()
    trial.start()
    return f"the run stopped at its checkpoint and named the site ({told}); space freed, `run.sh` again"


def cut(trial: Trial) -> str:
    trial.start()
    trial.wait_work(2)
    trial.strike()
    trial.proxy.cut(30)
    return "no byte between the site and the server for 30 s in the middle of a round; both waited, and went on"


def broken_off(trial: Trial) -> str:
    trial.start()
    trial.wait_work(2)
    trial.strike()
    trial.proxy.break_off(15)
    return "every TLS connection broken off for 15 s; the SuperNode, which gives up on that, ended and was started again"


def spoilt(kind: str) -> Callable[[Trial], str]:
    def fault(trial: Trial) -> str:
        write_json(trial.deployment.site(SITE) / "fault.json", {"step": SPOILT, "kind": kind})
        trial.start()
        trial.wait_records(SPOILT)
        trial.strike()
        trial.wait_records(SPOILT + 1)
        reason = str(trial.records()[SPOILT]["absent"][SITE])
        here = trial.deployment.folder / f"here-{kind}"
        trial.reference = reference(trial.config, here, Without(SPOILT, reason))
        trial.expected = read_lines(here / "rounds.jsonl", "records")
        return f"left out of that round ({reason}), there again in the next"

    return fault


FAULTS: dict[str, tuple[dict[str, Any], Callable[[Trial], str]]] = {
    "kill -9 of a SuperNode while its site adapts": (WARMFED, node(lambda trial: trial.wait_work(0))),
    "kill -9 of a SuperNode in the middle of a round": (WARMFED, node(lambda trial: trial.wait_work(2))),
    "kill -9 of a SuperNode between rounds": (WARMFED, node(lambda trial: trial.wait_records(2))),
    "kill -9 of the ServerApp": (WARMFED, server_app),
    "kill -9 of the SuperLink": (WARMFED, superlink),
    "network of a site cut for 30 s": (WARMFED, cut),
    "TLS connections of a site broken off for 15 s": (WARMFED, broken_off),
    "full disk at a site": (WARMFED, disk),
    "a reply with NaN": (TUNED, spoilt("nan")),
    "a reply of a wrong shape": (TUNED, spoilt("shape")),
    "an oversized reply": (TUNED, spoilt("oversized")),
    "a reply replayed from an earlier round": (TUNED, spoilt("replayed")),
}


def reference(config: dict[str, Any], folder: Path, place: Backend = LOCAL) -> dict[str, Any]:
    """The summary of the run in process."""
    path = folder.with_suffix(".toml")
    atomic_write(path, tomli_w.dumps(config))
    return execute(parse(path), folder, backend=place)


@contextmanager
def running(folder: Path) -> Iterator[tuple[Deployment, Proxy, Path]]:
    """A deployment with all its SuperNodes, one of which goes through a proxy, and the app of the sites that are not honest."""
    atomic_write(folder / "run.toml", tomli_w.dumps(WARMFED))
    with (
        Deployment(folder / "all", folder / "run.toml", SITES, {"data": WARMFED["data"]}) as deployment,
        Proxy(deployment.port) as proxy,
    ):
        script = deployment.site(SITE) / "start.sh"
        script.write_text(script.read_text().replace(f"localhost:{deployment.port}", f"localhost:{proxy.port}"))
        app = write_project(deployment.folder / "app")
        (app / "warmfed_app" / "client_app.py").write_text(_CLIENT)
        deployment.superlink()
        for site in SITES:
            deployment.supernode(site)
        try:
            yield deployment, proxy, app
        finally:
            if (work := deployment.site(SITE) / "work").is_mount():  # the full disk's
                subprocess.run(["umount", "-l", str(work)], check=True)


def measure(
    name: str, run_name: str, there: tuple[Deployment, Proxy, Path], whole: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """One fault, in a run of its own."""
    (config, fault), (deployment, proxy, app) = FAULTS[name], there
    trial = Trial(deployment, config, run_name, proxy, app if config is TUNED else None)
    told = fault(trial)
    before = len(trial.records())
    deployment.wait(lambda: len(trial.records()) > before or (trial.out / "summary.json").exists(), 300, "a next record")
    recovered = time.monotonic() - trial.hit
    found = deployment.finished(f"runs/{run_name}", 400)
    wanted = trial.reference or whole[config["algorithm"]["name"]]
    same = {"models_sha256": found["models_sha256"] == wanted["models_sha256"]}
    if trial.reference:  # the refused bytes crossed the wire here, and none did there
        same["records"] = told_of(trial.records()) == told_of(trial.expected)
    else:
        same["history_sha256"] = found["history_sha256"] == wanted["history_sha256"]
    absent = {r["step"]: r["absent"] for r in trial.records() if r.get("absent")}
    lost = "nothing" if not absent else f"the reply of {SITE} to step {', '.join(map(str, absent))}"
    return {
        "fault": name,
        "happened": told,
        "lost": lost if all(same.values()) else f"DIFFERS {same}",
        "seconds": round(recovered, 1),
    }


def told_of(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Records without times and traffic."""
    dropped = ("seconds", "peak_memory_mb", "bytes_up", "bytes_down")
    return [{key: value for key, value in record.items() if key not in dropped} for record in records]


def table(rows: list[dict[str, Any]], about: dict[str, Any]) -> str:
    lines = [
        "# Faults in a deployment", "",
        "`python benchmarks/faults.py` on " + ", ".join(f"{key} {value}" for key, value in about.items()) + ".", "",
        "Lost: beside the run in process that nothing disturbed (`history_sha256` and the bytes of all models), or, where a",
        "reply was refused, beside one in which that site gave none in that round (all records but for their traffic, and the",
        "bytes of all models): equal but for what is named. Seconds: from the fault to the next stage that was done, with the",
        "pause before the restart (5 s; the cut: 30 s). Flower takes a killed node back when it has missed its sign of life",
        "(up to a minute); the restart is tried every ten seconds.", "",
        "| fault | what happened | lost | seconds |", "|---|---|---|---|",
    ]  # fmt: skip
    lines += [f"| {row['fault']} | {row['happened']} | {row['lost']} | {row['seconds']} |" for row in rows]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=list(FAULTS), metavar="NAME", help="some of the faults")
    parser.add_argument("--out", type=Path, help="writes .json and .md; rows that are there already are kept")
    parser.add_argument("--proxy", nargs=2, type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.proxy:
        carry(*args.proxy)
    about = {"machine": f"{platform.machine()} ({os.cpu_count()} processors)", "date": time.strftime("%Y-%m-%d")}
    about |= {name: version(name) for name in ("warmfed", "flwr", "torch")}
    results = args.out.with_suffix(".json") if args.out else None
    rows = {row["fault"]: row for row in read_json(results, "the results")["rows"]} if results and results.exists() else {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        data = {"source": str(arrays(folder / "data.npz", SITES))}
        for config in (WARMFED, TUNED):
            config["data"] = data
        whole = {config["algorithm"]["name"]: reference(config, folder / str(i)) for i, config in enumerate((WARMFED, TUNED))}
        with running(folder) as there:
            for i, name in enumerate(name for name in FAULTS if any(part in name for part in args.only)):
                rows[name] = measure(name, f"trial-{i}", there, whole)
                print(rows[name], flush=True)
                if args.out:
                    ordered = [rows[name] for name in FAULTS if name in rows]
                    write_json(args.out.with_suffix(".json"), {**about, "rows": ordered})
                    atomic_write(args.out.with_suffix(".md"), table(ordered, about))
    sys.exit(any("DIFFERS" in row["lost"] for row in rows.values()))


if __name__ == "__main__":
    main()
