"""Capacities of networks that can be worked out by hand, and the analytic ones against simulation."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from commissure.core.errors import DegenerateError, InputError
from commissure.reservoirs.capacity import (
    information_processing_capacity,
    linear_memory_capacity,
    linear_memory_capacity_reference,
    memory_capacity,
)
from commissure.reservoirs.reservoir import Reservoir


def run(weights, w_in, u, activation="linear"):
    reservoir = Reservoir(weights, inputs=w_in[None], spectral_radius=None, activation=activation, dtype=torch.float64)
    return reservoir(torch.from_numpy(u)[None, :, None])[0][0].numpy()


def line(n):
    return np.diag(np.ones(n - 1), 1), np.eye(n)[0]


def gaussian(n, radius, seed=0):
    rng = np.random.default_rng(seed)
    weights = rng.normal(size=(n, n))
    return weights * radius / np.abs(np.linalg.eigvals(weights)).max(), rng.uniform(-1, 1, n)


def tensors(*arrays):
    return tuple(torch.from_numpy(np.ascontiguousarray(array)) for array in arrays)


def signal(time, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, time)


def test_a_delay_line_remembers_as_many_steps_as_it_has_nodes():
    """Oracle 3: 1 for k = 0 .. 19, about N / T beyond, 20 in all."""
    u = signal(3100)
    found = memory_capacity(run(*line(20), u), u, max_delay=60, warmup=100)
    np.testing.assert_allclose(found[:20], 1, atol=1e-12)
    assert found[20:].mean() == pytest.approx(20 / 3000, rel=0.3)
    exact = linear_memory_capacity(*tensors(*line(20)), max_delay=60)
    assert exact.tolist() == pytest.approx([1.0] * 20 + [0.0] * 41, abs=1e-12)
    assert float(exact.sum()) == pytest.approx(20, abs=1e-12)


@pytest.mark.parametrize("feedback", [0.3, 0.8])
@pytest.mark.parametrize("noise", [0.0, 0.2])
def test_a_ring_with_feedback_remembers_geometrically(feedback, noise):
    """w_in W^k = c^j e_i, j = k // N and i = k mod N, so S = s / (1 - c^2) I, C_k = s c^2j / (s / (1 - c^2) + n^2)."""
    n, variance = 7, 0.4
    weights, w_in = line(n)
    weights[n - 1, 0] = feedback
    found = linear_memory_capacity(*tensors(weights, w_in), max_delay=60, noise=noise, input_variance=variance)
    turns = np.arange(61) // n
    expected = variance * feedback ** (2 * turns) / (variance / (1 - feedback**2) + noise**2)
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    if not noise:
        u = signal(30_000)
        measured = memory_capacity(run(weights, w_in, u), u, max_delay=60, warmup=500)
        np.testing.assert_allclose(measured, expected, atol=0.03)


def test_without_noise_a_linear_network_remembers_as_many_steps_as_its_numerical_rank():
    """Oracle 4: N in exact arithmetic, fewer directions above rounding."""
    small = linear_memory_capacity(*tensors(*gaussian(6, 0.9)), max_delay=400)
    assert float(small.sum()) == pytest.approx(6, abs=1e-6)
    total = float(linear_memory_capacity(*tensors(*gaussian(30, 0.9)), max_delay=400).sum())
    assert total == pytest.approx(round(total), abs=1e-2)
    assert 20 < total < 30


@pytest.mark.parametrize("noise", [1e-3, 1e-2])
def test_the_lyapunov_equation_predicts_the_simulated_memory(noise):
    """Oracle 4: ten runs of 10,000 steps, each capacity adjusted for the 30 weights fitted, within three errors."""
    weights, w_in = gaussian(30, 0.9)
    exact = float(linear_memory_capacity(*tensors(weights, w_in), max_delay=80, noise=noise).sum())
    totals = []
    for seed in range(10):
        u = signal(10_100, seed)
        states = run(weights, w_in, u) + noise * np.random.default_rng(100 + seed).normal(size=(10_100, 30))
        found = memory_capacity(states, u, max_delay=80, warmup=100)
        totals.append((1 - (1 - found) * 9999 / (9999 - 30)).sum())
    error = np.std(totals, ddof=1) / np.sqrt(10)
    assert abs(np.mean(totals) - exact) < 3 * error
    assert error < 0.05
    assert 10 < exact < 25


