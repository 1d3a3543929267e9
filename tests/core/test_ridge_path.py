"""Ridge paths: errors against fits without each row, from rows, moments and factors; degenerate and bad input."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from commissure.core import ridge_path as module
from commissure.core.errors import DegenerateError, InputError
from commissure.core.lsq import _center, ridge
from commissure.core.ridge_path import (
    MOMENTS_RCOND,
    RidgePath,
    ridge_path,
    ridge_path_from_factor,
    ridge_path_from_moments,
    ridge_path_reference,
)

SHAPES = st.tuples(st.integers(3, 20), st.integers(1, 24), st.integers(0, 3))


def problem(seed: int, n: int, p: int, m: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Random x (n, p) with mean 1, y (n, m) or (n,) with m = 0, and positive weights."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, p)) + 1, rng.normal(size=(n, m) if m else n) + 3, rng.uniform(0.2, 2.0, n)


def distance(a: np.ndarray, b: np.ndarray) -> float:
    assert np.shape(a) == np.shape(b)
    return float(np.max(np.abs(np.subtract(a, b)), initial=0.0) / max(1e-300, np.max(np.abs(b), initial=0.0)))


def sums(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return x.T @ x, x.T @ y, (y**2).sum(0)


@settings(deadline=None, max_examples=80)
@given(SHAPES, st.booleans(), st.booleans(), st.integers(0, 1000))
def test_errors_are_those_of_fits_without_each_row(
    shape: tuple[int, int, int], weighted: bool, intercept: bool, seed: int
) -> None:
    x, y, weight = problem(seed, *shape)
    options = {"sample_weight": weight if weighted else None, "intercept": intercept, "loo": True}
    penalties = [30.0, 0.05, 1.0]
    path, reference = ridge_path(x, y, penalties, **options), ridge_path_reference(x, y, penalties, **options)
    for name, ours, theirs in zip(RidgePath._fields, path, reference, strict=True):
        assert distance(ours, theirs) <= 1e-10, name


def test_leaving_out_a_row_of_a_wide_problem_subtracts_nothing() -> None:
    """What remains of a row's leverage is small here: any difference would lose the digits that the case needs."""
    x, y, weight = problem(166, 3, 20, 0)
    for penalty in (30.0, 0.05, 1.0):
        options = {"sample_weight": weight, "loo": True}
        ours, theirs = (f(x, y, [penalty], **options).loo for f in (ridge_path, ridge_path_reference))
        assert distance(ours, theirs) <= 1e-12, penalty


@pytest.mark.parametrize("n", [1, 2])
def test_too_few_rows_to_leave_one_out(n: int) -> None:
    path = ridge_path(np.ones((n, 3)), np.arange(n), [1.0], loo=True)
    assert np.isfinite(path.loo).all() == (n == 2)


@pytest.mark.parametrize("shape", [(40, 7), (7, 40), (8, 8), (8, 7)])
@pytest.mark.parametrize("intercept", [True, False])
def test_eigen_and_singular_paths_agree(shape: tuple[int, int], intercept: bool, monkeypatch) -> None:
    x, y, weight = problem(0, *shape, 2)
    options = {"sample_weight": weight, "intercept": intercept, "loo": True}
    assert module._eigen(_center(x, y, weight, intercept), 1.0) is not None
    fast = ridge_path(x, y, [1.0, 10.0], **options)
    monkeypatch.setattr(module, "_eigen", lambda d, penalty: None)
    for a, b in zip(fast, ridge_path(x, y, [1.0, 10.0], **options), strict=True):
        assert distance(a, b) <= 1e-11


@pytest.mark.parametrize("condition", [1e1, 2e2, 1e3, 1e5])
def test_an_ill_conditioned_gram_is_not_trusted(condition: float) -> None:
    """The Gram squares the condition: from 1e5 on (x: 316) its eigenvalues would cost digits that x still has."""
    rng = np.random.default_rng(0)
    u, v = np.linalg.qr(rng.normal(size=(60, 6)))[0], np.linalg.qr(rng.normal(size=(6, 6)))[0]
    x, truth = u * np.geomspace(1, 1 / condition, 6) @ v.T, rng.normal(size=(6, 2))
    found = ridge_path(x, x @ truth, [0.0], intercept=False).coefficients[0]
    assert distance(found, truth) <= 1e-14 * max(condition, 1e3)
    assert (module._eigen(_center(x, x @ truth, None, False), 0.0) is None) == (condition > 316)


