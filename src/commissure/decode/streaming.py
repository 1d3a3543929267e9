"""Decoding online: push spikes as they come, poll for predictions; every chunk is encoded, nothing is lost silently.

Chunk b of a stream is [t0 + b Tc, t0 + (b + 1) Tc).  `push` folds the open chunk's spikes into the engine at once and
keeps those of later chunks in a bounded queue; `poll(now)` closes the open chunk once `now` has reached its end.

Back pressure: chunks are closed in order, each exactly once, whatever the delay.  A chunk polled more than one chunk
after its end is encoded, which keeps the state exact, but not read out: its prediction is returned without values,
`skipped=True`, and counted.  When the queue is full the open chunk is closed early in the same way, to make room.

Times are float64 seconds of any origin; only differences from `t0` and from the chunk reach the network, so that a
stream shifted by days decodes the same.  Source: POSSM, arXiv 2506.05320; the streaming contract is our own.
"""

from __future__ import annotations

import copy
import math
import threading
import time
from collections.abc import Sequence
from numbers import Integral, Real
from os import PathLike
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike

from commissure.core.errors import InputError
from commissure.decode.possm import POSSM
from commissure.decode.recording import bin_index
from commissure.decode.step_weights import has_kernel
from commissure.decode.stream_check import check_stream
from commissure.decode.stream_stats import LatencyHistogram, StreamStats, Tally
from commissure.decode.stream_store import StreamState, model_digest, read_state, write_state
from commissure.decode.torch_step import TorchStep, TorchStepState
from commissure.native import kernels
from commissure.native.possm import PossmStep
from commissure.native.possm_reference import check_times, spike_arrays

__all__ = ["Prediction", "StreamStats", "StreamingDecoder"]

MARGIN_S = 1e-6  # inside a chunk by more than any edge tolerance of `bin_index`, the chunk needs no rounding rule
LARGEST_OFFSET_S = 10.0  # the longest rotary period: times beyond it look like nearer ones
LARGEST_S = 1e9  # seconds from t0: beyond 30 years a time is a unit error, and chunk numbers would overflow


class Prediction(NamedTuple):
    """One closed chunk.

    `times` (seconds, the stream's clock) and `values` (times, outputs) are empty when `skipped`; `latency_us` is the
    wall time of closing and reading out; `n_spikes` entered this chunk; `late` ones came since the last one.
    """

    times: Float[np.ndarray, " times"]
    values: Float[np.ndarray, "times outputs"]
    chunk: int
    latency_us: float
    n_spikes: int
    late: int
    skipped: bool


