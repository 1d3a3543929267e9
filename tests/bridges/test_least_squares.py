"""One answer: ridge = scikit-learn's Ridge = Gaussian process = recursive least squares = static Kalman filter.

Each organ adds its own side of the bridge in its own tests; all of them hold to 1e-10 in float64.
"""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from commissure.core import lsq, moments
from commissure.core.lsq import RecursiveLeastSquares, ridge
from commissure.experiments import bridges_least_squares as bridge
from commissure.experiments.claims import CLAIMS, Context

TOLERANCE = 1e-10
CASES = [
    (seed, n, p, m, penalty)
    for seed, (n, p, m, penalty) in enumerate(
        [(40, 5, 1, 1.0), (80, 12, 3, 0.1), (15, 15, 2, 3.0), (9, 25, 2, 0.7), (1, 4, 1, 2.0), (200, 30, 4, 50.0)]
    )
]


@pytest.fixture(params=CASES, ids=lambda case: "n{1}-p{2}-m{3}-penalty{4}".format(*case))
def problem(request: pytest.FixtureRequest) -> tuple[np.ndarray, np.ndarray, float]:
    """Features with mean 1, noisy linear targets and a penalty."""
    seed, n, p, m, penalty = request.param
    rng = np.random.default_rng(seed)
    x = 1.0 + rng.normal(size=(n, p))
    return x, x @ rng.normal(size=(p, m)) + rng.normal(size=(n, m)), penalty


def assert_same(a: np.ndarray, b: np.ndarray) -> None:
    assert np.shape(a) == np.shape(b)
    assert np.max(np.abs(np.subtract(a, b))) <= TOLERANCE * np.max(np.abs(b))


def test_sklearn_ridge(problem: tuple[np.ndarray, np.ndarray, float]) -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    x, y, penalty = problem
    for weight in (None, np.linspace(0.1, 2.0, len(x))):
        for intercept in (True, False):
            theirs = linear_model.Ridge(alpha=penalty, fit_intercept=intercept).fit(x, y, sample_weight=weight)
            ours = ridge(x, y, penalty=penalty, sample_weight=weight, intercept=intercept)
            assert_same(ours.predict(x), theirs.predict(x).reshape(y.shape))
            if len(x) > 1 or not intercept:  # one centered sample: every coefficient is zero
                assert_same(ours.coefficients, theirs.coef_.reshape(y.shape[1], -1).T)


def test_gaussian_process_mean(problem: tuple[np.ndarray, np.ndarray, float]) -> None:
    gaussian_process = pytest.importorskip("sklearn.gaussian_process")
    x, y, penalty = problem
    kernel = gaussian_process.kernels.DotProduct(sigma_0=0.0, sigma_0_bounds="fixed")
    process = gaussian_process.GaussianProcessRegressor(kernel, alpha=penalty, optimizer=None).fit(x, y)
    at = np.random.default_rng(9).normal(size=(7, x.shape[1]))
    mean = process.predict(at).reshape(7, -1)
    assert_same(ridge(x, y, penalty=penalty, intercept=False).predict(at), mean)


def test_gaussian_process_covariance_is_the_recursion_s(problem: tuple[np.ndarray, np.ndarray, float]) -> None:
    """Posterior variance of a GP with noise lambda = lambda x' P x: the RLS covariance is the process's uncertainty."""
    x, y, penalty = problem
    at = np.random.default_rng(9).normal(size=(7, x.shape[1]))
    gram = x @ x.T + penalty * np.eye(len(x))
    posterior = at @ at.T - at @ x.T @ np.linalg.solve(gram, x @ at.T)
    rls = RecursiveLeastSquares(n_features=x.shape[1], n_outputs=y.shape[1], penalty=penalty)
    assert_same(penalty * at @ rls.update(rls.init_state(), x, y).covariance @ at.T, posterior)


def test_recursive_least_squares_and_kalman_filter(problem: tuple[np.ndarray, np.ndarray, float]) -> None:
    x, y, penalty = problem
    coefficients = ridge(x, y, penalty=penalty, intercept=False).coefficients
    rls = RecursiveLeastSquares(n_features=x.shape[1], n_outputs=y.shape[1], penalty=penalty)
    state = rls.init_state()
    for x_t, y_t in zip(x, y, strict=True):
        state = rls.update(state, x_t, y_t)
    assert_same(state.coefficients, coefficients)
    assert_same(bridge.static_kalman(x, y, penalty=penalty), coefficients)


