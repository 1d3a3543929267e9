"""Two reports side by side: what post-training, or anything else, did to the geometry, site by site.

    change = log RankMe(after) - log RankMe(before)       stderr^2 = sum of (stderr / RankMe)^2 of both

Both must be of the same rows, for errors are taken as independent: on the same contexts they are not, and the error is
then too large.  arXiv 2509.23024, section 6.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from commissure.core.errors import InputError
from commissure.geometry.tracing import Pooling, TraceFrame, TraceRow

__all__ = ["GeometryChange", "compare"]


@dataclass(frozen=True)
class GeometryChange:
    """One site, pooling and frame in both reports; `alpha` is None where either has none, or another window.

    `change`: of log RankMe; `ratio` its exponential; `stderr` of the change, nan without folds.
    `participation_ratio`: after over before.  `top_share`, `alpha`: after minus before.
    """

    site: str
    pooling: Pooling
    frame: TraceFrame
    before: float
    after: float
    change: float
    stderr: float
    participation_ratio: float
    top_share: float
    alpha: float | None

    @property
    def ratio(self) -> float:
        return math.exp(self.change)


def compare(before: Sequence[TraceRow], after: Sequence[TraceRow]) -> tuple[GeometryChange, ...]:
    """Changes of what both reports hold, in the order of `before`.

    Other numbers of samples or widths, or nothing in common: `InputError`.

    >>> def row(rank: float) -> TraceRow:
    ...     return TraceRow("norm", "last", "raw", 99, 8, rank, 0.1, None, None, rank, 2.0, 0.5, 1.0, (1, 4))
    >>> compare([row(4.0)], [row(2.0)])[0].ratio
    0.5
    """
    for name, rows in (("before", before), ("after", after)):
        if not rows or not all(isinstance(row, TraceRow) for row in rows):
            raise InputError(name, type(rows).__name__, "rows of a report, one at least")
    later = {_key(row): row for row in after}
    pairs = [(row, later[_key(row)]) for row in before if _key(row) in later]
    if not pairs:
        raise InputError("after", sorted(later), f"a site of the other report: {[_key(row) for row in before]}")
    return tuple(_change(one, other) for one, other in pairs)


def _key(row: TraceRow) -> tuple[str, Pooling, TraceFrame]:
    return row.site, row.pooling, row.frame


def _change(before: TraceRow, after: TraceRow) -> GeometryChange:
    for name in ("n_samples", "dim"):
        if getattr(before, name) != getattr(after, name):
            raise InputError(
                f"{name} of {before.site}", getattr(after, name), f"{getattr(before, name)}, as in the other report"
            )
    error = math.hypot(before.rankme_stderr / before.rankme, after.rankme_stderr / after.rankme)
    return GeometryChange(
        before.site,
        before.pooling,
        before.frame,
        before.rankme,
        after.rankme,
        math.log(after.rankme / before.rankme),
        error,
        after.participation_ratio / before.participation_ratio,
        after.top_share - before.top_share,
        _alpha(before, after),
    )


def _alpha(before: TraceRow, after: TraceRow) -> float | None:
    if before.alpha is None or after.alpha is None or before.alpha_window != after.alpha_window:
        return None
    return after.alpha - before.alpha
