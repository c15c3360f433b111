"""Exact identities of the methods that share a global model in another way, or only a part of it."""

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch
import toy
from torch import Tensor

from warmfed.algorithms.fedbsd import distance
from warmfed.algorithms.fedopt import ServerOptimizer
from warmfed.algorithms.moon import contrast
from warmfed.algorithms.scaffold import Control, Server
from warmfed.algorithms.shared.base import Model
from warmfed.core import ClientContext
from warmfed.core.messages import tensors_of
from warmfed.core.rng import stream
from warmfed.core.tensors import Tensors, mean, only, sub
from warmfed.core.training import Training
from warmfed.fit import fit
from warmfed.run import run
from warmfed.transports.in_process import InProcess
from warmfed.utils.errors import InputError

ASIDE = "abcd"
quick = toy.quick
play = functools.cache(functools.partial(toy.play, task=toy.LAYERED))


def local(site: str = "c", purpose: str = "identity") -> ClientContext:
    return ClientContext(toy.LAYERED, toy.SITES[site], stream(purpose), site, toy.PROMPTS)


def weights(*key: object) -> Tensors:
    return toy.LAYERED.init(stream(*key))


def close(a: Tensors, b: Tensors, tolerance: float = 1e-6) -> bool:
    return a.keys() == b.keys() and all(torch.allclose(a[name], b[name], atol=tolerance) for name in a)


def tapped(algorithm: Any) -> toy.Tap:
    """Return the transport of a finished run, with all its messages."""
    tap = toy.Tap(InProcess(toy.workers(algorithm, task=toy.LAYERED)))
    list(run(algorithm, toy.central(task=toy.LAYERED), tap, evaluate="never"))
    return tap


def of_head(name: str) -> bool:
    return name.startswith("head.")


def of_body(name: str) -> bool:
    return name.startswith("body.")


# FedBSD


def test_fedbsd_of_no_weight_from_the_global_backbone_is_fedrep() -> None:
    bsd, rep = play(quick("fedbsd", weight=0.0, start="global")), play(quick("fedrep"))
    assert toy.same(bsd.server.model, rep.server.model)
    for site in ASIDE:
        assert toy.same(only(bsd.transport.state(site).model, of_head), rep.transport.state(site).model)
    assert not toy.same(play(quick("fedbsd", start="global")).server.model, rep.server.model)
    assert not toy.same(play(quick("fedbsd", weight=0.0)).server.model, rep.server.model)


def test_fedbsds_student_starts_alike_before_it_has_a_backbone_of_its_own() -> None:
    first, other = (play(quick("fedbsd", rounds=1, start=start)) for start in ("own", "global"))
    assert toy.same(first.server.model, other.server.model)


def test_fedbsds_teacher_draws_the_sites_own_backbone_to_the_global_one() -> None:
    """λ → ∞: from far apart, the student's features become the teacher's."""
    far, training = weights("student"), Training(lr=0.05, epochs=40, batch_size=12, max_grad_norm=1.0)
    down = Model(only(weights("teacher"), of_body))

    def gap(weight: float) -> float:
        algorithm = quick("fedbsd", weight=weight, distance="mse", local=training)
        reply = algorithm.train(down, Model(far), local())
        both = (toy.LAYERED.features({**far, **model}, toy.SITES["c"]["train"]) for model in (down.model, reply.message.model))
        return distance(*both, "mse", 1.0).item()

    assert gap(1000.0) < 0.1 * gap(0.0)
    assert gap(1000.0) < gap(1.0) < gap(0.0)


@pytest.mark.parametrize("start", ["own", "global"])
def test_only_fedbsds_backbone_crosses(start: str) -> None:
    for _, _, down, _, reply in tapped(quick("fedbsd", start=start)).seen:
        crossing = {*tensors_of(down), *tensors_of(reply.message)}
        assert crossing == {f"model/{name}" for name in weights("names") if of_body(name)}


def test_the_distances_are_what_they_say() -> None:
    student, teacher = torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([[4.0, 3.0], [0.0, 2.0]])
    assert distance(student, teacher, "mse", 9.0).item() == pytest.approx((1 + 1 + 1 + 4) / 4)
    assert distance(student, teacher, "cosine", 9.0).item() == pytest.approx((1 - 0.96 + 1) / 2)
    p, q = (teacher / 2).softmax(-1), (student / 2).softmax(-1)
    assert distance(student, teacher, "kl", 2.0).item() == pytest.approx(4 * (p * (p / q).log()).sum().item() / 2)


# the other parts that are shared


