"""The admission policy: rejected replies, and runs that go on without the rejected site."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import toy
from faulty import Faulty

from warmfed.algorithms.shared.base import Model
from warmfed.core import Empty, Failure, Reply, Stage
from warmfed.core.admission import DEFAULT_ADMISSION, AdmissionPolicy
from warmfed.core.messages import Message
from warmfed.core.tensors import Tensors
from warmfed.run import run
from warmfed.transports.in_process import InProcess
from warmfed.utils.errors import InputError

DOWN = Model({"w": torch.tensor([3.0, 4.0]), "n": torch.tensor(7)})
STAGE = Stage("train", lambda server, replies, ctx: (server, {}))


def verdict(message: Message, border: AdmissionPolicy = DEFAULT_ADMISSION, weight: float = 1.0, stage: Stage = STAGE) -> str:
    """Return the reason of a rejection; empty if the reply is accepted."""
    reply = Reply(message, None, weight, {})
    found = border.admit(reply, "a", DOWN, stage, toy.central())
    assert found is reply or isinstance(found, Failure)
    return found.reason if isinstance(found, Failure) else ""


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ({"w": torch.tensor([3.0, 5.0]), "n": torch.tensor(8)}, ""),
        ({"w": torch.tensor([3.0, float("nan")]), "n": torch.tensor(7)}, "tensor 'model/w' is not finite"),
        ({"w": torch.tensor([3.0, float("inf")]), "n": torch.tensor(7)}, "tensor 'model/w' is not finite"),
        ({"w": torch.tensor([3.0]), "n": torch.tensor(7)}, "tensor 'model/w' is float32 [1], expected float32 [2]"),
        ({"w": torch.tensor([3.0, 4.0]).half(), "n": torch.tensor(7)}, "'model/w' is float16 [2], expected float32 [2]"),
        ({"w": torch.tensor([3.0, 4.0])}, "tensor 'model/n' is missing, expected int64 []"),
        ({"w": DOWN.model["w"], "n": torch.tensor(7), "x": torch.tensor(0)}, "tensor 'model/x' is int64 [], expected missing"),
    ],
)
def test_a_reply_has_the_layout_of_the_message_and_is_finite(tensors: Tensors, reason: str) -> None:
    assert reason in verdict(Model(tensors))
    assert bool(reason) == bool(verdict(Model(tensors)))


def test_the_norm_is_that_of_the_change() -> None:
    moved = Model({"w": torch.tensor([6.0, 8.0]), "n": torch.tensor(7)})  # by 5
    assert verdict(moved, AdmissionPolicy(max_update_norm=5.1)) == ""
    assert (
        verdict(moved, AdmissionPolicy(max_update_norm=4.9)) == "its norm is 5, expected at most 4.9 (server.max_update_norm)"
    )


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
def test_a_weight_is_finite_and_not_negative(weight: float) -> None:
    assert "weight" in verdict(DOWN, weight=weight)


def test_a_stage_may_demand_more() -> None:
    def picky(reply: Reply, site: str, ctx: object) -> None:
        raise InputError(f"{site} must send more")

    assert verdict(Empty(), stage=replace(STAGE, check=picky, replies=(Empty,))) == "a must send more"


def spoiled(reply: Reply) -> Reply:
    model = {name: torch.full_like(value, float("nan")) for name, value in reply.message.model.items()}
    return replace(reply, message=Model(model))


def faulty(name: str, faults: Any, least: int) -> list[Any]:
    algorithm, task = toy.quick(name), toy.task_of(name)
    transport = Faulty(InProcess(toy.workers(algorithm, task=task)), faults)
    return list(run(algorithm, toy.central(task=task), transport, admission=AdmissionPolicy(min_sites=least), evaluate="never"))


def test_a_site_that_fails_is_left_out_and_comes_back() -> None:
    rounds = faulty("fedavg", {(0, "b"): spoiled, (0, "c"): lambda reply: Failure("it hung")}, least=2)
    assert [list(r.train) for r in rounds] == [["a", "d"], ["a", "b", "c", "d"]]
    assert rounds[0].absent == {"b": "tensor 'model/body.1.bias' is not finite", "c": "it hung"}
    assert rounds[0].results()["absent"] == rounds[0].absent
    assert "absent" not in rounds[1].results()


def test_too_few_answers_stop_the_run_by_name() -> None:
    with pytest.raises(InputError, match=r"3 of 4 sites gave a valid reply to stage train 1, 4 are needed \(site 'b': "):
        faulty("fedavg", {(0, "b"): spoiled}, least=0)


def test_an_adapter_that_does_not_fit_leaves_its_site_out() -> None:
    def bent(reply: Reply) -> Reply:
        return replace(reply, message=replace(reply.message, adapter={"shift": torch.zeros(2, 2)}))

    rounds = faulty("warmfed", {(0, "d"): bent}, least=3)
    assert "the adapter of site 'd'" in rounds[0].absent["d"]
    assert list(rounds[-1].train) == ["a", "b", "c", "d"]


def bent(**changes: Any) -> Callable[[Reply], Reply]:
    """Return a reply with changed fields of its message."""

    def change(reply: Reply) -> Reply:
        values = {name: made(getattr(reply.message, name)) for name, made in changes.items()}
        return replace(reply, message=replace(reply.message, **values))

    return change


def shorter(tensors: Tensors) -> Tensors:
    return dict(list(tensors.items())[1:])


@pytest.mark.parametrize(
    ("name", "step", "change", "reason"),
    [
        ("warmfed", 0, bent(classes=lambda held: (7,)), "expected one or more distinct classes from 0 to 2, got [7]"),
        ("warmfed", 0, bent(classes=lambda held: ()), "one or more distinct classes"),
        ("warmfed", 2, bent(model=shorter), "is missing, expected float32"),
        ("warmfed", 3, bent(right=shorter), "expected right answers and losses of 0.0, 0.5, 1.0, got"),
        ("warmfed", 3, bent(right=lambda right: {**right, "1.0": right["1.0"] + 1e9}), "right answers and losses"),
        ("warmfed", 3, bent(loss=lambda loss: {**loss, "1.0": float("nan")}), "right answers and losses"),
        ("fgl", 0, bent(classes=lambda held: (0, 0)), "one or more distinct classes"),
        ("fednova", 0, bent(direction=shorter), "is missing, expected float32"),
        ("fednova", 0, bent(accumulated=lambda count: 0.0), "it accumulated 0.0 gradients"),
        ("fedbabu", 0, bent(model=shorter), "is missing, expected float32"),
        ("fedproto", 0, bent(feature=lambda f: {"mean": f["mean"][:, :1]}), "tensor 'mean' is float32 [3, 1], expected"),
        (
            "fedproto",
            0,
            bent(count=lambda c: {"images": c["images"] - 99}),
            "expected 3 class counts whose sum is",
        ),
        ("fedddpm", 0, bent(model=shorter), "is missing, expected float32"),
        ("fedddpm", 0, bent(labels=lambda labels: (1, 2)), "expected 3 class counts whose sum is 28, got [1, 2]"),
    ],
)
def test_a_reply_that_cannot_be_used_leaves_its_site_out(name: str, step: int, change: Any, reason: str) -> None:
    rounds = faulty(name, {(step, "b"): change}, least=3)
    assert reason in rounds[step].absent["b"]
    assert not any(done.absent for done in rounds if done.step != step)
