"""The training loop's options: micro-batches, schedules, early stopping and snapshots."""

import gc
import importlib.util
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from small_fit import DATA, SGD, START, Rows, close, ctx, rates, same
from torch import Tensor, nn

from warmfed.core.tensors import Table, Tensors
from warmfed.core.training import Training
from warmfed.core.training_snapshot import Snapshots
from warmfed.fit import Stop, fit
from warmfed.utils.errors import InputError

ADAM = replace(SGD, optimizer="adamw", epochs=4, schedule="cosine", warmup=2, ema_decay=0.9)


class Died(BaseException):
    """A process that is killed."""


@pytest.mark.parametrize("micro", [1, 2, 3])
def test_micro_batches_have_the_gradient_of_the_batch(micro: int) -> None:
    """Also where the last one is smaller (3 of 4), and of batches that are accumulated."""
    for training in (SGD, replace(SGD, gradient_accumulation_steps=2)):
        whole, info = fit(ctx(), START, training, DATA)
        parts, again = fit(ctx(), START, replace(training, micro_batch_size=micro), DATA)
        assert close(whole, parts)
        assert again["steps"] == info["steps"]
        assert again["loss"] == pytest.approx(info["loss"])
        assert not close(whole, START, 1e-3)


def test_a_micro_batch_as_large_as_the_batch_changes_no_bit() -> None:
    assert same(fit(ctx(), START, SGD, DATA)[0], fit(ctx(), START, replace(SGD, micro_batch_size=4), DATA)[0])


def test_what_is_drawn_for_a_batch_is_not_drawn_anew_for_its_parts() -> None:
    def noisy(model: nn.Module, batch: Table) -> Tensor:
        return F.cross_entropy(model(batch["x"] + batch["noise"]), batch["y"])

    def draw(batch: Table) -> Table:
        return {**batch, "noise": torch.randn(batch["x"].shape)}

    whole, _ = fit(ctx(), START, SGD, DATA, loss=noisy, draw=draw)
    parts, _ = fit(ctx(), START, replace(SGD, micro_batch_size=3), DATA, loss=noisy, draw=draw)
    assert close(whole, parts)
    assert not close(whole, fit(ctx(), START, SGD, DATA)[0], 1e-3)


def test_cosine_is_torchs_schedule() -> None:
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=7)
    wanted = []
    for _ in range(7):
        wanted.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert rates(Training(steps=7, schedule="cosine")) == pytest.approx(wanted, abs=1e-6)


def test_warm_up_multiplies_the_cosine() -> None:
    cosine = rates(Training(steps=6, schedule="cosine"))
    assert rates(Training(steps=6, schedule="cosine", warmup=3)) == pytest.approx(
        [0.25 * cosine[0], 0.5 * cosine[1], 0.75 * cosine[2], *cosine[3:]], abs=1e-6
    )


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed")
def test_no_tensor_of_a_step_stays(tmp_path: Path) -> None:
    """One number kept of each step, between what the next steps free and take, cost a long training 0.5 MB a step."""
    alive: dict[int, int] = {}

    def count(step: int, steps: int, tensors: object) -> None:
        gc.collect()
        alive[step] = sum(issubclass(type(each), Tensor) for each in gc.get_objects())

    fit(ctx(), START, replace(SGD, epochs=20), DATA, watch=count, snapshots=Snapshots(tmp_path / "kept", 7))
    assert len(alive) > 40
    assert len({alive[step] for step in range(10, len(alive))}) == 1


def test_an_optimizer_that_is_not_installed_is_named() -> None:
    with pytest.raises(InputError, match="adamw8bit needs bitsandbytes, which is not installed; pip install bitsandbytes"):
        fit(ctx(), START, replace(SGD, optimizer="adamw8bit"), DATA)


# early stop


def figures(*values: float) -> tuple[Stop, list[Tensors]]:
    """A judge that says these figures, and what it was shown."""
    left, seen = list(values), []

    def judge(model: nn.Module) -> float:
        assert not model.training
        assert not torch.is_grad_enabled()
        seen.append({name: value.clone() for name, value in model.state_dict().items()})
        return left.pop(0)

    return Stop(judge, 2), seen


