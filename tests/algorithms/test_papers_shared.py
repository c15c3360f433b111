"""SCAFFOLD and FedDyn against implementations in NumPy, on quadratics with a known common minimum."""

import numpy as np
import pytest
import quadratic
import toy

from warmfed.algorithms.fedavg import FedAvg
from warmfed.algorithms.feddyn import FedDyn
from warmfed.algorithms.scaffold import Scaffold
from warmfed.core.training import Training

CENTRE = {"a": [0.0, 3.0], "b": [1.0, -1.0], "c": [4.0, 0.5], "d": [-2.0, 2.0]}
CURVATURE = {"a": [1.0, 0.2], "b": [0.5, 1.0], "c": [0.1, 0.6], "d": [2.0, 0.3]}
B, A = ({site: np.array(row) for site, row in rows.items()} for rows in (CENTRE, CURVATURE))
SITES = {site: quadratic.site(CENTRE[site], CURVATURE[site], 3) for site in CENTRE}
START = (5.0, -3.0)
MINIMUM = sum(A[s] * B[s] for s in SITES) / sum(A.values())
"""Of Σ ½·(w - b_i)ᵀA_i(w - b_i)."""


def trained(algorithm: object) -> toy.Outcome:
    return toy.play(algorithm, task=quadratic.Quadratic(START), sites=SITES, evaluate="never")


def points(outcome: toy.Outcome) -> np.ndarray:
    """The server's model after each round, [rounds, 2]."""
    return np.stack([record.server.model["w"].numpy() for record in outcome.rounds])


def steps(count: int, lr: float = 0.1) -> Training:
    return Training(lr=lr, momentum=0.0, steps=count)


@pytest.mark.parametrize("sample", [1.0, 0.5])
def test_scaffold_is_algorithm_1_option_ii(sample: float) -> None:
    k, lr_l, lr_g = 5, 0.1, 0.8
    outcome = trained(Scaffold(rounds=12, client_fraction=sample, local=steps(k, lr_l), server_lr=lr_g))
    x, c, c_i = np.array(START), np.zeros(2), {site: np.zeros(2) for site in SITES}
    for record in outcome.rounds:
        dy, dc = [], []
        for i in record.cohort:
            y = x.copy()
            for _ in range(k):
                g = A[i] * (y - B[i])
                y = y - lr_l * (g - c_i[i] + c)
            c_plus = c_i[i] - c + (x - y) / (k * lr_l)
            dy.append(y - x)
            dc.append(c_plus - c_i[i])
            c_i[i] = c_plus
        x = x + lr_g / len(record.cohort) * sum(dy)
        c = c + len(record.cohort) / len(SITES) * (sum(dc) / len(record.cohort))
        np.testing.assert_allclose(record.server.model["w"].numpy(), x, rtol=0, atol=1e-12)
        np.testing.assert_allclose(record.server.control["w"].numpy(), c, rtol=0, atol=1e-12)
    for site in SITES:
        state = outcome.transport.state(site)
        np.testing.assert_allclose(np.zeros(2) if state is None else state.control["w"].numpy(), c_i[site], rtol=0, atol=1e-12)


@pytest.mark.parametrize("sample", [1.0, 0.5])
def test_feddyn_is_algorithm_1(sample: float) -> None:
    """Its local problem is quadratic too, and its minimum known: (A + α)·θ = A·b + ∇L_k(θ_k) + α·θ^{t-1}."""
    alpha = 0.4
    outcome = trained(FedDyn(rounds=6, client_fraction=sample, local=steps(130, 0.4), alpha=alpha))
    theta, h, gradient = np.array(START), np.zeros(2), {site: np.zeros(2) for site in SITES}
    for record in outcome.rounds:
        solved = {i: (A[i] * B[i] + gradient[i] + alpha * theta) / (A[i] + alpha) for i in record.cohort}
        for i, theta_i in solved.items():
            gradient[i] = gradient[i] - alpha * (theta_i - theta)
            np.testing.assert_allclose(gradient[i], A[i] * (theta_i - B[i]), atol=1e-12)  # it is the gradient there
        h = h - alpha / len(SITES) * sum(theta_i - theta for theta_i in solved.values())
        theta = sum(solved.values()) / len(solved) - h / alpha
        np.testing.assert_allclose(record.server.model["w"].numpy(), theta, rtol=0, atol=1e-9)
        np.testing.assert_allclose(record.server.drift["w"].numpy(), h, rtol=0, atol=1e-9)


def test_both_reach_the_common_minimum_where_fedavg_stays_aside() -> None:
    """FedAvg's fixed point is known too: Σ (1 - (1 - ηA_i)^K)·(b_i - w) = 0."""
    k, lr = 5, 0.3
    pull = {site: 1 - (1 - lr * A[site]) ** k for site in SITES}
    aside = sum(pull[s] * B[s] for s in SITES) / sum(pull.values())
    np.testing.assert_allclose(points(trained(FedAvg(rounds=25, local=steps(k, lr))))[-1], aside, atol=1e-9)
    assert np.abs(aside - MINIMUM).max() > 0.3
    np.testing.assert_allclose(points(trained(Scaffold(rounds=60, local=steps(k, lr))))[-1], MINIMUM, atol=1e-6)
    np.testing.assert_allclose(points(trained(FedDyn(rounds=60, local=steps(k, lr), alpha=0.8)))[-1], MINIMUM, atol=1e-6)
