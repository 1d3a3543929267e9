"""What a linear readout needs to know of the states, streamed: no state is kept, memory does not depend on time.

    Z = [1, X, Y]      M = Z' Z (moments)   or   Z = Q R (factor),   M = R' R
    training           b = argmin |Y - X b|^2 + lambda |b|^2, from M's blocks X'X and X'Y
    test error         |Y - X b|^2 = yy - 2 b' X'Y + b' X'X b, from the test series' own M

| here            | meaning                                                                       |
|-----------------|-------------------------------------------------------------------------------|
| X               | states that a readout reads, (time, features)                                 |
| Y               | targets, (time, outputs)                                                      |
| batch           | rows and readouts: every readout has its own M, all of one size come together |

M is float64 whatever the states are.  It squares the condition number of X: a penalty below 50 eps of its largest
eigenvalue is lost in its rounding, and R, which does not square, takes over (Golub & Van Loan, Matrix
Computations, 5.3).  Both merge in any order and from any process.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int
from scipy.linalg.blas import dsyrk
from torch import Tensor

from commissure.core.errors import CommissureWarning, DegenerateError, InputError
from commissure.core.ridge_path import (
    MOMENTS_RCOND,
    RidgePath,
    ridge_path_from_factor,
    ridge_path_from_moments,
)

__all__ = ["IllConditionedWarning", "ReadoutFactor", "ReadoutMoments", "ReadoutScores", "joint_columns"]


# A variance below this share of the mean square is the rounding of a constant's.
_ROUNDING = 100 * float(np.finfo(np.float64).eps)


class IllConditionedWarning(CommissureWarning):
    """A penalty is too small for the normal equations in float64; the readout was solved without them."""


class ReadoutScores(NamedTuple):
    """How well readouts predict: R^2 = 1 - SSE / SST, and the squared correlation of prediction and target."""

    r2: Float[np.ndarray, " *batch outputs"]
    squared_correlation: Float[np.ndarray, " *batch outputs"]


def joint_columns(
    x: Float[Tensor, "*batch features time"], y: Float[Tensor, "*batch outputs time"]
) -> Float64[Tensor, "*batch columns time"]:
    """[1, x, y] in float64: what `update` of moments and factors takes.  In memory each step's columns are together."""
    if x.ndim != y.ndim or x.shape[:-2] != y.shape[:-2] or x.shape[-1] != y.shape[-1]:
        raise InputError("y", tuple(y.shape), f"the batch axes and the time of x, {tuple(x.shape)}")
    z = torch.empty(*x.shape[:-2], x.shape[-1], 1 + x.shape[-2] + y.shape[-2], dtype=torch.float64)
    z[..., 0], z[..., 1 : 1 + x.shape[-2]], z[..., 1 + x.shape[-2] :] = 1.0, x.mT, y.mT
    return z.mT