@pytest.mark.parametrize("shape", [(6, 40), (8, 8), (8, 7)])
@pytest.mark.parametrize("intercept", [True, False])
def test_left_out_errors_survive_a_vanishing_penalty_where_nothing_is_left_of_the_residuals(
    shape: tuple[int, int], intercept: bool
) -> None:
    """Interpolation: both residual and 1 - leverage vanish with the penalty; their ratio does not."""
    x, y, _ = problem(3, *shape, 2)
    path = ridge_path(x, y, [1e-13], intercept=intercept, loo=True)
    squares = []
    for row in range(len(x)):
        keep = np.arange(len(x)) != row
        squares.append((y[row] - ridge(x[keep], y[keep], penalty=1e-13, intercept=intercept).predict(x[[row]])[0]) ** 2)
    assert path.loo is not None
    assert distance(path.loo[0], np.mean(squares, axis=0)) <= 1e-9


def test_gcv_is_leave_one_out_where_every_row_has_the_mean_leverage() -> None:
    """A circulant design: all rows alike."""
    first = np.random.default_rng(0).normal(size=12)
    x = np.stack([np.roll(first, k) for k in range(12)])[:, :12]
    y = np.random.default_rng(1).normal(size=(12, 2))
    path = ridge_path(x, y, [0.5, 5.0], intercept=False, loo=True)
    assert distance(path.gcv, path.loo) <= 1e-12
    uneven = ridge_path(x * np.arange(1, 13)[:, None], y, [0.5, 5.0], intercept=False, loo=True)
    assert distance(uneven.gcv, uneven.loo) > 1e-3


def test_rows_of_weight_zero_are_absent() -> None:
    x, y, weight = problem(4, 15, 4, 2)
    weight[[2, 7]] = 0.0
    keep = weight > 0
    for a, b in zip(
        ridge_path(x, y, [0.1, 1.0], sample_weight=weight, loo=True),
        ridge_path(x[keep], y[keep], [0.1, 1.0], sample_weight=weight[keep], loo=True),
        strict=True,
    ):
        assert distance(a, b) <= 1e-13


def test_a_vanishing_penalty_is_least_squares() -> None:
    x, y, _ = problem(5, 50, 6, 2)
    expected = np.linalg.lstsq(x, y, rcond=None)[0]
    factor = np.linalg.qr(np.hstack([x, y]), mode="r")
    for path in (
        ridge_path(x, y, [0.0, 1e-13], intercept=False),
        ridge_path_from_moments(*sums(x, y), [0.0, 1e-13], n_samples=50),
        ridge_path_from_factor(factor, [0.0, 1e-13], n_features=6, n_samples=50),
    ):
        assert distance(path.coefficients, np.stack([expected, expected])) <= 1e-11


@pytest.mark.parametrize("penalty", [1e-6, 1e-2, 1.0, 1e3])
def test_sklearn_ridge_without_intercept(penalty: float) -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    x, y, _ = problem(6, 200, 20, 3)
    theirs = linear_model.Ridge(alpha=penalty, fit_intercept=False, solver="svd").fit(x, y).coef_.T
    assert distance(ridge_path(x, y, [penalty], intercept=False).coefficients[0], theirs) <= 1e-8
    assert distance(ridge_path_from_moments(*sums(x, y), [penalty], n_samples=200).coefficients[0], theirs) <= 1e-8


