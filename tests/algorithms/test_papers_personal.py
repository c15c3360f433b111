"""pFedMe, Per-FedAvg and FedAMP against implementations in NumPy, on quadratics (`quadratic.py`)."""

from typing import Any

import numpy as np
import pytest
import toy
from quadratic import Quadratic, site

from warmfed.algorithms.fedamp import FedAMP
from warmfed.algorithms.perfedavg import PerFedAvg
from warmfed.algorithms.pfedme import PFedMe
from warmfed.core.training import Training

START = np.array([1.0, -2.0])
CENTRES = {"a": np.array([3.0, 0.5]), "b": np.array([-1.0, 2.0]), "c": np.array([0.0, 4.0])}
CURVATURES = {"a": np.array([0.5, 1.0]), "b": np.array([2.0, 0.25]), "c": np.array([1.0, 1.5])}
ROWS = {"a": 6, "b": 3, "c": 9}
TASK = Quadratic((1.0, -2.0))
SITES = {name: site(CENTRES[name].tolist(), CURVATURES[name].tolist(), ROWS[name]) for name in "abc"}
STEPS = {"a": 2, "b": 1, "c": 3}
"""Batches of three rows in one pass."""


def play(algorithm: Any) -> toy.Outcome:
    return toy.play(algorithm, task=TASK, sites=SITES, generator=None, evaluate="never")


def slope(name: str, w: np.ndarray) -> np.ndarray:
    return CURVATURES[name] * (w - CENTRES[name])


def weighted(models: dict[str, np.ndarray]) -> np.ndarray:
    return sum(ROWS[name] / 18 * w for name, w in models.items())


def test_pfedme_is_its_algorithm_1() -> None:
    eta, lam, beta, lr, inner, rounds, passes = 0.03, 4.0, 1.5, 0.1, 3, 3, 2
    local = Training(lr=lr, momentum=0.0, steps=inner, batch_size=3)
    found = play(PFedMe(rounds=rounds, local=local, passes=passes, lam=lam, eta=eta, beta=beta))
    w, theta = START, dict.fromkeys("abc", START)
    for _ in range(rounds):
        sent = {}
        for name in "abc":
            own, theta[name] = w, w
            for _ in range(passes * STEPS[name]):
                for _ in range(inner):
                    theta[name] = theta[name] - lr * (slope(name, theta[name]) + lam * (theta[name] - own))
                own = own - eta * lam * (own - theta[name])
            sent[name] = own
        w = (1 - beta) * w + beta * weighted(sent)
    assert found.model["w"].numpy() == pytest.approx(w, abs=1e-12)
    for name in "abc":
        assert found.personal(name)["w"].numpy() == pytest.approx(theta[name], abs=1e-12)


def test_pfedmes_inner_problem_is_the_moreau_envelopes() -> None:
    """Solved to its end, θ̃ = (A + λI)⁻¹(A·x̄ + λ·w)."""
    local = Training(lr=0.2, momentum=0.0, steps=300, batch_size=9)
    found = play(PFedMe(rounds=1, local=local, passes=1, lam=2.0, eta=0.1))
    for name in "abc":
        a = CURVATURES[name]
        assert found.personal(name)["w"].numpy() == pytest.approx((a * CENTRES[name] + 2.0 * START) / (a + 2.0), abs=1e-9)


@pytest.mark.parametrize("variant", ["first-order", "hessian-free", "exact"])
def test_per_fedavg_is_its_algorithm_1(variant: str) -> None:
    """On a quadratic the difference of gradients is the Hessian's product itself."""
    alpha, beta, rounds = 0.2, 0.1, 3
    local = Training(lr=beta, momentum=0.0, epochs=2, batch_size=3)
    own = Training(lr=alpha, momentum=0.0, steps=1, batch_size=9)
    found = play(PerFedAvg(rounds=rounds, local=local, alpha=alpha, variant=variant, delta=0.01, personal=own))
    w = START
    for _ in range(rounds):
        sent = {}
        for name in "abc":
            sent[name] = w
            for _ in range(2 * STEPS[name]):
                there = sent[name] - alpha * slope(name, sent[name])
                curve = 1 if variant == "first-order" else 1 - alpha * CURVATURES[name]
                sent[name] = sent[name] - beta * curve * slope(name, there)
        w = weighted(sent)
    assert found.model["w"].numpy() == pytest.approx(w, abs=1e-9)
    for name in "abc":
        assert found.personal(name)["w"].numpy() == pytest.approx(w - alpha * slope(name, w), abs=1e-9)


@pytest.mark.parametrize("attention", ["distance", "cosine"])
def test_fedamp_is_its_algorithm_1(attention: str) -> None:
    sigma, alpha, lam, itself, lr, rounds = 20.0, 5.0, 2.0, 0.3, 0.1, 4
    local = Training(lr=lr, momentum=0.0, epochs=2, batch_size=3)
    settings = {"sigma": sigma, "alpha": alpha, "lam": lam, "itself": itself, "attention": attention}
    found = play(FedAMP(rounds=rounds, local=local, **settings))
    held = lam / alpha if attention == "distance" else lam
    w, u = dict.fromkeys("abc", START), dict.fromkeys("abc", START)
    for _ in range(rounds):
        for name in "abc":
            for _ in range(2 * STEPS[name]):
                w[name] = w[name] - lr * (slope(name, w[name]) + held * (w[name] - u[name]))
        u = {}
        for i in "abc":
            if attention == "distance":
                xi = {j: alpha * np.exp(-np.sum((w[i] - w[j]) ** 2) / sigma) / sigma for j in "abc" if j != i}
                xi[i] = 1 - sum(xi.values())
            else:
                cosine = {j: w[i] @ w[j] / np.linalg.norm(w[i]) / np.linalg.norm(w[j]) for j in "abc" if j != i}
                total = sum(np.exp(sigma * c) for c in cosine.values())
                xi = {j: (1 - itself) * np.exp(sigma * c) / total for j, c in cosine.items()} | {i: itself}
            u[i] = sum(xi[j] * w[j] for j in "abc")
    for name in "abc":
        assert found.personal(name)["w"].numpy() == pytest.approx(w[name], abs=1e-9)
        assert found.server.cloud[name]["w"].numpy() == pytest.approx(u[name], abs=1e-9)


def test_fedamps_local_problem_is_the_proximal_one() -> None:
    """Solved to its end, w_i = (A + λ/α·I)⁻¹(A·x̄ + λ/α·u_i)."""
    found = play(FedAMP(rounds=1, local=Training(lr=0.2, momentum=0.0, steps=300), attention="distance", alpha=2.0, lam=3.0))
    for name in "abc":
        a = CURVATURES[name]
        assert found.personal(name)["w"].numpy() == pytest.approx((a * CENTRES[name] + 1.5 * START) / (a + 1.5), abs=1e-9)