def test_fedrep_fits_the_head_and_then_the_body_under_it() -> None:
    start, algorithm, ctx = weights("start"), quick("fedrep"), local()
    down, state = Model(only(start, of_body)), Model(only(start, of_head))
    head, _ = fit(ctx, start, toy.TRAINING, toy.SITES["c"]["train"], trainable=of_head)
    assert toy.same(only(head, of_body), down.model)
    both, _ = fit(ctx, head, toy.TRAINING, toy.SITES["c"]["train"], trainable=of_body)
    reply = algorithm.train(down, state, local())
    assert toy.same(reply.state.model, only(head, of_head))
    assert toy.same(reply.message.model, only(both, of_body))


def test_lg_fedavg_that_keeps_nothing_is_fedavg_and_that_keeps_all_is_fedper() -> None:
    shared = play(quick("lg-fedavg", private="no such layer"))
    assert toy.same(shared.server.model, play(quick("fedavg")).model)
    alone, other = (play(quick(name, private="")) for name in ("lg-fedavg", "fedper"))
    assert all(toy.same(alone.personal(site), other.personal(site)) for site in ASIDE)


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("lg-fedavg", {"body.1.weight", "body.1.bias", "body.2.weight", "body.2.bias"}),
        ("fedbn", {"body.2.weight", "body.2.bias"}),
        ("fedper", {"head.weight", "head.bias"}),
    ],
)
def test_what_a_site_keeps_is_its_own_and_the_rest_is_everyones(name: str, kept: set[str]) -> None:
    outcome = play(quick(name))
    a, b = outcome.personal("a"), outcome.personal("b")
    assert {tensor for tensor in a if not torch.equal(a[tensor], b[tensor])} == kept
    assert outcome.server.model.keys() == a.keys() - kept


def test_fedbabu_never_trains_the_head_before_the_end() -> None:
    outcome, start = play(quick("fedbabu")), toy.LAYERED.init(stream(0, "init"))
    assert toy.same(only(outcome.model, of_head), only(start, of_head))
    assert not toy.same(outcome.model, start)
    up = [tensors_of(reply.message).keys() for stage, _, _, _, reply in tapped(quick("fedbabu")).seen if stage == "train"]
    assert all(names == {f"model/{name}" for name in start if of_body(name)} for names in up)
    assert not any(torch.equal(outcome.personal(site)["head.weight"], start["head.weight"]) for site in ASIDE)


def test_fedbabu_without_a_head_is_fedavg_with_fine_tuning() -> None:
    plain, tuned = play(quick("fedbabu", head="no such layer")), play(quick("fedavg-finetune"))
    assert toy.same(plain.model, tuned.model)
    assert all(toy.same(plain.personal(site), tuned.personal(site)) for site in ASIDE)


def test_fedrods_generic_model_is_fedavgs_where_classes_are_balanced() -> None:
    even = {site: toy.SITES[site] for site in "ad"}
    rod, plain = (toy.play(quick(name), task=toy.LAYERED, sites=even) for name in ("fedrod", "fedavg"))
    assert close(rod.model, plain.model, 1e-5)
    assert not close(play(quick("fedrod")).model, play(quick("fedavg")).model, 1e-5)


def test_fedrods_personal_head_is_added_and_never_reaches_the_generic_model() -> None:
    rod, other = play(quick("fedrod")), play(quick("fedrod", personal=Training(lr=0.001, batch_size=5)))
    assert toy.same(rod.model, other.model)
    for site in ASIDE:
        apart = sub(rod.personal(site), rod.model)
        assert close(only(apart, of_head), rod.transport.state(site).model)
        assert not any(value.any() for value in only(apart, of_body).values())
        assert not toy.same(rod.personal(site), other.personal(site))


def test_a_model_without_the_part_in_question_is_refused() -> None:
    for name in ("fedrep", "fedbabu", "fedbsd"):
        with pytest.raises(InputError, match="no trainable tensors"):
            toy.play(quick(name))
    with pytest.raises(InputError, match="normalisation layers at the sites, but this model has none"):
        toy.play(quick("fedbn"))


# global models by other means


def test_a_server_optimizer_of_plain_steps_is_fedavg() -> None:
    plain = play(quick("fedavgm", server=ServerOptimizer("momentum", beta1=0.0)))
    assert close(plain.model, play(quick("fedavg")).model)
    assert not close(play(quick("fedavgm")).model, play(quick("fedavg")).model)


def test_the_first_round_of_momentum_is_fedavg() -> None:
    assert close(play(quick("fedavgm", rounds=1)).model, play(quick("fedavg", rounds=1)).model)


def scalar(value: float) -> dict[str, Tensor]:
    return {"x": torch.tensor([value], dtype=torch.float64)}