def test_kalman_filter_is_gaussian_conditioning(problem: tuple[np.ndarray, np.ndarray, float]) -> None:
    """The filter against E[w | y] = cov(w, y) cov(y)^-1 y of the joint Gaussian, which knows no ridge."""
    x, y, penalty = problem
    prior = np.eye(x.shape[1]) / penalty
    conditional = prior @ x.T @ np.linalg.solve(x @ prior @ x.T + np.eye(len(x)), y)
    assert_same(bridge.static_kalman(x, y, penalty=penalty), conditional)


@pytest.mark.parametrize("faded_to", [0.9, 0.1, 1e-3])
def test_forgetting_is_sample_weight(problem: tuple[np.ndarray, np.ndarray, float], faded_to: float) -> None:
    """`faded_to` is what remains of the prior at the last sample."""
    x, y, penalty = problem
    n = len(x)
    forgetting = faded_to ** (1 / n)
    weight = np.array([forgetting ** (n - 1 - i) for i in range(n)])
    faded = ridge(x, y, penalty=forgetting**n * penalty, sample_weight=weight, intercept=False).coefficients
    rls = RecursiveLeastSquares(n_features=x.shape[1], n_outputs=y.shape[1], penalty=penalty, forgetting=forgetting)
    assert_same(rls.update(rls.init_state(), x, y).coefficients, faded)
    assert_same(bridge.static_kalman(x, y, penalty=penalty, fading=forgetting), faded)
    ours, theirs = rls.as_ridge(n), (weight, forgetting**n * penalty)
    assert_same(ours[0], theirs[0])
    assert ours[1] == pytest.approx(theirs[1], rel=1e-12)


def test_degrees_of_freedom_are_the_trace_of_the_hat_matrix(problem: tuple[np.ndarray, np.ndarray, float]) -> None:
    x, y, penalty = problem
    hat = x @ np.linalg.inv(x.T @ x + penalty * np.eye(x.shape[1])) @ x.T
    kernel = x @ x.T
    smoother = kernel @ np.linalg.inv(kernel + penalty * np.eye(len(x)))
    dof = lsq.effective_dof(np.linalg.svd(x, compute_uv=False) ** 2, penalty)
    fit = ridge(x, y, penalty=penalty, intercept=False)
    for other in (np.trace(hat), np.trace(smoother), fit.effective_dof):
        assert_same(other, dof)
    # The hat matrix is the derivative of the predictions with respect to the targets.
    assert_same(ridge(x, np.eye(len(x)), penalty=penalty, intercept=False).predict(x), smoother)


def test_streamed_moments(problem: tuple[np.ndarray, np.ndarray, float]) -> None:
    x, y, penalty = problem
    blocks = [moments.measure(block) for block in torch.from_numpy(np.hstack([x, y])).split(6)]
    fit = lsq.ridge_from_moments(moments.merge(*blocks), x.shape[1], penalty=penalty)
    assert_same(fit.predict(x), ridge(x, y, penalty=penalty).predict(x))


CLAIM = next(claim for claim in CLAIMS if claim.id == "bridges.least_squares")


def test_claim_passes_on_enough_seeds_only() -> None:
    pytest.importorskip("sklearn")
    outcome = bridge.run(Context("quick", CLAIM))
    assert outcome.verdict == "PASS"
    assert outcome.n_seeds >= 5
    values = {row.key: row.value for row in outcome.rows}
    assert list(values) == [*bridge.Disagreements._fields, "worst"]
    assert values["worst"] == max(values.values()) <= TOLERANCE
    assert outcome.figure is not None
    assert outcome.figure.startswith("<svg")
    assert bridge.run(Context("smoke", CLAIM)).verdict == "NOT CLAIMED"


def test_claim_misses_when_one_identity_breaks(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn")
    exact = lsq.effective_dof
    monkeypatch.setattr(lsq, "effective_dof", lambda s, penalty: exact(s, penalty) * (1 + 1e-8))
    outcome = bridge.run(Context("quick", CLAIM))
    assert outcome.verdict == "MISS"
    monkeypatch.setattr(lsq, "effective_dof", lambda s, penalty: float("nan"))
    assert bridge.run(Context("quick", CLAIM)).verdict == "MISS"


def test_claim_without_sklearn_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "sklearn"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    outcome = bridge.run(Context("quick", CLAIM))
    assert outcome.verdict == "NOT RUN"
    assert "pip install 'commissure[sklearn]'" in outcome.note
    notes = {row.key: row.note for row in outcome.rows}
    assert notes["sklearn"] == notes["gp"] == "not run: scikit-learn is not installed"
    assert next(row.value for row in outcome.rows if row.key == "worst") <= TOLERANCE
    exact = lsq.effective_dof
    monkeypatch.setattr(lsq, "effective_dof", lambda s, penalty: exact(s, penalty) + 1)
    assert bridge.run(Context("quick", CLAIM)).verdict == "MISS"
