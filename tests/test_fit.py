"""The training loop against handwritten loops."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from small_fit import DATA, SGD, START, Net, Rows, close, ctx, rates, same
from torch import Tensor, nn

from warmfed.core.rng import stream
from warmfed.core.tensors import Table
from warmfed.core.training import Training
from warmfed.fit import fit, proximal
from warmfed.utils.errors import InputError


def order(epochs: int, batch: int, n: int = 10) -> list[Tensor]:
    """The batches that `ctx().rng` names: its first number seeds the global stream, then come the shuffles."""
    rng = stream("fit")
    torch.randint(2**62, (), generator=rng)
    return [part for _ in range(epochs) for part in torch.randperm(n, generator=rng).split(batch)]


def by_hand(
    batches: list[Tensor],
    make: Callable[[list[nn.Parameter]], torch.optim.Optimizer] = lambda live: torch.optim.SGD(
        live, 0.1, momentum=0.9, weight_decay=0.01
    ),
) -> list[dict[str, Tensor]]:
    """The weights after each step of a plain loop."""
    net, path = Net(), []
    net.load_state_dict(START)
    optimizer = make(list(net.parameters()))
    for rows in batches:
        optimizer.zero_grad()
        F.cross_entropy(net(DATA["x"][rows]), DATA["y"][rows]).backward()
        optimizer.step()
        path.append({name: value.clone() for name, value in net.state_dict().items()})
    return path


def test_sgd_equals_a_plain_loop_bit_for_bit() -> None:
    tensors, info = fit(ctx(), START, SGD, DATA)
    assert same(tensors, by_hand(order(2, 4))[-1])
    assert info["steps"] == 6
    assert info["samples"] == 20


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("adam", lambda live: torch.optim.Adam(live, 0.1, weight_decay=0.01)),
        ("adamw", lambda live: torch.optim.AdamW(live, 0.1, weight_decay=0.01)),
    ],
)
def test_adam_equals_a_plain_loop_bit_for_bit(name: str, make: Callable) -> None:
    tensors, _ = fit(ctx(), START, replace(SGD, optimizer=name), DATA)
    assert same(tensors, by_hand(order(2, 4), make)[-1])


def test_the_losses_are_means_over_rows_of_the_first_and_the_last_epoch() -> None:
    batches, path = order(2, 4), [START, *by_hand(order(2, 4))]
    net, sums = Net(), []
    for rows, weights in zip(batches, path[:-1], strict=True):
        net.load_state_dict(weights)
        sums.append(F.cross_entropy(net(DATA["x"][rows]), DATA["y"][rows], reduction="sum").item())
    _, info = fit(ctx(), START, SGD, DATA)
    assert info["first_loss"] == pytest.approx(sum(sums[:3]) / 10)
    assert info["loss"] == pytest.approx(sum(sums[3:]) / 10)


def test_steps_replace_epochs() -> None:
    assert SGD.count(10) == 6
    assert replace(SGD, steps=4).count(10) == 4
    assert replace(SGD, gradient_accumulation_steps=2).count(10) == 4
    tensors, info = fit(ctx(), START, replace(SGD, steps=4), DATA)
    assert info["steps"] == 4
    assert same(tensors, by_hand(order(2, 4)[:4])[-1])


def test_accumulation_equals_a_bigger_batch() -> None:
    small, _ = fit(ctx(), START, replace(SGD, batch_size=5, gradient_accumulation_steps=2, max_grad_norm=0.5), DATA)
    big, _ = fit(ctx(), START, replace(SGD, batch_size=10, max_grad_norm=0.5), DATA)
    assert close(small, big)
    assert not close(small, START, 1e-3)


def test_the_proximal_penalty_adds_mu_times_the_distance_to_the_gradient() -> None:
    anchor = {name: value - 0.5 for name, value in START.items()}
    once = Training(lr=1.0, momentum=0.0, batch_size=10)
    plain, _ = fit(ctx(), START, once, DATA)
    held, _ = fit(ctx(), START, once, DATA, penalty=proximal(anchor, 0.2))
    assert close(
        {name: plain[name] - held[name] for name in plain}, {name: torch.full_like(v, 0.1) for name, v in START.items()}
    )
    assert proximal(anchor, 0.2)({"head.bias": nn.Parameter(START["head.bias"])}).item() == pytest.approx(0.1 * 3 * 0.25)


def test_a_correction_rewrites_every_gradient() -> None:
    seen = []

    def shift(name: str, gradient: Tensor) -> Tensor:
        seen.append(name)
        return gradient + 1

    once = Training(lr=0.5, momentum=0.0, batch_size=10)
    plain, _ = fit(ctx(), START, once, DATA)
    shifted, _ = fit(ctx(), START, once, DATA, correct=shift)
    assert seen == list(START)
    assert close({name: plain[name] - shifted[name] for name in plain}, {n: torch.full_like(v, 0.5) for n, v in START.items()})


def test_what_is_not_trainable_stays_bit_for_bit() -> None:
    tensors, _ = fit(ctx(), START, SGD, DATA, trainable=lambda name: name.startswith("head."))
    for name in START:
        assert torch.equal(tensors[name], START[name]) == name.startswith("body.")


def test_a_partial_start_trains_its_own_names_only_and_the_rest_is_what_the_task_builds() -> None:
    net = Net()
    net.load_state_dict(START)
    part = {name: value for name, value in START.items() if name.startswith("head.")}
    tensors, _ = fit(ctx(Rows(lambda: net)), part, SGD, DATA)
    frozen, _ = fit(ctx(), START, SGD, DATA, trainable=lambda name: name.startswith("head."))
    assert same(tensors, {name: frozen[name] for name in part})
    assert torch.equal(net.body.weight, START["body.weight"])


def test_a_task_that_builds_random_weights_builds_the_same_ones() -> None:
    part = {name: value for name, value in START.items() if name.startswith("head.")}
    torch.manual_seed(1)
    first, _ = fit(ctx(), part, SGD, DATA)
    torch.manual_seed(2)
    assert same(first, fit(ctx(), part, SGD, DATA)[0])


def test_a_loss_replaces_the_tasks() -> None:
    def double(model: nn.Module, batch: Table) -> Tensor:
        return 2 * F.cross_entropy(model(batch["x"]), batch["y"])

    twice, info = fit(ctx(), START, Training(lr=0.05, momentum=0.0), DATA, loss=double)
    plain, plain_info = fit(ctx(), START, Training(lr=0.1, momentum=0.0), DATA)
    assert close(twice, plain)
    assert info["first_loss"] == pytest.approx(2 * plain_info["first_loss"])


def test_the_moving_average_has_a_short_memory_at_first() -> None:
    path = by_hand(order(2, 4))
    smooth = START
    for step, weights in enumerate(path):
        decay = min(0.2, (1 + step) / (10 + step))  # 0.1, 0.1818…, 0.2, 0.2, …
        smooth = {name: decay * smooth[name] + (1 - decay) * weights[name] for name in weights}
    tensors, _ = fit(ctx(), START, replace(SGD, ema_decay=0.2), DATA)
    assert close(tensors, smooth)
    assert not close(tensors, path[-1], 1e-3)


def test_cosine_starts_at_the_peak_and_ends_one_step_before_zero() -> None:
    found = rates(Training(steps=4, schedule="cosine"))
    assert found == pytest.approx([1, 0.5 * (1 + math.sqrt(0.5)), 0.5, 0.5 * (1 - math.sqrt(0.5))], abs=1e-6)


def test_warm_up_rises_in_equal_steps() -> None:
    assert rates(Training(steps=5, warmup=3)) == pytest.approx([0.25, 0.5, 0.75, 1, 1], abs=1e-6)


def test_clipping_bounds_the_norm_of_the_whole_gradient() -> None:
    once = Training(lr=1.0, momentum=0.0, batch_size=10, max_grad_norm=0.01)
    tensors, _ = fit(ctx(), START, once, DATA)
    moved = torch.cat([(tensors[name] - START[name]).flatten() for name in START]).norm().item()
    assert moved == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains_32_bit_weights(precision: str) -> None:
    half, _ = fit(ctx(), START, replace(SGD, mixed_precision=precision), DATA)
    full, _ = fit(ctx(), START, SGD, DATA)
    assert all(value.dtype == torch.float32 for value in half.values())
    assert close(half, full, 0.05)
    assert not same(half, full)


def test_watch_sees_every_step() -> None:
    path, seen = by_hand(order(2, 4)), []
    fit(ctx(), START, SGD, DATA, watch=lambda step, steps, tensors: seen.append((step, steps, tensors())))
    assert [(step, steps) for step, steps, _ in seen] == [(i, 6) for i in range(1, 7)]
    assert all(same(found, wanted) for (_, _, found), wanted in zip(seen, path, strict=True))


def test_nothing_outside_is_touched() -> None:
    before, start = torch.get_rng_state(), {name: value.clone() for name, value in START.items()}
    make = lambda: nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 3))  # noqa: E731
    net = {"1.weight": torch.zeros(3, 4), "1.bias": torch.zeros(3)}
    first, _ = fit(ctx(Rows(make)), net, SGD, DATA)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(5)
    assert same(first, fit(ctx(Rows(make)), net, SGD, DATA)[0])
    fit(ctx(), start, SGD, DATA)
    assert same(start, START)


def test_buffers_are_kept() -> None:
    make = lambda: nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3))  # noqa: E731
    start = {name: value.clone() for name, value in make().state_dict().items()}
    tensors, _ = fit(ctx(Rows(make)), start, replace(SGD, batch_size=5), DATA)
    assert tensors["0.num_batches_tracked"].item() == 4
    assert not torch.equal(tensors["0.running_mean"], start["0.running_mean"])


def squares(model: nn.Module, batch: Table) -> Tensor:
    return model(batch["x"]).square().sum()


@pytest.mark.parametrize(("lr", "steps"), [(1e3, 60), (3e38, 1)])
def test_divergence_is_named(lr: float, steps: int) -> None:
    """In the losses, and in weights that the last step itself has spoiled."""
    with pytest.raises(InputError, match=f"diverged: loss or weights not finite after {steps} steps; lower lr"):
        fit(ctx(), START, Training(lr=lr, steps=steps), DATA, loss=squares)


def test_no_rows_are_refused() -> None:
    with pytest.raises(InputError, match="no rows"):
        fit(ctx(), START, SGD, {name: column[:0] for name, column in DATA.items()})


@pytest.mark.parametrize(
    "settings",
    [
        {"optimizer": "sdg"},
        {"schedule": "linear"},
        {"mixed_precision": "int8"},
        {"batch_size": 0},
        {"gradient_accumulation_steps": 0},
        {"epochs": 0},
        {"steps": -1},
        {"lr": -0.1},
        {"lr": float("nan")},
        {"weight_decay": -1e-4},
        {"max_grad_norm": float("inf")},
        {"momentum": 1.0},
        {"ema_decay": -0.1},
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict) -> None:
    with pytest.raises(InputError):
        Training(**settings)