class ReadoutMoments(NamedTuple):
    """Z' Z of [1, x, y] for every readout of a batch; only the lower triangle is summed.

    >>> x, y = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[1.0, 3.0, 5.0]])
    >>> moments = ReadoutMoments.empty((), n_features=1, n_outputs=1).update(joint_columns(x, y))
    >>> moments.products().tolist()
    [[3.0, 6.0, 9.0], [6.0, 14.0, 22.0], [9.0, 22.0, 35.0]]
    >>> moments.path([1e-9]).coefficients.round(6).ravel()
    array([1.571429])
    """

    lower: Float64[Tensor, "*batch columns columns"]
    n_samples: int
    n_features: int

    @classmethod
    def empty(cls, batch: tuple[int, ...], *, n_features: int, n_outputs: int) -> ReadoutMoments:
        """Nothing seen yet."""
        k = _n_columns(n_features, n_outputs)
        return cls(torch.zeros(*batch, k, k, dtype=torch.float64), 0, n_features)

    def update(self, columns: Float64[Tensor, "*batch columns time"]) -> ReadoutMoments:
        """With the samples of one more block of `joint_columns`; the order of blocks matters only to rounding."""
        _check_columns(columns, self.lower)
        lower, n = self.lower.numpy().copy(), columns.shape[-1]
        size = lower.shape[-1]
        # One symmetric product after another: faster than a batch of whole ones, and the same for one alone.
        for held, z in zip(lower.reshape(-1, size, size), columns.numpy().reshape(-1, size, n), strict=True):
            dsyrk(1.0, z, beta=1.0, c=held.T, overwrite_c=1)
        return type(self)(torch.from_numpy(lower), self.n_samples + n, self.n_features)

    def products(self) -> Float64[np.ndarray, "*batch columns columns"]:
        """Both triangles of Z' Z."""
        lower = self.lower.numpy()
        return lower + np.tril(lower, -1).swapaxes(-1, -2)

    def merge(self, other: ReadoutMoments) -> ReadoutMoments:
        """The moments of both sets of samples."""
        _check_mergeable(self.lower, other.lower, self.n_features, other.n_features)
        return type(self)(self.lower + other.lower, self.n_samples + other.n_samples, self.n_features)

    def is_sub_precision(self, penalty: float) -> Bool[np.ndarray, " *batch"]:
        """Whether this penalty is below 50 eps of the largest eigenvalue of X'X."""
        gram = self.products()[..., 1 : 1 + self.n_features, 1 : 1 + self.n_features]
        if MOMENTS_RCOND * np.trace(gram, axis1=-2, axis2=-1).max() <= penalty:  # the sum of all eigenvalues
            return np.zeros(gram.shape[:-2], bool)
        return penalty < MOMENTS_RCOND * np.linalg.eigvalsh(gram)[..., -1]

    def select(self, index: Int[np.ndarray, " rows"]) -> ReadoutMoments:
        """These rows of the first batch axis."""
        return type(self)(self.lower[torch.from_numpy(index)], self.n_samples, self.n_features)

    def path(self, penalties: Sequence[float]) -> RidgePath:
        """Ridges without an intercept at every penalty, with generalized cross-validation."""
        p, m = self.n_features, self.products()
        squares = np.diagonal(m[..., 1 + p :, 1 + p :], axis1=-2, axis2=-1)
        gram, cross = m[..., 1 : 1 + p, 1 : 1 + p], m[..., 1 : 1 + p, 1 + p :]
        return ridge_path_from_moments(gram, cross, squares, penalties, n_samples=self.n_samples)

    def score(self, coefficients: Float[np.ndarray, " *batch features outputs"]) -> ReadoutScores:
        """Scores of these coefficients (without an intercept) on the samples of these moments."""
        p, m = self.n_features, self.products()
        one, x, y = m[..., 0, :], m[..., 1 : 1 + p, :], m[..., 1 + p :, 1 + p :]
        gram, cross = x[..., 1 : 1 + p], x[..., 1 + p :]
        yy = np.diagonal(y, axis1=-2, axis2=-1)
        sum_y, sum_f = one[..., 1 + p :], (one[..., None, 1 : 1 + p] @ coefficients)[..., 0, :]
        fy, ff = np.sum(coefficients * cross, axis=-2), np.sum(coefficients * (gram @ coefficients), axis=-2)
        n = self.n_samples
        return _scores(yy, yy - 2 * fy + ff, yy - sum_y**2 / n, ff - sum_f**2 / n, fy - sum_f * sum_y / n)


