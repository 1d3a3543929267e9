"""The geometry of a model step by step: rows of `trace` by step, and one site of them as a series.

series = trajectory.series("lm_head:input")
segment_phases(series.steps, series.ranks, stderr=series.stderr, alpha=series.alpha)
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float64

from commissure.core.errors import BackendMissing, InputError
from commissure.geometry.tracing import Pooling, TraceFrame, TraceRow

__all__ = ["Series", "Trajectory", "TrajectoryRow"]


@dataclass(frozen=True)
class TrajectoryRow:
    """One site, pooling and frame at one step."""

    step: int
    geometry: TraceRow


class Series(NamedTuple):
    """One site, pooling and frame over the steps, ascending; `stderr` and `alpha` are nan where there is none."""

    steps: Float64[np.ndarray, " steps"]
    ranks: Float64[np.ndarray, " steps"]
    stderr: Float64[np.ndarray, " steps"]
    alpha: Float64[np.ndarray, " steps"]


@dataclass(frozen=True)
class Trajectory:
    """Rows by step, then site, pooling and frame."""

    rows: tuple[TrajectoryRow, ...]

    def series(self, site: str, *, pooling: Pooling = "last", frame: TraceFrame = "raw") -> Series:
        """RankMe, its error and alpha over the steps; what was not traced is an InputError that lists what was."""
        chosen = sorted(
            (row for row in self.rows if _key(row) == (site, pooling, frame)),
            key=lambda row: row.step,
        )
        if not chosen:
            known = ", ".join(map(str, dict.fromkeys(_key(row) for row in self.rows))) or "none yet"
            raise InputError("site, pooling, frame", (site, pooling, frame), f"one that was traced: {known}")
        told = [row.geometry for row in chosen]
        columns = (
            [row.step for row in chosen],
            [row.rankme for row in told],
            [row.rankme_stderr for row in told],
            [np.nan if row.alpha is None else row.alpha for row in told],
        )
        return Series(*(np.array(column, np.float64) for column in columns))

    def to_frame(self) -> Any:
        """All rows as a pandas table."""
        try:
            import pandas as pd
        except ImportError as error:
            raise BackendMissing("pandas", "frames", "to_frame") from error
        return pd.DataFrame([{"step": row.step, **asdict(row.geometry)} for row in self.rows])


def _key(row: TrajectoryRow) -> tuple[str, Pooling, TraceFrame]:
    return row.geometry.site, row.geometry.pooling, row.geometry.frame
