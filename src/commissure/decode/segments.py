"""What every binned decoder does the same way: checked training segments, folds over trials, and reading at a time.

A segment is a trial, or the one stretch of a continuous recording; nothing (lag, hidden state, window) crosses from one
segment to the next.  The value of a binned decoder at time tau is its output for the bin that holds tau.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import ArrayLike

from commissure.core.errors import InputError
from commissure.core.rng import generator
from commissure.decode.metrics import r2_score
from commissure.decode.recording import BinnedSegment, SpikeRecording, bin_index, inside_intervals

__all__ = [
    "check_times",
    "check_units",
    "fold_of_rows",
    "one_session",
    "score_within",
    "training_segments",
    "values_at",
]


def one_session(recordings: SpikeRecording | Sequence[SpikeRecording]) -> list[SpikeRecording]:
    """The recordings as a list, after checking that there is one and that all have the same units and outputs."""
    given = [recordings] if isinstance(recordings, SpikeRecording) else list(recordings)
    if not given:
        raise InputError("recordings", given, "one SpikeRecording or more")
    for position, recording in enumerate(given):
        if not isinstance(recording, SpikeRecording):
            raise InputError(f"recordings[{position}]", type(recording).__name__, "a SpikeRecording")
        check_units(given[0].unit_ids, recording, name=f"recordings[{position}]")
        outputs = recording.behavior.shape[1]
        if outputs == 0 or len(recording.behavior) == 0:
            raise InputError(f"recordings[{position}].behavior", recording.behavior.shape, "behavior to train on")
        if outputs != given[0].behavior.shape[1]:
            raise InputError(
                f"recordings[{position}].behavior",
                recording.behavior.shape,
                f"{given[0].behavior.shape[1]} columns, as in recordings[0]",
            )
    return given


def check_units(unit_ids: tuple[str, ...], recording: SpikeRecording, *, name: str = "recording") -> None:
    """Refuse a recording whose units are not `unit_ids` in this order; the message names the difference."""
    if recording.unit_ids == unit_ids:
        return
    extra = sorted(set(recording.unit_ids) - set(unit_ids))
    missing = sorted(set(unit_ids) - set(recording.unit_ids))
    difference = []
    if extra:
        difference.append(f"{len(extra)} unknown ({', '.join(extra[:5])}{', ...' if len(extra) > 5 else ''})")
    if missing:
        difference.append(f"{len(missing)} missing ({', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''})")
    if not difference:
        difference.append("the same units in another order")
    raise InputError(
        f"{name}.unit_ids",
        "; ".join(difference),
        f"the {len(unit_ids)} units of the fit, in the same order",
        "a decoder is tied to its units: give other units another session name and fit them",
    )


def training_segments(recordings: SpikeRecording | Sequence[SpikeRecording], bin_s: float) -> list[BinnedSegment]:
    """Binned segments of recordings of one session; at least two bins must have behavior."""
    segments = [segment for recording in one_session(recordings) for segment in recording.binned(bin_s)]
    n_labeled = sum(int(np.isfinite(segment.behavior).all(1).sum()) for segment in segments)
    if n_labeled < 2:
        raise InputError("recordings", f"{n_labeled} bin(s) with behavior", "at least 2", "pass a longer recording")
    return segments


def fold_of_rows(lengths: Sequence[int], folds: int, *, seed: int) -> Int[np.ndarray, " n_rows"]:
    """Fold number of each row of segments of these lengths, laid one after the other.

    Whole segments are dealt to folds at random; fewer segments than two a fold are cut into contiguous blocks of rows.

    >>> fold_of_rows([6], 3, seed=0).tolist()
    [0, 0, 1, 1, 2, 2]
    """
    total = int(sum(lengths))
    if len(lengths) >= 2 * folds:
        order = generator(seed, "folds").permutation(len(lengths))
        return np.repeat(order % folds, lengths)
    return np.arange(total) * folds // total


def values_at(
    recording: SpikeRecording,
    at: ArrayLike | None,
    bin_s: float,
    outputs: Sequence[Float[np.ndarray, "time n_outputs"]],
) -> Float[np.ndarray, "n n_outputs"]:
    """Read per-segment outputs (one row a bin) at `at` (default: the behavior's times): the bin holding each time."""
    times, rows = check_times(recording, at)
    values = np.empty((len(times), outputs[0].shape[1]))
    for row in np.unique(rows):
        here = rows == row
        bins = bin_index(times[here], recording.segments[row, 0], bin_s)
        # the clip only absorbs rounding at the segment's edges: membership was decided by the segment
        values[here] = outputs[row][np.clip(bins, 0, len(outputs[row]) - 1)]
    return values


def score_within(
    recording: SpikeRecording, prediction: Float[np.ndarray, "n_samples n_outputs"], interval: ArrayLike | None
) -> float:
    """R2 (uniform average over outputs) of a prediction at the recording's own times, on the samples in `interval`.

    `interval` (n, 2) holds half-open `[start, stop)` in seconds, such as an entry of `epochs`; None takes all samples.
    """
    if interval is None:
        return r2_score(recording.behavior, prediction)
    kept = inside_intervals(recording.behavior_times, interval)
    if not kept.any():
        fix = "pass intervals in the recording's own seconds"
        raise InputError("interval", np.asarray(interval).tolist(), "at least one behavior sample inside", fix)
    return r2_score(recording.behavior[kept], prediction[kept])


def check_times(
    recording: SpikeRecording, at: ArrayLike | None
) -> tuple[Float[np.ndarray, " n"], Int[np.ndarray, " n"]]:
    """Times `at` (default: the behavior's) and the segment each lies in; a time outside all segments is refused."""
    times = recording.behavior_times if at is None else np.asarray(at, dtype=np.float64)
    if times.ndim != 1:
        raise InputError("at", times.shape, "a 1-dimensional array of times (seconds)")
    bad = np.flatnonzero(~np.isfinite(times))
    if bad.size:
        raise InputError(f"at[{bad[0]}]", float(times[bad[0]]), "a finite time (seconds)")
    rows = recording.segment_index(times)
    outside = np.flatnonzero(rows < 0)
    if outside.size:
        raise InputError(
            f"at[{outside[0]}]", float(times[outside[0]]), "a time inside a trial (or the recording)", "drop it"
        )
    return times, rows
