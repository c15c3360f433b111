"""Checks of a party's machine before a run (`warmfed deploy check`), with advice for each fault.

A check is a function that returns its finding, or raises `InputError` with the expected value, the actual value and advice.
"""

import hashlib
import http.client
import os
import shutil
import socket
import ssl
import stat
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path

import psutil

from ..config import parse
from ..core.tensors import rows
from ..data import SPLITS, Federation
from ..diffusion import pipeline
from ..report.parts import size
from ..utils.errors import InputError
from ..utils.files import file_lock, read_bytes
from ..utils.paths import exists, matching, resolved
from . import keys
from .guard import STRANGER
from .node import SERVER, SITE
from .project import start_digest
from .project_file import Project, environment, read_project, versions
from .site import SiteConfig, read_site

DISK, MEMORY = 1_000_000_000, 1_000_000_000
"""Smallest free disk space and memory in bytes; memory also needs three times the size of the base's weights."""
SKEW = 4.0
"""Largest difference of a site's clock in seconds; Flower refuses a site that is 5 s ahead."""
PATIENCE = 5.0
"""Time limit of a request to the server in seconds."""
_AGAIN = "get a new certificate from the coordinator (warmfed deploy renew)"
_RESTORE = "restore it from the coordinator's copy"


@dataclass(frozen=True)
class Row:
    """Result of one check; `ok` is None if it could not run, and `found` gives the reason."""

    check: str
    ok: bool | None
    found: str


class _Open(Exception):  # noqa: N818
    """Reason why a check cannot run here."""


def check(folder: Path) -> list[Row]:
    """Return the results of all checks of a server's or a site's folder; raise `InputError` if it is neither."""
    if exists(folder / "site.toml"):
        return list(_rows(_site(folder)))
    if exists(folder / "server.crt"):
        return list(_rows(_server(folder)))
    raise InputError(f"{folder} is neither a site's folder (site.toml) nor a server's (server.crt); choose one of them")


Checks = Iterator[tuple[str, Callable[[], str]]]


def _rows(checks: Checks) -> Iterator[Row]:
    for name, made in checks:
        try:
            yield Row(name, True, made())
        except InputError as error:
            yield Row(name, False, str(error))
        except _Open as why:
            yield Row(name, None, str(why))


def _server(folder: Path) -> Checks:
    project = read_project(folder)
    values = environment(folder)
    yield from _common(folder, project, ("warmfed-superlink", "flower-superexec", "flwr"), values)
    settings = parse(folder / "config.toml")

    def certificate() -> str:
        ca, made = (_bytes(folder / name) for name in ("ca.crt", "server.crt"))
        until = keys.dates(made, "the server's certificate", keys.now(), _AGAIN)
        return f"for {keys.chain(made, _bytes(folder / 'server.key'), ca, project.host, _AGAIN)}; {until}"

    def nodes() -> str:
        names = set(keys.registered(folder / "nodes").values())
        for wrong, which in (("has no key of", set(project.sites) - names), ("has a key of", names - set(project.sites))):
            if which:
                raise InputError(f"nodes/ {wrong} {', '.join(sorted(which))}; copy nodes/ from the coordinator's server folder")
        return ", ".join(project.sites)

    yield "certificate", certificate
    yield "server.key", lambda: _private(folder / "server.key")
    yield "sites' keys", nodes
    running = _running(folder / SERVER)
    yield "SuperLink", lambda: "is running" if running else "is not running"
    yield "port", lambda: _port(values["WARMFED_LISTEN"], int(values["WARMFED_PORT"]), folder if running else None)
    yield from _access("127.0.0.1", int(values["WARMFED_PORT"]), folder, running)
    yield "base", lambda: _equal("base", project.base, lambda: settings.generator.fingerprint())
    yield "start", lambda: _equal("classifier to start from", project.start, lambda: start_digest(settings))
    yield from _machine(folder, settings.device, settings.generator.base if project.base else "")


def _site(folder: Path) -> Checks:
    project, site, values = read_project(folder), read_site(folder), environment(folder)
    yield from _common(folder, project, ("warmfed-supernode", "flower-superexec"), values)
    loaded: list[Federation] = []

    def data() -> str:
        loaded.append(site.federation())
        table = loaded[0].sites[site.name].splits
        counts = []
        for split in SPLITS:
            labels = table[split]["label"].bincount(minlength=len(site.classes)).tolist()
            each = ", ".join(f"{name} {count}" for name, count in zip(loaded[0].classes, labels, strict=True) if count)
            counts.append(f"{split} {rows(table[split])} ({each})")
        return "; ".join(counts)

    def images() -> str:
        if not loaded:
            raise _Open("the data have not been read")
        side, shape = project.side or loaded[0].shape[1], loaded[0].shape
        if shape[1:] != (side, side):
            raise InputError(f"expected images of {side}×{side}, these have {shape[1]}×{shape[2]}; set image_size = {side}")
        return f"{side}×{side}"

    yield "node key", lambda: keys.pair(_bytes(folder / "node"), _bytes(folder / "node.pub"))
    yield "node", lambda: _private(folder / "node")
    yield "SuperNode", lambda: "is running" if _running(folder / SITE) else "is not running"
    yield from _reached(folder, project)
    yield from _access(project.host, project.port, folder, True)
    yield "data", data
    yield "images", images
    yield "classes", lambda: _same("classes", site.classes, project.classes)
    yield "prompts", lambda: _same("prompts", site.prompts, project.prompts)
    base = _base(site, project)
    yield "base", lambda: _equal("base", project.base, lambda: pipeline.fingerprint(base))
    yield "start", lambda: _equal("classifier to start from", project.start, lambda: _start(site, base))
    yield from _machine(site.path(site.work), site.device, base if project.base else "")


