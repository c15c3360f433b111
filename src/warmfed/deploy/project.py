"""Creates projects for deployments: the Flower app, the server's folder, one folder for each site, and an authority.

DIR/README.md  project.json          values that are equal for all parties
DIR/authority/ca.crt  ca.key         certificate authority of the server's certificate
DIR/server/                          config.toml, app/, nodes/SITE.pub, certificate and key, scripts, systemd unit
DIR/sites/SITE/                      site.toml, node and node.pub, ca.crt, script, systemd unit
"""

import hashlib
import ipaddress
import os
import re
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import tomli_w

from ..config import Config, parse
from ..data import Federation, describe_names, load
from ..runs.prepare import start_file
from ..transports.flower_project import write_project
from ..utils.errors import InputError
from ..utils.files import PUBLIC, atomic_write, make_folder, occupied, read_bytes, write_json
from ..utils.names import plain_names
from ..utils.paths import exists, is_folder, resolved
from . import keys, policy
from .project_file import Project, read_project, versions

_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?(\.[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?)*")
SHARE = 0.5
"""Default of server.max_weight_share in a deployment."""
_READ = ("image_size", "validation", "test", "seed")
"""Options of the data that apply to the folders of all sites."""


def init(
    folder: Path,
    sites: Sequence[str],
    host: str,
    port: int = 8000,
    config: Path | None = None,
    classes: Sequence[str] = (),
    prompts: str = "",
) -> Project:
    """Write a new project into `folder`, atomically.

    Args:
        folder: new folder of the project.
        sites: names of the sites.
        host: name or address of the server.
        port: port of the server.
        config: the run's configuration. Its data give classes and template, if they can be read on this machine.
        classes: class names in the order of their labels, if the data cannot be read on this machine.
        prompts: template of the prompts, likewise.

    Raises:
        InputError: The folder exists, a name is not valid, or classes are missing and the data cannot be read.
    """
    if occupied(folder):
        raise InputError(f"{folder} exists already; choose another folder, or add a site to it: warmfed deploy add-site")
    sites, classes = plain_names(sites, "--sites"), plain_names(classes, "--classes")
    for place, site in enumerate(sites):
        _check_name(site, sites[:place])
    if not sites:
        raise InputError("a deployment needs sites; set them: --sites ink,paper")
    _check_host(host)
    if not 1 <= port <= 65535:
        raise InputError(f"port must be from 1 to 65535; got {port}")
    settings = _absolute(parse(config))
    project = Project(host=host, port=port, sites=tuple(sites), classes=tuple(classes), prompts=prompts)
    data = _data_here(settings, needed=not (classes and prompts))
    project, own = _project(settings, project, data), _own(settings, data)
    now = keys.now()
    with _aside(folder) as made:
        certificate, key = keys.authority(f"warmfed {host}", now)
        atomic_write(made / "authority" / "ca.crt", certificate, PUBLIC)
        atomic_write(made / "authority" / "ca.key", key, 0o600)
        write_project(made / "server" / "app")
        _render(made / "server", _SERVER, port=port, address=project.address, site="", unit="warmfed-server")
        atomic_write(made / "server" / "ca.crt", certificate, PUBLIC)
        _certify(made, host, now)
        for site in sites:
            _write_site(made, made / "sites" / site, project, settings, site, own)
        _write_common(made, project, settings)
    return project


def add_site(folder: Path, name: str) -> Path:
    """Add a site to a project, or create new keys for a site whose folder was moved away; return the site's folder.

    Raises:
        InputError: The project does not exist, the name is not valid, or the site's folder exists.
    """
    project, settings = read_project(folder), parse(folder / "server" / "config.toml")
    made = folder / "sites" / name
    _check_name(name, [site for site in project.sites if site != name or exists(made)])
    project = replace(project, sites=tuple(dict.fromkeys((*project.sites, name))))
    with _aside(made) as aside:
        own = _own(settings, _data_here(settings, needed=False))
        _write_site(folder, aside, project, settings, name, own)
        _write_common(folder, project, settings)
        _copy(project, aside)
    return made


def renew(folder: Path) -> Path:
    """Write a new certificate of the server, signed by the same authority, and return its path; sites need no change."""
    project = read_project(folder)
    _certify(folder, project.host, keys.now())
    return folder / "server" / "server.crt"


_SERVER = {
    "environment": "environment",
    "env.sh": "env.sh",
    "start.sh": "start-server.sh",
    "register.sh": "register.sh",
    "run.sh": "run.sh",
    "warmfed-server@.service": "unit.service",
    "README.md": "server.md",
}
_SITE = {
    "environment": "environment",
    "start.sh": "start-site.sh",
    "warmfed-site@.service": "unit.service",
    "README.md": "site.md",
}
"""Templates by the names of the written files."""


_INSTALLED = ("digits4",)
"""Federations that are installed with warmfed, so that every party has them."""


def _data_here(settings: Config, needed: bool) -> Federation | None:
    """Return the configuration's data if they are needed or installed with warmfed, else None."""
    source, options = settings.data.source, settings.data.options
    return load(source, **options) if needed or source in _INSTALLED else None


def _own(settings: Config, data: Federation | None) -> Collection[str]:
    """Return the sites whose images are installed with warmfed."""
    return data.sites if data is not None and settings.data.source in _INSTALLED else ()


def _project(settings: Config, asked: Project, data: Federation | None) -> Project:
    """Return the project with versions, and with the values of the configuration and its data."""
    classes, prompts, side = asked.classes, asked.prompts, int(settings.data.options.get("image_size", 0))
    if data is not None:
        if classes and not prompts and set(classes) != set(data.classes):
            raise InputError(
                f"--classes {','.join(classes)} are not those of the data ({', '.join(data.classes)}), so the data's prompt "
                f"{data.template!r} need not fit them; set --prompts as well"
            )
        classes, prompts, side = classes or data.classes, prompts or data.template, data.shape[1]
    if len(set(classes)) < max(len(classes), 2):
        raise InputError(f"expected two or more different classes; got {', '.join(classes)}")
    if not describe_names(prompts):
        raise InputError(f"prompts must have one {{}} for the class; got {prompts!r}")
    have, draws = versions(), settings.algorithm.needs_generator is not None
    return replace(
        asked,
        python=have["python"],
        warmfed=have["warmfed"],
        torch=have["torch"],
        flwr=have["flwr"],
        app=_app(have["flwr"]),
        classes=classes,
        prompts=prompts,
        side=side,
        base=settings.generator.fingerprint() if draws else "",
        base_name="" if is_folder(Path(settings.generator.base)) else settings.generator.base,
        start=start_digest(settings),
    )


def _app(flwr: str) -> str:
    if not flwr:
        raise InputError("a deployment needs Flower; install warmfed with it: pip install 'warmfed[flower]'")
    from ..transports.flower_processes import app_sha256

    return app_sha256()


def start_digest(settings: Config) -> str:
    """Return the SHA-256 of the run's initial classifier; empty if there is none."""
    path = start_file(settings)
    return hashlib.sha256(read_bytes(Path(path), "the classifier to start from")).hexdigest() if path else ""


def _absolute(settings: Config) -> Config:
    """Return the settings with absolute paths, because the server runs in another folder."""
    base, start = settings.generator.base, settings.model.start
    base = str(resolved(Path(base))) if is_folder(Path(base)) else base
    start = str(resolved(Path(start))) if start not in ("", "public", "auto") else start
    generator, model = replace(settings.generator, base=base), replace(settings.model, start=start)
    return replace(settings, generator=generator, model=model)


def _write_site(root: Path, folder: Path, project: Project, settings: Config, name: str, own: Collection[str]) -> None:
    """Write a site's folder, and its public key for the server."""
    private, public = keys.node()
    atomic_write(folder / "node", private, 0o600)
    atomic_write(folder / "node.pub", public, PUBLIC)
    atomic_write(root / "server" / "nodes" / f"{name}.pub", public, PUBLIC)
    atomic_write(folder / "ca.crt", read_bytes(root / "authority" / "ca.crt", "the authority's certificate"), PUBLIC)
    table: dict[str, Any] = {"name": name, "work": "work", "device": "cpu"}
    if project.base:
        table["base"] = project.base_name or "base"
    if project.start and settings.model.start != "public":
        table["start"] = "start.safetensors"
        atomic_write(folder / table["start"], read_bytes(Path(settings.model.start), "the classifier to start from"))
    table |= {"classes": list(project.classes), "prompts": project.prompts, "data": _data(project, settings, name in own)}
    atomic_write(folder / "site.toml", f"{_HEADER}{tomli_w.dumps(table)}\n{policy.toml(policy.agreed(settings))}")
    _render(folder, _SITE, name=name, address=project.address, site=name, unit="warmfed-site")


_HEADER = """\
# Yours: work, device (cpu or cuda), [data] and [policy]; paths are relative to this file. The rest is the consortium's.
# data.source: a folder with NAME/CLASS/*.png below it, or an .npz file. base: your copy of the generator's folder.
"""


def _data(project: Project, settings: Config, own: bool) -> dict[str, Any]:
    """Return the data table of a site: a federation that is installed with warmfed, or the folder data in the site's folder."""
    source, options = settings.data.source, dict(settings.data.options)
    if own:
        return {"source": source, "options": options}
    kept = {key: value for key, value in options.items() if key in _READ}
    return {"source": "data", "options": {**kept, "image_size": project.side} if project.side else kept}


def _write_common(root: Path, project: Project, settings: Config) -> None:
    """Write all files with the names of the sites; project.json at the root is written last."""
    server = replace(settings.server, sites=project.sites)
    if server.max_weight_share == 1 and len(project.sites) > 2:  # with two sites, one has half of the weight or more
        server = replace(server, max_weight_share=SHARE)
    settings = replace(settings, server=server)
    atomic_write(root / "server" / "config.toml", settings.toml())
    for folder in (*(root / "sites" / site for site in project.sites), root / "server"):
        if is_folder(folder):
            _copy(project, folder)
    _render(root, {"README.md": "project.md"}, address=project.address, sites=project.sites)
    _copy(project, root)


def _copy(project: Project, folder: Path) -> None:
    write_json(folder / "project.json", asdict(project))


def _certify(root: Path, host: str, now: datetime) -> None:
    certificate, key = (read_bytes(root / "authority" / name, "the authority") for name in ("ca.crt", "ca.key"))
    made, private = keys.server(certificate, key, host, now)
    atomic_write(root / "server" / "server.key", private, 0o600)
    atomic_write(root / "server" / "server.crt", made, PUBLIC)


def _render(folder: Path, names: Mapping[str, str], **values: Any) -> None:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    loader = PackageLoader("warmfed.deploy")
    found = Environment(loader=loader, undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True)
    for name, template in names.items():
        text = found.get_template(template).render(values)
        atomic_write(folder / name, text, 0o755 if template.endswith(".sh") and name != "env.sh" else 0o644)


@contextmanager
def _aside(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder; it is renamed to `folder` at the end, or removed after an error."""
    try:
        make_folder(folder.parent)
        made = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    except OSError as error:
        raise InputError(f"cannot write to {folder.parent}: {error.strerror}; choose another folder") from error
    try:
        yield made
        os.replace(made, folder)
    except OSError as error:
        raise InputError(f"cannot write {folder}: {error.strerror}; choose another folder") from error
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _check_name(site: str, others: Sequence[str]) -> None:
    if not keys.NAME.fullmatch(site):
        raise InputError(
            f"a site's name must have at most 64 letters, digits, - and _, and begin with a letter or digit; got {site!r}"
        )
    if site.lower() in [other.lower() for other in others]:
        raise InputError(f"the site {site!r} exists already; choose another name")


def _check_host(host: str) -> None:
    try:
        if "%" in host:  # an IPv6 scope may be any text, and a certificate cannot contain it
            raise ValueError
        ipaddress.ip_address(host)
    except ValueError:
        if not _HOST.fullmatch(host) or len(host) > 253:
            raise InputError(f"host must be a name or an address, as fl.example.org or 10.0.0.7; got {host!r}") from None
