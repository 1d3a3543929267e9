"""RankMe and alpha against reptrix, and the parts of `commissure.geometry.bench` that have no peer: ratios with ranges.

    python benchmarks/geometry.py [--full] [--turns N]

reptrix's two public functions decompose the rows anew, each in full whatever `max_eigenvals` is, so that there is no
faster setting; "reptrix, one SVD" calls the functions inside to share one decomposition, as context.  Both sides get
the same rows, in float32 and in float64, in a process of their own each, in turns; the values are compared first.  CPU
seconds are those of the process with the number of threads that OMP_NUM_THREADS gives.
"""

from __future__ import annotations

import argparse
import importlib.util
from importlib.metadata import version

import numpy as np
import torch
from torch import Tensor

from commissure.geometry.bench import (
    FULL,
    QUICK,
    RIVALS,
    BenchRow,
    Contender,
    bench_metrics,
    bench_model,
    bench_phases,
    ours,
)

CLOSE = 1e-5  # relative


def reptrix(x: Tensor) -> tuple[float, float]:
    """Its two public functions."""
    from reptrix import alpha, rankme

    return float(rankme.get_rankme(x)), float(alpha.get_alpha(x)[0])


def reptrix_shared(x: Tensor) -> tuple[float, float]:
    """One of its decompositions for both."""
    from reptrix import alpha, rankme, utils

    values = utils.get_eigenspectrum(x.numpy())
    return float(rankme.get_rank(values)), float(alpha.get_powerlaw(values, np.arange(10, 100))[0])


def show(row: BenchRow) -> None:
    """One line."""
    print(
        f"{row.part:14s} {row.size:16s} {row.dtype:8s} ours {row.ours:9.4g} {row.unit:2s} "
        f"{row.rival:18s} {row.theirs:9.4g} {row.unit:2s} ratio {row.ratio.median:.3g} "
        f"[{row.ratio.low:.3g}, {row.ratio.high:.3g}] differs by {row.difference:.0e}",
        flush=True,
    )


def main() -> None:
    """Print every row."""
    parser = argparse.ArgumentParser(description="Geometry against reptrix.")
    parser.add_argument("--full", action="store_true", help="20,000 rows of 2,048 components too: half an hour")
    parser.add_argument("--turns", type=int, default=3)
    options = parser.parse_args()
    rivals: dict[str, Contender] = dict(RIVALS)
    if importlib.util.find_spec("reptrix"):
        print(f"reptrix {version('reptrix')}, torch {torch.__version__}, {torch.get_num_threads()} threads")
        rivals = {"reptrix": reptrix, "reptrix, one SVD": reptrix_shared, **rivals}
        rows = torch.randn(1000, 512, generator=torch.Generator().manual_seed(0))
        assert np.allclose(ours(rows), reptrix(rows), rtol=CLOSE)
    for n, dim in FULL if options.full else QUICK:
        for dtype in (torch.float32, torch.float64):
            for row in bench_metrics(n, dim, dtype=dtype, rivals=rivals, repeats=options.turns):
                show(row)
    for row in (*bench_model(repeats=options.turns), *bench_phases(repeats=options.turns)):
        show(row)


if __name__ == "__main__":
    main()