class StreamingDecoder:
    """Online decoder around a POSSM with trained (or at least added) session.

    Parameters
    ----------
    session           a session the model knows; `units` of `push` are its rows, or its unit ids as strings
    engine            "c++" (GRU, S4D, Mamba; the compiled kernel), "torch" (any backbone), "auto": C++ where it can
    output_offsets    output times in seconds from the START of the chunk; default: where the model was trained, if
                      its behavior was binned, else five, at 0, 1/5, ... 4/5 of the chunk.
                      Times past the chunk are forecasts
    late              spikes of a closed chunk: "drop", or "fold" into the open chunk at its start.  Up to `late_tol`
                      seconds late they are folded in any case.  All are counted
    duplicates        repeated (unit, time) pairs of a chunk: "keep" (not looked for), "count", or "drop" the repeats
    unknown_units     "error" or "ignore" (counted)
    capacity          spikes the queue for later chunks holds
    horizon_s         a spike further ahead of the open chunk, or a `now` of `poll` further past its end, raises
                      InputError: a clock has jumped; go on with `reset(t0)` or `advance(n)`

    The model is copied: training it further does not change a running stream.  One thread may push while another polls.
    The stream starts at `t0 = 0`; `reset(t0)` starts a new one.

    >>> from commissure.decode.recording import SpikeRecording
    >>> model = POSSM.from_preset("possm-ss")
    >>> model.add_session(SpikeRecording.from_counts(np.ones((4, 3), int), 0.05, session="demo"))
    >>> stream = StreamingDecoder(model, session="demo")
    >>> stream.push([0.012, 0.031], [0, 2])
    >>> stream.poll(0.049) is None, stream.poll(0.05).values.shape
    (True, (5, 2))
    """

    def __init__(
        self,
        model: POSSM,
        *,
        session: str,
        engine: Literal["auto", "c++", "torch"] = "auto",
        output_offsets: Sequence[float] | None = None,
        late: Literal["drop", "fold"] = "drop",
        late_tol: float = 0.0,
        duplicates: Literal["keep", "count", "drop"] = "keep",
        unknown_units: Literal["error", "ignore"] = "error",
        capacity: int = 65_536,
        horizon_s: float = 60.0,
    ) -> None:
        _choice("engine", engine, ("auto", "c++", "torch"))
        _choice("late", late, ("drop", "fold"))
        _choice("duplicates", duplicates, ("keep", "count", "drop"))
        _choice("unknown_units", unknown_units, ("error", "ignore"))
        self.chunk_s = model.config.chunk_s
        if not (late_tol >= 0 and math.isfinite(late_tol)):
            raise InputError("late_tol", late_tol, "a number >= 0 (seconds)")
        if capacity < 1:
            raise InputError("capacity", capacity, "an integer >= 1 (spikes)")
        if not self.chunk_s <= horizon_s <= LARGEST_S:
            raise InputError("horizon_s", horizon_s, f"{self.chunk_s} (one chunk) to {LARGEST_S:g} (seconds)")
        default = np.arange(5) * (self.chunk_s / 5) if model.output_offsets is None else model.output_offsets
        self.output_offsets = check_times("output_offsets", default if output_offsets is None else output_offsets)
        if np.abs(self.output_offsets).max(initial=0.0) > LARGEST_OFFSET_S:
            far = float(self.output_offsets[np.abs(self.output_offsets).argmax()])
            raise InputError("output_offsets", far, f"seconds within {LARGEST_OFFSET_S:g} s of the chunk", "not ms")
        self.session, self.late, self.late_tol = session, late, float(late_tol)
        self.duplicates, self.unknown_units = duplicates, unknown_units
        self.capacity, self.horizon_s = int(capacity), float(horizon_s)
        model.session_row(session)
        self.unit_ids = model.sessions[session]
        self.n_outputs = model.config.out_dim
        relative = (self.output_offsets - self.chunk_s).tolist()
        if engine == "torch" or (engine == "auto" and (not has_kernel(model) or kernels() is None)):
            self._engine: PossmStep | TorchStep = TorchStep(model, session=session, offsets=relative)
        else:
            is_double = model.unit_embedding.element_size() == 8
            dtype: Literal["float32", "float64"] = "float64" if is_double else "float32"
            self._engine = PossmStep(model.step_weights(session), offsets=relative, dtype=dtype)
        self._rows: dict[str, int] = {}
        self._lock = threading.Lock()
        self._queue_units = np.zeros(self.capacity, np.int64)
        self._queue_chunks = np.zeros(self.capacity, np.int64)
        self._queue_times = np.zeros(self.capacity)
        self._tally = Tally()
        self.reset()

    @property
    def backend(self) -> str:
        """What computes: 'c++', 'torch', or 'python' (the reference, where the extension is missing)."""
        return self._engine.backend

    @property
    def next_end(self) -> float:
        """When the open chunk ends (seconds)."""
        return self._t0 + (self._chunk + 1) * self.chunk_s

    def reset(self, t0: float = 0.0) -> None:
        """Start a new stream whose first chunk begins at `t0` (seconds); state, queue and counters are cleared."""
        _check_moment("t0", t0)
        with self._lock:
            self._t0, self._chunk, self._queued = float(t0), 0, 0
            self._seen: dict[int, set[tuple[float, int]]] = {}
            self._tally = Tally()
            self._latency = LatencyHistogram()
            self._engine.reset()

    def push(self, times: ArrayLike, units: ArrayLike) -> None:
        """Give spikes, `times` (n) in seconds and `units` (n), in any order; O(n), never waits for time to pass.

        Raises InputError for times not finite numbers or beyond the horizon, for unknown units (unless ignored) and for
        arrays of different lengths; no spike of the call has been taken then.
        """
        with self._lock:
            self._engine.idle()
            self._push(times, units)

    def push_counts(self, counts: ArrayLike, *, start: float | None = None, bin_s: float | None = None) -> None:
        """Give binned spikes: counts (units) of one bin or (bins, units) of several; spikes sit at their bin's center.

        `start` of the first bin defaults to the open chunk's, `bin_s` to the chunk, its largest value.  Repeats
        are not duplicates here.
        """
        array = np.atleast_2d(np.asarray(counts))
        if array.dtype.kind not in "iufb":
            raise InputError("counts", str(array.dtype), "integers >= 0")
        if array.ndim != 2 or array.shape[1] != len(self.unit_ids):
            raise InputError("counts", array.shape, f"(units) or (bins, units) with {len(self.unit_ids)} units")
        bad = np.argwhere(~((array >= 0) & (array == np.rint(array)) & (array < 2**31)))
        if len(bad):
            where = tuple(bad[0].tolist())
            raise InputError(f"counts[{where[0]}, {where[1]}]", float(array[where]), "an integer >= 0")
        width = self.chunk_s if bin_s is None else bin_s
        if not (isinstance(width, Real) and 0 < width <= self.chunk_s * (1 + 1e-9)):
            fix = "longer bins would leave chunks empty: make the model with chunk_s = bin_s"
            raise InputError("bin_s", bin_s, f"above 0, at most chunk_s = {self.chunk_s} (seconds)", fix)
        if start is not None:
            _check_moment("start", start)
        rows, units = np.nonzero(array)
        repeats = array[rows, units].astype(np.int64)
        with self._lock:
            self._engine.idle()
            first = self._t0 + self._chunk * self.chunk_s if start is None else start
            times = first + (rows + 0.5) * width
            self._push(np.repeat(times, repeats), np.repeat(units, repeats), is_binned=True)

    def poll(self, now: float) -> Prediction | None:
        """Close the open chunk if it has ended by `now`, at most one a call; None when there is nothing to close.

        Call it until it returns None: after a stall the chunks that are more than one chunk late come without values.
        Raises InputError for `now` more than `horizon_s` past the open chunk's end; nothing has been closed then.
        """
        _check_moment("now", now)
        with self._lock:
            behind = now - self.next_end
            if behind < 0 and (behind < -MARGIN_S or self._chunk_of(now) <= self._chunk):
                return None
            if behind > self.horizon_s:
                allowed = f"at most horizon_s = {self.horizon_s:g} s after the open chunk's end at {self.next_end} s"
                raise InputError("now", now, allowed, "if the clock jumped, call reset(t0) or advance(n)")
            is_stale = behind > self.chunk_s + MARGIN_S
            return self._finish(readout=not is_stale)

    def step(self, times: ArrayLike, units: ArrayLike) -> Prediction:
        """Push spikes, then close the open chunk whatever the time: one call a chunk, as in an offline replay."""
        with self._lock:
            self._engine.idle()
            self._push(times, units)
            return self._finish(readout=True)

    def advance(self, n: int) -> None:
        """Close `n` chunks without readout, as after a gap in the data; spikes already given for them are used."""
        if not isinstance(n, Integral) or n < 0:
            raise InputError("n", n, "an integer >= 0 (chunks)")
        with self._lock:
            for _ in range(n):
                self._close(readout=False)
                self._tally.gaps += 1

    def idle(self) -> None:
        """Use the time between chunks: compute now what the next close needs and needs no spikes (push does it too)."""
        with self._lock:
            self._engine.idle()

    def warmup(self, n: int = 20) -> None:
        """Run `n` chunks on a copy, so that the first real ones find code and weights in the caches."""
        other = self.copy()
        other.reset()
        for b in range(n):
            other.step(np.full(8, (b + 0.5) * self.chunk_s), np.arange(8) % len(self.unit_ids))

    def stats(self) -> StreamStats:
        """Counters since the reset, and latency percentiles."""
        return self._tally.stats(queued=self._queued, chunks=self._chunk, latency=self._latency)

    def state(self) -> StreamState:
        """The stream's whole state, exact also in the middle of a chunk."""
        with self._lock:
            n = self._queued
            seen = [(t, u, b) for b, pairs in self._seen.items() for t, u in sorted(pairs)]
            return StreamState(
                t0=self._t0,
                chunk=self._chunk,
                engine=self._engine.state(),
                queue_units=self._queue_units[:n].copy(),
                queue_chunks=self._queue_chunks[:n].copy(),
                queue_times=self._queue_times[:n].copy(),
                seen=np.array(seen, dtype=np.float64).reshape(-1, 3),
                counters=np.array(list(vars(self._tally).values()), np.int64),
                latencies=self._latency.counts.copy(),
                largest_us=self._latency.largest,
            )

    def load_state(self, state: StreamState) -> None:
        """Go on from `state`, of a decoder with the same model, session and kind of engine.

        A state that no such decoder can have raises InputError naming the field; nothing has changed then.
        """
        check_stream(state, n_units=len(self.unit_ids), chunk_s=self.chunk_s)
        n = len(state.queue_units)
        if n > self.capacity:
            raise InputError("state.queue_units", n, f"at most capacity = {self.capacity} spikes", "raise capacity")
        if isinstance(state.engine, TorchStepState) != isinstance(self._engine, TorchStep):
            raise InputError("state.engine", type(state.engine).__name__, "a state of the same kind of engine")
        with self._lock:
            self._engine.load_state(state.engine)  # type: ignore[arg-type]
            self._t0, self._chunk, self._queued = float(state.t0), int(state.chunk), n
            self._queue_units[:n], self._queue_chunks[:n] = state.queue_units, state.queue_chunks
            self._queue_times[:n] = state.queue_times
            self._seen = {}
            for t, u, b in state.seen.tolist():
                self._seen.setdefault(int(b), set()).add((t, int(u)))
            self._tally = Tally(*state.counters.tolist())
            self._latency = LatencyHistogram()
            self._latency.counts[:] = state.latencies
            self._latency.largest = float(state.largest_us)

    def save(self, path: str | PathLike[str]) -> None:
        """Write the state to a safetensors file, with a digest of the model it belongs to."""
        write_state(path, self.state(), model_digest(self._engine))

    def load(self, path: str | PathLike[str]) -> None:
        """Go on from a file written by `save`; a state of another model or session raises InputError."""
        self.load_state(read_state(path, model_digest(self._engine)))

    def copy(self) -> StreamingDecoder:
        """An independent stream in the same state, sharing the weights."""
        with self._lock:
            other = copy.copy(self)
            other._lock = threading.Lock()
            other._engine = self._engine.copy()
            for name in ("_queue_units", "_queue_chunks", "_queue_times"):
                setattr(other, name, getattr(self, name).copy())
            other._seen = {b: set(pairs) for b, pairs in self._seen.items()}
            other._tally, other._latency = copy.copy(self._tally), copy.deepcopy(self._latency)
        return other

    def _chunk_of(self, moment: float) -> int:
        return int(bin_index(moment, self._t0, self.chunk_s))

    def _unit_rows(self, units: ArrayLike) -> np.ndarray:
        array = np.asarray(units)
        if array.dtype.kind != "U":
            return array
        if not self._rows:
            self._rows = {name: row for row, name in enumerate(self.unit_ids)}
        rows = np.array([self._rows.get(name, -1) for name in array.tolist()], np.int64)
        if self.unknown_units == "error":
            self._check_units(rows, array)
        return rows

    def _check_units(self, rows: np.ndarray, units: np.ndarray) -> None:
        bad = np.flatnonzero((rows < 0) | (rows >= len(self.unit_ids)))
        if bad.size:
            allowed = f"one of the session's {len(self.unit_ids)} units"
            fix = "check the session, or pass unknown_units='ignore'"
            raise InputError(f"units[{bad[0]}]", units[bad[0]].item(), allowed, fix)

    def _push(self, times: ArrayLike, units: ArrayLike, *, is_binned: bool = False) -> None:
        rows, seconds = spike_arrays(self._unit_rows(units), _seconds(times))
        if not seconds.size:
            return
        relative = seconds - self._t0
        start = self._chunk * self.chunk_s
        is_plain = is_binned or self.duplicates == "keep"
        first, last = np.minimum.reduce(relative), np.maximum.reduce(relative)
        inside = first >= start + MARGIN_S and last < start + self.chunk_s - MARGIN_S
        if is_plain and inside and self.unknown_units == "error":
            self._fold(rows, relative)  # the engine checks the units
        else:
            self._push_checked(seconds, relative, rows, is_plain)

    def _push_checked(self, seconds: np.ndarray, relative: np.ndarray, rows: np.ndarray, is_plain: bool) -> None:
        self._check_times(seconds, relative)
        if self.unknown_units == "error":
            self._check_units(rows, rows)
        else:
            known = (rows >= 0) & (rows < len(self.unit_ids))
            self._tally.unknown_dropped += int((~known).sum())
            seconds, relative, rows = seconds[known], relative[known], rows[known]
        chunks = bin_index(seconds, self._t0, self.chunk_s)
        late = chunks < self._chunk
        if late.any():
            self._tally.late += int(late.sum())
            start = self._chunk * self.chunk_s
            taken = ~late | (self.late == "fold") | (start - relative <= self.late_tol)
            self._tally.late_dropped += int((~taken).sum())
            relative, rows, chunks, late = relative[taken], rows[taken], chunks[taken], late[taken]
            chunks = np.maximum(chunks, self._chunk)
        if not is_plain:
            fresh = self._first_of_pairs(relative, rows, chunks)
            relative, rows, chunks, late = relative[fresh], rows[fresh], chunks[fresh], late[fresh]
        relative = np.where(late, np.maximum(relative, self._chunk * self.chunk_s), relative)
        order = np.argsort(chunks, kind="stable")
        self._place(rows[order], relative[order], chunks[order])

    def _check_times(self, seconds: np.ndarray, relative: np.ndarray) -> None:
        limit = min(self._chunk * self.chunk_s + self.horizon_s, LARGEST_S)
        bad = np.flatnonzero(~((relative > -LARGEST_S) & (relative <= limit)))
        if bad.size:
            first = int(bad[0])
            raise InputError(
                f"times[{first}]",
                float(seconds[first]),
                f"a finite time up to horizon_s = {self.horizon_s:g} s after the open chunk's start",
                "if the clock jumped, call reset(t0) or advance(n)",
            )

    def _first_of_pairs(self, relative: np.ndarray, rows: np.ndarray, chunks: np.ndarray) -> np.ndarray:
        """Mask of the spikes to take; repeats of a (unit, time) pair are counted, and dropped if so asked."""
        fresh = np.ones(rows.size, bool)
        for i, (t, u, b) in enumerate(zip(relative.tolist(), rows.tolist(), chunks.tolist(), strict=True)):
            pairs = self._seen.setdefault(b, set())
            fresh[i] = (t, u) not in pairs
            pairs.add((t, u))
        repeats = int((~fresh).sum())
        self._tally.duplicates += repeats
        if self.duplicates == "count":
            return np.ones_like(fresh)
        self._tally.duplicates_dropped += repeats
        return fresh

    def _place(self, rows: np.ndarray, relative: np.ndarray, chunks: np.ndarray) -> None:
        """Fold the open chunk's spikes and queue the rest (sorted by chunk), closing chunks early if room is short."""
        while rows.size:
            n_open = int(np.searchsorted(chunks, self._chunk, side="right"))
            if n_open:
                self._fold(rows[:n_open], relative[:n_open])
                rows, relative, chunks = rows[n_open:], relative[n_open:], chunks[n_open:]
            if rows.size <= self.capacity - self._queued:
                end = self._queued + rows.size
                self._queue_units[self._queued : end], self._queue_chunks[self._queued : end] = rows, chunks
                self._queue_times[self._queued : end] = relative
                self._queued = end
                return
            self._close(readout=False)
            self._tally.skipped += 1

    def _fold(self, rows: np.ndarray, relative: np.ndarray) -> None:
        self._engine.fold(rows, relative - (self._chunk + 0.5) * self.chunk_s)
        self._tally.used += rows.size
        self._tally.open_spikes += rows.size

    def _finish(self, *, readout: bool) -> Prediction:
        tally = self._tally
        begin = time.perf_counter_ns()
        chunk, n_spikes = self._chunk, tally.open_spikes
        late, tally.late_reported = tally.late - tally.late_reported, tally.late
        values = self._close(readout=readout)
        tally.predictions += readout
        tally.skipped += not readout
        latency_us = (time.perf_counter_ns() - begin) / 1e3
        self._latency.add(latency_us)
        tally.overruns += latency_us > self.chunk_s * 1e6
        times = self._t0 + chunk * self.chunk_s + self.output_offsets if readout else np.zeros(0)
        return Prediction(times, values, chunk, latency_us, n_spikes, late, not readout)

    def _close(self, *, readout: bool) -> np.ndarray:
        """Close the open chunk and open the next one with its queued spikes."""
        values = self._engine.close(readout=readout)
        self._seen.pop(self._chunk, None)
        self._chunk += 1
        self._tally.open_spikes = 0
        if self._queued:
            n = self._queued
            due = self._queue_chunks[:n] <= self._chunk
            if due.any():
                self._fold(self._queue_units[:n][due], self._queue_times[:n][due])
                rest = ~due
                self._queued = int(rest.sum())
                for queue in (self._queue_units, self._queue_chunks, self._queue_times):
                    queue[: self._queued] = queue[:n][rest]
        return values


def _choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise InputError(name, value, f"one of {allowed}")


def _check_moment(name: str, value: Any) -> None:
    if not (isinstance(value, Real) and math.isfinite(value)):
        raise InputError(name, value, "a finite time (seconds)")


def _seconds(times: ArrayLike) -> np.ndarray:
    """Times as float64; text, None and ragged lists are not parsed."""
    try:
        array = np.asarray(times)
    except ValueError as error:
        raise InputError("times", type(times).__name__, f"a 1-dimensional array of seconds ({error})") from None
    if array.dtype.kind not in "iuf":
        raise InputError("times", str(array.dtype), "numbers (seconds)", "convert with .astype(float)")
    return array.astype(np.float64, copy=False)
