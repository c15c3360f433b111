"""Comparisons: each cell runs once, statistics are correct, and a killed comparison resumes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from scipy.stats import ttest_rel

from warmfed.cli.parser import main
from warmfed.data import load
from warmfed.experiments.aggregate import aggregate, holm, paired
from warmfed.experiments.compare import Cell, Cells, compare, plan
from warmfed.report import latex
from warmfed.utils.errors import InputError

QUICK = {"model.name": "linear", "algorithm.local.epochs": 1}


def cells(data: Path, algorithms: list[str], seeds: list[int], rounds: list[int], **more: Any) -> list[Cell]:
    return plan(None, QUICK | {"data.source": str(data)} | more, algorithms, seeds, rounds)


def test_holm() -> None:
    # by hand: 0.01·4, 0.02·3, then 0.03·2 = 0.06, and 0.5
    assert holm([0.03, 0.01, None, 0.5, 0.02]) == pytest.approx([0.06, 0.04, None, 0.5, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_paired() -> None:
    ours, theirs = [90.0, 91.5, 92.0], [88.0, 90.0, 91.5]
    assert paired([a - b for a, b in zip(ours, theirs, strict=True)]) == pytest.approx(ttest_rel(ours, theirs).pvalue)
    assert paired([2.0, 2.0]) is None


def summary(union: float | None, personal: float) -> dict[str, Any]:
    shared = None if union is None else {"union": union, "site_mean": union, "site_worst": union - 5}
    own = {"mean": personal, "worst": personal - 3, "std": 1.0, "union": personal}
    return {"federation": "toy", "global": shared, "personal": own, "bytes_up_per_site": 100, "seconds": 2.0}


def test_the_table() -> None:
    planned = plan(None, {}, ["fedavg", "warmfed", "local"], [0, 1], [1, 5])
    values = {"fedavg": (80.0, 82.0), "warmfed": (90.0, 91.0), "local": (None, 85.0)}
    found = []
    for cell in planned:
        union, personal = values[cell.arm]
        found.append(summary(union and union + cell.seed, personal + cell.rounds * cell.seed))
    table = aggregate(planned, found)
    assert [(row["algorithm"], row["rounds"]) for row in table["rows"]][:3] == [("fedavg", 1), ("fedavg", 5), ("warmfed", 1)]
    row = table["rows"][1]
    assert (row["global_mean"], row["global_std"], row["global_worst_mean"]) == (80.5, pytest.approx(0.5**0.5), 75.5)
    assert row["personal_mean"] == 84.5
    assert [cell["folder"] for cell in row["cells"]] == ["cells/fedavg-rounds5-seed0", "cells/fedavg-rounds5-seed1"]
    assert (table["seeds"], table["rounds"], table["federation"]) == ([0, 1], 5, "toy")
    assert {(test["rounds"], test["metric"], test["against"]) for test in table["tests"]} == {
        (rounds, metric, against)
        for rounds in (1, 5)
        for metric, others in (("global", ["fedavg"]), ("personal", ["fedavg", "local"]))
        for against in others
    }
    assert all(test["algorithm"] == "warmfed" for test in table["tests"])
    first = table["tests"][0]
    assert (first["metric"], first["against"], first["difference"]) == ("global", "fedavg", 10.0)
    other = aggregate(planned, found, "fedavg")["tests"][0]
    assert (other["algorithm"], other["against"], other["difference"]) == ("fedavg", "warmfed", -10.0)


def test_arms_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "ablation.toml"
    file.write_text("""
        evaluate = "last"
        [algorithm]
        rounds = 3
        gate = true
        local = { epochs = 2 }
        [compare]
        seeds = [4, 5]
        [arms.warmfed]
        [arms.ungated.algorithm]
        name = "warmfed"
        gate = false
        [arms.fedavg]
    """)
    found = plan(file)
    assert [(cell.arm, cell.seed, cell.rounds) for cell in found] == [
        (arm, seed, 3) for arm in ("warmfed", "ungated", "fedavg") for seed in (4, 5)
    ]
    assert [cell.config.algorithm.gate for cell in found[:4]] == [True, True, False, False]
    assert all(cell.config.algorithm.local.epochs == 2 and cell.config.evaluate == "last" for cell in found)
    assert [cell.name for cell in plan(file, {}, ["ungated"], [0], [1])] == ["ungated-rounds1-seed0"]


def test_what_one_arm_sets_is_not_the_next_one_s(tmp_path: Path) -> None:
    """Tables within tables, too: the second arm's learning rate stays what all share."""
    file = tmp_path / "arms.toml"
    file.write_text("algorithm.local.lr = 0.1\n[arms.fedprox.algorithm.local]\nlr = 0.5\n[arms.fedavg]\n")
    found = {cell.arm: cell.config.algorithm.local.lr for cell in plan(file, seeds=[0])}
    assert found == {"fedprox": 0.5, "fedavg": 0.1}


