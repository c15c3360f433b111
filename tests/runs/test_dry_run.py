"""What a dry run counts is what a run does."""

import pytest
import toy

import warmfed.fit
from warmfed.algorithms import ALGORITHMS

EXACT = (
    "fedavg", "fedprox", "fedbn", "fedper", "fedrep", "fedbsd", "fedbabu", "fedrod", "ditto", "fedavg-finetune", "scaffold",
    "feddyn", "fednova", "fedadam", "moon", "fedamp", "dense", "local", "centralized", "fedncm", "fedpft", "feddf",
)  # fmt: skip


def steps(name: str, monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    """Return the optimizer steps that a method's workload announces, and those that its toy run takes."""
    algorithm, taken = toy.quick(name), []
    step = warmfed.fit._train_step

    def counted(*arguments: object) -> None:
        taken.append(1)
        step(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(warmfed.fit, "_train_step", counted)
    toy.play(algorithm, task=toy.task_of(name))
    rows = {site: len(tables["train"]["label"]) for site, tables in toy.SITES.items()}
    return sum(each.steps for each in algorithm.workload(rows, len(rows) * toy.CLASSES)), len(taken)


@pytest.mark.parametrize("name", EXACT)
def test_a_workload_is_what_a_run_does(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    announced, taken = steps(name, monkeypatch)
    assert announced == taken


@pytest.mark.parametrize(
    "name", [name for name, each in ALGORITHMS.items() if each.cls.__name__ in ("WarmFed", "FGL", "FedDEO", "FedBiP")]
)
def test_filtered_samples_make_a_warm_start_shorter_only(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    announced, taken = steps(name, monkeypatch)
    assert 0.8 * announced <= taken <= announced