@pytest.mark.parametrize("noise", [0.0, 1e-3, 0.1])
def test_linear_memory_equals_the_reference(noise):
    given_ = tensors(*gaussian(5, 0.8, seed=2))
    keywords = {"max_delay": 30, "noise": noise, "input_variance": 0.7}
    np.testing.assert_allclose(
        linear_memory_capacity(*given_, **keywords), linear_memory_capacity_reference(*given_, **keywords), atol=1e-10
    )


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(1, 12), radius=st.floats(0.05, 0.95), noise=st.floats(1e-3, 1.0))
def test_noise_never_helps_and_the_total_is_bounded(seed, n, radius, noise):
    weights, w_in = tensors(*gaussian(n, radius, seed))
    exact = linear_memory_capacity(weights, w_in, max_delay=300, noise=noise)
    worse = linear_memory_capacity(weights, w_in, max_delay=300, noise=2 * noise)
    assert (worse <= exact + 1e-12).all()
    assert float(exact.min()) >= 0
    assert float(exact.max()) <= 1
    assert float(exact.sum()) <= n
    order = torch.from_numpy(np.random.default_rng(seed).permutation(n))
    permuted = linear_memory_capacity(weights[order][:, order], w_in[order], max_delay=300, noise=noise)
    np.testing.assert_allclose(permuted, exact, atol=1e-9)


def test_linear_memory_is_differentiable():
    weights, w_in = (part.requires_grad_() for part in tensors(*gaussian(4, 0.7)))

    def total(weights, w_in):
        return linear_memory_capacity(weights, w_in, max_delay=20, noise=0.1).sum()

    assert torch.autograd.gradcheck(total, (weights, w_in), atol=1e-6)


def test_processing_capacity_of_a_linear_network_is_all_of_degree_one():
    u = signal(20_200)
    found = information_processing_capacity(run(*gaussian(6, 0.6), u), u, max_delays=[60, 10, 6], warmup=200)
    by_degree = found.by_degree()
    assert by_degree[0] == pytest.approx(6, abs=0.1)
    assert by_degree[1:].tolist() == [0, 0]
    assert found.threshold == pytest.approx(27.9 / 20_000, rel=0.01)  # chi-squared, 6 degrees of freedom, 1e-4


@pytest.mark.parametrize("gain", [0.3, 1.5])
def test_processing_capacity_of_a_nonlinear_network_is_bounded(gain):
    """At most the number of nodes; odd degrees only, where nothing breaks the symmetry u -> -u."""
    weights, w_in = gaussian(6, 0.6)
    u = signal(20_200, 1)
    states = run(weights, gain * w_in, u, "tanh")
    found = information_processing_capacity(states, u, max_delays=[30, 10, 8], warmup=200)
    by_degree = found.by_degree()
    assert by_degree[1] == 0
    assert by_degree[2] > 0.02
    assert 5 < found.total < 6 * 1.02
    shifted = information_processing_capacity(
        run(weights, gain * w_in, u + 0.5, "tanh"), u, max_delays=[30, 10, 8], warmup=200
    )
    assert shifted.by_degree()[1] > 0.1


def test_each_product_of_polynomials_is_a_target_once():
    """Against the list of all degrees per delay."""
    u = signal(500)
    found = information_processing_capacity(np.stack([u, u**2], 1), u, max_delays=[4, 3, 2])
    expected = set()
    for total, longest in ((1, 4), (2, 3), (3, 2)):
        for degrees in product(range(total + 1), repeat=longest + 1):
            if sum(degrees) == total:
                expected.add(tuple((delay, degree) for delay, degree in enumerate(degrees) if degree))
    assert len(found.targets) == len(set(found.targets))
    assert set(found.targets) == expected


