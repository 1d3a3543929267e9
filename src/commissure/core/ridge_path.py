"""Ridges for many penalties from one decomposition, and the errors they would make on rows they have not seen.

    b(lambda)   = V diag(1 / (s_j + lambda)) V' X' y,    X' X = V diag(s_j) V'
    LOO(lambda) = mean_i ( r_i / (1 - h_i) )^2,          h_i = x_i' (X' X + lambda I)^-1 x_i,    r = y - X b
    GCV(lambda) = mean_i r_i^2 / (1 - sum_i h_i / n)^2

LOO is exact: the error at each row of the ridge fitted without it.  GCV is LOO with the mean leverage in place of each
row's own, which needs no rows: moments suffice.  With weights w the rows are those of sqrt(w) X, means are weighted and
leaving a row out leaves out its whole weight; an intercept, never penalized, adds w_i / sum(w) to h_i.

| symbol | name                                                              |
|--------|-------------------------------------------------------------------|
| lambda | `penalty`                                                         |
| s, V   | eigenvalues and eigenvectors of the Gram matrix X' X              |
| h      | leverage, the diagonal of the hat matrix; its sum: `effective_dof` |

Golub, Heath & Wahba (1979), Technometrics 21, 215; Hastie, Tibshirani & Friedman, 7.10 and 7.52.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import ArrayLike

from commissure.core.errors import DegenerateError, InputError
from commissure.core.lsq import (
    _EPS,
    _GRAM_RCOND,
    RidgeFit,
    _center,
    _Centered,
    _finite,
    _is_kept,
    _penalty,
    ridge_reference,
)

__all__ = [
    "MOMENTS_RCOND",
    "RidgePath",
    "ridge_path",
    "ridge_path_from_factor",
    "ridge_path_from_moments",
    "ridge_path_reference",
]

Array = np.ndarray

# An eigenvalue of a Gram matrix is known to about eps times the largest; a penalty of fifty such errors hides them.
MOMENTS_RCOND = 50 * _EPS


class RidgePath(NamedTuple):
    """Ridges for several penalties, one a row, in the order the penalties were given, each with its errors.

    `gcv` and `loo` are mean squared errors of prediction; infinite where a row cannot be left out (no degrees of
    freedom remain).  `loo` is None where it was not asked for.  `batch` axes: problems solved together.
    """

    penalties: Float[Array, " penalties"]
    coefficients: Float[Array, " penalties *batch features *outputs"]
    intercept: Float[Array, " penalties *batch *outputs"]
    effective_dof: Float[Array, " penalties *batch"]
    gcv: Float[Array, " penalties *batch *outputs"]
    loo: Float[Array, " penalties *batch *outputs"] | None

    def fit(self, index: int) -> RidgeFit:
        """The ridge at `penalties[index]`."""
        return RidgeFit(self.coefficients[index], np.asarray(self.intercept[index]), float(self.effective_dof[index]))

    def best(self, criterion: Literal["gcv", "loo"] = "gcv") -> Int[Array, " *batch"]:
        """Index of the penalty with the smallest error, summed over the outputs; the first of equals.

        >>> path = ridge_path([[0.0], [1.0], [2.0], [3.0]], [1.0, 3.0, 5.0, 7.0], [100.0, 0.1, 10.0], loo=True)
        >>> int(path.best("loo"))
        1
        """
        if criterion not in ("gcv", "loo"):
            raise InputError("criterion", criterion, "'gcv' or 'loo'")
        error = self.gcv if criterion == "gcv" else self.loo
        if error is None:
            raise InputError("criterion", criterion, "'gcv'", "leave-one-out needs the rows: ridge_path(..., loo=True)")
        n_outputs = self.coefficients.ndim - self.effective_dof.ndim - 1
        error = error.sum(axis=-1) if n_outputs else error
        if not np.isfinite(error).any(axis=0).all():
            raise DegenerateError(f"ridge: {criterion} is infinite at every penalty: fewer rows than features")
        return np.asarray(error.argmin(axis=0))


def ridge_path(
    x: ArrayLike,
    y: ArrayLike,
    penalties: Sequence[float] | Float[Array, " penalties"],
    *,
    sample_weight: ArrayLike | None = None,
    intercept: bool = True,
    loo: bool = False,
) -> RidgePath:
    """`ridge` for every penalty from one eigendecomposition of the smaller Gram (or one SVD where ill-conditioned).

    x (samples, features), y (samples,) or (samples, outputs), penalties >= 0, `sample_weight` (samples,) >= 0.
    Leaving rows out (`loo=True`) costs one product of the size of `x` with the outputs more for each penalty.

    >>> path = ridge_path([[0.0], [1.0], [2.0]], [1.0, 3.0, 6.0], [0.0, 2.0], loo=True)
    >>> path.coefficients.round(9).ravel(), path.effective_dof.round(9), path.loo.round(6)
    (array([2.5 , 1.25]), array([2. , 1.5]), array([0.75, 6.19]))
    """
    values = _penalties(penalties)
    d = _center(x, y, sample_weight, intercept)
    s = _eigen(d, float(values.min())) or _singular(d, float(values.min()))
    coefficients = _coefficients(s, values).reshape(len(values), *d.shape)
    offset = np.stack([d.y_mean - d.x_mean @ b for b in coefficients])
    dof = np.sum(s.eigenvalues * _inverse(s, values), axis=-1) + d.intercept
    squares, total, shape = _residual_squares(s, d, values), d.weight.sum(), (len(values), *d.shape[1:])
    gcv = _squared_ratio(np.sqrt(squares / total), _mean_slack(s, d, dof, values)[:, None]).reshape(shape)
    left_out = (_left_out_squares(s, d, values) / total).reshape(shape) if loo else None
    return RidgePath(values, coefficients, offset, dof, gcv, left_out)


def ridge_path_reference(
    x: ArrayLike,
    y: ArrayLike,
    penalties: Sequence[float] | Float[Array, " penalties"],
    *,
    sample_weight: ArrayLike | None = None,
    intercept: bool = True,
    loo: bool = False,
) -> RidgePath:
    """`ridge_path` by the normal equations at each penalty, leaving out each row in turn and fitting again."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    weight = np.ones(len(x)) if sample_weight is None else np.asarray(sample_weight, np.float64)
    rows, total = np.flatnonzero(weight), weight.sum()
    fits, gcv, left_out = [], [], []
    for penalty in penalties:
        fit = ridge_reference(x, y, penalty=penalty, sample_weight=weight, intercept=intercept)
        fits.append(fit)
        error = np.tensordot(weight, (y - fit.predict(x)) ** 2, axes=1) / total
        gcv.append(error / (1 - fit.effective_dof / len(rows)) ** 2)
        squares = []
        for row in rows:
            keep = np.arange(len(x)) != row
            other = ridge_reference(x[keep], y[keep], penalty=penalty, sample_weight=weight[keep], intercept=intercept)
            squares.append(weight[row] * (y[row] - other.predict(x[row : row + 1])[0]) ** 2)
        left_out.append(np.sum(squares, axis=0) / total)
    return RidgePath(
        np.asarray(penalties, np.float64),
        np.stack([fit.coefficients for fit in fits]),
        np.stack([fit.intercept for fit in fits]),
        np.array([fit.effective_dof for fit in fits]),
        np.stack(gcv),
        np.stack(left_out) if loo else None,
    )


