"""alpha-ReQ: the decay of the spectrum as a power of the rank, lambda_i ~ i^-alpha.

    minimize over (alpha, c)   sum_i w_i (log lambda_i + alpha log i - c)^2,     w_i = 1/i or 1,     i in the window
    alpha = -sum w (x - x') (y - y') / sum w (x - x')^2       x = log i, y = log lambda_i, primes: weighted means

Small alpha: variance in many directions; alpha = 1: the border of smooth codes (Stringer et al. 2019); large: few.
Ranks count from 1 and the window includes both ends.  Two windows pass for "the default": ranks 11 to 100 (reptrix;
here too) and 12 to 100 (the program published with arXiv 2509.23024).  On narrow models both lie in the tail of the
spectrum, where alpha can move against every other window: choose (1, dim // 2) there, and say so.

Agrawal et al., alpha-ReQ, NeurIPS 2022.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np

from commissure.core.errors import DegenerateError, InputError
from commissure.geometry.spectra import Data, spectrum

__all__ = ["PowerLaw", "alpha_req"]


class PowerLaw(NamedTuple):
    """log lambda_i = intercept - alpha log i on `window`, both ends included.

    `stderr`: of alpha, from the residuals, as if eigenvalues were independent (they are not: use folds for an error
    over samples).  `r2`: of the weighted fit, on the window.
    """

    alpha: float
    intercept: float
    stderr: float
    r2: float
    window: tuple[int, int]


def alpha_req(
    data: Data,
    *,
    fit_range: tuple[int, int] = (11, 100),
    weights: Literal["1/rank", "uniform"] = "1/rank",
    center: bool = True,
) -> PowerLaw:
    """The power law that fits the eigenvalues of these ranks; a window that leaves the positive ones is an InputError.

    >>> from commissure.geometry.spectra import Spectrum
    >>> round(alpha_req(Spectrum.of(np.arange(1.0, 201.0) ** -1.5)).alpha, 9)
    1.5
    """
    found = spectrum(data, center=center)
    first, last = _window(fit_range, int((found.values > 0).sum()))
    if weights not in ("1/rank", "uniform"):
        raise InputError("weights", weights, "'1/rank' or 'uniform'")
    ranks = np.arange(first, last + 1, dtype=np.float64)
    x, y = np.log(ranks), np.log(found.values[first - 1 : last])
    w = 1 / ranks if weights == "1/rank" else np.ones_like(ranks)
    x_mean, y_mean = (w @ x) / w.sum(), (w @ y) / w.sum()
    spread = w @ (x - x_mean) ** 2
    slope = (w @ ((x - x_mean) * (y - y_mean))) / spread
    intercept = y_mean - slope * x_mean
    residuals, total = w @ (y - intercept - slope * x) ** 2, w @ (y - y_mean) ** 2
    variance = residuals / (len(ranks) - 2) / spread if len(ranks) > 2 else np.nan
    r2 = 1 - residuals / total if total > 0 else 1.0
    return PowerLaw(float(-slope), float(intercept), float(np.sqrt(variance)), float(r2), (first, last))


def _window(fit_range: tuple[int, int], n_positive: int) -> tuple[int, int]:
    allowed = f"two ranks (first, last), 1 <= first < last <= {n_positive}, the number of positive eigenvalues"
    if not isinstance(fit_range, tuple | list) or len(fit_range) != 2:
        raise InputError("fit_range", fit_range, allowed)
    if any(isinstance(end, bool) or not isinstance(end, int | np.integer) for end in fit_range):
        raise InputError("fit_range", fit_range, allowed)
    first, last = fit_range
    if n_positive < 2:
        raise DegenerateError(f"{n_positive} positive eigenvalues have no power law")
    if not 1 <= first < last <= n_positive:
        raise InputError("fit_range", fit_range, allowed, f"pass for example fit_range=(1, {n_positive})")
    return int(first), int(last)
