"""Lyapunov exponents against eigenvalues, determinants and full Jacobians; regimes of networks that are understood."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from commissure.core.errors import InputError
from commissure.core.rng import generator
from commissure.reservoirs.dynamics import lyapunov, lyapunov_reference, regime
from commissure.reservoirs.reservoir import Reservoir

RNG = np.random.default_rng(0)
GAUSSIAN = RNG.normal(size=(30, 30)) / np.sqrt(30)
NOISE = RNG.uniform(-1, 1, (3000, 1))
# Exponents far apart settle fast, so that random and canonical first tangents give the same to the last digits.
SPREAD = np.diag([1.4, 0.8, -0.5, 0.3, 0.15]) + 0.05 * np.random.default_rng(1).normal(size=(5, 5))


def scaled(weights, radius):
    return weights * radius / np.abs(np.linalg.eigvals(weights)).max()


def test_exponents_of_a_linear_network_are_its_eigenvalues():
    """Oracle 5: log |eig|, and their sum log |det| to the last digits."""
    reservoir = Reservoir(GAUSSIAN, spectral_radius=0.9, activation="linear", dtype=torch.float64)
    found = lyapunov(reservoir, NOISE, k=30, warmup=500).exponents
    weights = scaled(GAUSSIAN, 0.9)
    np.testing.assert_allclose(found, np.sort(np.log(np.abs(np.linalg.eigvals(weights))))[::-1], atol=3e-4)
    assert found.sum() == pytest.approx(np.linalg.slogdet(weights)[1], abs=1e-11)
    few = lyapunov(reservoir, NOISE, k=3, warmup=500).exponents
    np.testing.assert_allclose(few, found[:3], atol=3e-4)


@pytest.mark.parametrize("radius", [0.3, 0.95])
def test_a_silent_network_below_one_decays_at_its_spectral_radius(radius):
    """Oracle 5: tanh is linear at rest."""
    reservoir = Reservoir(SPREAD, spectral_radius=radius, dtype=torch.float64)
    (exponent,), (error,) = lyapunov(reservoir, np.zeros((400, 1)))
    assert exponent == pytest.approx(np.log(radius), abs=1e-12)
    assert error < 1e-12


def test_leak_enters_the_exponent():
    """A linear network with leak a has the eigenvalues 1 - a + a s."""
    reservoir = Reservoir(SPREAD, spectral_radius=None, activation="linear", leak=0.3, dtype=torch.float64)
    expected = np.sort(np.log(np.abs(0.7 + 0.3 * np.linalg.eigvals(SPREAD))))[::-1]
    np.testing.assert_allclose(
        lyapunov(reservoir, np.zeros((4000, 1)), k=5, warmup=1500).exponents, expected, atol=1e-9
    )


@pytest.mark.parametrize("activation", ["tanh", "linear", "relu", "sigmoid"])
def test_exponents_equal_those_of_full_jacobians(activation):
    rng = np.random.default_rng(2)
    reservoir = Reservoir(
        SPREAD * (4 if activation == "sigmoid" else 1), inputs=rng.normal(size=(2, 5)), spectral_radius=None,
        leak=np.array([1.0, 0.9, 1.0, 0.95, 1.0]), bias=np.full(5, 0.3), activation=activation, dtype=torch.float64,
    )  # fmt: skip
    u = 0.3 * rng.normal(size=(700, 2))
    ours, full = (function(reservoir, u, k=4, warmup=400) for function in (lyapunov, lyapunov_reference))
    np.testing.assert_allclose(ours.exponents, full.exponents, atol=1e-10)
    np.testing.assert_allclose(lyapunov(reservoir, u, k=5, warmup=400).exponents[:4], ours.exponents, atol=1e-10)


def test_a_network_that_contracts_beyond_float_range_keeps_its_digits():
    """1e-9 a step is 1e-90 in one stretch of ten, below the smallest float32: the stretches must be halved."""
    weights = np.diag([0.5, 1e-9])
    reservoir = Reservoir(weights, spectral_radius=None, activation="linear")
    found = lyapunov(reservoir, np.zeros((200, 1)), k=2).exponents
    np.testing.assert_allclose(found, np.log([0.5, 1e-9]), rtol=1e-6)
    alone = Reservoir(weights[1:, 1:], spectral_radius=None, activation="linear")
    assert lyapunov(alone, np.zeros((200, 1))).exponents[0] == pytest.approx(np.log(1e-9), rel=1e-6)


def test_a_chain_forgets_everything():
    reservoir = Reservoir([[0.0, 1.0], [0.0, 0.0]], spectral_radius=None, activation="linear")
    found = lyapunov(reservoir, np.zeros((150, 1)))
    assert found.exponents[0] == -np.inf
    assert np.isnan(found.standard_errors[0])
    assert regime(reservoir, np.zeros((150, 1))).name == "ordered"


def test_state_noise_is_part_of_the_orbit():
    """The exponent is the growth of a small difference between two orbits with the same noise."""
    reservoir = Reservoir(GAUSSIAN, spectral_radius=1.0, state_noise=0.5, dtype=torch.float64, seed=3)
    silent = Reservoir(GAUSSIAN, spectral_radius=1.0, dtype=torch.float64, seed=3)
    u, distance, logs = np.zeros((1500, 1)), 1e-7, []
    a, b = reservoir.init_state(1), reservoir.init_state(1)
    b = b._replace(activity=b.activity + distance / np.sqrt(30))
    with torch.no_grad():
        for _ in range(1500):
            (_, a), (_, b) = (reservoir.step(torch.zeros(1, 1, dtype=torch.float64), state) for state in (a, b))
            apart = b.activity - a.activity
            logs.append(float(apart.norm().log()) - np.log(distance))
            b = b._replace(activity=a.activity + apart * (distance / apart.norm()))
    exponent = lyapunov(reservoir, u, warmup=500).exponents[0]
    assert exponent == pytest.approx(np.mean(logs[500:]), abs=2e-6)
    assert exponent < lyapunov(silent, u, warmup=500).exponents[0] - 0.05


def test_standard_errors_are_those_of_the_mean():
    """Their size against the scatter over independent inputs."""
    reservoir = Reservoir(GAUSSIAN, spectral_radius=0.9, dtype=torch.float64)
    inputs = np.random.default_rng(5).uniform(-1, 1, (40, 600, 1))
    found = [lyapunov(reservoir, u) for u in inputs]
    scatter = np.std([f.exponents[0] for f in found], ddof=1)
    assert 0.6 < np.mean([f.standard_errors[0] for f in found]) / scatter < 1.5


@pytest.mark.parametrize(
    ("radius", "gain", "name"), [(0.9, 0.01, "ordered"), (1.5, 0.01, "chaotic"), (1.5, 0.26, "chaotic")]
)
def test_signed_gaussian_networks_become_chaotic(radius, gain, name):
    """Oracle 10."""
    weights = np.random.default_rng(0).normal(size=(400, 400)) / 20
    reservoir = Reservoir(weights, inputs=np.ones((1, 400)), spectral_radius=radius, input_gain=gain)
    found = regime(reservoir, NOISE[:600])
    assert found.name == name
    assert found.standard_error < 0.01


@pytest.mark.parametrize(("radius", "name"), [(0.8, "ordered"), (1.2, "bistable"), (1.4, "bistable")])
def test_networks_of_positive_weights_are_never_chaotic(radius, name):
    """Oracle 10: beyond a spectral radius of 1 they settle on one of two branches and contract there."""
    rng = np.random.default_rng(0)
    weights = rng.uniform(size=(200, 200)) * (rng.random((200, 200)) < 0.15)
    reservoir = Reservoir(weights, inputs=np.ones((1, 200)), spectral_radius=radius, input_gain=0.05)
    found = regime(reservoir, NOISE[:600])
    assert found.exponent < -0.1
    assert found.name == name
    assert (found.distance > 1.5) == (name == "bistable")


def test_slow_convergence_is_not_taken_for_two_branches():
    reservoir = Reservoir(np.diag([0.985, 0.5]), spectral_radius=None, activation="linear")
    found = regime(reservoir, np.zeros((300, 1)))
    assert found.name == "ordered"
    assert (
        regime(Reservoir([[0.999]], spectral_radius=None, activation="linear"), np.zeros((300, 1))).name == "marginal"
    )


def test_what_is_no_reservoir_is_refused():
    for function in (lyapunov, lyapunov_reference, regime):
        with pytest.raises(InputError, match="reservoir = 'ndarray'"):
            function(GAUSSIAN, NOISE[:300])


@pytest.mark.parametrize("leak", [1.0, 0.3])
def test_exponents_of_a_large_network_are_those_of_dense_tangents(leak):
    """100 nodes: the tangents of its own states, columns, factorized after every step, to the last digits."""
    rng = np.random.default_rng(7)
    weights = scaled(rng.normal(size=(100, 100)) * (rng.random((100, 100)) < 0.5), 2.5)
    inputs, u = rng.uniform(-1, 1, (2, 100)), rng.uniform(-1, 1, (400, 2))
    reservoir = Reservoir(weights, inputs=inputs, spectral_radius=None, leak=leak, dtype=torch.float64)
    states = reservoir(torch.from_numpy(u)[None])[0][0].numpy()
    before = np.concatenate([np.zeros((1, 100)), states[:-1]])
    q, logs = np.linalg.qr(generator(0, "tangents").normal(size=(100, 4)))[0], []
    for x, u_t in zip(before, u, strict=True):
        slope = 1 - np.tanh(weights.T @ x + inputs.T @ u_t) ** 2
        q, r = np.linalg.qr((1 - leak) * q + leak * slope[:, None] * (weights.T @ q))
        logs.append(np.log(np.abs(np.diag(r))))
    found = lyapunov(reservoir, u, k=4).exponents
    np.testing.assert_allclose(found, np.sort(np.mean(logs[100:], 0))[::-1], rtol=0, atol=1e-12)
    assert (found[0] > 0.1) == (leak == 1.0)  # chaotic


def test_results_repeat_and_nothing_is_changed():
    reservoir = Reservoir(GAUSSIAN, spectral_radius=1.1)
    u = NOISE[:300].copy()
    first, second = lyapunov(reservoir, u, k=2, seed=4), lyapunov(reservoir, u, k=2, seed=4)
    assert first.exponents.tolist() == second.exponents.tolist()
    assert regime(reservoir, u) == regime(reservoir, u)
    np.testing.assert_array_equal(u, NOISE[:300])


@pytest.mark.parametrize(
    ("keywords", "argument"),
    [
        ({"k": 0}, "k"),
        ({"k": 31}, "k"),
        ({"warmup": 281}, "warmup"),
        ({"warmup": -1}, "warmup"),
        ({"u": np.zeros((300, 2))}, "u"),
        ({"u": np.full((300, 1), np.nan)}, "u[0, 0]"),
        ({"bits": 8}, "reservoir.state_bits"),
        ({"k": True}, "k"),
        ({"k": 1.5}, "k"),
        ({"warmup": "10"}, "warmup"),
        ({"u": "x"}, "u"),
        ({"u": [[1.0], [1.0, 2.0]]}, "u"),
        ({"u": np.ones((300, 1)) * 1j}, "u"),
    ],
)
def test_bad_input_is_refused_by_name(keywords, argument):
    reservoir = Reservoir(GAUSSIAN, state_bits=keywords.pop("bits", None))
    with pytest.raises(InputError) as raised:
        lyapunov(reservoir, keywords.pop("u", NOISE[:300]), **keywords)
    assert raised.value.argument == argument
