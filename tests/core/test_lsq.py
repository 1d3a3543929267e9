"""Least squares: fast paths against their references, closed forms, degenerate and bad input."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from commissure.core import lsq, moments
from commissure.core.errors import DegenerateError, InputError
from commissure.core.lsq import RecursiveLeastSquares, ridge, ridge_reference
from commissure.core.ridge_path import ridge_path

SHAPES = st.tuples(st.integers(2, 30), st.integers(1, 30), st.integers(0, 3))


def problem(seed: int, n: int, p: int, m: int, offset: float = 1.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Random x (n, p), y (n, m) or (n,) with m = 0, and positive weights."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, p)) + offset
    y = rng.normal(size=(n, m) if m else n) + 3.0
    return x, y, rng.uniform(0.2, 2.0, n)


def distance(a: np.ndarray, b: np.ndarray) -> float:
    assert np.shape(a) == np.shape(b)
    return float(np.max(np.abs(np.subtract(a, b)), initial=0.0) / max(1e-300, np.max(np.abs(b), initial=0.0)))


@settings(deadline=None, max_examples=50)
@given(SHAPES, st.floats(1e-2, 1e3), st.booleans(), st.booleans(), st.integers(0, 1000))
def test_ridge_is_its_reference(
    shape: tuple[int, int, int], penalty: float, weighted: bool, intercept: bool, seed: int
) -> None:
    x, y, weight = problem(seed, *shape)
    options = {"penalty": penalty, "sample_weight": weight if weighted else None, "intercept": intercept}
    fit, reference = ridge(x, y, **options), ridge_reference(x, y, **options)
    assert distance(fit.coefficients, reference.coefficients) <= 1e-10
    assert distance(fit.predict(x), reference.predict(x)) <= 1e-10
    assert fit.effective_dof == pytest.approx(reference.effective_dof, rel=1e-10)
    assert fit.coefficients.shape == (shape[1], *y.shape[1:])
    assert np.shape(fit.intercept) == y.shape[1:]


@settings(deadline=None, max_examples=50)
@given(SHAPES, st.booleans(), st.integers(0, 1000))
def test_path_is_ridge_at_every_penalty(shape: tuple[int, int, int], intercept: bool, seed: int) -> None:
    x, y, weight = problem(seed, *shape)
    penalties = np.array([100.0, 1e-9, 1.0])
    path = ridge_path(x, y, penalties, sample_weight=weight, intercept=intercept)
    for k, penalty in enumerate(penalties):
        fit, one = path.fit(k), ridge(x, y, penalty=penalty, sample_weight=weight, intercept=intercept)
        assert distance(fit.predict(x), one.predict(x)) <= 1e-10
        assert fit.effective_dof == pytest.approx(one.effective_dof, rel=1e-10)
        if penalty > 1e-6:
            assert distance(fit.coefficients, one.coefficients) <= 1e-10


def test_ill_conditioned_problems_keep_the_accuracy_of_the_singular_values() -> None:
    """Condition 1e7: a Gram (1e14) would leave two digits, the singular values leave about nine."""
    rng = np.random.default_rng(0)
    u, _ = np.linalg.qr(rng.normal(size=(50, 8)))
    v, _ = np.linalg.qr(rng.normal(size=(8, 8)))
    x = u * np.logspace(0, -7, 8) @ v.T
    truth = rng.normal(size=8)
    for fit in (
        ridge(x, x @ truth, penalty=0.0, intercept=False),
        ridge_path(x, x @ truth, [0.0, 1.0], intercept=False).fit(0),
    ):
        assert distance(fit.coefficients, truth) <= 1e-7
        assert fit.effective_dof == pytest.approx(8, rel=1e-12)


def test_no_penalty_is_ordinary_least_squares() -> None:
    x, y, _ = problem(1, 30, 4, 2)
    design = np.column_stack([np.ones(30), x])
    expected = np.linalg.lstsq(design, y, rcond=None)[0]
    fit = ridge(x, y, penalty=0.0)
    assert distance(np.vstack([fit.intercept, fit.coefficients]), expected) <= 1e-12
    assert fit.effective_dof == pytest.approx(5)


def test_gradient_of_the_objective_vanishes() -> None:
    x, y, weight = problem(2, 25, 6, 3)
    b = torch.zeros(6, 3, dtype=torch.float64, requires_grad=True)
    c = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    fit = ridge(x, y, penalty=0.7, sample_weight=weight)
    b.data, c.data = torch.from_numpy(fit.coefficients), torch.from_numpy(fit.intercept)
    residual = torch.from_numpy(y) - torch.from_numpy(x) @ b - c
    (torch.from_numpy(weight)[:, None] * residual**2).sum().add(0.7 * (b**2).sum()).backward()
    assert max(b.grad.abs().max().item(), c.grad.abs().max().item()) <= 1e-11


def test_weights_are_repetitions_and_zero_weights_are_absent() -> None:
    x, y, _ = problem(3, 12, 3, 2)
    times = np.arange(12) % 4
    weighted = ridge(x, y, penalty=0.5, sample_weight=times)
    repeated = ridge(np.repeat(x, times, 0), np.repeat(y, times, 0), penalty=0.5)
    assert distance(weighted.coefficients, repeated.coefficients) <= 1e-12
    assert distance(weighted.intercept, repeated.intercept) <= 1e-12
    assert weighted.effective_dof == pytest.approx(repeated.effective_dof, rel=1e-12)


def test_a_constant_feature_and_a_silent_feature_get_nothing() -> None:
    x, y, _ = problem(4, 20, 3, 0)
    padded = np.column_stack([x, np.full(20, 5.0), np.zeros(20)])
    fit = ridge(padded, y, penalty=1e-3)
    assert distance(fit.coefficients[:3], ridge(x, y, penalty=1e-3).coefficients) <= 1e-10
    assert np.abs(fit.coefficients[3:]).max() <= 1e-12


def test_a_vanishing_penalty_on_dependent_features_is_the_smallest_solution() -> None:
    x, y, _ = problem(5, 20, 3, 2)
    doubled = np.hstack([x, x])
    fit = ridge(doubled, y, penalty=1e-30)
    single = ridge(x, y, penalty=0.0).coefficients
    assert distance(fit.coefficients, np.vstack([single, single]) / 2) <= 1e-10


@pytest.mark.parametrize("solve", [ridge, lambda x, y, penalty: ridge_path(x, y, [penalty])])
def test_singular_without_penalty_is_degenerate(solve) -> None:
    x, y, _ = problem(6, 20, 3, 0)
    for bad in (np.hstack([x, x[:, :1]]), np.column_stack([x, np.ones(20)]), x[:3], np.zeros((20, 2))):
        with pytest.raises(DegenerateError, match=r"rank . of x"):
            solve(bad, y[: len(bad)], penalty=0.0)


def test_effective_dof_is_the_trace_of_the_hat_matrix_and_its_limits() -> None:
    x, _, _ = problem(7, 15, 6, 0)
    hat = x @ np.linalg.inv(x.T @ x + 2.5 * np.eye(6)) @ x.T
    assert lsq.effective_dof(np.linalg.eigvalsh(x.T @ x), 2.5) == pytest.approx(np.trace(hat), rel=1e-12)
    assert lsq.effective_dof([4.0, 0.0], 0.0) == 1.0
    assert lsq.effective_dof([], 1.0) == 0.0


def test_large_penalty_keeps_relative_precision_of_the_dof() -> None:
    x, y, _ = problem(8, 30, 5, 0)
    centered = x - x.mean(0)
    expected = np.sum(centered**2) / 1e14  # to first order in 1 / penalty
    assert ridge(x, y, penalty=1e14, intercept=True).effective_dof - 1 == pytest.approx(expected, abs=1e-15)
    assert ridge(centered, y, penalty=1e14, intercept=False).effective_dof == pytest.approx(expected, rel=1e-10)


def test_ridge_from_moments_needs_no_samples() -> None:
    x, y, _ = problem(9, 60, 5, 2, offset=100.0)
    joint = torch.from_numpy(np.hstack([x, y]))
    streamed = moments.merge(*(moments.measure(block) for block in joint.split(7)))
    fit, direct = lsq.ridge_from_moments(streamed, 5, penalty=0.3), ridge(x, y, penalty=0.3)
    assert distance(fit.coefficients, direct.coefficients) <= 1e-10
    assert distance(fit.intercept, direct.intercept) <= 1e-10
    assert fit.effective_dof == pytest.approx(direct.effective_dof, rel=1e-10)
    with pytest.raises(InputError, match=r"n_features = 7"):
        lsq.ridge_from_moments(streamed, 7, penalty=0.3)
    with pytest.raises(DegenerateError, match=r"singular"):
        lsq.ridge_from_moments(moments.measure(joint[:4]), 5, penalty=0.0)
    with pytest.raises(DegenerateError, match=r"no samples"):
        lsq.ridge_from_moments(moments.empty(7), 5, penalty=1.0)


@settings(deadline=None, max_examples=50)
@given(
    st.tuples(st.integers(1, 40), st.integers(1, 6), st.integers(1, 3)),
    st.sampled_from([1.0, 0.99, 0.8]),
    st.floats(0.1, 10.0),
    st.integers(0, 1000),
)
def test_rls_is_a_solution_at_every_step(
    shape: tuple[int, int, int], forgetting: float, penalty: float, seed: int
) -> None:
    n, p, m = shape
    x, y, _ = problem(seed, n, p, m, offset=0.0)
    rls = RecursiveLeastSquares(n_features=p, n_outputs=m, penalty=penalty, forgetting=forgetting)
    reference = lsq.rls_reference(x, y, penalty=penalty, forgetting=forgetting)
    state = rls.init_state()
    for t in range(n):
        state = rls.update(state, x[t], y[t])
        assert distance(state.coefficients, reference[t]) <= 1e-9
    weight, faded = rls.as_ridge(n)
    assert weight[-1] == 1.0
    fit = ridge(x, y, penalty=faded, sample_weight=weight, intercept=False)
    assert distance(state.coefficients, fit.coefficients) <= 1e-9
    assert distance(rls.predict(state, x), fit.predict(x)) <= 1e-9


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=5), st.sampled_from([1.0, 0.9]), st.integers(0, 100))
def test_rls_blocks_of_any_size_are_single_steps(sizes: list[int], forgetting: float, seed: int) -> None:
    n = sum(sizes)
    x, y, _ = problem(seed, n, 4, 2, offset=0.0)
    rls = RecursiveLeastSquares(n_features=4, n_outputs=2, penalty=1.0, forgetting=forgetting)
    steps = blocks = rls.init_state()
    for t in range(n):
        steps = rls.update(steps, x[t], y[t])
    for stop, size in zip(np.cumsum(sizes), sizes, strict=True):
        blocks = rls.update(blocks, x[stop - size : stop], y[stop - size : stop])
    assert distance(blocks.coefficients, steps.coefficients) <= 1e-10
    assert distance(blocks.covariance, steps.covariance) <= 1e-10
    assert blocks.n_samples == steps.n_samples == n


def test_rls_covariance_is_the_inverse_information_and_stays_symmetric() -> None:
    x, y, _ = problem(0, 500, 5, 1, offset=0.0)
    rls = RecursiveLeastSquares(n_features=5, n_outputs=1, penalty=0.1, forgetting=0.98)
    state = rls.update(rls.init_state(), x, y)
    weight, penalty = rls.as_ridge(500)
    information = (x.T * weight) @ x + penalty * np.eye(5)
    assert distance(state.covariance @ information, np.eye(5)) <= 1e-10
    assert (state.covariance == state.covariance.T).all()


def test_rls_forgets_a_change_that_least_squares_cannot() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 3))
    y = np.concatenate([x[:200] @ [[1.0], [2.0], [3.0]], x[200:] @ [[-1.0], [0.0], [5.0]]])
    errors = []
    for forgetting in (1.0, 0.9):
        rls = RecursiveLeastSquares(n_features=3, n_outputs=1, penalty=1.0, forgetting=forgetting)
        errors.append(np.abs(rls.update(rls.init_state(), x, y).coefficients[:, 0] - [-1.0, 0.0, 5.0]).max())
    assert errors[0] > 0.5
    assert errors[1] < 1e-6


def test_rls_never_mutates() -> None:
    rls = RecursiveLeastSquares(n_features=2, n_outputs=1, penalty=1.0, forgetting=0.5)
    state = rls.init_state()
    before = state.covariance.copy()
    x, y = np.ones((1, 2)), np.ones((1, 1))
    rls.update(state, x, y)
    assert (state.covariance == before).all()
    assert (x == 1).all()


@pytest.mark.parametrize(("direction", "at_least"), [([1.0, 0.0], 1000), ([0.6, 0.8], 30)])
def test_rls_wind_up_is_refused_before_it_is_wrong(direction: list[float], at_least: int) -> None:
    """Samples along one unit vector only: there the coefficients are the discounted mean of the targets."""
    rls = RecursiveLeastSquares(n_features=2, n_outputs=1, penalty=1.0, forgetting=0.5)
    noise = np.random.default_rng(0).normal(size=2000)
    states = [rls.init_state()]

    def stream() -> None:
        for y in noise:
            states.append(rls.update(states[-1], [direction], [[y]]))

    with pytest.raises(DegenerateError, match=r"lost its digits after \d+ samples at penalty = 1.0, forgetting = 0.5"):
        stream()
    assert len(states) > at_least
    total, weight = 0.0, 1.0
    for state, y in zip(states[1:], noise, strict=False):
        total, weight = 0.5 * total + y, 0.5 * weight + 1.0
        assert rls.predict(state, direction).item() == pytest.approx(total / weight, abs=1e-3)


def test_rls_refuses_a_penalty_below_its_precision() -> None:
    x, y, _ = problem(0, 20, 3, 1, offset=0.0)
    fine, tiny = (RecursiveLeastSquares(n_features=3, n_outputs=1, penalty=value) for value in (1e-8, 1e-15))
    expected = ridge(x, y, penalty=1e-8, intercept=False).coefficients
    assert distance(fine.update(fine.init_state(), x, y).coefficients, expected) <= 1e-4
    with pytest.raises(DegenerateError, match=r"raise the penalty"):
        tiny.update(tiny.init_state(), x, y)


def test_torch_tensors_are_read() -> None:
    x, y, _ = problem(10, 12, 3, 1)
    fit = ridge(torch.from_numpy(x), torch.from_numpy(y), penalty=1.0)
    assert isinstance(fit.coefficients, np.ndarray)
    assert distance(fit.coefficients, ridge(x, y, penalty=1.0).coefficients) == 0


X, Y = np.arange(12.0).reshape(6, 2) ** 1.5, np.arange(6.0)
NAN = np.where(np.arange(12).reshape(6, 2) == 7, np.nan, X)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((NAN, Y), {"penalty": 1.0}, r"^x\[3, 1\] = nan: expected a finite number"),
        ((X, np.r_[Y[:5], np.inf]), {"penalty": 1.0}, r"^y\[5\] = inf"),
        ((Y, Y), {"penalty": 1.0}, r"^x = \(6,\): expected an array of 2 dimensions"),
        ((X, Y[:5]), {"penalty": 1.0}, r"^y = \(5,\): expected shape \(6,\) or \(6, outputs\)"),
        ((X[:, :0], Y), {"penalty": 1.0}, "at least one feature"),
        ((X, Y), {"penalty": -1.0}, r"^penalty = -1\.0: expected a finite number >= 0"),
        ((X, Y), {"penalty": float("nan")}, "^penalty = nan"),
        ((X, Y), {"penalty": 1.0, "sample_weight": -Y}, r"^sample_weight\[5\] = -5\.0"),
        ((X, Y), {"penalty": 1.0, "sample_weight": Y[:2]}, r"^sample_weight = \(2,\)"),
    ],
)
def test_bad_input(arguments: tuple, options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        ridge(*arguments, **options)


def test_more_bad_input() -> None:
    with pytest.raises(DegenerateError, match=r"no sample with a positive weight"):
        ridge(X, Y, penalty=1.0, sample_weight=np.zeros(6))
    with pytest.raises(DegenerateError, match=r"0 samples"):
        ridge(X[:0], Y[:0], penalty=1.0)
    with pytest.raises(InputError, match=r"^penalties = "):
        ridge_path(X, Y, [])
    with pytest.raises(InputError, match=r"^x = \(2, 3\): expected shape \(samples, 2\)"):
        ridge(X, Y, penalty=1.0).predict(np.ones((2, 3)))
    with pytest.raises(InputError, match=r"^eigenvalues\[1\] = -1\.0"):
        lsq.effective_dof([1.0, -1.0], 1.0)


@pytest.mark.parametrize(
    ("field", "value"),
    [("n_features", 0), ("n_outputs", 0), ("penalty", 0.0), ("forgetting", 0.0), ("forgetting", 1.1)],
)
def test_rls_bad_construction(field: str, value: float) -> None:
    with pytest.raises(InputError, match=f"^{field} = {value}"):
        RecursiveLeastSquares(**{"n_features": 2, "n_outputs": 1, "penalty": 1.0, field: value})


def test_rls_bad_samples() -> None:
    rls = RecursiveLeastSquares(n_features=2, n_outputs=1, penalty=1.0)
    for x, y in (([1.0], [1.0]), ([[1.0, 2.0]], [[1.0], [2.0]]), ([1.0, 2.0], [1.0, 2.0])):
        with pytest.raises(InputError, match=r"the same n for x and y"):
            rls.update(rls.init_state(), x, y)
    with pytest.raises(InputError, match=r"^y\[0\] = nan"):
        rls.update(rls.init_state(), [1.0, 2.0], [np.nan])