def ridge_path_from_moments(
    gram: ArrayLike,
    cross: ArrayLike,
    target_squares: ArrayLike,
    penalties: Sequence[float] | Float[Array, " penalties"],
    *,
    n_samples: int,
) -> RidgePath:
    """`ridge_path` without an intercept from X'X, X'Y and the sums of y^2 alone, with GCV; any leading batch axes.

    gram (*batch, features, features), cross (*batch, features, outputs), target_squares (*batch, outputs).  Training
    errors come from a difference of sums: right to about 1e-16 of `target_squares`, and never below zero.  A Gram known
    only to 50 eps of its largest eigenvalue cannot carry a smaller penalty: `DegenerateError`.

    >>> x, y = np.array([[0.0], [1.0], [2.0]]), np.array([[1.0], [3.0], [5.0]])
    >>> path = ridge_path_from_moments(x.T @ x, x.T @ y, (y**2).sum(0), [1.0], n_samples=3)
    >>> np.allclose(path.gcv, ridge_path(x, y, [1.0], intercept=False).gcv)
    True
    """
    values = _penalties(penalties)
    gram, cross, target_squares = (
        _finite("gram", gram),
        _finite("cross", cross),
        _finite("target_squares", target_squares),
    )
    batch, n_features = gram.shape[:-2], gram.shape[-1]
    if gram.ndim < 2 or gram.shape[-2] != n_features or n_features == 0:
        raise InputError("gram", gram.shape, "shape (..., features, features)")
    if cross.shape[:-1] != (*batch, n_features):
        raise InputError("cross", cross.shape, f"shape {(*batch, n_features)} and the outputs")
    if target_squares.shape != (*batch, cross.shape[-1]):
        raise InputError("target_squares", target_squares.shape, f"shape {(*batch, cross.shape[-1])}")
    eigenvalues, vectors = np.linalg.eigh(gram)
    smallest, largest = np.maximum(eigenvalues[..., 0], 0.0), eigenvalues[..., -1]
    if np.any(smallest + values.min() < MOMENTS_RCOND * largest) or np.any(smallest + values.min() == 0):
        raise DegenerateError(
            f"ridge_path_from_moments: penalty = {values.min()} is below {MOMENTS_RCOND:.2g} of the largest eigenvalue "
            f"of gram, {largest.max():.3g}: pass a larger penalty, or the rows to ridge_path"
        )
    spectrum = _Spectrum(np.maximum(eigenvalues, 0.0), vectors, vectors.swapaxes(-1, -2) @ cross)
    inverse, s = _inverse(spectrum, values), spectrum.eigenvalues
    explained = inverse * (2 - s * inverse)  # 2 b'c - b'G b in the eigenbasis, over the squared target
    squares = target_squares - (explained[..., None, :] @ spectrum.target**2)[..., 0, :]
    return _from_spectrum(spectrum, values, np.maximum(squares, 0.0), n_samples)


