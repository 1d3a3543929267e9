"""Claim `bridges.least_squares`: one answer from ridge, Gaussian process, recursive least squares and Kalman filter.

    ridge                b = (X'X + lambda I)^-1 X'y
    Gaussian process     kernel x'x', noise variance lambda: posterior mean k*'(K + lambda I)^-1 y = x*'b
    Kalman filter        state w ~ N(0, I / lambda), w_{t+1} = w_t, y_t = x_t'w + e, unit noise: E[w | y_1..y_n] = b
    RLS, forgetting g    ridge with sample weights g^(n-i) and penalty g^n lambda
    sum s/(s+lambda)     trace of the hat matrix X (X'X + lambda I)^-1 X', s the eigenvalues of X'X

Each row is the largest relative disagreement, max|a - b| / max|b|, over the seeds and a tall, a square and a wide
problem.  The filter below is derived on its own, from the Joseph form, one observation at a time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib.util import find_spec
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from commissure.core import lsq
from commissure.core.rng import generator
from commissure.experiments.claims import Context, Outcome, Row

__all__ = ["Disagreements", "disagreements", "run", "static_kalman"]

Array = np.ndarray

_SEEDS = {"smoke": 1, "quick": 5, "full": 20}
_SHAPES = ((60, 7, 3), (20, 20, 2), (12, 30, 1))  # samples, features, outputs


class Disagreements(NamedTuple):
    """Largest relative disagreement of `core.lsq.ridge` with each other derivation; nan where it could not be run."""

    sklearn: float
    gp: float
    rls: float
    kalman: float
    forgetting: float
    dof: float


_LABELS = (
    "scikit-learn Ridge, weights and intercept",
    "Gaussian process, linear kernel",
    "recursive least squares",
    "Kalman filter, static weights",
    "forgetting = sample weights",
    "sum s/(s+λ) = trace of the hat matrix",
)


def run(ctx: Context) -> Outcome:
    """Measure the identities over the budget's seeds; NOT RUN where scikit-learn is missing."""
    n_seeds, found = _SEEDS[ctx.budget], []
    for seed in range(n_seeds):
        found += [disagreements(seed, *shape) for shape in _SHAPES]
        ctx.progress((seed + 1) / n_seeds, f"seed {seed}")
    largest = Disagreements(*np.max(found, axis=0).tolist())  # nan stays nan
    absent = ("sklearn", "gp") if find_spec("sklearn") is None else ()
    rows = [
        Row(key, label, value, note="not run: scikit-learn is not installed" if key in absent else "")
        for key, label, value in zip(Disagreements._fields, _LABELS, largest, strict=True)
    ]
    ran = [row.value for row in rows if row.key not in absent]
    rows.append(Row("worst", "largest relative disagreement", float(np.max(ran)), note=f"of {len(ran)} identities"))
    verdict = ctx.judge(rows, n_seeds)
    note = ""
    if absent:
        note = "scikit-learn is not installed; install it with: pip install 'commissure[sklearn]'"
        verdict = verdict if verdict == "MISS" else "NOT RUN"
    return Outcome(tuple(rows), verdict, _figure(rows[:-1]), n_seeds, note, "random regressions, float64")


def disagreements(seed: int, n_samples: int, n_features: int, n_outputs: int) -> Disagreements:
    """All the identities on one random regression (features with mean 1, penalty log-uniform in [0.1, 10])."""
    rng = generator(seed, "bridges", n_samples, n_features, n_outputs)
    x = 1.0 + rng.normal(size=(n_samples, n_features))
    y = rng.normal(size=(n_samples, n_outputs)) + x @ rng.normal(size=(n_features, n_outputs))
    penalty, gamma = float(10 ** rng.uniform(-1, 1)), float(rng.uniform(0.9, 0.99))
    weight = gamma ** np.arange(n_samples - 1, -1, -1)
    b = lsq.ridge(x, y, penalty=penalty, intercept=False).coefficients
    faded = lsq.ridge(x, y, penalty=gamma**n_samples * penalty, sample_weight=weight, intercept=False).coefficients
    s = np.linalg.svd(x, compute_uv=False) ** 2
    hat = x @ np.linalg.solve(x.T @ x + penalty * np.eye(n_features), x.T)
    return Disagreements(
        *_third_party(x, y, penalty, rng.uniform(0.1, 2.0, n_samples), 1.0 + rng.normal(size=(9, n_features))),
        rls=relative(_rls(x, y, penalty, 1.0), b),
        kalman=relative(static_kalman(x, y, penalty=penalty), b),
        forgetting=relative(
            np.stack([_rls(x, y, penalty, gamma), static_kalman(x, y, penalty=penalty, fading=gamma)]), faded[None]
        ),
        dof=relative(lsq.effective_dof(s, penalty), np.trace(hat)),
    )


