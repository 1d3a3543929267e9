"""Ranks: how many directions the states of a network span.

    kernel rank           rank of the final states after different inputs: how many can a linear readout tell apart
    generalization rank   the same after inputs that should count as one: the lower the better
    participation ratio   (sum_i s_i)^2 / sum_i s_i^2,  s the eigenvalues of the states' covariance

A rank counts the singular values above `tolerance` times the largest: a readout of that relative precision sees no
more.  Legenstein & Maass, Neural Networks 20 (2007); Busing, Schrauwen & Legenstein, Neural Computation 22 (2010);
participation ratio, unbiased: the Wishart moments of Letac & Massam (2004).
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import ArrayLike
from torch import Tensor

from commissure.core.errors import DegenerateError, InputError
from commissure.core.moments import Moments, measure
from commissure.core.rng import generator
from commissure.reservoirs.inputs import numbers, real, whole
from commissure.reservoirs.reservoir import Reservoir

__all__ = ["generalization_rank", "kernel_rank", "numerical_rank", "participation_ratio"]

_TOLERANCE = 1e-3


def numerical_rank(states: ArrayLike, *, tolerance: float = _TOLERANCE) -> int:
    """Singular values of `states` (samples, nodes) above `tolerance` (0 to 1) times the largest.

    >>> numerical_rank([[1.0, 0.0, 0.0], [0.0, 1e-2, 0.0], [0.0, 0.0, 1e-5]])
    2
    """
    x = numbers("states", states)
    if x.ndim != 2 or not x.size:
        raise InputError("states", x.shape, "shape (samples, nodes), neither 0")
    if not 0 < real("tolerance", tolerance) < 1:
        raise InputError("tolerance", tolerance, "a number between 0 and 1")
    s = np.linalg.svd(x, compute_uv=False)
    return int((s > tolerance * s[0]).sum())


def kernel_rank(
    reservoir: Reservoir,
    *,
    n_patterns: int | None = None,
    length: int = 100,
    tolerance: float = _TOLERANCE,
    seed: int = 0,
) -> int:
    """Rank of the states after `n_patterns` (None: as many as nodes) independent inputs from U(-1, 1), from rest.

    >>> kernel_rank(Reservoir(0.5 * np.eye(3), inputs=np.ones((1, 3)), spectral_radius=None))
    1
    """
    n_patterns = _checked(reservoir, n_patterns, length)
    drawn = generator(seed, "kernel rank").uniform(-1.0, 1.0, (n_patterns, length, reservoir.n_inputs))
    return numerical_rank(_final(reservoir, drawn), tolerance=tolerance)


def generalization_rank(
    reservoir: Reservoir,
    *,
    noise: float = 0.1,
    n_patterns: int | None = None,
    length: int = 100,
    tolerance: float = _TOLERANCE,
    seed: int = 0,
) -> int:
    """Rank of the states after `n_patterns` versions of one input from U(-1, 1), each with its own U(-noise, noise).

    The kernel rank's inputs are the limit where the noise is all there is.
    """
    n_patterns = _checked(reservoir, n_patterns, length)
    noise, rng = real("noise", noise, 0), generator(seed, "generalization rank")
    template = rng.uniform(-1.0, 1.0, (1, length, reservoir.n_inputs))
    versions = template + noise * rng.uniform(-1.0, 1.0, (n_patterns, length, reservoir.n_inputs))
    return numerical_rank(_final(reservoir, versions), tolerance=tolerance)


def participation_ratio(states: ArrayLike | Tensor | Moments, *, unbiased: bool = False) -> float:
    """The number of directions that carry the variance of `states` (samples, nodes), from 1 to the number of nodes.

    Few samples span few directions: `unbiased` divides the unbiased estimates of (sum s)^2 and sum s^2 that
    independent normal samples allow (states of consecutive steps are neither, and count as fewer).  States without
    variance, or too few for the estimate: DegenerateError.

    >>> participation_ratio([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    2.0
    """
    if not isinstance(states, Moments):
        x = numbers("states", states)
        if x.ndim != 2 or not x.shape[1]:
            raise InputError("states", x.shape, "shape (samples, nodes), at least one node")
        states = measure(torch.from_numpy(x))
    dof, least = states.n_samples - 1, 4 if unbiased else 2
    if dof + 1 < least:
        raise DegenerateError(f"participation_ratio of {dof + 1} samples: needs at least {least}")
    scatter = states.scatter / dof
    of_sum, of_squares = float(scatter.trace()) ** 2, float(scatter.square().sum())
    if unbiased:
        of_sum, of_squares = ((dof + 1) * of_sum - 2 * of_squares) / dof, of_squares - of_sum / dof
    if not of_squares > 0:
        raise DegenerateError("participation_ratio: the states have no variance, or too few samples to tell it")
    return of_sum / of_squares


def _checked(reservoir: Reservoir, n_patterns: int | None, length: int) -> int:
    if not isinstance(reservoir, Reservoir):
        raise InputError("reservoir", type(reservoir).__name__, "a Reservoir")
    whole("length", length, 1)
    return reservoir.n_nodes if n_patterns is None else whole("n_patterns", n_patterns, 1)


def _final(reservoir: Reservoir, u: Float[np.ndarray, "patterns time inputs"]) -> Float[np.ndarray, "patterns nodes"]:
    """The last states, a few patterns at a time: all states of all patterns need not fit in memory."""
    with torch.no_grad():
        drive = torch.from_numpy(u).to(reservoir.values)
        return torch.cat([reservoir(part)[1].activity for part in drive.split(64)]).double().numpy()