def ridge_path_from_factor(
    factor: ArrayLike,
    penalties: Sequence[float] | Float[Array, " penalties"],
    *,
    n_features: int,
    n_samples: int,
) -> RidgePath:
    """`ridge_path` without an intercept from the R of a QR of [X, Y], with GCV: as exact as from the rows themselves.

    factor (*batch, rows, features + outputs), any matrix with factor' factor = [X, Y]'[X, Y]; the first `n_features`
    columns belong to X.  Unlike the Gram matrix it keeps the condition number unsquared.
    """
    values = _penalties(penalties)
    factor = _finite("factor", factor)
    if factor.ndim < 2 or not 0 < n_features < factor.shape[-1]:
        raise InputError("factor", factor.shape, f"shape (..., rows, more than {n_features} columns)")
    x, y = factor[..., :n_features], factor[..., n_features:]
    u, singular, vt = np.linalg.svd(x, full_matrices=False)
    kept = singular > _EPS * n_features * singular.max(axis=-1, initial=0.0, keepdims=True)
    if values.min() == 0 and (kept.sum(-1) < n_features).any():
        raise DegenerateError(f"ridge: penalty = 0 and rank below {n_features} features: pass a penalty > 0")
    singular = np.where(kept, singular, 0.0)
    projected = u.swapaxes(-1, -2) @ y
    spectrum = _Spectrum(singular**2, vt.swapaxes(-1, -2), singular[..., None] * projected)
    outside = np.sum((y - u @ projected) ** 2, axis=-2)
    shrinkage = 1 - spectrum.eigenvalues * _inverse(spectrum, values)
    squares = outside + (shrinkage[..., None, :] ** 2 @ projected**2)[..., 0, :]
    return _from_spectrum(spectrum, values, squares, n_samples)


