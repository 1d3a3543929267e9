"""TwoNN: intrinsic dimension from the distances to two neighbors.

    mu = r_2 / r_1,    P(mu > m) = m^-d           maximum likelihood: d = (N - 1) / sum log mu

where r_1, r_2 are a row's distances to its nearest and second nearest rows (Facco et al., Sci. Rep. 7:12140, 2017).
`discard`: share of the largest ratios left out and the line through the origin fitted instead, as they do.  A nonlinear
dimension: a curve has 1 whatever directions it visits.  Distances of dim > 20 are biased down with few rows.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from commissure.core.errors import DegenerateError, InputError
from commissure.geometry.spectra import Rows, rows_of

__all__ = ["two_nn"]

_BLOCK = 1 << 22  # distances held at a time


def two_nn(x: Rows, *, discard: float | None = None) -> float:
    """Intrinsic dimension of rows; equal rows are counted once, and fewer than three different ones are none.

    >>> line = torch.rand(500, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    >>> 0.8 < two_nn(line @ torch.ones(1, 7, dtype=torch.float64)) < 1.2
    True
    """
    rows = torch.unique(rows_of(x).double(), dim=0)
    if discard is not None and not 0 <= discard < 1:
        raise InputError("discard", discard, "a number from 0 to below 1, or None")
    if len(rows) < 3:
        raise DegenerateError(f"{len(rows)} different rows: two neighbors need at least 3")
    first, second = _two_nearest(rows)
    logs = (second / first).log().sort().values
    n = len(logs)
    if discard is None:
        total = float(logs.sum())
        if not total > 0:
            raise DegenerateError("every row has two neighbors at one distance: the rows are a lattice")
        return (n - 1) / total
    kept = max(2, round(n * (1 - discard)))
    x_axis = logs[:kept]
    height = -torch.log1p(-torch.arange(1, kept + 1, dtype=torch.float64) / (n + 1))
    return float((x_axis @ height) / (x_axis @ x_axis))


def _two_nearest(rows: Float[Tensor, "samples dim"]) -> tuple[Float[Tensor, " samples"], Float[Tensor, " samples"]]:
    step = max(1, _BLOCK // len(rows))
    nearest = []
    for start in range(0, len(rows), step):
        block = torch.cdist(rows[start : start + step], rows, compute_mode="donot_use_mm_for_euclid_dist")
        block[torch.arange(len(block)), torch.arange(start, start + len(block))] = torch.inf
        nearest.append(block.topk(2, largest=False).values)
    first, second = torch.cat(nearest).unbind(1)
    return first, second
