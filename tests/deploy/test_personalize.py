"""Late sites: they join WarmFed's rounds with an adapter, or personalise the released global model alone."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import tomli_w
import toy
from faulty import Faulty

from warmfed.cli.parser import main
from warmfed.config import parse
from warmfed.core import Failure, Round
from warmfed.core.admission import AdmissionPolicy
from warmfed.core.tensors import only
from warmfed.run import run
from warmfed.runs.execute import execute
from warmfed.runs.folder import read_summary
from warmfed.runs.predict import predict
from warmfed.transports.in_process import InProcess

SETTINGS = {"algorithm.name": "fedavg", "algorithm.rounds": 1, "algorithm.local.epochs": 1, "workers": 1}


def rounds(faults: dict[tuple[int, str], Callable[[Any], Any]], folder: Path | None = None, **changes: Any) -> list[Round]:
    algorithm = toy.quick("warmfed", **changes)
    central = replace(toy.central(), folder=folder)
    return list(
        run(algorithm, central, Faulty(InProcess(toy.workers(algorithm)), faults), admission=AdmissionPolicy(min_sites=3))
    )


def away(reply: Any) -> Failure:
    return Failure("it is not connected")


def kinds(done: Round, site: str) -> list[str]:
    return [e.kind for e in done.exchanges if e.site == site]


def test_a_late_site_joins_with_its_adapter(tmp_path: Path) -> None:
    found = rounds({(0, "d"): away, (2, "d"): away, (3, "d"): away}, tmp_path)  # away until the second round of training
    assert [done.stage for done in found] == ["adapt", "warm", "train", "gate", "train", "gate", "personalize"]
    assert sorted(found[1].server.classes) == list("abc")
    before, after = found[3].server, found[4].server
    joined = len(after.subset["label"]) - len(before.subset["label"])
    assert found[4].aggregate["joined_samples"] == joined
    assert 0 < joined <= 3 * 4  # 36 images of three sites and three classes: four of each of its own classes, where recognised
    assert toy.same({n: t[:-joined] for n, t in after.subset.items()}, before.subset)
    assert sorted(after.classes) == list("abcd")
    assert kinds(found[4], "d") == ["warmfed.Late", "warmfed.Joined"]
    assert kinds(found[4], "a") == ["warmfed.Down", "averaging.Model"]
    assert (tmp_path / "adapters" / "d.safetensors").exists()
    assert list(found[-1].train) == list("abcd")


def test_without_the_filter_all_samples_of_a_late_site_count() -> None:
    synthesis = replace(toy.QUICK[toy.Synthesis], filter="none")
    found = rounds({(0, "d"): away}, synthesis=synthesis)
    assert found[2].aggregate["joined_samples"] == 12
    assert "joined_samples" not in found[4].aggregate


def test_a_late_adapter_that_does_not_fit_leaves_its_site_out_and_is_asked_for_again() -> None:
    def bent(reply: Any) -> Any:
        return replace(reply, message=replace(reply.message, adapter={}))

    found = rounds({(0, "d"): away, (2, "d"): bent})
    assert "the adapter of site 'd'" in found[2].absent["d"]
    assert kinds(found[4], "d") == ["warmfed.Late", "warmfed.Joined"]


def test_who_needs_no_synthetic_images_asks_for_no_late_adapter() -> None:
    found = rounds({(0, "d"): away}, tune=False)
    assert kinds(found[2], "d") == ["warmfed.Down", "averaging.Model"]


def test_a_model_of_another_layout_leaves_its_site_out() -> None:
    def bent(reply: Any) -> Any:
        return replace(reply, message=replace(reply.message, model=only(reply.message.model, lambda name: "bias" in name)))

    found = rounds({(2, "b"): bent})
    told = "tensor 'head.weight' is missing, expected float32 [3, 192]; do all run one version of warmfed?"
    assert found[2].absent == {"b": told}


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A run of sites a, b and c, and the folder of site d."""
    data = tiny.arrays(tmp_path / "toy.npz", "abcd")
    execute(parse(None, {**SETTINGS, "model.name": "linear", "data.source": str(data), "holdout.site": "d"}), tmp_path / "run")
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "site.toml").write_text(tomli_w.dumps({"name": "d", "data": {"source": str(data)}}))
    return tmp_path / "site"


def test_a_late_site_personalises_the_released_model_alone(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    released = site.parent / "released"  # what the consortium gives away
    (released / "models").mkdir(parents=True)
    for name in ("config.toml", "summary.json", "models/global.safetensors"):
        shutil.copy(site.parent / "run" / name, released / name)
    before = tiny.digest(released)
    assert main(["personalize", str(released), str(site), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    known = read_summary(site.parent / "run")["holdout"]
    assert (found["global"]["test"]["accuracy"], found["personal"]["test"]["accuracy"]) == (known["global"], known["tuned"])
    out = site / "work" / "runs" / "late-released"
    assert found["folder"] == str(out)
    picture = next(tiny.pictures(site.parent / "pictures", {"d": {"0": 1}}).rglob("*.png"))
    (answer,) = predict(out, [picture], "d")
    assert answer["class"] in ("0", "1", "2")
    assert predict(out, [picture]) == predict(site.parent / "run", [picture])
    assert tiny.digest(released) == before
    assert main(["personalize", str(released), str(site)]) == 2  # it is there already
    assert main(["personalize", str(released), str(site), "--out", str(site.parent / "again")]) == 0
    assert capsys.readouterr().out.startswith("global model at site d: validation")


@pytest.mark.parametrize(
    ("table", "told"),
    [
        ({"classes": ["2", "1", "0"]}, "has classes ['2', '1', '0'], the run has ['0', '1', '2']"),
        ({"name": "x"}, "have no site 'x'"),
    ],
)
def test_what_does_not_fit_is_refused(table: dict[str, Any], told: str, site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = {"source": str(site.parent / "toy.npz")}
    (site / "site.toml").write_text(tomli_w.dumps({"name": "d", "data": data, **table}))
    assert main(["personalize", str(site.parent / "run"), str(site)]) == 2
    assert told in capsys.readouterr().err
    assert not (site / "work").exists()
