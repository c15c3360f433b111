"""The attacks that a test of a real deployment found, on a real SuperLink and real SuperNodes: each is refused and named.

`make test-security`; a minute or two, nearly all of it for starting processes.
"""

import http.client
import json
import shutil
import socket
import ssl
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import tomli_w

pytest.importorskip("flwr")
from deployment import BIN, Deployment, arrays

from warmfed.deploy import keys
from warmfed.deploy.guard import STRANGER
from warmfed.transports.flower_processes import FLEET, KEY, PATHS, SIGNATURE, SIGNED
from warmfed.transports.flower_project import FILES
from warmfed.utils.files import read_lines

SITES = ("a", "b", "c", "d")
MARK = """
from pathlib import Path
from flwr.{kind} import {app}

open("/tmp/{mark}", "w").close()
app = {app}()
"""


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """Four sites. Site c says that it is site a; site d says that its name leads out of the run folder."""
    folder = tmp_path_factory.mktemp("deployment")
    data = arrays(folder / "toy.npz", (*SITES, "escaped"))
    begun = folder / "run.toml"
    border = {"sites": list(SITES), "min_sites": 2, "stage_timeout": 45.0}
    algorithm = {"name": "fedavg", "rounds": 1, "local": {"epochs": 1}}
    begun.write_text(tomli_w.dumps({"algorithm": algorithm, "data": {"source": str(data)}, "server": border, "workers": 1}))
    with Deployment(folder / "all", begun, SITES, {"data": {"source": str(data)}}) as running:
        change(running.site("c") / "site.toml", name="a")
        running.superlink()
        for name in running.sites:
            running.supernode(name, again=False)
        running.start("config.toml", "runs/first")
        running.finished("runs/first", 240)
        yield running


def change(path: Path, **values: Any) -> None:
    path.write_text(tomli_w.dumps(tomllib.loads(path.read_text()) | values))


def asked(
    deployment: Deployment, path: str, headers: Mapping[str, str] | None = None, body: bytes = b"", method: str = "POST"
) -> int:
    """The status of a request by somebody who has no right but to reach the port."""
    context = ssl.create_default_context(cafile=str(deployment.server / "ca.crt"))
    with closing(http.client.HTTPSConnection("localhost", deployment.port, timeout=30, context=context)) as connection:
        connection.request(method, path, body, headers={STRANGER.decode(): "1", **(headers or {})})
        return connection.getresponse().status


def test_the_run_goes_on_without_an_impostor_which_both_sides_name(deployment: Deployment) -> None:
    record = read_lines(deployment.server / "runs/first/rounds.jsonl", "records")[0]
    assert sorted(record["train"]) == ["a", "b", "d"]
    assert list(record["absent"]) == ["c"]
    log = deployment.command("flwr", "log", deployment.last_run, "here", "--show")
    assert "site c (node" in log
    assert "names site 'a', expected 'c'" in log
    assert "the server has refused this site" in (deployment.folder / "c.log").read_text()
    ledger = (deployment.site("c") / "work" / "ledger.jsonl").read_text()
    assert "expected 'c'" in ledger


def test_every_path_of_flower_refuses_a_stranger(deployment: Deployment) -> None:
    assert len(PATHS) > 60
    for path in (*PATHS, "/docs", "/openapi.json", "/redoc"):
        assert asked(deployment, path) == (401 if path in FLEET else 403), path
    for body in (b"", bytes(1_000_000)):
        assert asked(deployment, "/health", body=body, method="GET") == 200
    assert asked(deployment, "/docs") == 403  # it serves as before


def test_a_key_that_nobody_registered_or_a_false_signature_is_refused(deployment: Deployment) -> None:
    public, stamp, signature = keys.signature_of_a_new_key()
    headers = {KEY.decode(): public, SIGNED.decode(): stamp, SIGNATURE.decode(): signature}
    member = keys.pem(next(iter(keys.registered(deployment.server / "nodes"))))
    import base64

    borrowed = {**headers, KEY.decode(): base64.b64encode(member).decode()}
    for path in sorted(FLEET):
        assert asked(deployment, path, headers) == 401
        assert asked(deployment, path, borrowed) == 401


def test_a_stranger_takes_no_memory_and_no_connections(deployment: Deployment) -> None:
    (server,) = deployment.below("superlink", "warmfed-superlink") or [psutil.Process(deployment.processes["superlink"].pid)]
    asked(deployment, "/v1/fleet/push-object")
    before = server.memory_info().rss
    context = ssl.create_default_context(cafile=str(deployment.server / "ca.crt"))
    for path in ("/v1/fleet/push-object", "/v1/control/start-run"):
        raw = context.wrap_socket(socket.create_connection(("localhost", deployment.port)), server_hostname="localhost")
        head = f"POST {path} HTTP/1.1\r\nhost: x\r\n{STRANGER.decode()}: 1\r\ncontent-length: 300000000\r\n\r\n"
        with closing(raw):
            raw.sendall(head.encode())
            with suppress(OSError):  # the server hangs up
                for _ in range(300):
                    raw.sendall(bytes(1_000_000))
    half = [socket.create_connection(("localhost", deployment.port)) for _ in range(300)]
    silent = []
    for _ in range(300):
        with suppress(OSError):  # the server hangs up
            raw = socket.create_connection(("localhost", deployment.port))
            silent.append(context.wrap_socket(raw, server_hostname="localhost"))
    assert server.memory_info().rss - before < 5_000_000
    deadline = time.monotonic() + 30
    for raw in (*half, *silent):
        raw.settimeout(max(deadline - time.monotonic(), 0.1))
        with suppress(ConnectionError):
            assert raw.recv(1000) == b""
        raw.close()
    assert asked(deployment, "/v1/control/list-runs") == 403  # it serves as before


