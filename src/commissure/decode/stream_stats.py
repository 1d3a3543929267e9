"""Counters and latency percentiles of a stream, in memory that does not grow with it.

Latencies go into a histogram of logarithmic bins, 2.3 % wide, from 0.1 microsecond to 100 seconds, so that a percentile
is known to half a bin however long the stream runs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import numpy as np
from jaxtyping import Int

__all__ = ["LatencyHistogram", "StreamStats", "Tally"]

_LOWEST_US = 0.1
_PER_DECADE = 100
_BINS = 9 * _PER_DECADE


@dataclass(frozen=True)
class StreamStats:
    """What a stream has seen since its reset; every spike pushed is in exactly one of the first four and `queued`.

    used          spikes in a closed chunk or in the open one
    late_dropped  spikes of chunks already closed, dropped by policy
    duplicates_dropped, unknown_dropped     dropped by policy
    queued        spikes waiting for a later chunk
    chunks        chunks closed, with or without a readout; `gaps` of them by `advance`
    predictions   readouts returned; `skipped` chunks were closed without one because they came too late
    late          spikes of closed chunks, whatever became of them
    duplicates    repeated (unit, time) pairs found, unless duplicates="keep", which does not look for them
    overruns      chunks whose closing took longer than a chunk lasts
    *_us          computing time of a poll that closed a chunk: median, 99th percentile, largest
    """

    used: int
    late_dropped: int
    duplicates_dropped: int
    unknown_dropped: int
    queued: int
    chunks: int
    gaps: int
    predictions: int
    skipped: int
    late: int
    duplicates: int
    overruns: int
    p50_us: float
    p99_us: float
    max_us: float


@dataclass
class Tally:
    """The running counters behind `StreamStats`, and the two that `Prediction` reports."""

    used: int = 0
    late_dropped: int = 0
    duplicates_dropped: int = 0
    unknown_dropped: int = 0
    gaps: int = 0
    predictions: int = 0
    skipped: int = 0
    late: int = 0
    duplicates: int = 0
    overruns: int = 0
    open_spikes: int = 0
    late_reported: int = 0

    def stats(self, *, queued: int, chunks: int, latency: LatencyHistogram) -> StreamStats:
        """The public view."""
        shared = {f.name for f in fields(StreamStats)} & set(vars(self))
        return StreamStats(
            **{name: getattr(self, name) for name in shared},
            queued=queued,
            chunks=chunks,
            p50_us=latency.percentile(50),
            p99_us=latency.percentile(99),
            max_us=latency.largest,
        )


class LatencyHistogram:
    """Percentiles of positive numbers (microseconds) in constant memory.

    >>> histogram = LatencyHistogram()
    >>> for us in (10.0, 20.0, 1000.0):
    ...     histogram.add(us)
    >>> round(histogram.percentile(50)), histogram.largest
    (20, 1000.0)
    """

    def __init__(self) -> None:
        self.counts: Int[np.ndarray, " bins"] = np.zeros(_BINS, np.int64)
        self.largest = math.nan

    def add(self, us: float) -> None:
        """Count one value; values outside the range go to the first or last bin."""
        place = int(math.log10(max(us, _LOWEST_US) / _LOWEST_US) * _PER_DECADE)
        self.counts[min(place, _BINS - 1)] += 1
        self.largest = us if math.isnan(self.largest) else max(self.largest, us)

    def percentile(self, percent: float) -> float:
        """The value below which `percent` of the counted ones lie, to half a bin (1.2 %); nan before the first."""
        total = int(self.counts.sum())
        if not total:
            return math.nan
        rank = min(total, max(1, math.ceil(total * percent / 100)))
        place = int(np.searchsorted(np.cumsum(self.counts), rank))
        return float(min(_LOWEST_US * 10 ** ((place + 0.5) / _PER_DECADE), self.largest))