class _Spectrum(NamedTuple):
    """coefficients(penalty) = basis @ (target / (eigenvalues + penalty)).

    `left`, orthonormal over the samples, only where the ridge can reach every target as the penalty vanishes; the
    intercept's direction is outside its span.
    """

    eigenvalues: Float[Array, " *batch rank"]
    basis: Float[Array, " *batch features rank"]
    target: Float[Array, " *batch rank outputs"]
    left: Float[Array, " samples rank"] | None = None


def _is_wide(d: _Centered) -> bool:
    return d.x.shape[0] - d.intercept <= d.x.shape[1]


def _off_intercept(d: _Centered) -> Float[Array, "samples directions"]:
    """An orthonormal basis of the samples' space without the direction that centering removed, sqrt(w).

    A Householder reflection: rounding leaves no trace of that direction, whose leverage would else have to be
    subtracted.  Its pivot is the largest weight, whose row is then free of cancellation too.
    """
    if not d.intercept:
        return np.eye(len(d.x))
    direction = np.sqrt(d.weight / d.weight.sum())
    pivot = int(direction.argmax())
    normal = direction + (np.arange(len(direction)) == pivot)
    reflection = np.eye(len(direction)) - np.outer(normal, normal) / normal[pivot]  # |normal|^2 = 2 normal[pivot]
    reflection[pivot] = reflection[:, pivot] = -direction
    return np.delete(reflection, pivot, axis=1)


def _eigen(d: _Centered, penalty: float) -> _Spectrum | None:
    """From the smaller Gram matrix; None where its small eigenvalues are too inexact for this penalty."""
    wide = _is_wide(d)
    directions = _off_intercept(d) if wide else None
    x = d.x if directions is None else directions.T @ d.x
    eigenvalues, vectors = np.linalg.eigh(x @ x.T if wide else x.T @ x)
    smallest, largest = max(float(eigenvalues.min(initial=np.inf)), 0.0), float(eigenvalues.max(initial=0.0))
    if smallest + penalty <= _GRAM_RCOND * (largest + penalty) or (wide and penalty == 0):
        return None
    eigenvalues = np.maximum(eigenvalues, 0.0)
    if directions is not None:
        return _Spectrum(eigenvalues, x.T @ vectors, vectors.T @ (directions.T @ d.y), directions @ vectors)
    return _Spectrum(eigenvalues, vectors, vectors.T @ (d.x.T @ d.y))


def _singular(d: _Centered, penalty: float) -> _Spectrum:
    """From the singular values of x; the exact solution has no component along null directions."""
    directions = _off_intercept(d) if _is_wide(d) else None
    u, s, vt = np.linalg.svd(d.x if directions is None else directions.T @ d.x, full_matrices=False)
    kept = _is_kept(s, d.x.shape, penalty)
    if directions is None:
        s = s[kept]
        return _Spectrum(s**2, vt[kept].T, s[:, None] * (u[:, kept].T @ d.y))
    s = np.where(kept, s, 0.0)
    return _Spectrum(s**2, vt.T * s, u.T @ (directions.T @ d.y), directions @ u)