def static_kalman(
    x: Float[Array, "samples features"], y: Float[Array, "samples outputs"], *, penalty: float, fading: float = 1.0
) -> Float[Array, "features outputs"]:
    """Mean of static weights after all observations, by Kalman's recursion with unit observation noise.

    Predict: P <- P / fading (1: the weights do not move).  Update, Joseph form: P <- (I - k x')P(I - k x')' + k k'.
    """
    mean, eye = np.zeros((x.shape[1], y.shape[1])), np.eye(x.shape[1])
    covariance = eye / penalty
    for x_t, y_t in zip(x, y, strict=True):
        covariance = covariance / fading
        gain = covariance @ x_t / (x_t @ covariance @ x_t + 1.0)
        mean = mean + np.outer(gain, y_t - x_t @ mean)
        rest = eye - np.outer(gain, x_t)
        covariance = rest @ covariance @ rest.T + np.outer(gain, gain)
    return mean


def relative(a: Array | float, b: Array | float) -> float:
    """max |a - b| / max |b|."""
    return float(np.max(np.abs(np.subtract(a, b))) / np.max(np.abs(b)))


def _third_party(x: Array, y: Array, penalty: float, weight: Array, at: Array) -> tuple[float, float]:
    """Scikit-learn's Ridge (coefficients, intercept) and Gaussian process (mean at `at`), or nan without it."""
    if find_spec("sklearn") is None:
        return math.nan, math.nan
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import DotProduct
    from sklearn.linear_model import Ridge

    ours, theirs = lsq.ridge(x, y, penalty=penalty, sample_weight=weight), Ridge(alpha=penalty).fit(x, y, weight)
    coefficients = relative(ours.coefficients, np.reshape(theirs.coef_, (-1, x.shape[1])).T)
    intercept = relative(ours.intercept, theirs.intercept_)
    kernel = DotProduct(sigma_0=0.0, sigma_0_bounds="fixed")
    process = GaussianProcessRegressor(kernel, alpha=penalty, optimizer=None).fit(x, y)
    mean = process.predict(at).reshape(len(at), -1)
    ridge = lsq.ridge(x, y, penalty=penalty, intercept=False)
    return float(np.max([coefficients, intercept])), relative(ridge.predict(at), mean)


def _rls(x: Array, y: Array, penalty: float, forgetting: float) -> Array:
    rls = lsq.RecursiveLeastSquares(n_features=x.shape[1], n_outputs=y.shape[1], penalty=penalty, forgetting=forgetting)
    return rls.update(rls.init_state(), x, y).coefficients


def _figure(rows: Sequence[Row]) -> str:
    from commissure.report.style import COLORS, figure, to_svg

    shown = [row for row in reversed(rows) if math.isfinite(row.value)]
    with figure(6.4, 3.0) as (fig, ax):
        lengths = [math.log10(max(row.value, 1e-17)) + 17 for row in shown]
        ax.barh([row.label for row in shown], lengths, left=-17, height=0.6)
        ax.axvline(-10, color=COLORS["GRU"])
        ax.annotate("gate ", (-10, len(shown) - 0.6), color=COLORS["GRU"], ha="right", va="bottom")
        ax.set_xlim(-17, -9.5)
        ax.set_xlabel("relative disagreement, log10")
        ax.grid(visible=False, axis="y")
        return to_svg(fig, label="Largest relative disagreement of each identity with ridge regression")
