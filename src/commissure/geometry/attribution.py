"""Which eigenvalues moved the effective rank from one spectrum to the next.

    S = -sum p log p,    p = lambda / sum lambda         dS/dt = -Cov_p(g, log p) = -sum p (g - E_p g) log p
    g_i = d log lambda_i / dt

The entropy falls exactly if directions that are heavy already grow fastest.  Between two spectra g is taken constant on
the way (every eigenvalue moves as a power of the other end) and the rate is integrated: the parts add up to the whole
change of log RankMe.  A band of ranks has the sum of its eigenvalues' parts; E_p g is common to all.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64

from commissure.core.errors import DegenerateError, InputError
from commissure.geometry.spectra import Spectrum

__all__ = ["EntropyChange", "entropy_change", "entropy_rate"]

_POINTS = 32  # of Gauss and Legendre's rule: exact to rounding where no eigenvalue moves by more than e^10


class EntropyChange(NamedTuple):
    """Change of log RankMe (nats), and the part of each band of ranks, first and last counted from 1."""

    total: float
    bands: tuple[tuple[int, int], ...]
    parts: Float64[np.ndarray, " bands"]


def entropy_rate(
    values: Float64[np.ndarray, " rank"], growth: Float64[np.ndarray, " rank"]
) -> Float64[np.ndarray, " rank"]:
    """Every eigenvalue's part of dS/dt, for eigenvalues > 0 and their rates of growth d log lambda / dt.

    >>> entropy_rate(np.array([3.0, 1.0]), np.array([1.0, 0.0])).round(4).tolist()
    [0.0539, -0.2599]
    """
    p = values / values.sum()
    return -p * (growth - p @ growth) * np.log(p)


def entropy_change(
    before: Spectrum, after: Spectrum, *, bands: Sequence[tuple[int, int]] | None = None
) -> EntropyChange:
    """The change of log RankMe from `before` to `after`, split over bands of ranks, by default of doubling width.

    Eigenvalues are followed by rank.  Those that are zero in either spectrum have no rate: `DegenerateError`, if they
    are among the first min of both numbers of samples.

    >>> found = entropy_change(Spectrum.of(np.array([1.0, 1.0])), Spectrum.of(np.array([3.0, 1.0])))
    >>> found.bands, round(found.total, 6), round(float(found.parts.sum()), 6)
    (((1, 1), (2, 2)), -0.130812, -0.130812)
    """
    a, b = before.values, after.values
    if len(a) != len(b):
        raise InputError("after", len(b), f"{len(a)} eigenvalues, as many as before", "take as many samples of both")
    if not (a.min() > 0 and b.min() > 0):
        raise DegenerateError("an eigenvalue is zero: it has no rate of growth; take more samples, or cut both spectra")
    ranges = _bands(len(a)) if bands is None else tuple(bands)
    for i, band in enumerate(ranges):
        if len(band) != 2 or not all(isinstance(end, int | np.integer) for end in band):
            raise InputError(f"bands[{i}]", band, "two ranks (first, last)")
        if not 1 <= band[0] <= band[1] <= len(a):
            raise InputError(f"bands[{i}]", band, f"1 <= first <= last <= {len(a)}")
    growth = np.log(b) - np.log(a)
    nodes, weights = np.polynomial.legendre.leggauss(_POINTS)
    parts = np.zeros(len(a))
    for node, weight in zip((nodes + 1) / 2, weights / 2, strict=True):
        parts += weight * entropy_rate(a ** (1 - node) * b**node, growth)
    return EntropyChange(float(parts.sum()), ranges, np.array([parts[i - 1 : j].sum() for i, j in ranges]))


def _bands(n: int) -> tuple[tuple[int, int], ...]:
    """1, 2, 3 to 4, 5 to 8, ..."""
    edges = [0, 1]
    while edges[-1] < n:
        edges.append(min(n, 2 * edges[-1]))
    return tuple((a + 1, b) for a, b in pairwise(edges))
