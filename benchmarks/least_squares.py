"""`core.lsq` and `core.moments` against scikit-learn and numpy: CPU seconds, alternating in one process, ratios.

    python benchmarks/least_squares.py

A ratio above 1 means that ours takes less.  Ridge: ours also returns the degrees of freedom, scikit-learn does not.
The path: 20 penalties from one eigendecomposition against 20 fits.  Moments: streamed in blocks of 512 rows against
numpy's covariance of the whole array.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from sklearn.linear_model import Ridge

from commissure.core.lsq import ridge, ridge_path
from commissure.core.moments import covariance, empty, update
from commissure.decode.bench import alternate

PENALTIES = np.logspace(-2, 3, 20)


def compare(title: str, ours: Callable[[], object], rival: Callable[[], object]) -> None:
    """Print the ratio rival / ours: median and range over the pairs."""
    a, b = (np.array(seconds) for seconds in alternate((ours, rival), repeats=7))
    ratios = b / a
    print(f"{title:52} {np.median(ratios):6.2f}x  ({ratios.min():.2f}-{ratios.max():.2f})  {1e3 * np.median(a):.1f} ms")


def main() -> None:
    """Print one line a comparison."""
    rng = np.random.default_rng(0)
    for n, d in ((1500, 100), (1500, 500), (800, 1500), (20_000, 200)):
        x, y = rng.normal(size=(n, d)), rng.normal(size=(n, 2))
        compare(f"ridge {n} x {d}", lambda: ridge(x, y, penalty=10.0), lambda: Ridge(alpha=10.0).fit(x, y))  # noqa: B023
        compare(
            f"ridge path, 20 penalties, {n} x {d}",
            lambda: ridge_path(x, y, PENALTIES),  # noqa: B023
            lambda: [Ridge(alpha=p).fit(x, y) for p in PENALTIES],  # noqa: B023
        )
    for n, d in ((100_000, 64), (20_000, 512)):
        rows = torch.randn(n, d, generator=torch.Generator().manual_seed(0))

        def streamed() -> object:
            moments = empty(rows.shape[1])  # noqa: B023
            for block in rows.split(512):  # noqa: B023
                moments = update(moments, block)
            return covariance(moments)

        compare(f"moments {n} x {d}, blocks of 512", streamed, lambda: np.cov(rows.double().numpy().T))  # noqa: B023


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