def test_an_arm_is_changed_or_added_by_the_command_line(tmp_path: Path) -> None:
    file = tmp_path / "arms.toml"
    file.write_text("algorithm.local.lr = 0.1\n[arms.fedprox.algorithm.local]\nlr = 0.5\n[arms.fedavg]\n")
    over = {"arms.fedprox.algorithm.local.lr": 0.3, "arms.mine.algorithm.name": "fedavg", "algorithm.local.lr": 0.2}
    found = {cell.arm: cell.config.algorithm.local.lr for cell in plan(file, over, seeds=[0])}
    assert found == {"fedprox": 0.3, "fedavg": 0.2, "mine": 0.2}
    with pytest.raises(InputError, match="unknown key 'pretraining'"):
        plan(file, {"pretraining.side": 32})


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[algorithm]\ngatte = true", "unknown key 'algorithm.gatte'"),
        ("[compare]\nseed = [1]", "did you mean 'seeds'"),
        ('[compare]\nseeds = ["one"]', "list of int"),
        ("[arms]\nx = 1", "must be tables"),
        ("arms = 1", "must be tables"),
        ("[arms.mine]\nseed = 1", "no algorithm 'mine'"),
    ],
)
def test_bad_files(content: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "compare.toml").write_text(content)
    with pytest.raises(InputError) as error:
        plan(tmp_path / "compare.toml")
    assert words in str(error.value)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.arrays(tmp_path_factory.mktemp("data") / "toy.npz")


class Log(Cells):
    """Remembers which cells were finished; `then` is called after each."""

    def __init__(self, then: Callable[[], None] = lambda: None) -> None:
        self.names: list[str] = []
        self._then = then

    def finished(self, cell: Cell, summary: Any, done: int, total: int) -> None:
        self.names.append(cell.name)
        self._then()


def stop() -> None:
    raise tiny.Killed


def test_a_killed_comparison_goes_on_and_a_finished_one_grows(data: Path, tmp_path: Path) -> None:
    planned = cells(data, ["fedavg", "fedper"], [0], [1])
    first, second, third = Log(stop), Log(), Log()
    with pytest.raises(tiny.Killed):
        compare(planned, tmp_path / "x", workers=1, listener=first)
    assert first.names == ["fedavg-rounds1-seed0"]
    kept = tiny.digest(tmp_path / "x" / "cells" / first.names[0])

    table = compare(planned, tmp_path / "x", workers=2, listener=second)
    assert second.names == ["fedper-rounds1-seed0"]
    assert tiny.digest(tmp_path / "x" / "cells" / first.names[0]) == kept
    assert json.loads((tmp_path / "x" / "compare.json").read_text()) == table
    assert "| fedavg |" in (tmp_path / "x" / "compare.md").read_text()
    assert (tmp_path / "x" / "report.html").exists()

    compare(cells(data, ["fedavg", "fedper"], [0, 1], [1]), tmp_path / "x", workers=2, listener=third)
    assert sorted(third.names) == ["fedavg-rounds1-seed1", "fedper-rounds1-seed1"]

    before = tiny.digest(tmp_path / "x")
    with pytest.raises(InputError, match="other settings"):
        compare(cells(data, ["fedavg"], [0], [1], **{"algorithm.local.lr": 0.3}), tmp_path / "x")
    assert tiny.digest(tmp_path / "x") == before