def test_sklearn_chooses_the_same_penalty() -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    penalties, chosen = np.logspace(-3, 4, 15), set()
    for seed in range(6):
        x, noise, weight = problem(seed, 40, 15, 2)
        y = x @ np.ones((15, 2)) + 10.0 ** (seed - 2) * noise
        theirs = linear_model.RidgeCV(penalties, store_cv_results=True).fit(x, y, sample_weight=weight)
        path = ridge_path(x, y, penalties, sample_weight=weight, loo=True)
        assert penalties[path.best("loo")] == theirs.alpha_
        chosen.add(theirs.alpha_)
    assert len(chosen) > 2


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 12), st.integers(1, 3), st.integers(0, 1000))
def test_moments_and_factors_give_the_path_of_the_rows(p: int, m: int, seed: int) -> None:
    x, y, _ = problem(seed, 40, p, m)
    penalties = [1e-3, 1.0, 50.0]
    path = ridge_path(x, y, penalties, intercept=False)
    factor = np.linalg.qr(np.hstack([x, y]), mode="r")
    for other in (
        ridge_path_from_moments(*sums(x, y), penalties, n_samples=40),
        ridge_path_from_factor(factor, penalties, n_features=p, n_samples=40),
    ):
        for name, ours, theirs in zip(RidgePath._fields[:-1], other, path, strict=False):
            assert distance(ours, theirs) <= 1e-10, name
        assert other.loo is None
        assert int(other.best()) == int(path.best("gcv"))


def test_a_batch_is_its_problems_one_at_a_time() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 3, 30, 5)), rng.normal(size=(2, 3, 30, 4))
    gram, cross, squares = x.swapaxes(-1, -2) @ x, x.swapaxes(-1, -2) @ y, (y**2).sum(-2)
    factor = np.linalg.qr(np.concatenate([x, y], -1), mode="r")
    penalties = np.logspace(-3, 3, 7)
    together = ridge_path_from_moments(gram, cross, squares, penalties, n_samples=30)
    factored = ridge_path_from_factor(factor, penalties, n_features=5, n_samples=30)
    assert together.best().shape == factored.best().shape == (2, 3)
    for i, j in np.ndindex(2, 3):
        alone = ridge_path_from_moments(gram[i, j], cross[i, j], squares[i, j], penalties, n_samples=30)
        apart = ridge_path_from_factor(factor[i, j], penalties, n_features=5, n_samples=30)
        for a, b, c, d in zip(together[1:-1], alone[1:-1], factored[1:-1], apart[1:-1], strict=True):
            assert (a[:, i, j] == b).all()
            assert (c[:, i, j] == d).all()
        assert together.best()[i, j] == alone.best()


def test_a_factor_keeps_what_a_gram_loses() -> None:
    """Condition 1e9: its square is beyond float64, so that only the factor still knows the small directions."""
    rng = np.random.default_rng(0)
    u, v = np.linalg.qr(rng.normal(size=(60, 6)))[0], np.linalg.qr(rng.normal(size=(6, 6)))[0]
    x = u * np.logspace(0, -9, 6) @ v.T
    truth = rng.normal(size=(6, 2))
    y = x @ truth
    factor = np.linalg.qr(np.hstack([x, y]), mode="r")
    path = ridge_path_from_factor(factor, [0.0], n_features=6, n_samples=60)
    assert distance(path.coefficients[0], truth) <= 1e-5
    assert distance(np.linalg.solve(x.T @ x, x.T @ y), truth) > 1e-2
    largest = float(np.linalg.eigvalsh(x.T @ x)[-1])
    with pytest.raises(DegenerateError, match=r"penalty = 0\.0 is below .* pass a larger penalty"):
        ridge_path_from_moments(*sums(x, y), [0.0], n_samples=60)
    assert np.isfinite(ridge_path_from_moments(*sums(x, y), [MOMENTS_RCOND * largest], n_samples=60).gcv).all()


def test_without_degrees_of_freedom_errors_are_infinite_and_nothing_is_chosen() -> None:
    x, y, _ = problem(7, 5, 5, 1)
    path = ridge_path(x, y, [0.0], intercept=False, loo=True)
    assert np.isinf(path.gcv).all()
    with pytest.raises(DegenerateError, match=r"loo is infinite at every penalty"):
        path.best("loo")
    lonely = np.zeros((10, 2))
    lonely[:, 0], lonely[0, 1] = 1 + np.arange(10), 1.0  # only row 0 knows the second feature
    assert np.isinf(ridge_path(lonely, np.arange(10.0), [0.0], intercept=False, loo=True).loo).all()
    assert np.isfinite(ridge_path(lonely, np.arange(10.0), [0.1], intercept=False, loo=True).loo).all()


