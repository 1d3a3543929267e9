"""Effective ranks: how many directions a representation uses, each a function of the spectrum's shares alone.

    p_i = lambda_i / sum lambda        R_a = (sum p_i^a)^(1 / (1 - a))        R_1 = exp(-sum p_i log p_i)

| order a | name                | other names                                    |
|---------|---------------------|------------------------------------------------|
| 0       | rank                | eigenvalues above rounding                      |
| 1       | RankMe              | exponential of the spectral (von Neumann) entropy |
| 2       | participation ratio | (sum lambda)^2 / sum lambda^2                   |
| inf     | stable rank         | sum lambda / lambda_1, NESum                    |

They fall with a:  stable rank <= participation ratio <= RankMe <= rank <= min(N - 1, dim).

"RankMe" names different numbers.  `weights="eigenvalue"` (default) is the one of arXiv 2509.23024; "singular" takes
p_i = s_i / sum s with s = sqrt(lambda), as Garrido et al. (arXiv 2210.02885) did, without centering.  `compat`
adds what public programs add: 1e-7 to every p_i, not normalized again, so that a flat spectrum exceeds its dimension.

| compat    | weights    | center | eps  | eigenvalues |
|-----------|------------|--------|------|-------------|
| "reptrix" | eigenvalue | yes    | 1e-7 | 2048        |
| "garrido" | singular   | no     | 1e-7 | all         |

All are plug-in estimates: biased down where rows are few.  `commissure.geometry.estimation` corrects and gives errors.
"""

from __future__ import annotations

import warnings
from typing import Literal, NamedTuple

import numpy as np

from commissure.core.errors import DegenerateError, InputError
from commissure.geometry.spectra import Data, FewSamplesWarning, Spectrum, spectrum

__all__ = [
    "condition_number",
    "explained_directions",
    "isotropy",
    "matrix_entropy",
    "participation_ratio",
    "rankme",
    "renyi_rank",
    "stable_rank",
    "top_share",
]

Weights = Literal["eigenvalue", "singular"]


class _Convention(NamedTuple):
    weights: Weights
    center: bool
    eps: float
    most: int | None


_COMPAT = {
    "reptrix": _Convention("eigenvalue", True, 1e-7, 2048),
    "garrido": _Convention("singular", False, 1e-7, None),
}


def rankme(
    data: Data,
    *,
    weights: Weights = "eigenvalue",
    center: bool = True,
    eps: float = 0.0,
    drop_top: int = 0,
    compat: Literal["reptrix", "garrido"] | None = None,
) -> float:
    """exp of the entropy of the spectrum; see the module for what the name has meant.

    `drop_top`: leave the largest eigenvalues out, so many.  `compat` sets the rest and stands alone.  Fewer rows than
    components: the value comes with a `FewSamplesWarning`.

    >>> round(rankme(Spectrum.of(np.ones(8))), 9)
    8.0
    """
    if compat is not None:
        if compat not in _COMPAT:
            raise InputError("compat", compat, f"one of {', '.join(_COMPAT)}, or None")
        if (weights, center, eps, drop_top) != ("eigenvalue", True, 0.0, 0):
            raise InputError("compat", compat, "no weights, center, eps or drop_top beside it")
        weights, center, eps, most = _COMPAT[compat]
        found = _checked(data, center)
        return _entropy_rank(found.values[:most], weights, eps)
    if weights not in ("eigenvalue", "singular"):
        raise InputError("weights", weights, "'eigenvalue' or 'singular'")
    if not 0 <= eps < 1:
        raise InputError("eps", eps, "a number from 0 to 1")
    return _entropy_rank(_without_top(_checked(data, center), drop_top), weights, eps)


def renyi_rank(data: Data, *, order: float, center: bool = True, drop_top: int = 0) -> float:
    """Effective rank of a Renyi order from 0 to infinity; order 1 is RankMe, 2 the participation ratio.

    Order 0 counts eigenvalues above dim * eps(float64) of the largest.

    >>> renyi_rank(Spectrum.of(np.array([2.0, 1.0, 1.0])), order=2)
    2.6666666666666665
    """
    if isinstance(order, bool) or not isinstance(order, int | float) or not order >= 0:
        raise InputError("order", order, "a number >= 0, inf too")
    found = _checked(data, center)
    values = _without_top(found, drop_top)
    if order == 0:
        return float((values > found.dim * np.finfo(np.float64).eps * values[0]).sum())
    if order == 1:
        return _entropy_rank(values, "eigenvalue", 0.0)
    if order == np.inf:
        return float(values.sum() / values[0])
    p = values[values > 0] / values[0]  # the largest is one: no power overflows
    return float(np.exp((np.log((p**order).sum()) - order * np.log(p.sum())) / (1 - order)))