class ReadoutFactor(NamedTuple):
    """R of the QR decomposition of [1, x, y], block by block: as exact as the states, at three times the cost.

    >>> x, y = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[1.0, 3.0, 5.0]])
    >>> factor = ReadoutFactor.empty((), n_features=1, n_outputs=1).update(joint_columns(x, y))
    >>> factor.path([1e-9]).coefficients.round(6).ravel()
    array([1.571429])
    """

    triangle: Float64[Tensor, "*batch columns columns"]
    n_samples: int
    n_features: int

    @classmethod
    def empty(cls, batch: tuple[int, ...], *, n_features: int, n_outputs: int) -> ReadoutFactor:
        """Nothing seen yet."""
        k = _n_columns(n_features, n_outputs)
        return cls(torch.zeros(*batch, k, k, dtype=torch.float64), 0, n_features)

    def update(self, columns: Float64[Tensor, "*batch columns time"]) -> ReadoutFactor:
        """With the samples of one more block of `joint_columns`."""
        _check_columns(columns, self.triangle)
        stacked = torch.cat([self.triangle, columns.mT], -2)
        return type(self)(_triangle(stacked), self.n_samples + columns.shape[-1], self.n_features)

    def merge(self, other: ReadoutFactor) -> ReadoutFactor:
        """The factor of both sets of samples."""
        _check_mergeable(self.triangle, other.triangle, self.n_features, other.n_features)
        stacked = torch.cat([self.triangle, other.triangle], -2)
        return type(self)(_triangle(stacked), self.n_samples + other.n_samples, self.n_features)

    def select(self, index: Int[np.ndarray, " rows"]) -> ReadoutFactor:
        """These rows of the first batch axis."""
        return type(self)(self.triangle[torch.from_numpy(index)], self.n_samples, self.n_features)

    def path(self, penalties: Sequence[float]) -> RidgePath:
        """Ridges without an intercept at every penalty, with generalized cross-validation."""
        columns = self.triangle[..., 1:].numpy()
        return ridge_path_from_factor(columns, penalties, n_features=self.n_features, n_samples=self.n_samples)

    def score(self, coefficients: Float[np.ndarray, " *batch features outputs"]) -> ReadoutScores:
        """Scores of these coefficients (without an intercept) on the samples of this factor."""
        r, p = self.triangle.numpy(), self.n_features
        f, y = r[..., 1 : 1 + p] @ coefficients, r[..., 1 + p :]
        # The first row is the component along [1, ..., 1]: the rest is centered.
        f_centered, y_centered = f[..., 1:, :], y[..., 1:, :]
        return _scores(
            np.sum(y**2, axis=-2),
            np.sum((y - f) ** 2, axis=-2),
            np.sum(y_centered**2, axis=-2),
            np.sum(f_centered**2, axis=-2),
            np.sum(f_centered * y_centered, axis=-2),
        )


def _scores(
    squares: np.ndarray, errors: np.ndarray, total: np.ndarray, spread: np.ndarray, shared: np.ndarray
) -> ReadoutScores:
    """From sums of squares of targets, errors, centered targets and predictions, and the last two times each other."""
    is_constant = total <= _ROUNDING * squares
    if is_constant.any():
        at = tuple(int(i) for i in np.argwhere(is_constant)[0])
        raise DegenerateError(f"target {at[-1]} is constant over the scored samples: R^2 is not defined")
    correlation = np.divide(shared**2, spread * total, out=np.zeros_like(shared), where=spread > 0)
    return ReadoutScores(1 - errors / total, np.minimum(correlation, 1.0))


def _triangle(stacked: Float64[Tensor, "*batch rows columns"]) -> Float64[Tensor, "*batch columns columns"]:
    return torch.linalg.qr(stacked, mode="r").R


def _n_columns(n_features: int, n_outputs: int) -> int:
    for name, value in (("n_features", n_features), ("n_outputs", n_outputs)):
        if value < 1:
            raise InputError(name, value, "an integer >= 1")
    return 1 + n_features + n_outputs


def _check_columns(columns: Tensor, held: Tensor) -> None:
    if columns.shape[:-1] != held.shape[:-1] or columns.dtype != torch.float64:
        raise InputError(
            "columns", (tuple(columns.shape), str(columns.dtype)), f"float64, shape {(*held.shape[:-1], 'time')}"
        )


def _check_mergeable(a: Tensor, b: Tensor, features: int, others: int) -> None:
    if a.shape != b.shape or features != others:
        raise InputError("other", (tuple(b.shape), others), f"{(tuple(a.shape), features)}, columns and features")
