"""The spectral radius of a network, by the cheapest method that can be trusted for its kind.

    rho(W) = max |eigenvalue| = the largest over the strongly connected parts of W

| part | method |
|---|---|
| none with a cycle (W is nilpotent) | "structure": the radius is 0 |
| no negative weight | "power": min (W v / v) <= rho <= max (W v / v) for every v > 0 (Collatz 1942, Wielandt 1950) |
| symmetric | "lanczos" |
| any other | "arnoldi" from a fixed start with 40 vectors, or "dense": all eigenvalues |

A signed matrix with cycles can be nilpotent all the same, where the cycles cancel.  A solver's value is then rounding
noise, (1e-16)^(1/k) for a Jordan block of size k: too large for a threshold on values.  The condition of the eigenvalue
by weights tells it, eps |y|' |W| |x| / |y' x| with left and right eigenvectors y and x: what one rounding of every
weight makes, whatever the scaling of the nodes (Higham & Higham 1998, 10.1137/S0895479896314188).

A directed matrix must never be given to a symmetric solver, which reads one triangle of it.  Power iteration runs on
W + s I: without the shift s it would not settle on a periodic W (a ring).  bioRxiv 2025.06.20.660760 scales networks
by this number.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import numpy as np
import scipy.linalg
from jaxtyping import Complex
from numpy.typing import ArrayLike
from scipy.sparse import csr_array, sparray
from scipy.sparse.csgraph import connected_components
from scipy.sparse.linalg import ArpackError, eigs, eigsh

from commissure.core.errors import DegenerateError, InputError
from commissure.reservoirs.connectome import Connectome, as_csr

__all__ = ["SpectralRadius", "spectral_radius", "spectral_radius_reference"]

_WIDTH = 1e-12  # relative width at which the bracket is closed: some 1e3 roundings of one row
_STEPS = 2000  # of power iteration; rings of more than about 10 nodes need more, and go on to the other methods
_SHIFT = 0.1  # of the mean row sum: an eigenvalue -rho shrinks by 0.82 a step, other convergence hardly slows
_VECTORS = 40  # of the Krylov space: leading complex pairs of random networks lie close together
_RESTARTS = 100  # of ARPACK; a random matrix of 5000 nodes takes some 10, a long ring never ends
_DOUBT = 1e-3  # relative error of a value that means nothing: nilpotent matrices reach 0.5 and more, random ones 1e-13
_AGREE = 1e-6  # relative difference of ARPACK's values for W and its transpose; 1e-11 where both converged
_DENSE = 100  # nodes up to which all eigenvalues cost less than a Krylov space is worth


class SpectralRadius(NamedTuple):
    """`value`, with `lower <= rho <= upper` guaranteed up to rounding: by the method "power" tightly, else by norms."""

    value: float
    lower: float
    upper: float
    method: Literal["structure", "power", "lanczos", "arnoldi", "dense"]


def spectral_radius(weights: Connectome | ArrayLike | sparray) -> SpectralRadius:
    """Largest modulus of the eigenvalues of a network or of any square matrix (n, n), dense or sparse.

    `DegenerateError` where cycles of both signs cancel so that rounding decides, `InputError` beyond float64.

    >>> ring = np.roll(np.diag([2.0, 2.0, 4.0]), 1, axis=1)
    >>> radius = spectral_radius(ring)
    >>> round(radius.value, 9), radius.method
    (2.5198421, 'power')
    >>> spectral_radius(np.triu(np.ones((3, 3)), 1))
    SpectralRadius(value=0.0, lower=0.0, upper=0.0, method='structure')
    """
    matrix = as_csr("weights", weights)
    n_parts, part = connected_components(matrix, connection="strong")
    sizes = np.bincount(part)
    looped = np.unique(part[matrix.diagonal() != 0])
    found, errors = [SpectralRadius(0.0, 0.0, 0.0, "structure")], [0.0]
    for which in sorted({*np.flatnonzero(sizes > 1).tolist(), *looped.tolist()}):
        nodes = np.flatnonzero(part == which)
        radius, error = _radius_of_part(matrix if n_parts == 1 else matrix[nodes][:, nodes])
        found.append(radius)
        errors.append(error)
    at = max(range(len(found)), key=lambda i: found[i].value)
    if errors[at] > _DOUBT:
        raise DegenerateError(
            f"the spectral radius is 0 or lost in rounding: cycles of both signs cancel, and the {found[at].value:.3g} "
            f"found has a relative error of about {errors[at]:.1g}; pass spectral_radius=None to leave weights unscaled"
        )
    if np.isinf(found[at].value):
        raise InputError("weights", float(abs(matrix).max()), "weights whose spectral radius is below 1.8e308")
    return found[at]._replace(lower=max(r.lower for r in found), upper=max(r.upper for r in found))


def spectral_radius_reference(weights: Connectome | ArrayLike | sparray) -> SpectralRadius:
    """`spectral_radius` from all eigenvalues of the dense matrix."""
    matrix = as_csr("weights", weights)
    value = float(np.abs(np.linalg.eigvals(matrix.toarray())).max())
    return SpectralRadius(value, 0.0, _norm(matrix), "dense")


def _radius_of_part(matrix: csr_array) -> tuple[SpectralRadius, float]:
    """Of an irreducible matrix, with the estimated relative error; weights near 1 so that none over- or underflows."""
    exponent = int(np.frexp(abs(matrix.data).max())[1])
    scaled = csr_array((np.ldexp(matrix.data, -exponent), matrix.indices, matrix.indptr), shape=matrix.shape)
    radius, error = _radius_near_one(scaled)
    with np.errstate(over="ignore"):
        value, lower, upper = np.ldexp(radius[:3], exponent).tolist()
    return SpectralRadius(value, lower, upper, radius.method), error


def _radius_near_one(matrix: csr_array) -> tuple[SpectralRadius, float]:
    lower, upper = 0.0, _norm(matrix)
    is_positive = bool((matrix.data > 0).all())
    if is_positive:
        bracket = _power(matrix)
        if bracket.upper - bracket.lower <= _WIDTH * bracket.upper:
            return bracket, 0.0
        lower, upper = bracket.lower, bracket.upper
    if is_positive or (matrix != matrix.T).nnz == 0:  # neither is nilpotent
        value, method = _eigenvalue(matrix)
        return SpectralRadius(value, lower, upper, method), 0.0
    krylov = _krylov_pair(matrix) if matrix.shape[0] > _DENSE else None
    method = "dense" if krylov is None else "arnoldi"
    value, error = krylov or _dense_pair(matrix)
    return SpectralRadius(value, lower, upper, method), error


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


def _eigenvalue(matrix: csr_array) -> tuple[float, Literal["lanczos", "arnoldi", "dense"]]:
    """The largest modulus, by ARPACK from a fixed start or, where it does not converge, by all eigenvalues."""
    is_symmetric = (matrix != matrix.T).nnz == 0
    if matrix.shape[0] > _DENSE:
        try:
            leading = (eigsh if is_symmetric else eigs)(matrix, return_eigenvectors=False, **_arpack(matrix))
            return float(np.abs(leading).max()), "lanczos" if is_symmetric else "arnoldi"
        except ArpackError:  # no convergence too
            pass
    spectrum = (np.linalg.eigvalsh if is_symmetric else np.linalg.eigvals)(matrix.toarray())
    return float(np.abs(spectrum).max()), "dense"


def _krylov_pair(matrix: csr_array) -> tuple[float, float] | None:
    """The largest modulus and its relative error, by ARPACK for W and its transpose; None where they disagree."""
    try:
        values, right = eigs(matrix, **_arpack(matrix))
        transposed, left = eigs(matrix.T, **_arpack(matrix))
    except ArpackError:
        return None
    at = int(np.abs(values).argmax())
    twin = int(np.abs(transposed - values[at]).argmin())
    value = float(abs(values[at]))
    error = _relative_error(matrix, value, left[:, twin], right[:, at])
    return (value, error) if error <= _DOUBT and abs(transposed[twin] - values[at]) <= _AGREE * value else None


def _dense_pair(matrix: csr_array) -> tuple[float, float]:
    """The largest modulus and its relative error, from all eigenvalues."""
    values, left, right = scipy.linalg.eig(matrix.toarray(), left=True, right=True)
    at = int(np.abs(values).argmax())
    value = float(abs(values[at]))
    return value, _relative_error(matrix, value, left[:, at].conj(), right[:, at])


def _relative_error(
    matrix: csr_array, value: float, left: Complex[np.ndarray, " n"], right: Complex[np.ndarray, " n"]
) -> float:
    """Of an eigenvalue, to first order, were every weight off by one rounding; `left @ W` is the value times `left`."""
    overlap = value * float(abs(left @ right))
    moved = np.finfo(np.float64).eps * float(np.abs(left) @ (abs(matrix) @ np.abs(right)))
    return moved / overlap if overlap else np.inf


def _arpack(matrix: csr_array) -> dict[str, Any]:
    start = np.random.default_rng(0).standard_normal(matrix.shape[0])
    return {"k": 4, "which": "LM", "v0": start, "ncv": _VECTORS, "maxiter": _RESTARTS}