def participation_ratio(data: Data, *, center: bool = True, drop_top: int = 0, unbiased: bool = False) -> float:
    """(sum lambda)^2 / sum lambda^2.

    `unbiased`: numerator and denominator without bias for Gaussian rows, from n = N - 1 degrees of freedom:
    tr Sigma^2 ~ n^2 / ((n - 1)(n + 2)) (tr S^2 - (tr S)^2 / n), (tr Sigma)^2 ~ (n (n + 1) (tr S)^2 - 2 n tr S^2) /
    ((n - 1)(n + 2)).  All eigenvalues are needed: no `drop_top`; three rows at least.

    >>> participation_ratio(Spectrum.of(np.array([1.0, 1.0, 0.0])))
    2.0
    """
    if not unbiased:
        return renyi_rank(data, order=2, center=center, drop_top=drop_top)
    found = spectrum(data, center=center)
    n = found.n_samples - center
    if drop_top:
        raise InputError("drop_top", drop_top, "0 where unbiased")
    if n < 2:
        raise DegenerateError(f"{found.n_samples} rows: an unbiased participation ratio needs at least {2 + center}")
    a, b = float((found.values**2).sum()), float(found.values.sum()) ** 2
    squares = n * (a - b / n)
    if not squares > 0:
        raise DegenerateError("the unbiased sum of squared eigenvalues is not above zero: too few rows")
    return ((n + 1) * b - 2 * a) / squares


def stable_rank(data: Data, *, center: bool = True, drop_top: int = 0) -> float:
    """sum lambda / lambda_1, the squared Frobenius over the squared spectral norm of the rows.

    >>> stable_rank(Spectrum.of(np.array([2.0, 1.0, 1.0])))
    2.0
    """
    return renyi_rank(data, order=np.inf, center=center, drop_top=drop_top)


def matrix_entropy(data: Data, *, order: float = 1.0, center: bool = False) -> float:
    """Matrix-based Renyi entropy (nats) of the trace-normalized Gram matrix of the rows: log of the effective rank.

    Skean et al., arXiv 2502.02013: rows as they are, so not centered.

    >>> round(matrix_entropy(np.eye(4)), 4)
    1.3863
    """
    return float(np.log(renyi_rank(data, order=order, center=center)))


def top_share(data: Data, *, k: int = 1, center: bool = True) -> float:
    """Share of the variance that the `k` largest eigenvalues have.

    >>> top_share(Spectrum.of(np.array([3.0, 1.0])))
    0.75
    """
    shares = spectrum(data, center=center).shares
    if isinstance(k, bool) or not isinstance(k, int | np.integer) or not 1 <= k <= len(shares):
        raise InputError("k", k, f"an integer from 1 to {len(shares)}")
    return float(shares[:k].sum())


def explained_directions(data: Data, *, share: float = 0.9, center: bool = True) -> int:
    """How many of the largest eigenvalues have `share` of the variance.

    >>> explained_directions(Spectrum.of(np.array([3.0, 1.0])), share=0.75)
    1
    """
    if not 0 < share <= 1:
        raise InputError("share", share, "a number above 0, to 1")
    sums = spectrum(data, center=center).shares.cumsum()
    return int(np.searchsorted(sums, share * sums[-1] * (1 - 1e-12))) + 1


def isotropy(data: Data, *, center: bool = True) -> float:
    """RankMe over the number of components: 1 where all directions have one variance.

    >>> isotropy(Spectrum.of(np.ones(4)))
    1.0
    """
    found = _checked(data, center)
    return _entropy_rank(found.values, "eigenvalue", 0.0) / found.dim


def condition_number(data: Data, *, center: bool = True) -> float:
    """Largest over smallest eigenvalue; inf where some direction has no variance.

    >>> condition_number(Spectrum.of(np.array([8.0, 2.0])))
    4.0
    """
    found = spectrum(data, center=center)
    found.check_variance()
    least = found.values[-1] if len(found.values) == found.dim else 0.0
    return float(found.values[0] / least) if least > 0 else np.inf


def _checked(data: Data, center: bool) -> Spectrum:
    """The spectrum, with variance, and a warning where rows are fewer than components."""
    found = spectrum(data, center=center)
    found.check_variance()
    if found.n_samples < found.dim:
        warnings.warn(
            f"{found.n_samples} rows of {found.dim} components: effective ranks are far too low; take more rows",
            FewSamplesWarning,
            stacklevel=3,
        )
    return found


def _without_top(found: Spectrum, k: int) -> np.ndarray:
    if isinstance(k, bool) or not isinstance(k, int | np.integer) or not 0 <= k < len(found.values):
        raise InputError("drop_top", k, f"an integer from 0 to {len(found.values) - 1}")
    values = found.values[k:]
    if not values[0] > 0:
        raise DegenerateError(f"no variance is left without the {k} largest eigenvalues")
    return values


def _entropy_rank(values: np.ndarray, weights: Weights, eps: float) -> float:
    p = np.sqrt(values) if weights == "singular" else values
    p = p / p.sum() + eps
    p = p[p > 0]
    return float(np.exp(-(p * np.log(p)).sum()))
