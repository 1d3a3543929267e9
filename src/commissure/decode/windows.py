"""From recordings to batches: windows of a recording as ragged spikes and queries, and their collation.

A window starts at `start` and is cut into chunks [start + i Tc, start + (i+1) Tc).  A spike becomes (unit row, seconds
from its chunk's center, chunk); a behavior sample becomes a query (chunk, seconds from its chunk's end) with a target
and a weight.  All differences are taken in float64 before any cast.  Recordings with trials give one window a trial,
continuous ones random windows of a fixed length.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from commissure.core.errors import InputError
from commissure.decode.encoder import SpikeTokens
from commissure.decode.recording import SpikeRecording, bin_count, bin_index

__all__ = ["Batch", "Queries", "Window", "collate", "cut_window", "interval_weights"]


class Window(NamedTuple):
    """One stretch of one recording in numpy; `unit` is the recording's own unit row."""

    unit: Int[np.ndarray, " spikes"]
    offset: Float[np.ndarray, " spikes"]
    chunk: Int[np.ndarray, " spikes"]
    n_chunks: int
    query_chunk: Int[np.ndarray, " queries"]
    query_offset: Float[np.ndarray, " queries"]
    samples: Int[np.ndarray, " queries"]


class Queries(NamedTuple):
    """Output times of a batch: batch row, chunk in the row, seconds from that chunk's end (float64)."""

    row: Int[Tensor, " queries"]
    chunk: Int[Tensor, " queries"]
    offset: Float[Tensor, " queries"]


class Batch(NamedTuple):
    """Rows padded to one number of chunks; spikes and queries stay ragged."""

    tokens: SpikeTokens
    lengths: Int[Tensor, " batch"]
    session: Int[Tensor, " batch"]
    queries: Queries

    @property
    def n_chunks(self) -> int:
        """Chunks per row, padding included."""
        return self.tokens.n_slots // len(self.lengths)


def cut_window(
    recording: SpikeRecording,
    start: float,
    *,
    stop: float,
    chunk_s: float,
    times: Float[np.ndarray, " samples"] | None = None,
) -> Window:
    """The window [start, stop); queries at `times` (default: the behavior's) that fall into it."""
    times = recording.behavior_times if times is None else times
    n_chunks = bin_count(start, stop, chunk_s)

    def inside(sorted_times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Places of the times in the window, and their chunks; edges by the recording's one rule."""
        near = np.arange(*np.searchsorted(sorted_times, [start - chunk_s, stop + chunk_s]))
        chunk = bin_index(sorted_times[near], start, chunk_s)
        mask = (chunk >= 0) & (bin_index(sorted_times[near], stop, chunk_s) < 0)
        # the minimum only absorbs the rounding of n * chunk_s against `stop`, as in `SpikeRecording.binned`
        return near[mask], np.minimum(chunk[mask], n_chunks - 1)

    spikes, chunk = inside(recording.times)
    offset = recording.times[spikes] - (start + (chunk + 0.5) * chunk_s)
    samples, query_chunk = inside(times)
    query_offset = times[samples] - (start + (query_chunk + 1) * chunk_s)
    return Window(recording.units[spikes], offset, chunk, n_chunks, query_chunk, query_offset, samples)


def collate(
    windows: Sequence[Window],
    session_rows: Sequence[int],
    unit_starts: Sequence[int],
    *,
    keep: Sequence[np.ndarray] | None = None,
    device: torch.device | str = "cpu",
) -> Batch:
    """One batch of windows; `unit_starts` are the rows where each window's session begins in the unit table.

    `keep` holds one mask over units per window (unit dropout).
    """
    n_chunks = max(w.n_chunks for w in windows)
    unit, offset, slot, row, chunk, query_offset = [], [], [], [], [], []
    for i, window in enumerate(windows):
        shown = slice(None) if keep is None else keep[i][window.unit]
        unit.append(window.unit[shown] + unit_starts[i])
        offset.append(window.offset[shown])
        slot.append(window.chunk[shown] + i * n_chunks)
        row.append(np.full(len(window.query_chunk), i))
        chunk.append(window.query_chunk)
        query_offset.append(window.query_offset)

    def tensor(parts: Sequence[np.ndarray] | np.ndarray) -> Tensor:
        return torch.from_numpy(np.concatenate(parts) if isinstance(parts, list) else parts).to(device)

    return Batch(
        SpikeTokens(tensor(unit), tensor(offset), tensor(slot), n_chunks * len(windows)),
        tensor(np.array([w.n_chunks for w in windows])),
        tensor(np.asarray(session_rows, dtype=np.int64)),
        Queries(tensor(row), tensor(chunk), tensor(query_offset)),
    )


def interval_weights(recording: SpikeRecording, weights: Mapping[str, float]) -> Float[np.ndarray, " samples"]:
    """Loss weight of every behavior sample: the weight of the epoch it lies in, 1 outside all named epochs."""
    unknown = sorted(set(weights) - set(recording.epochs))
    if unknown:
        known = ", ".join(sorted(recording.epochs)) or "none"
        raise InputError("weights", unknown, f"names of the recording's epochs ({known})", "correct or remove them")
    result = np.ones(len(recording.behavior_times))
    for name, weight in weights.items():
        for start, stop in recording.epochs[name]:
            result[(recording.behavior_times >= start) & (recording.behavior_times < stop)] = weight
    return result