def _common(folder: Path, project: Project, commands: tuple[str, ...], values: dict[str, str]) -> Checks:
    def version(name: str, wanted: str, have: str) -> Callable[[], str]:
        def made() -> str:
            if not have:
                raise InputError(f"{name} is not installed; pip install 'warmfed[flower]=={project.warmfed}'")
            if wanted and have != wanted:
                raise InputError(f"the project has {name} {wanted}, this machine has {have}; install {wanted}")
            return have

        return made

    for name, have in versions().items():
        yield name, version(name, getattr(project, name), have)

    def found() -> str:
        path = os.pathsep.join([values["WARMFED_BIN"], os.environ.get("PATH", "")])
        places = {name: shutil.which(name, path=path) for name in commands}
        missing = [name for name, place in places.items() if place is None]
        if missing:
            here = f"WARMFED_BIN={Path(sys.executable).parent}"
            raise InputError(f"{', '.join(missing)}: no such command; set {here} in {folder / 'environment'}")
        return ", ".join(str(place) for place in places.values())

    def app() -> str:
        from ..transports.flower_processes import app_sha256

        if (here := app_sha256()) != project.app:
            raise InputError(f"SHA-256 {here[:12]}…, expected {project.app[:12] or 'none'}…; install the project's versions")
        return f"SHA-256 {here[:12]}…, as agreed; the sites run no other app"

    yield "commands", found
    yield "app", app
    last = "create a new project; this one has expired"
    yield "authority", lambda: keys.dates(_bytes(folder / "ca.crt"), "the authority's certificate", keys.now(), last)


def _reached(folder: Path, project: Project) -> Checks:
    """Connect to the server like a SuperNode, and compare clocks by the answer's header `Date`, which has whole seconds."""
    clock: list[tuple[float, float]] = []  # difference and its error, in seconds

    def reached() -> str:
        ca = str(folder / "ca.crt")
        try:
            connection = http.client.HTTPSConnection(
                project.host, project.port, timeout=PATIENCE, context=ssl.create_default_context(cafile=ca)
            )
            began = time.time()
            connection.request("GET", "/")
            answer = connection.getresponse()
            ended, date = time.time(), answer.getheader("Date")
            connection.close()
        except ssl.SSLCertVerificationError as error:
            raise InputError(
                f"{project.address}: its certificate is not accepted ({error.verify_message}); {_AGAIN}"
            ) from error
        except (OSError, http.client.HTTPException) as error:
            raise InputError(
                f"{project.address} does not answer ({error}); check that it runs and that your network allows its port"
            ) from error
        if date is not None:
            wait = ended - began
            clock.append(((began + ended) / 2 - parsedate_to_datetime(date).timestamp() - 0.5, wait / 2 + 0.5))
        return f"{project.address} answers over TLS, its certificate is accepted"

    def skew() -> str:
        if not clock:
            raise _Open("the server's clock is unknown: it does not answer, or its answer has no time")
        ((difference, error),) = clock
        if abs(difference) - error > SKEW:
            raise InputError(
                f"this clock is {abs(difference):.0f} s {'ahead of' if difference > 0 else 'behind'} the server's, {SKEW:g} s "
                "are allowed; synchronize it (timedatectl set-ntp true)"
            )
        return f"{difference:+.1f} s to the server's, give or take {error:.1f} s"

    yield "server", reached
    yield "clock", skew


def _machine(folder: Path, device: str, base: str) -> Checks:
    def disk() -> str:
        there = next(path for path in (folder, *resolved(folder).parents) if exists(path))
        return _enough("disk", shutil.disk_usage(there).free, DISK, "free some space, or move the folder")

    def memory() -> str:
        weights = sum(path.stat().st_size for path in matching(pipeline.find(base), "*.safetensors", below=True)) if base else 0
        return _enough("memory", psutil.virtual_memory().available, MEMORY + 3 * weights, "end other programs")

    def card() -> str:
        if device == "cpu":
            return "not used (device is cpu)"
        import torch

        if not torch.cuda.is_available():
            raise InputError("device is cuda, but torch finds no GPU; install its driver, or set device to cpu")
        free, total = torch.cuda.mem_get_info()
        return f"{torch.cuda.get_device_name()}, {size(free)} of {size(total)} free"

    yield "disk", disk
    yield "memory", memory
    yield "graphics card", card


