"""Regularized least squares: direct, from streamed moments, and recursive (`core.ridge_path`: many penalties at once).

    b = argmin  sum_i w_i |y_i - c - x_i' b|^2 + lambda |b|^2        (the intercept c is never penalized)
    b = (X' W X + lambda I)^-1 X' W y,   X and y centered on their weighted means
    trace of the hat matrix = sum_j s_j / (s_j + lambda) (+ 1 with an intercept),   s = eigenvalues of X' W X

| symbol  | name                                                   |
|---------|--------------------------------------------------------|
| lambda  | `penalty`                                              |
| w       | `sample_weight`                                        |
| gamma   | `forgetting`: the weight of a sample shrinks each step |
| P       | `covariance`: (X' W X + lambda I)^-1, recursively      |

Hastie, Tibshirani & Friedman, The Elements of Statistical Learning, 3.4 and 7.6; Haykin, Adaptive Filter Theory,
chapter 10.  Arrays are numpy float64 in and out; anything `numpy.asarray` reads (a CPU tensor too) is accepted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float
from numpy.typing import ArrayLike
from scipy.linalg import cho_solve, lapack

from commissure.core.errors import DegenerateError, InputError
from commissure.core.moments import Moments

__all__ = [
    "RLSState",
    "RecursiveLeastSquares",
    "RidgeFit",
    "effective_dof",
    "ridge",
    "ridge_from_moments",
    "ridge_reference",
    "rls_reference",
]

Array = np.ndarray
_EPS = float(np.finfo(np.float64).eps)

# A Gram matrix squares the condition number.  From reciprocal conditions of 1e-5 on, solving with it keeps about
# eps / 1e-5 = 2e-11 of relative accuracy; below, the singular values of X itself are used.
_GRAM_RCOND = 1e-5

# The recursion subtracts: it refuses an update that leaves fewer than four digits of the covariance.
_RLS_LOSS = 1e-4


class RidgeFit(NamedTuple):
    """A fitted ridge; `effective_dof` is the trace of its hat matrix, the intercept's 1 included."""

    coefficients: Float[Array, " features *outputs"]
    intercept: Float[Array, " *outputs"]
    effective_dof: float

    def predict(self, x: ArrayLike) -> Float[Array, " samples *outputs"]:
        """Predictions at the rows of `x` (samples, features)."""
        return _predict(self.coefficients, self.intercept, x)


def effective_dof(eigenvalues: ArrayLike, penalty: float) -> float:
    """Effective degrees of freedom sum s / (s + penalty) of a ridge whose Gram has these eigenvalues (each >= 0).

    >>> effective_dof([3.0, 1.0], 1.0)
    1.25
    """
    s = _finite("eigenvalues", eigenvalues, ndim=1)
    if s.size and s.min() < 0:
        raise InputError(f"eigenvalues[{int(s.argmin())}]", float(s.min()), "a number >= 0")
    s = s[s > 0]
    return float(np.sum(s / (s + _penalty(penalty))))


def ridge(
    x: ArrayLike,
    y: ArrayLike,
    *,
    penalty: float,
    sample_weight: ArrayLike | None = None,
    intercept: bool = True,
) -> RidgeFit:
    """Ridge regression of `y` (samples,) or (samples, outputs) on `x` (samples, features), solved directly.

    Cholesky of the smaller Gram matrix; singular values of `x` where that is ill-conditioned.  `sample_weight`
    (samples,) >= 0.  With `penalty=0` and fewer independent rows than features the answer is not unique:
    `DegenerateError`.

    >>> fit = ridge([[0.0], [1.0], [2.0]], [1.0, 3.0, 5.0], penalty=0.0)
    >>> fit.coefficients.round(9), float(fit.intercept.round(9))
    (array([2.]), 1.0)
    """
    penalty = _penalty(penalty)
    d = _center(x, y, sample_weight, intercept)
    wide = d.x.shape[0] < d.x.shape[1]
    gram = d.x @ d.x.T if wide else d.x.T @ d.x
    solved = None if wide and penalty == 0 else _cholesky(gram, d.y if wide else d.x.T @ d.y, penalty)
    if solved is None:
        coefficients, dof = _from_singular(d, penalty)
    else:
        coefficients, dof = d.x.T @ solved[0] if wide else solved[0], solved[1]
    coefficients = coefficients.reshape(d.shape)
    return RidgeFit(coefficients, np.asarray(d.y_mean - d.x_mean @ coefficients), dof + intercept)