@pytest.mark.parametrize("ema", [0.0, 0.5])
def test_training_stops_when_nothing_gets_better_and_returns_the_best_epoch(ema: float) -> None:
    stop, seen = figures(3.0, 1.0, 2.0, 1.5, 0.5)
    training = replace(SGD, epochs=9, ema_decay=ema)
    tensors, info = fit(ctx(), START, training, DATA, stop=stop)
    assert len(seen) == 4
    assert same(tensors, seen[1])
    assert same(tensors, fit(ctx(), START, replace(training, epochs=2), DATA)[0])
    assert (info["steps"], info["best_step"], info["judged"]) == (12, 6, 1.0)


def test_measuring_does_not_change_the_training() -> None:
    stop, seen = figures(4.0, 3.0, 2.0)
    training = replace(SGD, epochs=3, ema_decay=0.5)
    assert same(fit(ctx(), START, training, DATA, stop=stop)[0], fit(ctx(), START, training, DATA)[0])
    assert len(seen) == 3


# snapshots


def dying(at: int) -> Callable[[int, int, object], None]:
    def watch(step: int, steps: int, tensors: object) -> None:
        if step == at:
            raise Died

    return watch


@pytest.mark.parametrize(
    "training",
    [
        SGD,
        replace(SGD, momentum=0.0, gradient_accumulation_steps=2),
        ADAM,
        replace(ADAM, mixed_precision="fp16", micro_batch_size=3),
    ],
    ids=["momentum", "plain, accumulated", "adamw, cosine, average", "fp16, micro"],
)
@pytest.mark.parametrize("at", [1, 3, 4])
def test_a_killed_training_goes_on_with_the_same_bytes(training: Training, at: int, tmp_path: Path) -> None:
    """With noise in its loss; killed before the first snapshot (1), and in the steps after one that ends no epoch."""

    def loss(model: nn.Module, batch: Table) -> Tensor:
        return F.cross_entropy(model(batch["x"] + torch.randn(batch["x"].shape)), batch["y"])

    snapshots = Snapshots(tmp_path / "a.unfinished", 2)
    whole, info = fit(ctx(), START, training, DATA, loss=loss)
    with pytest.raises(Died):
        fit(ctx(), START, training, DATA, loss=loss, snapshots=snapshots, watch=dying(at))
    seen: list[int] = []
    again, told = fit(ctx(), START, training, DATA, loss=loss, snapshots=snapshots, watch=lambda step, *_: seen.append(step))
    assert seen[0] == 1 + (at - 1) // 2 * 2
    assert same(again, whole)
    assert told == info


def test_a_killed_training_remembers_its_best_epoch(tmp_path: Path) -> None:
    snapshots, training = Snapshots(tmp_path / "a.unfinished", 2), replace(SGD, epochs=9, ema_decay=0.5)
    whole, info = fit(ctx(), START, training, DATA, stop=figures(3.0, 1.0, 2.0, 1.5)[0])
    with pytest.raises(Died):
        fit(ctx(), START, training, DATA, stop=figures(3.0, 1.0, 2.0)[0], snapshots=snapshots, watch=dying(9))
    stop, seen = figures(2.0, 1.5)
    again, told = fit(ctx(), START, training, DATA, stop=stop, snapshots=snapshots)
    assert len(seen) == 2
    assert same(again, whole)
    assert told == info


@pytest.mark.parametrize("other", ["start", "settings", "data", "loss", "damaged"])
def test_a_snapshot_of_another_training_is_not_used(other: str, tmp_path: Path) -> None:
    path = tmp_path / "a.unfinished"
    snapshots = Snapshots(path, 2)
    with pytest.raises(Died):
        fit(ctx(), START, SGD, DATA, snapshots=snapshots, watch=dying(5))
    start, training, data = START, SGD, DATA
    match other:
        case "start":
            start = {**START, "head.bias": START["head.bias"] + 1}
        case "settings":
            training = replace(SGD, lr=0.2)
        case "data":
            data = {**DATA, "x": DATA["x"] + 1}
        case "loss":
            snapshots = replace(snapshots, of="another loss")
        case _:
            path.write_bytes(path.read_bytes()[:-1])
    assert same(fit(ctx(Rows()), start, training, data, snapshots=snapshots)[0], fit(ctx(), start, training, data)[0])
