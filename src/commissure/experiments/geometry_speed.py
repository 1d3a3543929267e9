"""Claim `geometry.speed`: RankMe and alpha from streamed moments, beside a singular value decomposition for each.

    rows: 20,000 x 2,048, variances 1/i; every contender in a fresh process, one thread, in turns

The rival that is judged does what the public program does (reptrix 0.1.0: a full decomposition of the centered rows,
with vectors, for each of the two metrics); `benchmarks/geometry.py` times that program itself.  Beside it the best use
of a decomposition that we can write: one for both, without vectors.  Values are compared first.  Intervals of
this claim are the least and largest of the turns.
"""

from __future__ import annotations

import torch

from commissure.experiments.claims import Budget, Context, Outcome, Row
from commissure.geometry.bench import RIVALS, BenchRow, bench_metrics, bench_phases
from commissure.report.style import COLORS, figure, to_svg

__all__ = ["run"]

_SIZES: dict[Budget, tuple[int, int, int]] = {
    "smoke": (1000, 256, 1),
    "quick": (5000, 1024, 3),
    "full": (20000, 2048, 3),
}
CHECKPOINTS = 1000
KEYS = {"SVD each": "", "SVD values": "values_"}


def run(ctx: Context) -> Outcome:
    """Time both dtypes, and the segmentation of 1,000 checkpoints; judge the medians of the ratios."""
    n, dim, turns = _SIZES[ctx.budget]
    found: list[BenchRow] = []
    for k, dtype in enumerate((torch.float32, torch.float64)):
        found += bench_metrics(n, dim, dtype=dtype, rivals=RIVALS, repeats=turns)
        ctx.progress((k + 1) / 3, f"{dtype}: {found[0].ratio.median:.1f} times")
    phases = bench_phases(small=8, large=CHECKPOINTS, repeats=turns)[-1]  # the small one has a rival, not judged
    rows = [_row(row) for row in found]
    rows.append(Row("difference", "largest relative difference of a value", max(row.difference for row in found)))
    ends = 1 / phases.ratio.high, 1 / phases.ratio.low  # of a budget of one second
    rows.append(Row("phases", f"segmentation of {phases.size}", phases.ours, *ends, "s"))
    return Outcome(tuple(rows), ctx.judge(rows, turns), _figure(found), turns, data=f"simulated rows, {n:,} x {dim:,}")


def _row(row: BenchRow) -> Row:
    part, unit = ("memory", "MB") if row.part == "memory" else ("seconds", "s")
    label = f"{row.rival} over ours, {part}, {row.dtype}"
    note = f"ours {row.ours:.3g} {unit}, the rival's {row.theirs:.4g}; ends: least and largest of the turns"
    return Row(
        f"{KEYS[row.rival]}{part}_{row.dtype}", label, row.ratio.median, row.ratio.low, row.ratio.high, note=note
    )


def _figure(found: list[BenchRow]) -> str:
    with figure(7.0, 3.4) as (fig, ax):
        for y, row in enumerate(reversed(found)):
            ax.barh(y, row.ratio.median, color=COLORS["rank"], height=0.6)
            ax.plot([row.ratio.low, row.ratio.high], [y, y], color=COLORS["degree"])
        ax.set_yticks(range(len(found)), [f"{row.rival}: {row.part}, {row.dtype}" for row in reversed(found)])
        ax.set_xlabel("the rival over ours (times)")
        ax.axvline(1, color=COLORS["degree"], linewidth=0.8)
        return to_svg(fig, label="Seconds and memory of decompositions over those of streamed moments")