@pytest.mark.parametrize("smallest", [1.0, 1e-2, 1e-6])
@pytest.mark.parametrize("intercept", [True, False])
def test_a_row_that_alone_knows_a_direction_cannot_be_left_out(smallest: float, intercept: bool) -> None:
    """Its 1 - leverage is 0 but for rounding, which grows with the condition of the decomposition used."""
    for seed in range(40):
        rng = np.random.default_rng(seed)
        n, p = int(rng.integers(8, 40)), int(rng.integers(2, 6))
        x = rng.normal(size=(n, p)) * np.geomspace(1, smallest, p)
        x[1:, -1] = 0.0
        x = x @ np.linalg.qr(rng.normal(size=(p, p)))[0]
        path = ridge_path(x, rng.normal(size=n), [0.0], intercept=intercept, loo=True)
        assert np.isinf(path.loo).all(), seed
        assert np.isfinite(path.gcv).all()


@pytest.mark.parametrize("size", [1e2, 1e4, 1e6])
def test_a_row_of_large_leverage_can_be_left_out(size: float) -> None:
    x, y, _ = problem(0, 30, 3, 0)
    x[0] *= size
    ours, theirs = (f(x, y, [0.0], intercept=False, loo=True).loo for f in (ridge_path, ridge_path_reference))
    assert distance(ours, theirs) <= 1e-15 * size**2


def test_best_sums_over_the_outputs_and_needs_rows_for_loo() -> None:
    """Each output alone, and the mean leverage of rows of very different ones, would choose otherwise."""
    x, y, _ = problem(30, 40, 10, 2)
    x[:3] *= 30
    y[:, 1] = 3 * y[:, 1] + 0.3 * x[:, 0]
    path = ridge_path(x, y, [0.01, 1.0, 100.0, 1e4], loo=True)
    assert path.loo.argmin(0).tolist() == [3, 0]
    assert (
        (int(path.best("loo")), int(path.best("gcv")))
        == (0, 2)
        == (path.loo.sum(-1).argmin(), path.gcv.sum(-1).argmin())
    )
    assert float(path.fit(path.best()).effective_dof) == path.effective_dof[path.best()]
    with pytest.raises(InputError, match=r"^criterion = 'aic'"):
        path.best("aic")
    with pytest.raises(InputError, match=r"^criterion = 'loo'.*needs the rows"):
        ridge_path_from_moments(*sums(x, y), [1.0], n_samples=40).best("loo")


@pytest.mark.parametrize(
    ("gram", "cross", "squares", "message"),
    [
        (np.ones((2, 3)), np.ones((2, 1)), np.ones(1), r"^gram = \(2, 3\)"),
        (np.eye(2), np.ones((3, 1)), np.ones(1), r"^cross = \(3, 1\): expected shape \(2,\) and the outputs"),
        (np.eye(2), np.ones((2, 1)), np.ones(2), r"^target_squares = \(2,\): expected shape \(1,\)"),
        (np.full((2, 2), np.nan), np.ones((2, 1)), np.ones(1), r"^gram\[0, 0\] = nan"),
    ],
)
def test_bad_moments(gram: np.ndarray, cross: np.ndarray, squares: np.ndarray, message: str) -> None:
    with pytest.raises(InputError, match=message):
        ridge_path_from_moments(gram, cross, squares, [1.0], n_samples=5)


def test_bad_factor_and_penalties() -> None:
    with pytest.raises(InputError, match=r"^factor = \(3, 3\): expected shape"):
        ridge_path_from_factor(np.eye(3), [1.0], n_features=3, n_samples=5)
    with pytest.raises(DegenerateError, match=r"penalty = 0 and rank below 2"):
        ridge_path_from_factor(np.ones((3, 3)), [0.0], n_features=2, n_samples=5)
    with pytest.raises(InputError, match=r"^penalty = -1"):
        ridge_path_from_factor(np.eye(3), [-1.0], n_features=2, n_samples=5)
