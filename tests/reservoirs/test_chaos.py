"""Chaotic series: the equations by their known exponents and invariants, the integrator by refinement, the task."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy.integrate import solve_ivp

from commissure.core.errors import InputError
from commissure.reservoirs.tasks import ChaoticForecast, chaos
from commissure.reservoirs.tasks.systems import SYSTEMS, advance, simulate

FLOWS = [name for name, system in SYSTEMS.items() if system.step and not system.delay]
NAMES = (*SYSTEMS, "narma")

# Largest Lyapunov exponents, nats per unit of time (maps: per step).  Sprott, Chaos and Time-Series Analysis (2003)
# for the first six; Lorenz & Emanuel (1998), errors double in 2.1 days of 1/5 unit, for lorenz96.
EXPONENTS = {
    "logistic": (np.log(2), 0.01),
    "henon": (0.4192, 0.01),
    "lorenz": (0.9056, 0.02),
    "rossler": (0.0714, 0.05),
    "multiscroll": (2.0272, 0.03),
    "rabinovich_fabrikant": (0.1981, 0.1),
    "lorenz96": (np.log(2) / 0.42, 0.05),
}


def exponent(name, n_samples, n_runs):
    """Growth of 1e-7 apart, pulled back to 1e-7 after every sample; all runs side by side in arrays."""
    system, distance = SYSTEMS[name], 1e-7
    rng = np.random.default_rng(0)
    x = simulate(name, 200 * n_runs, rng=rng)[::200].T  # places on one long orbit
    offset = rng.normal(size=x.shape)
    y, total = x + distance * offset / np.linalg.norm(offset, axis=0), 0.0
    for n in range(n_samples):
        x, y = (one_sample(system, state) for state in (x, y))
        grown = np.linalg.norm(y - x, axis=0)
        if n >= n_samples // 3:
            total = total + np.log(grown / distance)
        y = x + (y - x) * distance / grown
    return float(total.mean()) / (n_samples - n_samples // 3) / (system.interval or 1.0)


def one_sample(system, x):
    """A sample later, by the textbook formula on arrays."""
    if not system.step:
        return np.stack(system.rule(*x))
    h = 2 * system.step  # coarse enough
    for _ in range(round(system.interval / h)):
        k1 = np.stack(system.rule(*x))
        k2 = np.stack(system.rule(*(x + h / 2 * k1)))
        k3 = np.stack(system.rule(*(x + h / 2 * k2)))
        k4 = np.stack(system.rule(*(x + h * k3)))
        x = x + h * (k1 / 6 + k2 / 3 + k3 / 3 + k4 / 6)
    return x


@pytest.mark.parametrize("name", EXPONENTS)
def test_largest_lyapunov_exponents_are_the_published_ones(name):
    value, tolerance = EXPONENTS[name]
    n_samples = {"lorenz96": 600, "henon": 20_000}.get(name, 2000)
    assert exponent(name, n_samples, 30) == pytest.approx(value, rel=tolerance)


@pytest.mark.parametrize("name", FLOWS)
def test_halving_the_step_changes_nothing_visible(name):
    """Over a tenth of a Lyapunov time the classical rule's error, of order h^4, is below 1e-5 of the attractor."""
    system = SYSTEMS[name]
    size = simulate(name, 500, rng=np.random.default_rng(0)).std(0).max()
    n_samples = max(1, round(0.1 / EXPONENTS.get(name, (0.1,))[0] / system.interval))
    for seed in range(5):
        start = simulate(name, 1, rng=np.random.default_rng(seed))[0]
        runs = [advance(system._replace(step=system.step / k), start, n_samples)[-1] for k in (1, 2, 4)]
        first, second = (np.abs(a - b).max() for a, b in itertools.pairwise(runs))
        assert first < 1e-5 * size
        assert second < first / 8  # 16 for order 4