@pytest.mark.parametrize(
    ("settings", "first", "second"),
    [
        (ServerOptimizer("momentum", 0.1, 0.5), (3, 0.5), (1, 1)),
        # v = 0.75·0.01 + 0.25·9, then 0.75·v + 0.25·1
        (ServerOptimizer("adam", 0.1, 0.5, 0.75, 0.1), (1.5, 0.25), (2.2575, 1.943125)),
        # v = 0.01 + 0.25·9 while Δ² is above it, then 2.26 - 0.25·1 as it is below
        (ServerOptimizer("yogi", 0.1, 0.5, 0.75, 0.1), (1.5, 0.25), (2.26, 2.01)),
    ],
    ids=["momentum", "adam", "yogi"],
)
def test_two_steps_of_each_server_optimizer(settings: ServerOptimizer, first: tuple, second: tuple) -> None:
    """Δ is 3, then -1."""
    server, x, tau = settings.begin(scalar(0.0)), 0.0, 0.0 if settings.name == "momentum" else 0.1
    for delta, m, v in zip((3.0, -1.0), first, second, strict=True):
        server, x = settings.step(server, scalar(delta)), x + 0.1 * m / (v**0.5 + tau)
        assert server.first["x"].item() == pytest.approx(m)
        assert settings.name == "momentum" or server.second["x"].item() == pytest.approx(v)
        assert server.model["x"].item() == pytest.approx(x)


@pytest.mark.parametrize("name", ["adam", "yogi"])
def test_without_memory_adaptive_steps_have_one_length(name: str) -> None:
    settings = ServerOptimizer(name, 0.1, 0.0, 0.0, 1e-9)
    start, change = weights("start"), weights("change")
    step = sub(settings.step(settings.begin(start), change).model, start)
    assert close(step, {key: 0.1 * value.sign() for key, value in change.items()}, 1e-3)


def test_fednova_of_equal_steps_is_fedavg() -> None:
    alike, apart = Training(lr=0.03, batch_size=12, steps=3), Training(lr=0.03, batch_size=12)
    assert close(play(quick("fednova", local=alike)).model, play(quick("fedavg", local=alike)).model)
    assert not close(play(quick("fednova", local=apart)).model, play(quick("fedavg", local=apart)).model, 1e-4)


def test_fednova_gives_a_site_its_share_however_many_steps_it_takes() -> None:
    """x + Σp_i·K_i · Σp_i·(y_i - x)/K_i, written out: 2, 3, 3 and 3 steps of plain sgd."""
    training, start = Training(lr=0.03, momentum=0.0, batch_size=12), toy.LAYERED.init(stream(0, "init"))
    outcome = play(quick("fednova", local=training, rounds=1))
    share, steps = (
        dict(zip(ASIDE, (24 / 120, 28 / 120, 32 / 120, 36 / 120), strict=True)),
        dict(zip(ASIDE, (2, 3, 3, 3), strict=True)),
    )
    wanted = dict(start)
    for site, data in toy.SITES.items():
        model, _ = fit(ClientContext(toy.LAYERED, data, stream(0, "train", 0, site)), start, training, data["train"])
        length = sum(share[s] * steps[s] for s in ASIDE)
        wanted = {name: wanted[name] + length * share[site] * (model[name] - start[name]) / steps[site] for name in start}
    assert close(outcome.model, wanted)
    assert outcome.rounds[-1].aggregate["effective_steps"] == pytest.approx(2.8)


@pytest.mark.parametrize(("momentum", "accumulated"), [(0.0, 3.0), (0.9, 1 + 1.9 + 2.71)])
def test_accumulated_gradients_are_how_far_a_constant_one_goes(momentum: float, accumulated: float) -> None:
    training = Training(lr=0.5, momentum=momentum, batch_size=12)
    start, data = weights("start"), toy.SITES["c"]["train"]
    model, _ = fit(local(), start, training, data, correct=lambda name, gradient: torch.ones_like(gradient))
    assert training.accumulated(32) == pytest.approx(accumulated)
    assert close(model, {name: value - 0.5 * accumulated for name, value in start.items()})


@pytest.mark.parametrize("name", ["scaffold", "fednova"])
@pytest.mark.parametrize("training", [Training(optimizer="adam"), Training(schedule="cosine"), Training(warmup=3)])
def test_steps_that_are_no_sum_of_gradients_are_refused(name: str, training: Training) -> None:
    with pytest.raises(InputError, match="needs sgd with a constant lr"):
        quick(name, local=training)


def test_moon_without_its_contrast_or_a_previous_model_is_fedavg() -> None:
    assert toy.same(play(quick("moon", mu=0.0)).model, play(quick("fedavg")).model)
    assert toy.same(play(quick("moon", rounds=1)).model, play(quick("fedavg", rounds=1)).model)
    assert not toy.same(play(quick("moon")).model, play(quick("fedavg")).model)


