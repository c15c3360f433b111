"""Distillation: divergence, limits and the choice of a teacher by the selector."""

import functools
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
import toy
from one_site import local, weights
from torch import nn

from warmfed.algorithms.dense import frozen
from warmfed.algorithms.shared.distillation import Distillation, distilled, divergence, dynamic
from warmfed.core.tensors import Table, rows
from warmfed.core.training import Training
from warmfed.fit import fit
from warmfed.run import run
from warmfed.transports.in_process import InProcess

TRAINING = toy.TRAINING
ASIDE = "abcd"
play = functools.cache(toy.play)
quick = toy.quick


def test_the_divergence_is_kl_at_a_temperature() -> None:
    student, teacher = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[0.5, 0.5], [1.0, 0.0]])
    p, q = F.softmax(teacher / 2, -1), F.softmax(student / 2, -1)
    assert divergence(student, teacher, 2.0).item() == pytest.approx(4 * (p * (p / q).log()).sum().item() / 2)
    assert divergence(teacher, teacher, 3.0).item() == pytest.approx(0, abs=1e-7)


def test_a_teacher_asked_once_teaches_as_one_asked_at_every_step() -> None:
    ctx, start, settings = local(), weights("start"), Distillation()
    teacher = frozen(ctx, weights("old"))

    def loss(student: nn.Module, batch: Table) -> torch.Tensor:
        logits = ctx.task.logits(student, batch)
        far = divergence(logits, ctx.task.logits(teacher, batch), settings.temperature)
        return F.cross_entropy(logits, batch["label"]) + settings.weight * far

    asked, _ = fit(local(), start, TRAINING, toy.SITES["c"]["train"], loss=loss)
    once, _ = distilled(local(), start, TRAINING, weights("old"), settings)
    for name, tensor in asked.items():
        torch.testing.assert_close(once[name], tensor)


def test_each_row_has_its_own_answer_however_many_there_are() -> None:
    ctx, data = local(), toy.SITES["c"]["train"]
    many = {name: torch.cat([column, column.flip(0)] * 5) for name, column in data.items()}
    assert rows(many) > 64
    answers = ctx.task.predict(weights("old"), many, batch=64)
    torch.testing.assert_close(answers, ctx.task.logits(frozen(ctx, weights("old")), many))
    assert not answers.requires_grad


def test_distillation_of_no_weight_or_no_teacher_is_training() -> None:
    start, data = weights("start"), toy.SITES["c"]["train"]
    plain, _ = fit(local(), start, TRAINING, data)
    assert toy.same(distilled(local(), start, TRAINING, weights("old"), Distillation(weight=0.0))[0], plain)
    assert toy.same(distilled(local(), start, TRAINING, None, Distillation())[0], plain)
    assert not toy.same(distilled(local(), start, TRAINING, weights("old"), Distillation())[0], plain)


def selector(hidden: int = 64) -> dict[str, torch.Tensor]:
    """A selector with equal scores for both teachers."""
    inputs = 2 * toy.CLASSES
    return {
        "0.weight": torch.zeros(hidden, inputs),
        "0.bias": torch.zeros(hidden),
        "2.weight": torch.zeros(2, hidden),
        "2.bias": torch.zeros(2),
    }


def biased(recent: float) -> dict[str, torch.Tensor]:
    return {**selector(), "2.bias": torch.tensor([recent, -recent])}


POOL = (weights("recent"), weights("older"))


def test_dynamic_distillation_of_no_weight_is_fine_tuning() -> None:
    start = weights("start")
    student, _, _ = dynamic(local(), start, TRAINING, POOL, selector(), Distillation(weight=0.0), 0, 10)
    plain, _ = fit(local(), start, TRAINING, toy.SITES["c"]["train"])
    assert toy.same(student, plain)


