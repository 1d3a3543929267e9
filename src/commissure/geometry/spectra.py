"""The eigenvalues of a covariance: what every metric of this organ but a few is a function of.

    Sigma = sum_i (f_i - m)(f_i - m)' / (N - 1)        lambda_1 >= lambda_2 >= ... >= 0

| here         | meaning                                                                                          |
|--------------|--------------------------------------------------------------------------------------------------|
| `center`     | m is the mean of the rows; False: m = 0 and the divisor is N (second moments)                     |
| "raw"        | rows as they are                                                                                  |
| "unit"       | every row scaled to length 1: directions alone, no row weighs more than another                   |
| "sign"       | rows centered, then scaled to length 1: directions of the deviations from the mean                |

Metrics take rows, moments or a spectrum.  Nearly all the time is in the spectrum: for more than one metric of the same
rows take it once and pass it on.

    found = spectrum(x)
    rankme(found), participation_ratio(found), alpha_req(found)

Only the min(N, dim) eigenvalues that can differ from zero are kept; with fewer rows than components they come from the
N x N Gram matrix of the rows.  Eigenvalues are float64; the Gram matrix has the precision of `core.moments`, so that of
float32 rows those below about 1e-6 of the largest are rounding.

Frames: Vershynin, High-Dimensional Probability, 3.3; spectra of representations: arXiv 2509.23024, section 2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import scipy.linalg
import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from commissure.core.errors import CommissureWarning, DegenerateError, InputError
from commissure.core.moments import Moments, measure

__all__ = ["Data", "FewSamplesWarning", "Frame", "Rows", "Spectrum", "in_frame", "rows_of", "spectrum"]

Frame = Literal["raw", "unit", "sign"]
Rows = Float[Tensor, "samples dim"] | Float[np.ndarray, "samples dim"]

_ROUNDING = 1e-4  # of the largest eigenvalue: more below zero than this is no rounding of a covariance


class FewSamplesWarning(CommissureWarning):
    """Fewer rows than components: the value is far below the population's."""


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Eigenvalues in descending order, all of those that `n_samples` rows of `dim` components can have.

    `is_centered`: around the mean, so that n rows leave n - 1 of them.
    """

    values: Float64[np.ndarray, " rank"]
    n_samples: int
    dim: int
    is_centered: bool = True

    def __post_init__(self) -> None:
        if self.values.ndim != 1 or not len(self.values) or not np.isfinite(self.values).all():
            raise InputError("values", self.values, "finite numbers (rank,), one at least")
        if (np.diff(self.values) > 0).any() or self.values[-1] < 0:
            raise InputError("values", self.values, "numbers >= 0 in descending order", "use Spectrum.of(values)")

    @classmethod
    def of(cls, values: Float[np.ndarray, " rank"], *, n_samples: int | None = None) -> Spectrum:
        """From eigenvalues in any order; without `n_samples` they are taken as the population's.

        >>> Spectrum.of(np.array([1.0, 3.0])).shares.tolist()
        [0.75, 0.25]
        """
        ordered = np.sort(np.asarray(values, np.float64))[::-1].copy()
        return cls(ordered, n_samples if n_samples is not None else 1 << 62, len(ordered))

    @property
    def shares(self) -> Float64[np.ndarray, " rank"]:
        """Eigenvalues over their sum; no variance at all: `DegenerateError`."""
        self.check_variance()
        return self.values / self.values.sum()

    def check_variance(self) -> None:
        """`DegenerateError` where every eigenvalue is zero."""
        if not self.values[0] > 0:
            raise DegenerateError("all rows are equal: their covariance is zero and its spectrum has no shape")


Data = Rows | Moments | Spectrum


def rows_of(x: Rows, *, mask: Bool[Tensor, " samples"] | None = None) -> Float[Tensor, "samples dim"]:
    """Rows as a tensor (half precision as float32), those that `mask` keeps; no finite number is an InputError."""
    rows = torch.from_numpy(np.ascontiguousarray(x)) if isinstance(x, np.ndarray) else x
    if not isinstance(rows, Tensor) or rows.ndim != 2 or not rows.is_floating_point() or rows.shape[1] < 1:
        found = (tuple(rows.shape), str(rows.dtype)) if isinstance(rows, Tensor) else type(x).__name__
        raise InputError("x", found, "floating-point numbers of shape (samples, dim)")
    rows = rows.detach() if mask is None else rows.detach()[mask]
    rows = rows if rows.dtype == torch.float64 else rows.float()
    if torch.isfinite(rows.sum()):  # one pass, no copy; else a sum too large, or numbers that are not finite
        return rows
    bad = ~torch.isfinite(rows).all(1)
    if bad.any():
        first = int(bad.nonzero()[0])
        allowed = "finite numbers in every row"
        raise InputError(f"x[{first}]", f"not finite ({int(bad.sum())} of {len(rows)} rows)", allowed, "mask them")
    return rows


def in_frame(rows: Float[Tensor, "samples dim"], frame: Frame) -> Float[Tensor, "samples dim"]:
    """Rows in a frame; a row of length zero has no direction and is a `DegenerateError`.

    >>> in_frame(torch.tensor([[3.0, 4.0]]), "unit").tolist()
    [[0.6000000238418579, 0.800000011920929]]
    """
    if frame not in ("raw", "unit", "sign"):
        raise InputError("frame", frame, "'raw', 'unit' or 'sign'")
    if frame == "raw":
        return rows
    turned = rows - rows.mean(0) if frame == "sign" else rows
    lengths = torch.linalg.vector_norm(turned, dim=1, keepdim=True)
    if not bool((lengths > 0).all()):
        raise DegenerateError(f"x[{int((lengths[:, 0] == 0).nonzero()[0])}] has length zero, so no direction; mask it")
    return turned / lengths


def spectrum(
    data: Data, *, center: bool = True, frame: Frame = "raw", mask: Bool[Tensor, " samples"] | None = None
) -> Spectrum:
    """The spectrum of rows, of `core.moments.Moments`, or the one given; only rows can be put into a frame or masked.

    Fewer than two rows around their mean, or none: `DegenerateError`.

    >>> spectrum(torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 2.0], [0.0, -2.0]])).values.round(6).tolist()
    [2.666667, 0.666667]
    """
    if isinstance(data, Moments | Spectrum) and (frame != "raw" or mask is not None):
        raise InputError("frame", frame, "'raw', and no mask, for moments and spectra", "pass the rows")
    if isinstance(data, Spectrum):
        if data.is_centered != center:
            raise InputError("center", center, f"{data.is_centered}, as the spectrum given")
        return data
    if isinstance(data, Moments):
        return _of_moments(data, center)
    rows = in_frame(rows_of(data, mask=mask), frame)
    return _dual(rows, center) if len(rows) < rows.shape[1] else _of_moments(measure(rows), center)


def _of_moments(moments: Moments, center: bool) -> Spectrum:
    n, dim = moments.n_samples, len(moments.mean)
    _check_count(n, center)
    scatter = moments.scatter
    if not center:
        scatter = scatter + n * torch.outer(moments.mean, moments.mean)
    return Spectrum(_eigenvalues(scatter, n - center)[: min(n, dim)], n, dim, center)


def _dual(rows: Float[Tensor, "samples dim"], center: bool) -> Spectrum:
    n, dim = rows.shape
    _check_count(n, center)
    if center:
        rows = rows - rows.mean(0)
    gram = (rows @ rows.T).double()
    return Spectrum(_eigenvalues(gram, n - center), n, dim, center)


def _check_count(n: int, center: bool) -> None:
    if n < 1 + center:
        raise DegenerateError(f"{n} rows have no covariance: at least {1 + center} are needed")


def _eigenvalues(scatter: Float64[Tensor, "rank rank"], divisor: int) -> Float64[np.ndarray, " rank"]:
    """In descending order, rounding below zero put to zero."""
    if scatter.device.type != "cpu":
        ascending = torch.linalg.eigvalsh(scatter).cpu().numpy()
    else:  # scipy's LAPACK: on an AMD processor 1.6 times as fast as torch's at 1,024 and no slower at others
        ascending = scipy.linalg.eigh(scatter.numpy(), eigvals_only=True, driver="evd")
    values = ascending[::-1] / divisor
    if values[-1] < -_ROUNDING * max(values[0], 0.0):
        raise InputError("data", float(values[-1]), "a covariance: no eigenvalue below zero")
    return np.maximum(values, 0.0)