def ridge_reference(
    x: ArrayLike,
    y: ArrayLike,
    *,
    penalty: float,
    sample_weight: ArrayLike | None = None,
    intercept: bool = True,
) -> RidgeFit:
    """`ridge` by the normal equations of the design [1, x] and the explicit hat matrix (O(samples^2) memory)."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    weight = np.diag(np.ones(len(x)) if sample_weight is None else np.asarray(sample_weight, np.float64))
    design = np.column_stack([np.ones(len(x)), x]) if intercept else x
    prior = penalty * np.eye(design.shape[1])
    if intercept:
        prior[0, 0] = 0.0
    smoother = np.linalg.solve(design.T @ weight @ design + prior, design.T @ weight)
    solution = smoother @ y
    offset, coefficients = (solution[0], solution[1:]) if intercept else (np.zeros(y.shape[1:]), solution)
    return RidgeFit(coefficients, np.asarray(offset), float(np.trace(design @ smoother)))


def ridge_from_moments(moments: Moments, n_features: int, *, penalty: float) -> RidgeFit:
    """`ridge` (with an intercept) from the joint moments of [x, y]: first `n_features` columns x, the others y.

    The samples themselves are not needed, so the moments can be streamed, merged over processes, or left out by fold.
    The scatter matrix is a Gram: below a reciprocal condition of 2e-14 at this penalty, `DegenerateError`.
    """
    dim = moments.mean.shape[0]
    if not 0 < n_features < dim:
        raise InputError("n_features", n_features, f"an integer from 1 to {dim - 1}")
    if moments.n_samples < 1:
        raise DegenerateError("ridge_from_moments: the moments hold no samples")
    mean, scatter = moments.mean.cpu().numpy(), moments.scatter.cpu().numpy()
    gram, cross = scatter[:n_features, :n_features], scatter[:n_features, n_features:]
    solved = _cholesky(gram, cross, _penalty(penalty), rcond=100 * _EPS)
    if solved is None:
        raise DegenerateError(f"ridge_from_moments: singular scatter at penalty = {penalty}: pass a larger penalty")
    coefficients, dof = solved
    return RidgeFit(coefficients, mean[n_features:] - mean[:n_features] @ coefficients, dof + 1)


class RLSState(NamedTuple):
    """State of `RecursiveLeastSquares`: coefficients, their covariance (unit noise) and the samples seen."""

    coefficients: Float[Array, " features outputs"]
    covariance: Float[Array, " features features"]
    n_samples: int


@dataclass(frozen=True, kw_only=True)
class RecursiveLeastSquares:
    """Recursive least squares without an intercept: one O(features^2) update a sample, exact at every step.

        k = P x / (gamma + x' P x),   b <- b + k (y - x' b),   P <- (P - k x' P) / gamma,   P_0 = I / lambda

    After n samples the coefficients are those of `ridge` with sample weights gamma^(n-1-i) and penalty
    gamma^n lambda (`as_ridge`).  With forgetting the prior fades as well: directions that the data stop exciting lose
    all regularization and their covariance grows as gamma^-n.  An update that can no longer be exact raises
    `DegenerateError`.

    >>> rls = RecursiveLeastSquares(n_features=1, n_outputs=1, penalty=1.0)
    >>> rls.update(rls.init_state(), [[1.0], [2.0]], [[1.0], [2.0]]).coefficients.round(9)
    array([[0.83333333]])
    """

    n_features: int
    n_outputs: int
    penalty: float
    forgetting: float = 1.0

    def __post_init__(self) -> None:
        for name in ("n_features", "n_outputs"):
            if getattr(self, name) < 1:
                raise InputError(name, getattr(self, name), "an integer >= 1")
        if _penalty(self.penalty) == 0:
            raise InputError("penalty", self.penalty, "a number > 0", "the recursion starts from the prior")
        if not 0 < self.forgetting <= 1:
            raise InputError("forgetting", self.forgetting, "a number in (0, 1]")

    def init_state(self) -> RLSState:
        """The prior: coefficients 0, covariance I / penalty."""
        zeros = np.zeros((self.n_features, self.n_outputs))
        return RLSState(zeros, np.eye(self.n_features) / self.penalty, 0)

    def update(self, state: RLSState, x: ArrayLike, y: ArrayLike) -> RLSState:
        """Absorb one sample, x (features,) and y (outputs,), or a block in time order, (n, features) and (n, outputs).

        A block equals its samples one at a time, for the price of one matrix product.
        """
        x, y = np.atleast_2d(_finite("x", x)), np.atleast_2d(_finite("y", y))
        for name, array, width in (("x", x, self.n_features), ("y", y, self.n_outputs)):
            if array.ndim != 2 or array.shape[1] != width or len(array) != len(x):
                raise InputError(name, array.shape, f"shape ({width},) or (n, {width}), the same n for x and y")
        # Between splits the covariance grows by gamma^-n; a factor of at most 10 costs no digits that matter.
        rows = len(x) if self.forgetting == 1 else max(1, int(math.log(0.1) / math.log(self.forgetting)))
        rows = max(1, min(rows, self.n_features))  # longer blocks would invert matrices larger than P
        for start in range(0, len(x), rows):
            state = self._absorb(state, x[start : start + rows], y[start : start + rows])
        return state

    def _absorb(self, state: RLSState, x: Float[Array, " n features"], y: Float[Array, "n outputs"]) -> RLSState:
        n = len(x)
        scale = np.sqrt(self.forgetting ** np.arange(n - 1, -1, -1))[:, None]
        x, residual = scale * x, scale * (y - x @ state.coefficients)
        with np.errstate(over="ignore", invalid="ignore"):
            prior = state.covariance / self.forgetting**n
            crossed = prior @ x.T
            innovation = np.eye(n) + x @ crossed
            largest = (np.abs(x) @ np.sqrt(np.diag(prior))) ** 2  # >= every term of x' P x
        is_lost = not (np.isfinite(prior).all() and np.isfinite(innovation).all())
        if not (is_lost or np.any(_EPS * largest > _RLS_LOSS * np.diag(innovation))):
            gain = np.linalg.solve(innovation, crossed.T).T
            covariance = prior - gain @ crossed.T
            if not np.any(_EPS * np.diag(prior) > _RLS_LOSS * np.diag(covariance)):
                covariance = covariance / 2 + covariance.T / 2
                return RLSState(state.coefficients + gain @ residual, covariance, state.n_samples + n)
        raise DegenerateError(
            f"RLS lost its digits after {state.n_samples} samples at penalty = {self.penalty}, forgetting = "
            f"{self.forgetting}: raise the penalty; with forgetting, raise it or drop features the data stop exciting"
        )

    def predict(self, state: RLSState, x: ArrayLike) -> Float[Array, " *n outputs"]:
        """Predictions at `x`, (features,) or (n, features)."""
        return _finite("x", x) @ state.coefficients

    def as_ridge(self, n_samples: int) -> tuple[Float[Array, " samples"], float]:
        """`sample_weight` and `penalty` with which `ridge(..., intercept=False)` gives the same coefficients."""
        weight = self.forgetting ** np.arange(n_samples - 1, -1, -1, dtype=np.float64)
        return weight, self.forgetting**n_samples * self.penalty


def rls_reference(
    x: ArrayLike, y: ArrayLike, *, penalty: float, forgetting: float = 1.0
) -> Float[Array, " samples features outputs"]:
    """Coefficients after each sample: discounted sums, and the normal equations solved again at every step."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    gram, cross, path = penalty * np.eye(x.shape[1]), np.zeros((x.shape[1], y.shape[1])), []
    for x_t, y_t in zip(x, y, strict=True):
        gram, cross = forgetting * gram + np.outer(x_t, x_t), forgetting * cross + np.outer(x_t, y_t)
        path.append(np.linalg.solve(gram, cross))
    return np.array(path).reshape(len(x), x.shape[1], y.shape[1])


class _Centered(NamedTuple):
    """Rows of positive weight, centered and scaled by its square root; `shape` is that of the coefficients."""

    x: Float[Array, " samples features"]
    y: Float[Array, " samples outputs"]
    x_mean: Float[Array, " features"]
    y_mean: Float[Array, " *outputs"]
    shape: tuple[int, ...]
    weight: Float[Array, " samples"]
    intercept: bool


def _center(x: ArrayLike, y: ArrayLike, sample_weight: ArrayLike | None, intercept: bool) -> _Centered:
    x, y = _finite("x", x, ndim=2), _finite("y", y)
    if x.shape[1] == 0:
        raise InputError("x", x.shape, "at least one feature")
    if y.ndim not in (1, 2) or len(y) != len(x):
        raise InputError("y", y.shape, f"shape ({len(x)},) or ({len(x)}, outputs)")
    weight = np.ones(len(x)) if sample_weight is None else _finite("sample_weight", sample_weight, ndim=1)
    if weight.shape != (len(x),):
        raise InputError("sample_weight", weight.shape, f"shape ({len(x)},)")
    if weight.size and weight.min() < 0:
        raise InputError(f"sample_weight[{int(weight.argmin())}]", float(weight.min()), "a number >= 0")
    if not weight.any():
        raise DegenerateError(f"ridge: no sample with a positive weight ({len(x)} samples)")
    if not weight.all():
        x, y, weight = x[weight > 0], y[weight > 0], weight[weight > 0]
    shape = (x.shape[1], *y.shape[1:])
    x_mean = np.average(x, axis=0, weights=weight) if intercept else np.zeros(x.shape[1])
    y_mean = np.average(y, axis=0, weights=weight) if intercept else np.zeros(y.shape[1:])
    scale = np.sqrt(weight)[:, None]
    targets = scale * (y - y_mean).reshape(len(y), -1)
    return _Centered(scale * (x - x_mean), targets, x_mean, np.asarray(y_mean), shape, weight, intercept)


def _cholesky(gram: Array, right: Array, penalty: float, *, rcond: float = _GRAM_RCOND) -> tuple[Array, float] | None:
    """(gram + penalty I)^-1 right and trace((gram + penalty I)^-1 gram), or None where ill-conditioned."""
    shifted = gram + penalty * np.eye(len(gram))
    factor, info = lapack.dpotrf(shifted, lower=1, clean=1)
    if info != 0:
        return None
    reciprocal, _ = lapack.dpocon(factor, np.abs(shifted).sum(0).max(), uplo="L")
    if not reciprocal > rcond:
        return None
    inverse, _ = lapack.dpotri(factor, lower=1)
    inverse = np.tril(inverse) + np.tril(inverse, -1).T
    return cho_solve((factor, True), right), float(np.sum(inverse * gram))


def _from_singular(d: _Centered, penalty: float) -> tuple[Array, float]:
    """Coefficients and degrees of freedom from the singular values of x."""
    u, s, vt = np.linalg.svd(d.x, full_matrices=False)
    kept = _is_kept(s, d.x.shape, penalty)  # the exact solution has no component along null directions
    s = s[kept]
    return vt[kept].T @ (s[:, None] * (u[:, kept].T @ d.y) / (s**2 + penalty)[:, None]), effective_dof(s**2, penalty)


def _is_kept(s: Float[Array, " rank"], shape: tuple[int, int], penalty: float) -> Bool[Array, " rank"]:
    """Numerical rank: singular values above eps * max(shape) times the largest."""
    kept = s > _EPS * max(shape) * s.max(initial=0.0)
    if penalty == 0 and kept.sum() < shape[1]:
        raise DegenerateError(
            f"ridge: penalty = 0 and rank {int(kept.sum())} of x (centered and weighted) below its {shape[1]} "
            "features: the coefficients are not unique; pass a penalty > 0"
        )
    return kept


def _predict(coefficients: Array, intercept: Array, x: ArrayLike) -> Array:
    x = np.asarray(x, np.float64)
    if x.ndim != 2 or x.shape[1] != len(coefficients):
        raise InputError("x", x.shape, f"shape (samples, {len(coefficients)})")
    return x @ coefficients + intercept


def _penalty(value: float) -> float:
    if not (math.isfinite(value) and value >= 0):
        raise InputError("penalty", value, "a finite number >= 0")
    return float(value)


def _finite(name: str, values: ArrayLike, *, ndim: int | None = None) -> Array:
    array = np.asarray(values, np.float64)
    if ndim is not None and array.ndim != ndim:
        raise InputError(name, array.shape, f"an array of {ndim} dimension{'s' * (ndim > 1)}")
    if not np.isfinite(array).all():
        index = tuple(int(i) for i in np.argwhere(~np.isfinite(array))[0])
        raise InputError(f"{name}[{', '.join(map(str, index))}]", float(array[index]), "a finite number")
    return array