@pytest.mark.parametrize(("recent", "which"), [(1e4, 0), (-1e4, 1)])
def test_a_selector_that_always_picks_one_teacher_makes_it_static(recent: float, which: int) -> None:
    start, settings = weights("start"), Distillation(tau_first=0.01, tau_last=0.01)
    student, chosen, info = dynamic(local(), start, TRAINING, POOL, biased(recent), settings, 0, 10)
    static, _ = distilled(local(), start, TRAINING, POOL[which], settings)
    assert toy.same(student, static)
    assert toy.same(chosen, biased(recent))  # and it gets no gradient where it is sure
    assert info["selector_share_recent"] == 1 - which
    assert info["selector_entropy"] == pytest.approx(0, abs=1e-6)


def test_two_equal_teachers_are_one() -> None:
    start, twice = weights("start"), (POOL[0], POOL[0])
    student, _, _ = dynamic(local(), start, TRAINING, twice, selector(), Distillation(), 0, 10)
    static, _ = distilled(local(), start, TRAINING, POOL[0], Distillation())
    for name in static:
        assert torch.allclose(student[name], static[name], atol=1e-6)


def test_the_selectors_shares_sum_to_one_and_its_temperature_falls() -> None:
    settings = Distillation(tau_first=1.0, tau_last=0.01)
    steps = TRAINING.count(32)
    _, chosen, first = dynamic(local(), weights("start"), TRAINING, POOL, None, settings, 0, 2 * steps)
    _, _, second = dynamic(local(), weights("start"), TRAINING, POOL, chosen, settings, steps, 2 * steps)
    for info in (first, second):
        assert info["selector_share_recent"] + info["selector_share_older"] == pytest.approx(1)
        assert 0 <= info["selector_share_recent"] <= 1
        assert 0 < info["selector_entropy"] <= 0.6932
    assert first["selector_temperature"] == pytest.approx(0.1)
    assert second["selector_temperature"] == pytest.approx(0.01)


@pytest.mark.parametrize(
    "parts", [{"micro_batch_size": 4}, {"micro_batch_size": 1}, {"batch_size": 4, "gradient_accumulation_steps": 2}]
)
def test_the_temperature_falls_by_steps_whatever_parts_a_batch_is_in(parts: dict[str, int]) -> None:
    whole = Training(lr=0.05, epochs=2, batch_size=8)
    student, chosen, info = dynamic(local(), weights("start"), whole, POOL, selector(), Distillation(), 0, 40)
    parted = replace(whole, **parts)
    assert parted.count(32) == whole.count(32) == 8
    again, chosen_again, told = dynamic(local(), weights("start"), parted, POOL, selector(), Distillation(), 0, 40)
    assert told["selector_temperature"] == info["selector_temperature"] == pytest.approx(0.1**0.2)
    if "micro_batch_size" in parts:
        assert told["selector_share_recent"] == pytest.approx(info["selector_share_recent"])
        for name in student:
            assert torch.allclose(student[name], again[name], atol=1e-5)
        for name in chosen:
            assert torch.allclose(chosen[name], chosen_again[name], atol=1e-5)


def test_the_selector_learns_to_pick_the_teacher_that_knows() -> None:
    knows, _ = fit(local("teacher"), weights("start"), Training(lr=0.05, epochs=5), toy.SITES["c"]["train"])
    wrong = {name: -value for name, value in knows.items()}
    settings, much = Distillation(selector_lr=1.0), Training(lr=0.05, epochs=15, batch_size=8)
    _, _, info = dynamic(local(), weights("start"), much, (wrong, knows), selector(), settings, 0, 60)
    assert info["selector_share_older"] > 0.8


def test_the_pool_is_the_last_two_personal_models() -> None:
    algorithm = quick("warmfed", rounds=3, warm=False, distill="dynamic")
    tap = toy.Tap(InProcess(toy.workers(algorithm)))
    list(run(algorithm, toy.central(), tap, evaluate="never"))
    states = [reply.state for _, site, _, _, reply in tap.seen if site == "b"]
    assert len(states) == 4
    for before, after in pairwise(states):
        assert toy.same(after.older, before.personal)
    assert [s.selector is None for s in states] == [True, True, False, False]
    assert [s.steps for s in states] == [0, 0, 3, 6]
