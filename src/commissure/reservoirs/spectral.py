"""The spectral radius of a network, by the cheapest method that can be trusted for its kind.

    rho(W) = max |eigenvalue| = the largest over the strongly connected parts of W

| part | method |
|---|---|
| none with a cycle (W is nilpotent) | "structure": the radius is 0 |
| no negative weight | "power": min (W v / v) <= rho <= max (W v / v) for every v > 0 (Collatz 1942, Wielandt 1950) |
| symmetric | "lanczos" |
| any other | "arnoldi" from a fixed start with 40 vectors, or "dense": all eigenvalues |

A directed matrix must never be given to a symmetric solver, which reads one triangle of it.  Power iteration runs on
W + s I: without the shift s it would not settle on a periodic W (a ring).  bioRxiv 2025.06.20.660760 scales networks
by this number.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.sparse import csr_array, sparray
from scipy.sparse.csgraph import connected_components
from scipy.sparse.linalg import ArpackError, eigs, eigsh

from commissure.reservoirs.connectome import Connectome, as_csr

__all__ = ["SpectralRadius", "spectral_radius", "spectral_radius_reference"]

_WIDTH = 1e-12  # relative width at which the bracket is closed: some 1e3 roundings of one row
_STEPS = 2000  # of power iteration; rings of more than about 10 nodes need more, and go on to the other methods
_SHIFT = 0.1  # of the mean row sum: an eigenvalue -rho shrinks by 0.82 a step, other convergence hardly slows
_VECTORS = 40  # of the Krylov space: leading complex pairs of random networks lie close together
_RESTARTS = 100  # of ARPACK; a random matrix of 5000 nodes takes some 10, a long ring never ends
_DENSE = 100  # nodes up to which all eigenvalues cost less than a Krylov space is worth


class SpectralRadius(NamedTuple):
    """`value`, with `lower <= rho <= upper` guaranteed up to rounding: by the method "power" tightly, else by norms."""

    value: float
    lower: float
    upper: float
    method: Literal["structure", "power", "lanczos", "arnoldi", "dense"]


def spectral_radius(weights: Connectome | ArrayLike | sparray) -> SpectralRadius:
    """Largest modulus of the eigenvalues of a network or of any square matrix (n, n), dense or sparse.

    >>> ring = np.roll(np.diag([2.0, 2.0, 4.0]), 1, axis=1)
    >>> radius = spectral_radius(ring)
    >>> round(radius.value, 9), radius.method
    (2.5198421, 'power')
    >>> spectral_radius(np.triu(np.ones((3, 3)), 1))
    SpectralRadius(value=0.0, lower=0.0, upper=0.0, method='structure')
    """
    matrix = _checked(weights)
    n_parts, part = connected_components(matrix, connection="strong")
    sizes = np.bincount(part)
    looped = np.unique(part[matrix.diagonal() != 0])
    found = [SpectralRadius(0.0, 0.0, 0.0, "structure")]
    for which in sorted({*np.flatnonzero(sizes > 1).tolist(), *looped.tolist()}):
        nodes = np.flatnonzero(part == which)
        found.append(_radius_of_part(matrix if n_parts == 1 else matrix[nodes][:, nodes]))
    largest = max(found, key=lambda radius: radius.value)
    return largest._replace(lower=max(r.lower for r in found), upper=max(r.upper for r in found))


def spectral_radius_reference(weights: Connectome | ArrayLike | sparray) -> SpectralRadius:
    """`spectral_radius` from all eigenvalues of the dense matrix."""
    matrix = _checked(weights)
    value = float(np.abs(np.linalg.eigvals(matrix.toarray())).max())
    return SpectralRadius(value, 0.0, _norm(matrix), "dense")


def _checked(weights: Connectome | ArrayLike | sparray) -> csr_array:
    if isinstance(weights, Connectome):
        return weights.weights
    matrix = as_csr("weights", weights)
    matrix.eliminate_zeros()
    return matrix


def _radius_of_part(matrix: csr_array) -> SpectralRadius:
    """Of an irreducible matrix."""
    lower, upper = 0.0, _norm(matrix)
    if (matrix.data > 0).all():
        bracket = _power(matrix)
        if bracket.upper - bracket.lower <= _WIDTH * bracket.upper:
            return bracket
        lower, upper = bracket.lower, bracket.upper
    is_symmetric = (matrix != matrix.T).nnz == 0
    value, method = _krylov(matrix, is_symmetric) if matrix.shape[0] > _DENSE else (None, "dense")
    if value is None:
        dense = matrix.toarray()
        spectrum = np.linalg.eigvalsh(dense) if is_symmetric else np.linalg.eigvals(dense)
        value, method = float(np.abs(spectrum).max()), "dense"
    return SpectralRadius(value, lower, upper, method)


def _norm(matrix: csr_array) -> float:
    """The smallest of three norms, each at least the spectral radius."""
    size = abs(matrix)
    return float(min(size.sum(0).max(), size.sum(1).max(), np.sqrt((matrix.data**2).sum())))


def _power(matrix: csr_array) -> SpectralRadius:
    """The bracket of Collatz and Wielandt, tightened until it is closed or the steps are spent."""
    v = np.ones(matrix.shape[0])
    shift = _SHIFT * matrix.sum() / len(v)
    lower, upper = 0.0, np.inf
    for _ in range(_STEPS):
        image = matrix @ v
        ratio = image / v
        lower, upper = max(lower, float(ratio.min())), min(upper, float(ratio.max()))
        v = image + shift * v
        v /= v.max()
        if upper - lower <= _WIDTH * upper or not v.min() > 0:
            break
    return SpectralRadius((lower + upper) / 2, lower, upper, "power")


def _krylov(matrix: csr_array, is_symmetric: bool) -> tuple[float | None, Literal["lanczos", "arnoldi", "dense"]]:
    """The leading eigenvalues by ARPACK from a fixed start; None where it does not converge."""
    start = np.random.default_rng(0).standard_normal(matrix.shape[0])
    try:
        solve = eigsh if is_symmetric else eigs
        leading = solve(matrix, k=4, which="LM", v0=start, ncv=_VECTORS, maxiter=_RESTARTS, return_eigenvectors=False)
    except ArpackError:  # no convergence too
        return None, "dense"
    return float(np.abs(leading).max()), "lanczos" if is_symmetric else "arnoldi"