def _enough(what: str, free: int, needed: int, remedy: str) -> str:
    if free < needed:
        raise InputError(f"{what}: {size(free)} are free, {size(needed)} are needed; {remedy}")
    return f"{size(free)} free"


def _private(path: Path) -> str:
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}; {_RESTORE}") from error
    if mode & 0o077:
        raise InputError(f"{path} must be private, but others may read it (mode {mode:o}); chmod 600 {path}")
    return f"mode {mode:o}"


def _running(path: Path) -> bool:
    """Return whether a party's server holds the lock of its folder's file."""
    try:
        with file_lock(path, "it is running"):
            return False
    except InputError:
        return exists(path)


def _port(address: str, port: int, ours: Path | None) -> str:
    """Return that the port is free, or used by the SuperLink of this folder; raise `InputError` if another program uses it."""
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except OSError as error:
            holder = _listener(port)
            if ours is not None and holder is not None and _folder_of(holder) == resolved(ours):
                return f"{port}: the SuperLink of this folder"
            who = f" by process {holder.pid}: {' '.join(holder.cmdline())[:80]}" if holder is not None else ""
            raise InputError(
                f"port {port} of {address} is not free ({error.strerror}{who}); end the program that uses it, "
                "or set another WARMFED_PORT"
            ) from error
    return f"{port} is free"


def _listener(port: int) -> psutil.Process | None:
    """Return the process of this user that listens on a port, or None."""
    for process in psutil.process_iter():
        try:
            if any(c.laddr.port == port and c.status == psutil.CONN_LISTEN for c in process.net_connections("tcp")):
                process.cmdline(), process.cwd()
                return process
        except psutil.Error:
            continue
    return None


def _folder_of(process: psutil.Process) -> Path | None:
    """Return the folder of a SuperLink's process, or None if it is another program."""
    words = process.cmdline()
    place = next((i for i, word in enumerate(words) if Path(word).name == "warmfed-superlink"), None)
    return None if place is None else resolved(Path(process.cwd()) / words[place + 1])


def _access(host: str, port: int, folder: Path, running: bool) -> Checks:
    """Check that the server refuses unauthorised callers: request each of Flower's paths without any rights."""

    def asked(path: str, headers: Mapping[str, str]) -> int:
        try:
            context = ssl.create_default_context(cafile=str(folder / "ca.crt"))
            connection = http.client.HTTPSConnection(host, port, timeout=PATIENCE, context=context)
            with closing(connection):
                connection.request("POST", path, headers={**headers, STRANGER.decode(): "1"})
                return connection.getresponse().status
        except (OSError, http.client.HTTPException) as error:
            raise _Open(f"not checked: the server does not answer ({error})") from error

    def closed() -> str:
        if not running:
            raise _Open("not checked: the SuperLink is not running")
        from ..transports.flower_processes import PATHS

        tried = (*PATHS, "/docs", "/openapi.json", "/v1/fleet/../control/start-run")
        opened = [path for path in tried if asked(path, {}) not in (401, 403)]
        if opened:
            raise InputError(
                f"{len(opened)} of {len(tried)} paths accept an unauthorised caller ({', '.join(opened[:3])}); close the port "
                "at once: start the server with ./start.sh, and connect directly, not through a proxy of its user"
            )
        return f"{len(tried)} paths refuse an unauthorised caller"

    def unregistered() -> str:
        if not running:
            raise _Open("not checked: the SuperLink is not running")
        from ..transports.flower_processes import FLEET, KEY, SIGNATURE, SIGNED

        public, stamp, signature = keys.signature_of_a_new_key()
        headers = {KEY.decode(): public, SIGNED.decode(): stamp, SIGNATURE.decode(): signature}
        opened = [path for path in sorted(FLEET) if asked(path, headers) != 401]
        if opened:
            raise InputError(f"an unregistered key may call {', '.join(opened[:3])}; start the server with ./start.sh")
        return "a key that is not in nodes/ is refused"

    yield "closed door", closed
    yield "strange key", unregistered


def _same(what: str, here: object, agreed: object) -> str:
    if here != agreed:
        raise InputError(f"{what} in site.toml are {here!r}, expected {agreed!r}; correct site.toml")
    return "as agreed"


def _equal(what: str, agreed: str, digest: Callable[[], str]) -> str:
    if not agreed:
        return "not used"
    here = digest()
    if here != agreed:
        raise InputError(f"the {what} has SHA-256 {here[:12]}…, expected {agreed[:12]}…; copy the coordinator's")
    return f"SHA-256 {here[:12]}…, as agreed"


def _base(site: SiteConfig, project: Project) -> str:
    return site.generator(project.base_name)


def _start(site: SiteConfig, base: str) -> str:
    path = site.path(site.start) if site.start else pipeline.find(base) / pipeline.PUBLIC_CLASSIFIER
    return hashlib.sha256(read_bytes(path, "the classifier to start from")).hexdigest()


def _bytes(path: Path) -> bytes:
    return read_bytes(path, f"the file {path.name}")
