"""LiDAR: the effective rank of what tells inputs apart, in units of what their views differ by.

    S_b = cov over inputs of the mean of their views       S_w = mean covariance of the views of one + delta I
    LiDAR = exp of the entropy of the eigenvalues of S_w^-1/2 S_b S_w^-1/2

The eigenvalues are those of the pair (S_b, S_w); they are taken as they are.  (A public program hands the matrix itself
to a principal component analysis as if it were data, which squares its spectrum.)  Thilak et al., arXiv 2312.04000.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Float64
from scipy.linalg import eigh
from torch import Tensor

from commissure.core.errors import DegenerateError, InputError
from commissure.geometry.effective_rank import renyi_rank
from commissure.geometry.spectra import Spectrum, rows_of

__all__ = ["Views", "discriminant_spectrum", "lidar"]

Views = Float[Tensor, "inputs views dim"] | Float[np.ndarray, "inputs views dim"]


def lidar(views: Views, *, delta: float = 1e-6) -> float:
    """Effective rank of the discriminant spectrum of at least two inputs with at least two views each.

    >>> x = np.array([[[1.0, 0.1], [1.0, -0.1]], [[-1.0, 0.1], [-1.0, -0.1]], [[0.0, 0.1], [0.0, -0.1]]])
    >>> round(lidar(x), 3)
    1.0
    """
    return renyi_rank(Spectrum.of(discriminant_spectrum(views, delta=delta)), order=1)


def discriminant_spectrum(views: Views, *, delta: float = 1e-6) -> Float64[np.ndarray, " dim"]:
    """Generalized eigenvalues of between- and within-input covariance, descending; `delta` is added to the second."""
    shape = tuple(getattr(views, "shape", ()))
    if len(shape) != 3 or shape[0] < 2 or shape[1] < 2:
        raise InputError("views", shape, "shape (inputs, views, dim), two inputs and two views at least")
    if isinstance(delta, bool) or not isinstance(delta, int | float) or not 0 <= delta < np.inf:
        raise InputError("delta", delta, "a number >= 0")
    x = rows_of(views.reshape(-1, shape[2])).double().cpu().numpy().reshape(shape)
    means = x.mean(1)
    between = np.cov(means, rowvar=False, ddof=1).reshape(shape[2], shape[2])
    apart = (x - means[:, None]).reshape(-1, shape[2])
    within = apart.T @ apart / (shape[0] * (shape[1] - 1)) + delta * np.eye(shape[2])
    try:
        values = eigh(between, within, eigvals_only=True)
    except np.linalg.LinAlgError:
        raise DegenerateError("the covariance within inputs is singular; pass delta > 0 or more views") from None
    return np.maximum(values[::-1], 0.0)