def test_a_state_that_is_one_product_is_found_alone():
    u = signal(4000)
    p2 = (3 * u**2 - 1) / 2
    states = np.zeros((4000, 1))
    states[3:, 0] = p2[2:-1] * u[:-3]
    found = information_processing_capacity(states, u, max_delays=[4, 4, 4])
    assert found.capacities.max() == pytest.approx(1, abs=1e-12)
    assert found.targets[int(found.capacities.argmax())] == ((1, 2), (3, 1))
    assert found.total == pytest.approx(1, abs=0.02)


def test_unrelated_targets_pass_the_threshold_as_rarely_as_stated():
    states = np.random.default_rng(1).normal(size=(3000, 5))
    found = information_processing_capacity(states, signal(3000), max_delays=[200, 60], significance=0.02)
    share = (found.capacities > 0).mean()
    assert abs(share - 0.02) < 4 * np.sqrt(0.02 / len(found.targets))


def test_repeated_and_constant_states_add_nothing():
    u = signal(2000)
    states = run(*gaussian(4, 0.5), u)
    more = np.concatenate([states, states[:, :2], np.ones((2000, 1))], 1)
    np.testing.assert_allclose(
        memory_capacity(more, u, max_delay=5), memory_capacity(states, u, max_delay=5), atol=1e-10
    )


@pytest.mark.parametrize(
    ("call", "argument"),
    [
        (lambda x, u: memory_capacity(x, u, max_delay=-1), "max_delay"),
        (lambda x, u: memory_capacity(x, u[:-1], max_delay=2), "u"),
        (lambda x, u: memory_capacity(x, u, max_delay=97), "states"),
        (lambda x, u: memory_capacity(x[:, 0], u, max_delay=2), "states"),
        (lambda x, u: information_processing_capacity(x, u, max_delays=[]), "max_delays"),
        (lambda x, u: information_processing_capacity(x, 3 * u, max_delays=[2]), "u"),
        (lambda x, u: information_processing_capacity(x, u, max_delays=[2], significance=0), "significance"),
        (lambda x, u: memory_capacity(x, u, max_delay=2.0), "max_delay"),
        (lambda x, u: memory_capacity(x, u, max_delay=2, warmup=-1), "warmup"),
        (lambda x, u: memory_capacity("x", u, max_delay=2), "states"),
        (lambda x, u: memory_capacity(x, np.append(u[1:], np.nan), max_delay=2), "u[99]"),
        (lambda x, u: information_processing_capacity(x, u, max_delays=[2, True]), "max_delays[1]"),
        (lambda x, u: information_processing_capacity(x, u, max_delays=2), "max_delays"),
        (lambda x, u: information_processing_capacity(x, u, max_delays=[2], significance="0.1"), "significance"),
        (lambda x, u: linear_memory_capacity(np.eye(2) / 2, torch.zeros(2), max_delay=1), "weights"),
        (lambda x, u: linear_memory_capacity(torch.eye(2), torch.zeros(2).double(), max_delay=1), "input_weights"),
        (lambda x, u: linear_memory_capacity(torch.eye(2) / 2, torch.zeros(2), max_delay=1.5), "max_delay"),
        (lambda x, u: linear_memory_capacity(torch.eye(2) / 2, torch.zeros(2), max_delay=1, noise="1"), "noise"),
        (lambda x, u: linear_memory_capacity(torch.zeros(2, 3), torch.zeros(2), max_delay=1), "weights"),
        (lambda x, u: linear_memory_capacity(torch.zeros(2, 2), torch.zeros(3), max_delay=1), "input_weights"),
        (lambda x, u: linear_memory_capacity(torch.zeros(2, 2), torch.zeros(2), max_delay=1, noise=-1), "noise"),
    ],
)
def test_bad_input_is_refused_by_name(call, argument):
    u = signal(100)
    with pytest.raises(InputError) as raised:
        call(np.stack([u, u**2], 1), u)
    assert raised.value.argument == argument


def test_what_is_not_defined_is_refused():
    with pytest.raises(DegenerateError, match=r"spectral radius 1\.1"):
        linear_memory_capacity(1.1 * torch.eye(2), torch.ones(2), max_delay=1)
    with pytest.raises(DegenerateError, match="without variance"):
        memory_capacity(np.random.default_rng(0).normal(size=(50, 2)), np.ones(50), max_delay=2)
