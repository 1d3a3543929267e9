"""Whether arrays can be the state of a stream: every field is checked before a decoder takes any of them.

What `StreamingDecoder.state` returns always passes; the engine's own part is checked by the engine.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from commissure.core.errors import InputError
from commissure.decode.stream_stats import LatencyHistogram, Tally

if TYPE_CHECKING:
    from commissure.decode.stream_store import StreamState

__all__ = ["check_stream"]

_EDGE_S = 1e-6  # more than any edge tolerance of `bin_index`, less than any chunk
_FIX = "load a state that StreamingDecoder.state or .save made"


def check_stream(state: StreamState, *, n_units: int, chunk_s: float) -> None:
    """Raise InputError naming the first field that no stream of `n_units` units and chunks of `chunk_s` can have."""
    for name in ("t0", "chunk", "largest_us"):
        _typed(state, name, "iu" if name == "chunk" else "iuf", ())
    _require(np.isfinite(state.t0), "t0", state.t0, "a finite time (seconds)")
    _require(state.chunk >= 0, "chunk", state.chunk, "an integer >= 0")
    _check_queue(state, n_units, chunk_s)
    _check_seen(state, n_units)
    n_counters, n_bins = len(vars(Tally())), len(LatencyHistogram().counts)
    for name, length in (("counters", n_counters), ("latencies", n_bins)):
        counts = _typed(state, name, "iu", (length,))
        _every(counts >= 0, name, counts, "an integer >= 0")
    if np.any(state.latencies):
        _require(0 <= state.largest_us < np.inf, "largest_us", state.largest_us, "a number >= 0 (microseconds)")
    else:
        _require(np.isnan(state.largest_us), "largest_us", state.largest_us, "nan where no latency was counted")


def _check_queue(state: StreamState, n_units: int, chunk_s: float) -> None:
    units = _typed(state, "queue_units", "iu", (None,))
    chunks = _typed(state, "queue_chunks", "iu", units.shape)
    times = _typed(state, "queue_times", "f", units.shape)
    _every((units >= 0) & (units < n_units), "queue_units", units, f"0 to {n_units - 1}")
    _every(chunks > state.chunk, "queue_chunks", chunks, f"a chunk after the open one, {state.chunk}")
    edge = _EDGE_S + 4 * np.spacing(np.abs(times) + abs(float(state.t0)))
    inside = np.abs(times - (chunks + 0.5) * chunk_s) <= 0.5 * chunk_s + edge  # False where not finite
    _every(inside, "queue_times", times, "a time in the spike's chunk (seconds from t0)")


def _check_seen(state: StreamState, n_units: int) -> None:
    seen = _typed(state, "seen", "f", (None, 3))
    _every(np.isfinite(seen), "seen", seen, "finite numbers")
    units, chunks = seen[:, 1], seen[:, 2]
    is_pair = (units == np.rint(units)) & (units >= 0) & (units < n_units)
    is_pair &= (chunks == np.rint(chunks)) & (chunks >= state.chunk)
    _every(is_pair, "seen", seen, f"(seconds, unit of {n_units}, chunk not yet closed)")


def _typed(state: StreamState, name: str, kinds: str, shape: tuple[int | None, ...]) -> np.ndarray:
    value = np.asarray(getattr(state, name))
    fits = value.ndim == len(shape) and all(want in (None, n) for n, want in zip(value.shape, shape, strict=True))
    wanted = {"iu": "integers", "f": "floats", "iuf": "numbers"}[kinds]
    _require(fits, name, value.shape, f"shape {tuple('n' if n is None else n for n in shape)}")
    _require(value.dtype.kind in kinds, name, str(value.dtype), wanted)
    return value


def _every(good: np.ndarray, name: str, values: np.ndarray, allowed: str) -> None:
    bad = np.argwhere(~good)
    if len(bad):
        where = tuple(bad[0].tolist())
        raise InputError(f"state.{name}[{', '.join(map(str, where))}]", values[where].tolist(), allowed, _FIX)


def _require(good: Any, name: str, value: object, allowed: str) -> None:
    if not good:
        raise InputError(f"state.{name}", value, allowed, _FIX)
