"""The operator's side of a deployment: the project, its certificates and keys, and preflight."""

import json
import os
import re
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import tiny

from warmfed.cli.parser import main
from warmfed.config import parse
from warmfed.deploy import policy
from warmfed.deploy.site import read_site
from warmfed.diffusion import pipeline
from warmfed.utils.errors import InputError
from warmfed.utils.files import file_lock

pytest.importorskip("flwr")

from warmfed.deploy import keys
from warmfed.deploy.check import check
from warmfed.deploy.project import add_site, init, renew
from warmfed.deploy.project_file import read_project
from warmfed.transports.flower_processes import app_sha256

PICTURES = {site: {"cat": 9, "dog": 9} for site in ("ink", "paper")}


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose images are 8×8 pictures of cats and dogs; the sites' folders have theirs."""
    folder = tmp_path_factory.mktemp("made")
    pictures = tiny.pictures(folder / "pictures", PICTURES)
    (folder / "c.toml").write_text(
        f'algorithm.name = "fedavg"\ndata.source = "{pictures}"\n'
        'data.options = { image_size = 8, template = "a picture of a {}" }\nmodel.name = "linear"\n'
    )
    words = ["--sites", "ink,paper", "--host", "127.0.0.1", "--port", str(free_port()), "--config", str(folder / "c.toml")]
    assert main(["deploy", "init", str(folder / "project"), *words]) == 0
    for site in PICTURES:
        shutil.copytree(pictures, folder / "project" / "sites" / site / "data")
    commands = folder / "project" / "bin"
    commands.mkdir()
    for name in ("warmfed-superlink", "flower-superexec", "warmfed-supernode", "flwr"):
        (commands / name).touch(0o755)
    for place in ("server", "sites/ink", "sites/paper"):
        change(folder / "project" / place / "environment", 'WARMFED_BIN=""', f"WARMFED_BIN={commands}")
    return folder / "project"


@pytest.fixture
def project(made: Path, tmp_path: Path) -> Path:
    return tiny.copy(made, tmp_path / "project")


def change(path: Path, old: str, new: str) -> None:
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