def _residual_squares(s: _Spectrum, d: _Centered, penalties: Array) -> Float[Array, "penalties outputs"]:
    """Weighted sums of squared residuals, every one a sum of positive terms.

    With r_0 the residuals at the smallest penalty, X' r_0 = lambda_0 b_0 gives those at any other from coefficients:
    |r|^2 = |r_0|^2 + 2 lambda_0 b_0' (b_0 - b) + |X (b_0 - b)|^2.
    """
    if s.left is not None:
        rest = penalties[:, None] / (s.eigenvalues + penalties[:, None])
        return rest**2 @ s.target**2
    least = float(penalties.min())
    first = 1 / (s.eigenvalues + least)
    change = (penalties[:, None] - least) * first * _inverse(s, penalties)
    residual = d.y - d.x @ (s.basis @ (first[:, None] * s.target))
    return np.sum(residual**2, axis=0) + (2 * least * first * change + s.eigenvalues * change**2) @ s.target**2


def _mean_slack(s: _Spectrum, d: _Centered, dof: Array, penalties: Array) -> Float[Array, " penalties"]:
    """1 - effective_dof / n; without left vectors dof < n, and nothing cancels."""
    if s.left is None:
        return 1 - dof / len(d.x)
    return np.sum(penalties[:, None] / (s.eigenvalues + penalties[:, None]), axis=1) / len(d.x)


def _left_out_squares(s: _Spectrum, d: _Centered, penalties: Array) -> Float[Array, "penalties outputs"]:
    """Weighted sums of squared errors at rows left out; from left vectors no difference of nearly equal numbers."""
    scores = d.x @ s.basis if s.left is None else s.left
    squares, sums = scores**2, []
    for penalty in penalties:
        rest = (1.0 if s.left is None else penalty) / (s.eigenvalues + penalty)
        residual, slack = scores @ (rest[:, None] * s.target), squares @ rest
        if s.left is None:
            residual, slack = d.y - residual, 1 - slack - (d.weight / d.weight.sum() if d.intercept else 0.0)
            lost = s.eigenvalues.max(initial=0.0) * (squares @ rest**2)  # eps of X'X, through each row's own weights
            lost = np.where(lost * _GRAM_RCOND < 1, lost, np.sqrt(lost))  # beyond: eps of x itself, not squared
            slack = np.where(slack > _EPS * len(slack) * np.maximum(lost, 1.0), slack, 0.0)
        sums.append(np.sum(_squared_ratio(residual, slack[:, None]), axis=0))
    return np.stack(sums)


def _squared_ratio(residual: Array, slack: Array) -> Array:
    """(residual / slack)^2, infinite where nothing is left of the slack."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(slack > 0, (residual / slack) ** 2, np.inf)


def _inverse(s: _Spectrum, penalties: Float[Array, " penalties"]) -> Float[Array, "penalties *batch rank"]:
    """1 / (s + penalty), and 0 along null directions: the solution has no component there."""
    shifted = s.eigenvalues + penalties.reshape(-1, *[1] * s.eigenvalues.ndim)
    return np.divide(1.0, shifted, out=np.zeros_like(shifted), where=shifted > 0)


def _coefficients(
    s: _Spectrum, penalties: Float[Array, " penalties"]
) -> Float[Array, "penalties *batch features outputs"]:
    return s.basis @ (_inverse(s, penalties)[..., None] * s.target)


def _from_spectrum(
    s: _Spectrum,
    penalties: Float[Array, " penalties"],
    squares: Float[Array, "penalties *batch outputs"],
    n_samples: int,
) -> RidgePath:
    dof = np.sum(s.eigenvalues * _inverse(s, penalties), axis=-1)
    gcv = _squared_ratio(np.sqrt(squares / n_samples), (1 - dof / n_samples)[..., None])
    return RidgePath(penalties, _coefficients(s, penalties), np.zeros_like(gcv), dof, gcv, None)


def _penalties(penalties: Sequence[float] | Float[Array, " penalties"]) -> Float[Array, " penalties"]:
    values = np.array([_penalty(value) for value in penalties])
    if not values.size:
        raise InputError("penalties", (), "at least one penalty")
    return values
