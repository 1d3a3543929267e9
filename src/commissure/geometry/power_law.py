"""alpha-ReQ: the decay of the spectrum as a power of the rank, lambda_i ~ i^-alpha.

    minimize over (alpha, c)   sum_i w_i (log lambda_i + alpha log i - c)^2,     w_i = 1/i or 1,     i in the window
    alpha = -sum w (x - x') (y - y') / sum w (x - x')^2       x = log i, y = log lambda_i, primes: weighted means

Small alpha: variance in many directions; alpha = 1: the border of smooth codes (Stringer et al. 2019); large: few.
Ranks count from 1 and the window includes both ends.  Two windows pass for "the default": ranks 11 to 100 (reptrix;
here too) and 12 to 100 (the program published with arXiv 2509.23024).  On narrow models both lie in the tail of the
spectrum, where alpha can move against every other window: choose (1, dim // 2) there, and say so, or "auto".

fit_range="auto": from rank 11, or 1 where dim < 200, to the last eigenvalue above the edge of noise, at most rank 100.

    edge = median(lambda) (1 + sqrt b)^2 / median of Marchenko and Pastur's law of b,   b = min(n, dim) / max(n, dim)

with n = N - 1 (N where not centered) and the median over the min(n, dim) eigenvalues that noise would make positive:
were they all noise of one variance, hardly any would lie above the edge (Gavish & Donoho, arXiv 1305.5870, estimate
noise so).  Thus the lower half of a spectrum always counts as noise and with n >> dim the window ends at rank dim / 2.

Agrawal et al., alpha-ReQ, NeurIPS 2022.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np

from commissure.core.errors import DegenerateError, InputError
from commissure.geometry.spectra import Data, Spectrum, spectrum

__all__ = ["FitRange", "PowerLaw", "alpha_req", "noise_edge"]

FitRange = tuple[int, int] | Literal["auto"]

_FEWEST = 5  # ranks of an automatic window: three more than a line has parameters


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
    fit_range: FitRange = (11, 100),
    weights: Literal["1/rank", "uniform"] = "1/rank",
    center: bool = True,
) -> PowerLaw:
    """The power law that fits the eigenvalues of these ranks; a window that leaves the positive ones is an InputError.

    `fit_range`: first and last rank, or "auto" (see the module); fewer than 5 ranks left: `DegenerateError`.

    >>> from commissure.geometry.spectra import Spectrum
    >>> round(alpha_req(Spectrum.of(np.arange(1.0, 201.0) ** -1.5)).alpha, 9)
    1.5
    """
    found = spectrum(data, center=center)
    first, last = _above_noise(found) if fit_range == "auto" else _window(fit_range, int((found.values > 0).sum()))
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


def noise_edge(data: Data, *, center: bool = True) -> float:
    """The largest eigenvalue of noise alone, were the median one noise; see the module.

    >>> rows = np.random.default_rng(0).normal(size=(3000, 300))
    >>> round(noise_edge(rows), 2), round((1 + 0.1**0.5) ** 2, 2)
    (1.73, 1.73)
    """
    found = spectrum(data, center=center)
    n = found.n_samples - found.is_centered
    if n < 1:
        raise DegenerateError(f"{found.n_samples} rows have no noise edge")
    few, many = sorted((n, found.dim))
    b = few / many
    return float(np.median(found.values[:few])) * (1 + b**0.5) ** 2 / _marchenko_pastur_median(b)


def _marchenko_pastur_median(b: float) -> float:
    """Of the law with density sqrt((x+ - x)(x - x-)) / (2 pi b x), x+- = (1 +- sqrt b)^2, 0 < b <= 1.

    With x = 1 + b - 2 sqrt(b) cos t, t from 0 to pi, its mass is 2 sin^2 t / (pi x) dt: smooth, so the midpoint rule
    of 4096 points has the median to 1e-6.
    """
    t = (np.arange(4096) + 0.5) * (np.pi / 4096)
    x = 1 + b - 2 * b**0.5 * np.cos(t)
    mass = np.cumsum(np.sin(t) ** 2 / x)
    return float(np.interp(mass[-1] / 2, mass, 1 + b - 2 * b**0.5 * np.cos(t + np.pi / 8192)))


def _above_noise(found: Spectrum) -> tuple[int, int]:
    found.check_variance()
    rounding = found.dim * np.finfo(np.float64).eps * found.values[0]
    edge = max(noise_edge(found, center=found.is_centered), rounding)
    first, last = 11 if found.dim >= 200 else 1, min(100, int((found.values > edge).sum()))
    if last - first + 1 < _FEWEST:
        raise DegenerateError(
            f"{last} eigenvalues lie above the noise edge {edge:.3g}: from rank {first} an automatic window needs "
            f"{_FEWEST} ranks; take more rows, or pass fit_range=(first, last)"
        )
    return first, last


def _window(fit_range: tuple[int, int], n_positive: int) -> tuple[int, int]:
    allowed = f"two ranks (first, last), 1 <= first < last <= {n_positive} positive eigenvalues, or 'auto'"
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