def change_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@contextmanager
def serving(project: Path, behind: float = 0.0, opened: str = "") -> Iterator[None]:
    """The server's certificate at its port, with a clock that is so many seconds behind, and one path open to strangers."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(404)
            self.end_headers()

        def do_POST(self) -> None:
            self.send_response(200 if self.path == opened else 401 if self.path.startswith("/v1/fleet/") else 403)
            self.end_headers()

        def date_time_string(self, timestamp: float | None = None) -> str:
            return super().date_time_string(time.time() - behind)

        def log_message(self, *words: object) -> None: ...

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(project / "server" / "server.crt", project / "server" / "server.key")
    server = HTTPServer(("127.0.0.1", read_project(project).port), Handler)
    server.handle_error = lambda *words: None  # type: ignore[method-assign]  # a client that does not trust us
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def failing(folder: Path) -> dict[str, str]:
    """Return the failed checks with reasons, except those that this environment lacks."""
    return {row.check: row.found for row in check(folder) if row.ok is False and "pip install" not in row.found}


def test_the_project_is_complete_and_its_secrets_are_private(made: Path) -> None:
    found = {str(p.relative_to(made)): p.stat().st_mode & 0o777 for p in made.rglob("*") if p.is_file()}
    private = {"authority/ca.key", "server/server.key", "sites/ink/node", "sites/paper/node"}
    assert private < {name for name, mode in found.items() if mode == 0o600}
    assert {found[name] for name in ("server/ca.crt", "server/server.crt", "server/nodes/ink.pub", "sites/ink/ca.crt")} == {
        0o644
    }
    for name in ("server/start.sh", "server/run.sh", "server/register.sh", "sites/ink/start.sh"):
        assert found[name] == 0o755
    assert {"server/app/pyproject.toml", "server/config.toml", "server/nodes/paper.pub", "README.md"} <= found.keys()
    keys_of = [name for name in found if b"PRIVATE KEY" in (made / name).read_bytes()]
    assert set(keys_of) == private
    site = read_site(made / "sites" / "ink")
    assert (site.name, site.classes, site.prompts) == ("ink", ("cat", "dog"), "a picture of a {}")
    assert site.federation().shape == (3, 8, 8)
    agreed = parse(made / "server" / "config.toml")
    assert site.policy == policy.agreed(agreed)
    assert (site.policy.algorithms, site.policy.images, site.policy.limits["algorithm.local.epochs"]) == (
        ("fedavg",), False, agreed.algorithm.local.epochs,
    )  # fmt: skip
    assert site.policy.excess(agreed) == []
    assert "# Whether this site may send its images" in (made / "sites/ink/site.toml").read_text()
    assert parse(made / "server" / "config.toml").server.sites == ("ink", "paper")
    assert (made / "sites/ink/node.pub").read_bytes() == (made / "server/nodes/ink.pub").read_bytes()
    assert read_project(made).app == app_sha256()
    assert not any("PORT" in (made / "sites" / site / "environment").read_text() for site in PICTURES)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sites": ["a/b"]}, "'a/b'"),
        ({"sites": [".."]}, "a site's name"),
        ({"sites": ["a", "A"]}, "already"),
        ({"sites": []}, "--sites"),
        ({"sites": ["a", " "]}, "--sites has an empty name at place 2"),
        ({"sites": ["a", "a "]}, "--sites names 'a' twice"),
        ({"host": "two words"}, "host"),
        ({"host": ""}, "host"),
        ({"port": 70000}, "65535"),
        ({"classes": ["cat"]}, "two or more"),
        ({"classes": ["cat", "cat "]}, "--classes names 'cat' twice"),
        ({"classes": ["cat", ""], "prompts": "a {}"}, "--classes has an empty name at place 2"),
        ({"classes": ["red", "blue"], "prompts": ""}, "set --prompts as well"),
        ({"prompts": "a picture"}, "{}"),
        ({"config": Path("nowhere.toml")}, "nowhere.toml"),
    ],
    ids=str,
)
def test_bad_input_writes_nothing(changes: dict[str, Any], words: str, made: Path, tmp_path: Path) -> None:
    config = made.parent / "c.toml"
    given: dict[str, Any] = {
        "sites": ["a"],
        "host": "localhost",
        "classes": ["cat", "dog"],
        "prompts": "a {}",
        "config": config,
    }
    given |= changes
    with pytest.raises(InputError, match=words.replace("{", r"\{")):
        init(tmp_path / "new", given.pop("sites"), given.pop("host"), **given)
    assert list(tmp_path.iterdir()) == []


def test_whole_or_not_at_all(made: Path, tmp_path: Path) -> None:
    config = made.parent / "c.toml"
    written = 0
    again = True
    while again:
        with pytest.MonkeyPatch.context() as patch:
            tiny.kill_at(patch, written, OSError)
            try:
                init(tmp_path / "new", ["a"], "localhost", config=config)
                again = False
            except InputError:
                assert list(tmp_path.iterdir()) == []
        written += 7
    assert written > 20
    before = tiny.digest(tmp_path)
    with pytest.raises(InputError, match="exists already"):
        init(tmp_path / "new", ["a"], "localhost", config=config)
    assert tiny.digest(tmp_path) == before


def test_what_is_ready_passes_every_check(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert failing(project / "server") == {}
    with serving(project):
        rows = check(project / "sites" / "ink")
    assert [row for row in rows if row.ok is not True and "pip install" not in row.found] == []
    told = {row.check: row.found for row in rows}
    rows_of = [
        sum(map(int, re.findall(rf"(?:{name}) (\d+)", told["data"]))) for name in ("cat", "dog", "train|validation|test")
    ]
    assert rows_of == [9, 9, 18]
    assert re.fullmatch(r"[+-][01]\.\d s to the server's, give or take \d\.\d s", told["clock"])
    main(["deploy", "check", str(project / "server"), "--json"])
    assert {"check": "sites' keys", "ok": True, "found": "ink, paper"} in json.loads(capsys.readouterr().out)


def expired(project: Path) -> None:
    ca, key = ((project / "authority" / name).read_bytes() for name in ("ca.crt", "ca.key"))
    certificate, private = keys.server(ca, key, "127.0.0.1", datetime.now(UTC) - timedelta(days=900))
    (project / "server" / "server.crt").write_bytes(certificate)
    (project / "server" / "server.key").write_bytes(private)


def other_host(project: Path) -> None:
    for place in ("", "server"):
        change_json(project / place / "project.json", host="10.1.1.1")


def other_authority(project: Path) -> None:
    (project / "server" / "ca.crt").write_bytes(keys.authority("another", datetime.now(UTC))[0])


def other_key(project: Path) -> None:
    shutil.copy(project / "authority" / "ca.key", project / "server" / "server.key")


@pytest.mark.parametrize(
    ("damage", "where", "words"),
    [
        (expired, "certificate", "has expired"),
        (other_host, "certificate", "is not for 10.1.1.1"),
        (other_authority, "certificate", "not signed by the authority"),
        (other_key, "certificate", "not that of its certificate"),
        (lambda p: (p / "server/server.crt").write_text("no"), "certificate", "not a certificate in PEM"),
        (lambda p: (p / "server/server.key").chmod(0o644), "server.key", "chmod 600"),
        (lambda p: (p / "server/nodes/ink.pub").unlink(), "sites' keys", "no key of ink"),
        (lambda p: change_json(p / "server/project.json", torch="1.0"), "torch", "torch 1.0"),
    ],
)
def test_a_server_that_is_not_ready(damage: Callable[[Path], object], where: str, words: str, project: Path) -> None:
    damage(project)
    found = failing(project / "server")
    assert set(found) == {where}
    assert words in found[where]


def test_commands_that_are_not_installed(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(project))
    assert failing(project / "server") == {}
    change(project / "server" / "environment", "WARMFED_BIN=", "WARMFED_BIN=/nowhere")
    assert "warmfed-superlink, flower-superexec, flwr: no such command" in failing(project / "server")["commands"]


@pytest.mark.parametrize(
    ("damage", "where", "words"),
    [
        (lambda p: (p / "node").chmod(0o640), "node", "mode 640"),
        (lambda p: shutil.copy(p / "../paper/node.pub", p / "node.pub"), "node key", "not the public key"),
        (lambda p: (p / "node").write_text("no"), "node key", "cannot be read"),
        (lambda p: shutil.rmtree(p / "data/ink/cat"), "data", "one class"),
        (lambda p: shutil.rmtree(p / "data"), "data", "there is no data"),
        (lambda p: next((p / "data/ink/cat").iterdir()).write_bytes(b"no"), "data", "ink/cat"),
        (lambda p: change(p / "site.toml", "image_size = 8", "image_size = 9"), "images", "image_size = 8"),
        (lambda p: change(p / "site.toml", '"cat",\n    "dog"', '"dog",\n    "cat"'), "classes", "expected"),
        (lambda p: change(p / "site.toml", "a picture", "a photo"), "prompts", "expected"),
        (lambda p: change_json(p / "project.json", base="0" * 64, base_name="digits"), "base", "000000000000"),
        (lambda p: change_json(p / "project.json", start="0" * 64, base_name="digits"), "start", "000000000000"),
        (lambda p: (p / "ca.crt").unlink(), "authority", "ca.crt"),
    ],
)
def test_a_site_that_is_not_ready(damage: Callable[[Path], object], where: str, words: str, project: Path) -> None:
    damage(project / "sites" / "ink")
    found = failing(project / "sites" / "ink")
    assert set(found) == {where, "server"}
    assert words in found[where]
    assert "does not answer" in found["server"] or where == "authority"


def test_the_base_is_compared_by_its_bytes(project: Path) -> None:
    site = project / "sites" / "ink"
    change_json(site / "project.json", base=pipeline.fingerprint("digits"), base_name="digits")
    assert {row.check: row.ok for row in check(site)}["base"] is True


@pytest.mark.parametrize(("behind", "said"), [(60.0, "s ahead of the server"), (-60.0, "s behind the server"), (2.0, "")])
def test_a_clock_that_differs(behind: float, said: str, project: Path) -> None:
    with serving(project, behind):
        found = failing(project / "sites" / "ink")
    assert said in found.get("clock", "")
    assert set(found) == ({"clock"} if said else set())


@pytest.mark.parametrize(("damage", "words"), [(expired, "expired"), (other_authority, "")])
def test_a_server_that_cannot_be_trusted(damage: Callable[[Path], object], words: str, project: Path) -> None:
    damage(project)
    site = project / "sites" / "ink"
    shutil.copy(project / "server" / "ca.crt", site / "ca.crt")
    with serving(project):
        rows = {row.check: row for row in check(site)}
    assert rows["server"].ok is False
    assert "is not accepted" in rows["server"].found
    assert words in rows["server"].found
    assert rows["clock"].ok is None


@pytest.mark.parametrize(
    ("path", "row"), [("/v1/control/start-run", "closed door"), ("/v1/fleet/pull-messages", "strange key")]
)
def test_a_server_that_lets_strangers_in(path: str, row: str, project: Path) -> None:
    with serving(project, opened=path):
        found = failing(project / "sites" / "ink")
    assert path in found[row]
    assert row in found


def test_a_port_that_is_taken(project: Path) -> None:
    with serving(project):
        found = failing(project / "server")["port"]
    assert "is not free" in found
    assert f"by process {os.getpid()}" in found


def test_a_port_is_ours_if_its_superlink_is_of_this_folder(project: Path, tmp_path: Path) -> None:
    """Another site's program at the port does not pass as the own one."""
    words = f"import socket; s = socket.create_server(('0.0.0.0', {read_project(project).port})); print(flush=True); input()"
    program = tmp_path / "warmfed-superlink"
    program.write_text(words)
    for folder, wrong in ((project / "server", False), (tmp_path, True)):
        with subprocess.Popen(
            [sys.executable, program, "."], cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as process:
            assert process.stdout is not None
            process.stdout.readline()
            with file_lock(project / "server" / "server.key", ""):
                assert ("port" in failing(project / "server")) is wrong
            process.kill()


HOSTS = ["fe80::1%';id>pwn;'", "fe80::1%eth0", "a b", "-x", "x;id", "$(id)", "a" * 254, ""]


@pytest.mark.parametrize("host", HOSTS)
def test_a_host_is_a_name_or_an_address(host: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="host must be"):
        init(tmp_path / "new", ["ink"], host)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["..", "a b", "a.b", "x" * 65])