def foreign(deployment: Deployment, mark: str, folder: Path) -> Path:
    """An app of the same name as warmfed's, which leaves a mark wherever it runs."""
    for name, text in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    (folder / "warmfed_app" / "client_app.py").write_text(MARK.format(kind="clientapp", app="ClientApp", mark=mark))
    server = (
        "import time\nfrom flwr.app import ConfigRecord, Message, RecordDict\nfrom flwr.serverapp import ServerApp\n"
        "app = ServerApp()\n\n@app.main()\ndef main(grid, context):\n"
        "    sent = [Message(RecordDict({'c': ConfigRecord({'x': 1})}), n, 'train') for n in grid.get_node_ids()]\n"
        "    for reply in grid.send_and_receive(sent, timeout=60):\n        print('ANSWER', reply.error)\n"
    )
    (folder / "warmfed_app" / "server_app.py").write_text(server)
    return folder


def test_a_site_runs_no_app_but_warmfeds(deployment: Deployment, tmp_path: Path) -> None:
    """Not even where the server's own user asks for it: who has the server still runs no code at the sites."""
    mark = f"warmfed-mark-{time.time_ns()}"
    run = deployment.start("config.toml", "runs/never", foreign(deployment, mark, tmp_path / "app"))
    deployment.wait(lambda: deployment.status(run).startswith("finished"), 120, "the foreign app has ended")
    log = deployment.command("flwr", "log", run, "here", "--show")
    assert log.count("could not be verified") == len(SITES)
    assert not (Path("/tmp") / mark).exists()
    for name in SITES:
        refused = read_lines(deployment.site(name) / "work" / "ledger.jsonl", "the ledger")[-1]
        assert refused["kind"] == "refused app"
        assert "this site runs warmfed's app only" in refused["reason"]
        assert "refused an app with SHA-256" in (deployment.folder / f"{name}.log").read_text()
        shown = subprocess.run([BIN / "warmfed", "site-report", "."], cwd=deployment.site(name), capture_output=True, text=True)
        assert "refused app" in shown.stdout


def test_a_withdrawn_key_is_told(deployment: Deployment, tmp_path: Path) -> None:
    before = (deployment.server / "nodes" / "d.pub").read_bytes()
    public = keys.node()[1]
    (deployment.server / "nodes" / "e.pub").write_bytes(public)
    assert "site e may connect" in deployment.command("warmfed", "deploy", "register", ".")
    told = deployment.command("flwr", "supernode", "list", "here", "--format", "json")
    listed = json.loads(told[told.index("{") :])
    newest = max(listed["nodes"], key=lambda node: node["status"] == "registered")
    deployment.command("flwr", "supernode", "unregister", str(newest["node-id"]), "here")
    with pytest.raises(RuntimeError, match=r"key of site e was withdrawn.*add-site"):
        deployment.command("warmfed", "deploy", "register", ".")
    (deployment.server / "nodes" / "e.pub").unlink()
    assert (deployment.server / "nodes" / "d.pub").read_bytes() == before


def test_a_key_that_is_taken_out_of_nodes_is_refused_at_once(deployment: Deployment, tmp_path: Path) -> None:
    kept = shutil.move(deployment.server / "nodes" / "b.pub", tmp_path / "b.pub")
    try:
        private = deployment.site("b") / "node"
        assert asked(deployment, "/v1/fleet/pull-messages", signed(private)) == 401
    finally:
        shutil.move(kept, deployment.server / "nodes" / "b.pub")
    assert asked(deployment, "/v1/fleet/pull-messages", signed(private)) not in (401, 403)


def signed(private: Path) -> dict[str, str]:
    """The headers of a site's request, made with its own key."""
    import base64

    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = serialization.load_ssh_private_key(private.read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    stamp = keys.now().isoformat()
    public = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    sealed = key.sign(stamp.encode(), ec.ECDSA(hashes.SHA256()))
    return {
        KEY.decode(): base64.b64encode(public).decode(),
        SIGNED.decode(): stamp,
        SIGNATURE.decode(): base64.b64encode(sealed).decode(),
    }


@pytest.mark.skipif(sys.platform != "linux", reason="the owner of a connection is read from Linux's table")
def test_another_user_of_the_machine_cannot_take_a_sites_work(deployment: Deployment) -> None:
    (node,) = deployment.below("a", "warmfed-supernode")
    (port,) = {c.laddr.port for c in node.net_connections("tcp") if c.status == psutil.CONN_LISTEN}
    for headers, status in (({STRANGER.decode(): "1"}, 403), ({}, None)):
        with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=10)) as connection:
            connection.request("POST", "/v1/runtime/acquire-task", headers=headers)
            found = connection.getresponse().status
        assert found == status if status else found not in (401, 403)


def test_a_second_supernode_of_one_folder_does_not_start(deployment: Deployment) -> None:
    words = [BIN / "warmfed-supernode", "."]
    again = subprocess.run(words, cwd=deployment.site("a"), capture_output=True, text=True, timeout=60)
    assert again.returncode == 2
    assert "is running already" in again.stderr


def test_what_flower_writes_is_the_users_alone(deployment: Deployment) -> None:
    for folder in (deployment.server, deployment.site("a")):
        for path in (*folder.glob("superlink.db*"), *(folder / "flwr").rglob("*"), *(folder / "work").rglob("*")):
            assert path.stat().st_mode & 0o077 == 0, path
