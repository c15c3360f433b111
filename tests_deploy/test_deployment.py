"""A SuperLink and four SuperNodes as processes, with TLS and node authentication: the same bytes as in process.

`make test-deploy`; it takes some minutes, nearly all of it for starting processes.
"""

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import tomli_w
from deployment import Deployment

from warmfed.config import parse
from warmfed.core.rng import seeded, stream
from warmfed.deploy import keys
from warmfed.diffusion import pipeline
from warmfed.runs.execute import execute
from warmfed.runs.folder import read_summary
from warmfed.runs.predict import predict
from warmfed.utils.files import read_lines

with warnings.catch_warnings():
    # diffusers and transformers import modules of their own that are deprecated
    warnings.simplefilter("ignore")
    from warmfed.pretraining.pretrain import Pretraining, build

SITES = "abcd"
ONCE = {"rounds": 1, "local": {"epochs": 1}}
SYNTHESIS = {"per_class": 4, "subset": 12, "filter": "none", "training": {"epochs": 1}, "filter_training": {"epochs": 1}}
QUICK: dict[str, dict[str, Any]] = {
    "fedper": {"algorithm": {**ONCE, "rounds": 2}},
    "fedbsd": {"algorithm": ONCE},
    "scaffold": {"algorithm": {**ONCE, "rounds": 2}},
    "ditto": {"algorithm": {**ONCE, "personal": {"epochs": 1}}},
    "warmfed": {"algorithm": {**ONCE, "personal": {"epochs": 1}, "synthesis": SYNTHESIS}},
    "fedddpm": {
        "algorithm": {**ONCE, "first": {"epochs": 1}, "server": {"epochs": 1}},
        "task": "denoise",
        "denoising": {"width": 32, "depth": 1, "latent": "", "times": 20, "steps": 2},
        "evaluation": {"samples": 0},
    },
}


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """Running, with data, base and site folders; a SuperNode that nobody registered tries to take part, and one that
    trusts another authority."""
    folder = tmp_path_factory.mktemp("deployment")
    data = tiny.arrays(folder / "toy.npz", SITES + "xy", side=32)
    with seeded(stream("tiny")):
        base = build(Pretraining(channels=4, decoder_width=8, widths=(16, 32), text_width=16, text_layers=1))
    pipeline.save(base, folder / "base")
    begun = folder / "run.toml"
    begun.write_text(tomli_w.dumps({**settings(folder, "warmfed"), "data": {"source": str(data)}}))
    table = {"data": {"source": str(data)}, "base": str(folder / "base")}
    with Deployment(folder / "all", begun, (*SITES, "x", "y"), table) as running:
        (running.server / "nodes" / "x.pub").unlink()
        (running.site("y") / "ca.crt").write_bytes(keys.authority("another", keys.now())[0])
        running.superlink()
        for name in running.sites:
            running.supernode(name, again=name in SITES)
        yield running


def settings(folder: Path, name: str) -> dict[str, Any]:
    """The configuration of a run by an algorithm, without its data."""
    own = QUICK[name]
    return {
        **own,
        "algorithm": {"name": name, **own["algorithm"]},
        "generator": {"base": str(folder / "base"), "rank": 2, "steps": 2, "training": {"epochs": 1}},
        "server": {"sites": list(SITES), "stage_timeout": 240.0},
        "workers": 1,
    }


def in_process(path: Path, data: Path, folder: Path) -> dict[str, Any]:
    execute(parse(path, {"data.source": str(data)}), folder)
    return read_summary(folder)


@pytest.mark.parametrize("name", QUICK)
def test_the_same_bytes_as_in_process(name: str, deployment: Deployment, tmp_path: Path) -> None:
    path = deployment.server / f"{name}.toml"
    path.write_text(tomli_w.dumps(settings(deployment.folder.parent, name)))
    if name == "ditto":  # the other way to start it
        words = ["run", path.name, "--transport", "flower", "--superlink", "here", "--out", f"runs/{name}", "--quiet"]
        assert deployment.command("warmfed", *words, seconds=900) == f"runs/{name}\n"
    else:
        deployment.start(path.name, f"runs/{name}")
    found = deployment.finished(f"runs/{name}", 900)
    # the federation of the four sites alone
    four = tiny.arrays(tmp_path / "toy.npz", SITES, side=32)
    wanted = in_process(path, four, tmp_path / "here")
    for key in ("history_sha256", "models_sha256", "data_sha256", "base_sha256"):
        assert found[key] == wanted[key], key
    lines = [
        [(m["site"], m["direction"], m["stage"], m["bytes"], m["sha256"]) for m in read_lines(ledger, "it") if "site" in m]
        for ledger in (deployment.server / "runs" / name / "ledger.jsonl", tmp_path / "here" / "ledger.jsonl")
    ]
    assert lines[0] == lines[1]
    personal = [name for name in wanted["models_sha256"] if name != "global"]
    assert personal == [f"personal/{site}" for site in SITES]
    for model in personal:
        kept = last(deployment, model[-1]) / "models" / f"{model}.safetensors"
        assert kept.read_bytes() == (tmp_path / "here" / "models" / f"{model}.safetensors").read_bytes()
    if name != "fedddpm":  # which draws
        picture = next(tiny.pictures(tmp_path / "pictures", {"a": {"0": 1}}).rglob("*.png"))
        assert predict(last(deployment, "a"), [picture], "a") == predict(tmp_path / "here", [picture], "a")


def last(deployment: Deployment, site: str) -> Path:
    """What a site has kept of its last run."""
    return max((deployment.site(site) / "work" / "runs").iterdir(), key=lambda path: path.stat().st_mtime)


def test_who_is_not_registered_or_trusts_another_authority_gets_nothing(deployment: Deployment) -> None:
    for name in "xy":
        assert not (deployment.site(name) / "work").exists()
    logs = {name: (deployment.folder / f"{name}.log").read_text() for name in ("a", "x", "y", "superlink")}
    assert "Receiving" not in logs["x"] + logs["y"]
    assert "Connection attempt failed" in logs["x"]  # the SuperLink refuses its key
    assert "Attempted to register SuperNode with public key" in logs["superlink"]
    assert "Connection attempt failed" in logs["y"]  # it does not trust the SuperLink
    assert "Connection attempt failed" not in logs["a"]


def test_an_expired_certificate_is_named_on_both_sides(deployment: Deployment, tmp_path: Path) -> None:
    with Deployment(tmp_path / "all", deployment.folder.parent / "run.toml", ("a",), deployment.table) as late:
        ca, key = ((late.folder / "authority" / name).read_bytes() for name in ("ca.crt", "ca.key"))
        old = keys.server(ca, key, "localhost", keys.now() - 2 * keys.SERVER)
        for name, data in zip(("server.crt", "server.key"), old, strict=True):
            (late.server / name).write_bytes(data)
        late.superlink(wait=False)
        log = late.folder / "superlink.log"
        late.wait(lambda: log.exists() and "Uvicorn running" in log.read_text(), 60, "the SuperLink listens")
        late.supernode("a", again=False)
        for name in ("superlink", "a"):
            told = late.folder / f"{name}.log"
            late.wait(lambda told=told: "expired" in told.read_text(), 120, f"{name} names what is wrong")
        assert "SSL/TLS handshake error" in (late.folder / "a.log").read_text()
        assert not (late.site("a") / "work" / "ledger.jsonl").exists()