def test_a_sweep_chooses_by_validation(data: Path, tmp_path: Path, capsys: Any) -> None:
    common = ["--set", "model.name=linear", f"data.source={data}", "--rounds", "1", "--seeds", "0", "--algorithms", "fedavg"]
    assert main(["sweep", *common, "--out", str(tmp_path / "x"), "--grid", "local.lr=0.0001"]) == 2
    assert "unknown key 'local'" in capsys.readouterr().err
    grid = ["--grid", "algorithm.local.lr=0.0001,0.05", "algorithm.local.epochs=1,2"]
    assert main(["sweep", *common, "--out", str(tmp_path / "x"), *grid]) == 0
    table = json.loads((tmp_path / "x" / "compare.json").read_text())
    assert table["swept"] == ["algorithm.local.lr", "algorithm.local.epochs"]
    assert [row["algorithm"] for row in table["rows"]] == [
        f"lr={lr} epochs={epochs}" for lr in (0.0001, 0.05) for epochs in (1, 2)
    ]
    cells = sorted(path.name for path in (tmp_path / "x" / "cells").iterdir())
    assert cells[0] == "lr=0.0001_epochs=1-rounds1-seed0"
    validation = [row["validation_mean"] for row in table["rows"]]
    lines = (tmp_path / "x" / "compare.md").read_text().splitlines()
    bold = [line.split(" | ")[0].removeprefix("| ") for line in lines if "**" in line]
    assert bold == [row["algorithm"] for row in table["rows"] if row["validation_mean"] == max(validation)]
    assert all(line.count("**") == 2 for line in lines if "**" in line)  # the test columns mark nobody
    page = (tmp_path / "x" / "report.html").read_text()
    assert "What each setting does" in page
    assert "Accuracy by site" in page


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[sweep]\nalgorithm.rounds = 3", "sweep.algorithm.rounds must be a list"),
        ("[sweep]\nalgorithm.rounds = [3, 3]", "has a value twice"),
        ("[sweep]\nalgorithm.roundz = [3, 4]", "unknown key 'algorithm.roundz'"),
    ],
)
def test_bad_sweeps(content: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "sweep.toml").write_text(content)
    with pytest.raises(InputError) as error:
        plan(tmp_path / "sweep.toml")
    assert words in str(error.value)


def test_a_site_that_takes_no_part(data: Path, tmp_path: Path) -> None:
    sites = list(load(str(data)).sites)
    planned = plan(None, QUICK | {"data.source": str(data)}, ["fedavg", "fedper"], [0], [1], sites[:2])
    assert [(cell.arm, cell.holdout) for cell in planned] == [(arm, site) for arm in ("fedavg", "fedper") for site in sites[:2]]
    table = compare(planned, tmp_path / "x", workers=2)
    assert table["holdout"] == sites[:2]
    fedavg, fedper = table["rows"]
    summaries = [json.loads((tmp_path / "x" / cell["folder"] / "summary.json").read_text()) for cell in fedavg["cells"]]
    assert all(
        sites[i] not in summary["sites"] and summary["holdout"]["site"] == sites[i] for i, summary in enumerate(summaries)
    )
    assert fedavg["holdout_mean"] == pytest.approx(sum(s["holdout"]["global"] for s in summaries) / 2)
    assert fedper["holdout_mean"] is None  # nobody has a head for the site
    with pytest.raises(InputError, match="cannot be left out"):
        compare(plan(None, {"data.source": str(data)}, ["fedavg"], [0], [1], ["nowhere"]), tmp_path / "y")


def test_latex() -> None:
    planned = plan(None, {}, ["fedavg", "warmfed"], [0, 1], [1])
    found = [summary(80.0 + 10 * (cell.arm == "warmfed") + cell.seed, 85.0 + cell.seed) for cell in planned]
    text = latex(aggregate(planned, found))
    assert r"warmfed & \textbf{90.5 $\pm$ 0.7}" in text
    assert text.count(r"\begin{tabular}") == text.count(r"\end{tabular}") == 2
    assert r"global, \%" in text


def test_a_cell_that_fails_is_named(data: Path, tmp_path: Path) -> None:
    wild = {"algorithm.local.lr": 1e38, "algorithm.local.max_grad_norm": 0.0, "algorithm.local.epochs": 5}
    with pytest.raises(InputError, match="cell fedavg-rounds1-seed0: training diverged"):
        compare(cells(data, ["fedavg"], [0], [1], **wild), tmp_path / "x")


def test_nothing_runs_where_one_cell_cannot(data: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no stages in 0 rounds"):
        compare(cells(data, ["fedavg"], [0], [1, 0]), tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_on_the_command_line(data: Path, tmp_path: Path, capsys: Any) -> None:
    arguments = ["compare", "--algorithms", "fedavg", "fedper", "--seeds", "0", "--rounds", "1", "2"]
    arguments += ["--set", "model.name=linear", "algorithm.local.epochs=1", f"data.source={data}", "--out", str(tmp_path / "x")]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert f"4 runs -> {tmp_path / 'x'}" in out
    assert out.count("★") >= 4
    assert out.index("2 rounds, 1 seed") < out.index("1 round, 1 seed")
    assert main([*arguments, "--json"]) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["comparison"] == json.loads((tmp_path / "x" / "compare.json").read_text())
    assert main(["report", str(tmp_path / "x")]) == 0