def test_the_contrast_is_between_the_global_and_the_last_model() -> None:
    now, near, far = (torch.tensor([row]) for row in ([1.0, 0.0], [3.0, 0.0], [0.0, 2.0]))
    e = torch.e
    assert contrast(now, near, far, 1.0).item() == pytest.approx(-torch.log(torch.tensor(e / (e + 1))).item())
    assert contrast(now, near, near, 0.5).item() == pytest.approx(0.6931472)
    assert contrast(now, near, far, 0.1).item() < 1e-4 < 9 < contrast(now, far, near, 0.1).item()


# SCAFFOLD: each of these catches defects that public implementations had


def scaffold_state() -> tuple[Server, Control]:
    """A server and a site in the middle of a run, whose control variates are not zero."""
    c, c_i = ({name: 0.1 * value for name, value in weights(key).items()} for key in ("c", "c_i"))
    return Server(weights("start"), c), Control(c_i)


def test_one_full_step_of_scaffold_is_the_corrected_gradient() -> None:
    down, state = scaffold_state()
    once = Training(lr=0.1, momentum=0.0, batch_size=10**6)
    gradient = {
        name: -10 * v for name, v in sub(fit(local(), down.model, once, toy.SITES["c"]["train"])[0], down.model).items()
    }
    reply = quick("scaffold", local=once).train(down, state, local())
    wanted = {n: -0.1 * (gradient[n] + down.control[n] - state.control[n]) for n in gradient}
    assert close(reply.message.model, wanted)
    assert close(reply.state.control, gradient, 1e-5)  # c_i⁺ of option I and II are one here


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_scaffolds_new_control_is_the_mean_gradient(momentum: float) -> None:
    """Of all K steps, not of an epoch's; with momentum, weighted by how much each moved the weights."""
    down, state = scaffold_state()
    training = Training(lr=0.05, momentum=momentum, epochs=2, batch_size=12)
    seen: dict[str, list[Tensor]] = {}

    def spy(name: str, gradient: Tensor) -> Tensor:
        seen.setdefault(name, []).append(gradient.clone())
        return gradient + down.control[name] - state.control[name]

    fit(local(), down.model, training, toy.SITES["c"]["train"], correct=spy)
    reply = quick("scaffold", local=training).train(down, state, local())
    pushes = [sum(momentum**j for j in range(6 - step)) for step in range(6)]
    wanted = {n: sum(p * g for p, g in zip(pushes, gs, strict=True)) / sum(pushes) for n, gs in seen.items()}
    assert close(reply.state.control, wanted, 1e-5)
    assert close(reply.message.control, sub(wanted, state.control), 1e-5)


@pytest.mark.parametrize("sample", [1.0, 0.5])
def test_scaffolds_server_control_is_the_mean_of_all_sites(sample: float) -> None:
    outcome = play(quick("scaffold", rounds=4, client_fraction=sample))
    none = {name: torch.zeros_like(value) for name, value in outcome.server.control.items()}
    states = [outcome.transport.state(site) for site in ASIDE]
    assert close(outcome.server.control, mean((none if s is None else s.control, 1.0) for s in states))
    assert outcome.server.control["head.weight"].abs().max() > 0.01


# FedDyn


@pytest.mark.parametrize("sample", [1.0, 0.5])
def test_feddyns_drift_is_the_mean_of_the_sites_gradients(sample: float) -> None:
    outcome = play(quick("feddyn", rounds=4, client_fraction=sample, alpha=0.1))
    none = {name: torch.zeros_like(value) for name, value in outcome.server.drift.items()}
    states = [outcome.transport.state(site) for site in ASIDE]
    assert close(outcome.server.drift, mean((none if s is None else s.gradient, 1.0) for s in states))
    assert outcome.server.drift["head.weight"].abs().max() > 0.001


def test_feddyns_first_round_is_fedproxs_and_goes_twice_as_far() -> None:
    even = {site: {**toy.SITES[site], "train": {k: v[:24] for k, v in toy.SITES[site]["train"].items()}} for site in ASIDE}
    start = toy.LAYERED.init(stream(0, "init"))
    dyn, prox = (
        toy.play(quick(name, rounds=1, **{key: 0.3}), task=toy.LAYERED, sites=even).model
        for name, key in (("feddyn", "alpha"), ("fedprox", "mu"))
    )
    assert close(dyn, {name: start[name] + 2 * (prox[name] - start[name]) for name in start})


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("feddyn", {"alpha": 0.0}, "alpha must be above 0"),
        ("fedbsd", {"start": "own "}, "start must be one of own, global"),
        ("fedbsd", {"distance": "l2"}, "distance must be one of kl, mse, cosine"),
    ],
)
def test_settings_that_cannot_be_are_refused(name: str, settings: dict, words: str) -> None:
    with pytest.raises(InputError, match=words):
        quick(name, **settings)
    with pytest.raises(InputError, match="momentum, adam, yogi; got 'adagrad'"):
        replace(ServerOptimizer(), name="adagrad")