def test_a_key_s_file_names_a_site(name: str, project: Path) -> None:
    shutil.copy(project / "server/nodes/ink.pub", project / f"server/nodes/{name}.pub")
    assert "a site's name must have" in failing(project / "server")["sites' keys"]


def test_each_site_has_a_key_of_its_own(project: Path) -> None:
    shutil.copy(project / "server/nodes/ink.pub", project / "server/nodes/paper.pub")
    assert "is the key of site 'ink'" in failing(project / "server")["sites' keys"]


@pytest.mark.parametrize("text", ["", "WARMFED_PORT=x", "WARMFED_PORT=0", 'WARMFED_PORT="9'])
def test_an_environment_that_is_none(text: str, project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (project / "server" / "environment").write_text(text)
    assert main(["deploy", "check", str(project / "server")]) == 2
    assert "environment" in capsys.readouterr().err
    assert main(["deploy", "check", str(project)]) == 2


def test_a_site_is_added_and_a_certificate_renewed(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = (project / "sites" / "ink" / "node").read_bytes(), (project / "server" / "server.crt").read_bytes()
    assert main(["deploy", "add-site", str(project), "street"]) == 0
    assert read_project(project).sites == read_project(project / "sites" / "ink").sites == ("ink", "paper", "street")
    assert parse(project / "server" / "config.toml").server.sites == ("ink", "paper", "street")
    site = read_site(project / "sites" / "street")
    assert (site.classes, site.data.source, site.data.options) == (("cat", "dog"), "data", {"image_size": 8})
    assert site.policy == read_site(project / "sites" / "ink").policy
    assert (project / "server/nodes/street.pub").read_bytes() == (project / "sites/street/node.pub").read_bytes()
    for name in ("street", "Ink", "a/b"):
        before = tiny.digest(project)
        assert main(["deploy", "add-site", str(project), name]) == 2
        assert tiny.digest(project) == before
    renew(project)
    assert failing(project / "server") == {}
    assert (project / "sites" / "ink" / "node").read_bytes() == old[0]
    assert (project / "server" / "server.crt").read_bytes() != old[1]
    # a site that has lost its key gets another
    shutil.rmtree(project / "sites" / "ink")
    add_site(project, "ink")
    assert (project / "sites" / "ink" / "node").read_bytes() != old[0]
    with pytest.raises(InputError, match=r"project\.json"):
        add_site(project / "server" / "app", "x")


def test_the_scripts_find_their_folder_wherever_it_is(project: Path, tmp_path: Path) -> None:
    for script in project.rglob("*.sh"):
        assert subprocess.run(["sh", "-n", script], check=False).returncode == 0
    moved = shutil.move(project / "server", tmp_path / "another place")
    seen = (
        "printenv FLWR_TELEMETRY_ENABLED FLWR_DISABLE_UPDATE_CHECK FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION WARMFED_SERVER"
    )
    ran = subprocess.run(["sh", "-c", f". ./env.sh; {seen}"], cwd=moved, capture_output=True, text=True, check=True)
    assert ran.stdout.split("\n")[:4] == ["0", "1", "1", str(moved)]
    link = tomllib.loads((tmp_path / "another place" / "flwr" / "config.toml").read_text())["superlink"]["here"]
    assert link["root-certificates"] == str(tmp_path / "another place" / "ca.crt")


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd here")
@pytest.mark.parametrize("unit", ["server/warmfed-server@.service", "sites/ink/warmfed-site@.service"])
def test_the_units_are_valid(unit: str, made: Path) -> None:
    environment = {**os.environ, "SYSTEMD_LOG_LEVEL": "warning"}
    words = ["systemd-analyze", "verify", "--user", "--man=no", str(made / unit)]
    ran = subprocess.run(words, capture_output=True, text=True, env=environment, check=False)
    assert [line for line in ran.stderr.splitlines() if "warmfed" in line] == []


def test_rows_are_shown_with_their_remedy(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (project / "server" / "server.key").chmod(0o644)
    assert main(["deploy", "check", str(project / "server")]) == 2
    shown = capsys.readouterr().out
    assert "fails" in shown
    assert "chmod 600" in shown
