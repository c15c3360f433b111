"""A real deployment on this machine: a SuperLink and SuperNodes as processes, with TLS and node authentication.

Used by tests_deploy/ and by the benchmarks of the Flower transport; an operator uses `warmfed deploy init`.
"""

import datetime
import ipaddress
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import tomli_w
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from warmfed.transports.project import write_project

BIN = Path(sys.executable).parent
QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
}


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def authority(folder: Path) -> Path:
    """A certificate authority and a server certificate for 127.0.0.1; the path of the authority's certificate."""
    folder.mkdir(parents=True)
    now = datetime.datetime.now(datetime.UTC)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "a test's authority")])
    root = ec.generate_private_key(ec.SECP384R1())

    def signed(subject: x509.Name, key: ec.EllipticCurvePrivateKey, ca: bool) -> x509.CertificateBuilder:
        made = x509.CertificateBuilder().subject_name(subject).issuer_name(name).public_key(key.public_key())
        made = made.serial_number(x509.random_serial_number()).not_valid_before(now - datetime.timedelta(hours=1))
        made = made.not_valid_after(now + datetime.timedelta(days=1))
        made = made.add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        made = made.add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        signer = x509.AuthorityKeyIdentifier.from_issuer_public_key(root.public_key())
        return made.add_extension(signer, critical=False)

    usage = x509.KeyUsage(True, False, False, False, False, True, True, False, False)
    ca = signed(name, root, True).add_extension(usage, critical=True).sign(root, hashes.SHA384())
    server = ec.generate_private_key(ec.SECP384R1())
    names = x509.SubjectAlternativeName([x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    certificate = signed(subject, server, False).add_extension(names, critical=False).sign(root, hashes.SHA384())
    (folder / "ca.crt").write_bytes(ca.public_bytes(serialization.Encoding.PEM))
    (folder / "server.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    (folder / "server.key").write_bytes(
        server.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return folder / "ca.crt"


def node_key(folder: Path, name: str) -> Path:
    """A SuperNode's key pair; the path of the private one, the public one has .pub after it."""
    key, encoding = ec.generate_private_key(ec.SECP384R1()), serialization.Encoding
    path = folder / name
    path.write_bytes(key.private_bytes(encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()))
    Path(f"{path}.pub").write_bytes(key.public_key().public_bytes(encoding.OpenSSH, serialization.PublicFormat.OpenSSH))
    return path


@dataclass
class Deployment:
    """A SuperLink and SuperNodes below `folder`, on free ports; use it as a context."""

    folder: Path
    port: int = field(default_factory=free_port)
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.ca = authority(self.folder / "certificates")
        self.server = self.folder / "server"
        self.server.mkdir()
        self.app = write_project(self.folder / "app")
        home = self.folder / "home"
        home.mkdir()
        connection = {"address": f"127.0.0.1:{self.port}", "root-certificates": str(self.ca)}
        (home / "config.toml").write_text(tomli_w.dumps({"superlink": {"default": "here", "here": connection}}))

    def environment(self, **more: str) -> dict[str, str]:
        return {
            **os.environ, **QUIET, "FLWR_HOME": str(self.folder / "home"), "WARMFED_SERVER": str(self.server),
            "PATH": f"{BIN}:{os.environ['PATH']}", **more,
        }  # fmt: skip

    def _start(self, name: str, *words: str, **more: str) -> None:
        with (self.folder / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                [str(BIN / words[0]), *words[1:]], env=self.environment(**more), cwd=self.folder,
                stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def superlink(self) -> None:
        certificates = self.folder / "certificates"
        self._start(
            "superlink", "flower-superlink", "--host", "127.0.0.1", "--port", str(self.port),
            "--ssl-ca-certfile", str(self.ca), "--ssl-certfile", str(certificates / "server.pem"),
            "--ssl-keyfile", str(certificates / "server.key"), "--enable-supernode-auth",
            "--disable-runtime-dependency-installation", "--database", str(self.folder / "superlink.db"),
        )  # fmt: skip
        self.wait(lambda: self.listens(), 60, "the SuperLink listens")

    def listens(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def site(self, name: str, config: Mapping[str, Any], *, register: bool = True) -> Path:
        """A site's folder with its site.toml and node key."""
        folder = self.folder / "sites" / name
        folder.mkdir(parents=True)
        (folder / "site.toml").write_text(tomli_w.dumps({"name": name, **config}))
        key = node_key(folder, "node")
        if register:
            self.flwr("supernode", "register", f"{key}.pub", "here")
        return folder

    def supernode(self, name: str, ca: Path | None = None, **more: str) -> None:
        folder = self.folder / "sites" / name
        self._start(
            name, "flower-supernode", "--superlink", f"127.0.0.1:{self.port}", "--root-certificates", str(ca or self.ca),
            "--auth-supernode-private-key", str(folder / "node"), "--host", "127.0.0.1", "--port", str(free_port()),
            "--node-config", f'site-folder="{folder}"', FLWR_HOME=str(folder / "home"), **more,
        )  # fmt: skip

    def flwr(self, *words: str) -> str:
        done = subprocess.run([str(BIN / "flwr"), *words], env=self.environment(), capture_output=True, text=True, timeout=120)
        if done.returncode:
            raise RuntimeError(f"flwr {' '.join(words)}: {done.stdout}{done.stderr}")
        return done.stdout

    def start(self, config: str, out: str, app: Path | None = None) -> str:
        """Start a run; its number."""
        told = self.flwr("run", str(app or self.app), "here", "-c", f'config="{config}" out="{out}"', "--format", "json")
        return str(json.loads(told[told.index("{") :])["run-id"])

    def finished(self, out: str, seconds: float = 300) -> dict[str, Any]:
        """The summary of a run, when it has finished."""
        path = self.server / out / "summary.json"
        self.wait(path.exists, seconds, f"{out} has finished")
        return dict(json.loads(path.read_text()))

    def wait(self, what: Any, seconds: float, told: str) -> float:
        """Wait until what() is true; the seconds it took."""
        began = time.monotonic()
        while not what():
            if time.monotonic() - began > seconds:
                raise TimeoutError(f"not within {seconds:g} s: {told}\n{self.logs()}")
            time.sleep(0.1)
        return time.monotonic() - began

    def logs(self, lines: int = 12) -> str:
        texts = {path.name: path.read_text(errors="replace") for path in sorted(self.folder.glob("*.log"))}
        return "\n".join(f"--- {name}\n" + "\n".join(text.splitlines()[-lines:]) for name, text in texts.items())

    def below(self, name: str, words: str = "") -> list[psutil.Process]:
        """The processes below one of ours whose command line has these words."""
        found = psutil.Process(self.processes[name].pid).children(recursive=True)
        return [process for process in found if words in " ".join(_command(process))]

    def kill(self, name: str) -> None:
        """kill -9 of a process of ours and of all below it."""
        process = self.processes.pop(name)
        end([*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)])
        process.wait()

    def close(self) -> None:
        for name in list(self.processes):
            if self.processes[name].poll() is None:
                self.kill(name)

    def __enter__(self) -> "Deployment":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _command(process: psutil.Process) -> list[str]:
    try:
        return list(process.cmdline())
    except psutil.Error:
        return []


def end(processes: Iterable[psutil.Process]) -> None:
    for process in processes:
        with suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)
