"""Rows come in batches and go: only folds of moments are kept, dim x dim numbers each.

    acc = CovarianceAccumulator(768, n_folds=2)
    for batch in batches:
        acc.update(batch)                  # (..., 768), any leading axes
    rankme(acc.spectrum())

Accumulators of other processes, shards or ranks merge into one (`merge`), in any order; row i of all that one
accumulator has seen is in fold i mod n_folds.  Two folds are enough to correct a metric for few rows, sixteen to give
its error; see `commissure.geometry.estimation`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from commissure.core.errors import InputError
from commissure.core.moments import Moments, empty, merge, update
from commissure.geometry.estimation import Estimate, estimate
from commissure.geometry.spectra import Frame, Spectrum, in_frame, rows_of, spectrum

__all__ = ["CovarianceAccumulator"]


class CovarianceAccumulator:
    """Moments of rows of `dim` components in `n_folds` folds; `frame` is "raw" or "unit", which needs no mean.

    >>> acc = CovarianceAccumulator(2)
    >>> acc.update(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
    >>> acc.update(torch.tensor([[[0.0, 1.0], [0.0, -1.0]]]))
    >>> acc.n_samples, acc.spectrum().shares.tolist()
    (4, [0.5, 0.5])
    """

    def __init__(self, dim: int, *, n_folds: int = 2, frame: Frame = "raw") -> None:
        if isinstance(n_folds, bool) or not isinstance(n_folds, int | np.integer) or n_folds < 1:
            raise InputError("n_folds", n_folds, "an integer >= 1")
        if frame not in ("raw", "unit"):
            raise InputError("frame", frame, "'raw' or 'unit': others need the mean of all rows beforehand")
        self.frame: Frame = frame
        self.folds: tuple[Moments, ...] = (empty(dim),) * int(n_folds)

    @property
    def n_samples(self) -> int:
        return sum(fold.n_samples for fold in self.folds)

    @property
    def moments(self) -> Moments:
        """Of all rows."""
        return merge(*self.folds)

    def update(self, x: Float[Tensor, "*samples dim"], *, mask: Bool[Tensor, "*samples"] | None = None) -> None:
        """Add rows, all leading axes being samples; those where `mask` is false are ignored, whatever they hold."""
        dim = len(self.folds[0].mean)
        if not isinstance(x, Tensor) or x.ndim < 1 or x.shape[-1] != dim:
            raise InputError("x", tuple(getattr(x, "shape", ())), f"a tensor of shape (..., {dim})")
        if mask is not None and (mask.shape != x.shape[:-1] or mask.dtype != torch.bool):
            raise InputError("mask", (tuple(mask.shape), str(mask.dtype)), f"bool, shape {tuple(x.shape[:-1])}")
        flat = x.reshape(-1, dim)
        rows = in_frame(rows_of(flat, mask=None if mask is None else mask.reshape(-1)), self.frame)
        seen, n_folds = self.n_samples, len(self.folds)
        self.folds = tuple(update(fold, rows[(k - seen) % n_folds :: n_folds]) for k, fold in enumerate(self.folds))

    def merge(self, *others: CovarianceAccumulator) -> None:
        """Take in what other accumulators have seen."""
        for i, other in enumerate(others):
            if (len(other.folds), other.frame) != (len(self.folds), self.frame):
                raise InputError(
                    f"others[{i}]", (len(other.folds), other.frame), f"{len(self.folds)} folds, {self.frame}"
                )
        together = zip(self.folds, *(other.folds for other in others), strict=True)
        self.folds = tuple(merge(*folds) for folds in together)

    def reset(self) -> None:
        """Forget every row."""
        self.folds = (empty(len(self.folds[0].mean)),) * len(self.folds)

    def spectrum(self, *, center: bool = True) -> Spectrum:
        """Of all rows; fewer than two: `DegenerateError`."""
        return spectrum(self.moments, center=center)

    def estimate(
        self, metric: Callable[[Spectrum], float], *, center: bool = True, correction: Literal["half"] | None = None
    ) -> Estimate:
        """A metric with its error over the folds."""
        return estimate(metric, self.folds, center=center, correction=correction)