@pytest.mark.parametrize("name", FLOWS)
def test_flows_agree_with_an_adaptive_solver_of_high_order(name):
    system = SYSTEMS[name]
    start = simulate(name, 1, rng=np.random.default_rng(1))[0]
    fine = system._replace(step=system.step / 16)
    ours = advance(fine, start, 3)
    times = system.interval * np.arange(1, 4)
    other = solve_ivp(lambda t, x: system.rule(*x), (0, times[-1]), start, "DOP853", times, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(ours, other.y.T, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize(
    ("name", "theirs", "keywords"),
    [
        ("lorenz", "lorenz", {"rho": 28.0, "sigma": 10.0, "beta": 8 / 3}),
        ("rossler", "rossler", {"a": 0.2, "b": 0.2, "c": 5.7}),
        ("multiscroll", "multiscroll", {"a": 35.0, "b": 3.0, "c": 28.0}),
        ("doublescroll", "doublescroll", {}),
        ("rabinovich_fabrikant", "rabinovich_fabrikant", {"alpha": 1.1, "gamma": 0.87}),
    ],
)
def test_flows_agree_with_another_package(name, theirs, keywords):
    datasets = pytest.importorskip("reservoirpy.datasets")
    system = SYSTEMS[name]
    start = simulate(name, 1, rng=np.random.default_rng(2))[0]
    # its grid of n samples ends at n h, so that their distance is n h / (n - 1)
    other = getattr(datasets, theirs)(
        4, x0=start.tolist(), h=system.interval * 3 / 4, rtol=1e-11, atol=1e-11, **keywords
    )
    ours = advance(system._replace(step=system.step / 8), start, 3)
    np.testing.assert_allclose(ours, other[1:], rtol=1e-6, atol=1e-6)


def test_the_delay_equation_agrees_with_the_method_of_steps():
    """Each stretch of one delay is an ordinary equation driven by the stretch before (an interpolant of order 7)."""
    system, history = SYSTEMS["mackey_glass"], 0.6
    ours = advance(system, [history], 51)[:, 0]
    past, x, expected = (lambda t: history), history, []
    for stretch in range(3):
        begin = 17.0 * stretch

        def slope(t, x, past=past):
            delayed = past(t - 17.0)
            return 0.2 * delayed / (1 + delayed**10) - 0.1 * x

        piece = solve_ivp(slope, (begin, begin + 17), [x], "DOP853", rtol=1e-12, atol=1e-12, dense_output=True)
        expected += [float(piece.sol(begin + t)[0]) for t in range(1, 18)]
        past, x = (lambda t, piece=piece: piece.sol(t)[0]), piece.y[0, -1]
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-7)


def test_the_delay_equation_rests_at_its_equilibrium():
    np.testing.assert_allclose(advance(SYSTEMS["mackey_glass"], [1.0], 50), 1.0, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_training_and_test_series_differ(name):
    """Defect D8 of the published code: one series for training, test and every seed."""
    task = ChaoticForecast(system=name, length=300, warmup=20)
    parts = [task.data(seed, split) for seed in (0, 1) for split in ("train", "test")]
    for i, part in enumerate(parts):
        assert part.inputs.shape == (320, task.n_inputs)
        assert part.targets.shape == (320, task.n_outputs)
        assert np.isfinite(part.inputs).all()
        assert np.isfinite(part.targets).all()
        for other in parts[:i]:
            assert np.abs(part.inputs - other.inputs).max() > 0.1
            assert np.abs(part.inputs[0] - other.inputs[0]).max() > 1e-4
    np.testing.assert_array_equal(parts[1].inputs, task.data(0, "test").inputs)


@pytest.mark.parametrize("name", SYSTEMS)
@pytest.mark.parametrize("horizon", [1, 7])
def test_targets_are_later_inputs(name, horizon):
    data = ChaoticForecast(system=name, horizon=horizon, length=100, warmup=20).data(4, "test")
    np.testing.assert_array_equal(data.targets[:-horizon], data.inputs[horizon:])


@pytest.mark.parametrize("name", NAMES)
def test_the_training_series_sets_the_scale_of_both(name):
    task = ChaoticForecast(system=name, length=300, warmup=20)
    train, test = task.data(0, "train"), task.data(0, "test")
    np.testing.assert_allclose(train.inputs.mean(0), 0, atol=1e-10)
    np.testing.assert_allclose(train.inputs.std(0), 1, atol=1e-10)
    assert np.abs(test.inputs.mean(0)).max() > 1e-4  # not by its own mean
    assert np.abs(test.inputs.std(0) - 1).max() > 1e-4


def test_the_equations_hold_between_samples():
    x = simulate("henon", 50, rng=np.random.default_rng(0))
    np.testing.assert_allclose(x[2:, 0], 1 - 1.4 * x[1:-1, 0] ** 2 + 0.3 * x[:-2, 0], atol=1e-14)
    x = simulate("logistic", 50, rng=np.random.default_rng(0))
    np.testing.assert_allclose(x[1:], 4 * x[:-1] * (1 - x[:-1]), atol=1e-14)


def test_narma_targets_follow_its_noise():
    task = ChaoticForecast(system="narma", length=400, warmup=20)
    u, y = task._series(0, "train")
    assert u.min() > 0
    assert 0.45 < u.max() < 0.5
    for t in range(10, 420):
        recent = y[t - 10 : t, 0]
        expected = 0.3 * recent[-1] + 0.05 * recent[-1] * recent.sum() + 1.5 * u[t - 9, 0] * u[t, 0] + 0.1
        assert y[t, 0] == pytest.approx(expected, abs=1e-12)


def test_narma_series_that_diverge_are_drawn_anew(monkeypatch):
    seen = [chaos._narma(40, np.random.default_rng(s))[1].max() for s in range(5)]
    monkeypatch.setattr(chaos, "_NARMA_LIMIT", np.sort(seen)[2])
    bounded = [chaos._narma(40, np.random.default_rng(s))[1].max() for s in range(5)]
    assert max(bounded) <= np.sort(seen)[2]
    assert sum(a == b for a, b in zip(seen, bounded, strict=True)) == 3


def test_bad_runs_are_refused_by_name():
    rng = np.random.default_rng(0)
    for argument, call in (
        ("n_samples", lambda: simulate("henon", 2.5, rng=rng)),
        ("rng", lambda: simulate("henon", 2, rng=0)),
        ("system", lambda: advance("henon", [0.0, 0.0], 2)),
        ("start", lambda: advance(SYSTEMS["henon"], [0.0], 2)),
        ("start[1]", lambda: advance(SYSTEMS["henon"], [0.0, np.nan], 2)),
        ("n_samples", lambda: advance(SYSTEMS["henon"], [0.0, 0.0], True)),
    ):
        with pytest.raises(InputError) as raised:
            call()
        assert raised.value.argument == argument


def test_an_unknown_system_is_refused():
    with pytest.raises(InputError, match="expected one of logistic, henon"):
        simulate("lorentz", 5, rng=np.random.default_rng(0))
