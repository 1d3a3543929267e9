"""Spike recordings: spike times, the behavior to decode, and the one rule that says to which bin a spike belongs.

Bin n of a segment is the half-open interval [start + n b, start + (n + 1) b).  Spikes often sit exactly on an edge
(times counted in samples, or 0.15000000000000002 for 3 x 0.05), so an edge is met up to a tolerance:

    n(t) = floor((t - start + tol) / b),   tol = max(1e-9 s, two float64 spacings of max(|t|, |start|))

A nanosecond is 3e4 times shorter than the sampling interval of any spike sorter, and larger than the rounding of
float64 seconds up to four months; beyond (Unix time) the second term takes over.  Segments use the same tolerance, so
in contiguous trials every spike is counted once.

| paper symbol (arXiv 2506.05320) | name |
|---|---|
| T_c | `bin_s` |
| (i, t) of a spike | `units`, `times` |
| y(t) | `behavior`, `behavior_times` |
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy.typing import ArrayLike

from commissure.core.errors import CommissureWarning, InputError
from commissure.core.files import replacing

__all__ = ["BinnedSegment", "SpikeRecording", "bin_count", "bin_index", "inside_intervals"]

_ENOUGH_SPIKES = 100  # fewer say nothing about the unit of their times
_EDGE_S = 1e-9  # a time this close below an edge is on it; see the module's docstring
_SMALLEST_BIN_S = 1e-6  # a thousand tolerances: below, the tolerance would be a visible part of the bin


def bin_index(times: ArrayLike, start: float, bin_s: float) -> Int[np.ndarray, "*shape"]:
    """Bin n of each time (seconds) on the grid `[start + n bin_s, start + (n + 1) bin_s)`; negative before `start`.

    The one place where spikes meet bins: edges are met up to the tolerance of the module's docstring, so a time that
    was computed as `start + n * bin_s` is in bin n whatever its rounding.  A spike's time from the start of its bin
    can therefore be as low as minus the tolerance.

    >>> bin_index([0.0, 0.05, 0.15000000000000002, 0.1999, 3 * 0.1], 0.0, 0.05)
    array([0, 1, 3, 3, 6])
    """
    times = np.asarray(times, np.float64)
    _check_bin(bin_s)
    return np.asarray(np.floor((times - start + _edge(times, start)) / bin_s), np.int64)


def bin_count(start: float, stop: float, bin_s: float) -> int:
    """Bins that cover `[start, stop)`; the last one may be partial, never by less than the edge tolerance.

    >>> bin_count(0.0, 0.3, 0.1), bin_count(0.0, 0.31, 0.1)
    (3, 4)
    """
    _check_bin(bin_s)
    edge = float(_edge(np.asarray(stop, np.float64), start))
    return max(1, int(np.ceil((stop - start - edge) / bin_s)))


def inside_intervals(times: Float[np.ndarray, " n"], interval: ArrayLike) -> Bool[np.ndarray, " n"]:
    """Whether each time lies in one of the half-open intervals (n, 2), which may overlap; edges as for bins.

    >>> inside_intervals(np.array([0.0, 0.1, 3 * 0.1]), [[0.0, 0.1], [0.2, 0.3]])
    array([ True, False, False])
    """
    bounds = _intervals("interval", interval)
    shifted = times + _edge(times, 0.0)
    started = np.searchsorted(np.sort(bounds[:, 0]), shifted, side="right")
    return started > np.searchsorted(np.sort(bounds[:, 1]), shifted, side="right")


class BinnedSegment(NamedTuple):
    """One segment on a grid of bins that starts at `start` (seconds); `times` are the bin centers."""

    counts: Float[np.ndarray, "time n_units"]
    behavior: Float[np.ndarray, "time n_outputs"]
    auxiliary: Float[np.ndarray, "time n_aux"] | None
    times: Float[np.ndarray, " time"]
    start: float


@dataclass(frozen=True, eq=False)
class SpikeRecording:
    """Spikes and behavior of one session, all times in float64 seconds of one clock.

    - `times`, `units`: one entry a spike; `units` are rows of `unit_ids`.  Unsorted spikes are sorted, with a warning.
      There may be none where trials or samples say when was recorded.
    - `behavior` (n_samples, n_outputs) at `behavior_times` (strictly increasing): what to decode.  Both may be empty.
    - `trials` (n_trials, 2): sorted, disjoint `[start, stop)`; None is one continuous stretch.  Each behavior sample
      lies in a trial; spikes outside all trials are kept and never counted.
    - `epochs`: named intervals (n, 2), such as "reach"; `auxiliary` (n_samples, n_aux): further training targets.
    - `bin_s`: set by `from_counts`, where the spikes sit at the centers of bins of this width.

    Bad input raises `InputError` naming the argument and the first index at fault.

    >>> recording = SpikeRecording([0.01, 0.12], [0, 1], unit_ids=("a", "b"), session="demo",
    ...                            behavior=[[1.0], [2.0]], behavior_times=[0.0, 0.1])
    >>> recording.n_units, recording.segments.tolist()
    (2, [[0.0, 0.2]])
    >>> recording.binned(0.1)[0].counts
    array([[1., 0.],
           [0., 1.]])
    """

    times: Float[np.ndarray, " n_spikes"]
    units: Int[np.ndarray, " n_spikes"]
    unit_ids: tuple[str, ...] = field(kw_only=True)
    behavior: Float[np.ndarray, "n_samples n_outputs"] = field(kw_only=True)
    behavior_times: Float[np.ndarray, " n_samples"] = field(kw_only=True)
    session: str = field(kw_only=True)
    subject: str = field(default="", kw_only=True)
    trials: Float[np.ndarray, "n_trials 2"] | None = field(default=None, kw_only=True)
    epochs: Mapping[str, Float[np.ndarray, "n 2"]] = field(default_factory=dict, kw_only=True)
    auxiliary: Float[np.ndarray, "n_samples n_aux"] | None = field(default=None, kw_only=True)
    bin_s: float | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        values: dict[str, Any] = {}
        values["unit_ids"] = _checked_unit_ids(self.unit_ids)
        values["times"], values["units"] = _checked_spikes(self.times, self.units, values["unit_ids"])
        values["behavior_times"] = times = _finite("behavior_times", self.behavior_times, 1)
        _check_increasing("behavior_times", times)
        values["behavior"] = _samples("behavior", self.behavior, len(times))
        if self.auxiliary is not None:
            values["auxiliary"] = _samples("auxiliary", self.auxiliary, len(times))
        if self.trials is not None:
            values["trials"] = _checked_trials(self.trials)
        elif not (values["times"].size or times.size):
            allowed = "at least one spike, behavior sample or trial"
            raise InputError("times", values["times"].shape, allowed, "the recording is empty: check the reader")
        values["epochs"] = {str(name): _intervals(f"epochs[{name!r}]", x) for name, x in self.epochs.items()}
        if self.bin_s is not None:
            _check_bin(self.bin_s)
        for name in ("session", "subject"):
            if not isinstance(getattr(self, name), str):
                raise InputError(name, getattr(self, name), "a string")
        for name, value in values.items():
            object.__setattr__(self, name, value)
        _doubt_time_units(values["times"], times)
        outside = np.flatnonzero(self.segment_index(times) < 0)
        if outside.size:
            first = int(outside[0])
            fix = "drop the samples between trials, or widen the trials"
            raise InputError(f"behavior_times[{first}]", float(times[first]), "a time inside one of the trials", fix)

    @property
    def n_units(self) -> int:
        """Units recorded, silent ones included."""
        return len(self.unit_ids)

    @property
    def segments(self) -> Float[np.ndarray, "n_segments 2"]:
        """The trials, or the one `[start, stop)` of a continuous recording.

        That stretch runs from the first spike or sample to one sampling interval after the last sample (half a bin
        before and after the samples of binned data), or to a microsecond after a later last spike.
        """
        if self.trials is not None:
            return self.trials
        samples = self.behavior_times
        start, stop = np.inf, -np.inf
        if self.times.size:
            start, stop = float(self.times[0]), float(self.times[-1]) + 1e-6
        if samples.size:
            interval = self.bin_s or (float(np.median(np.diff(samples))) if samples.size > 1 else 1e-6)
            before = 0.5 * self.bin_s if self.bin_s else 0.0
            start = min(start, float(samples[0]) - before)
            stop = max(stop, float(samples[-1]) + interval - before)
        return np.array([[start, stop]])

    @property
    def duration(self) -> float:
        """Seconds of data: the summed length of the segments."""
        return float(np.diff(self.segments, axis=1).sum())

    def segment_index(self, times: ArrayLike) -> Int[np.ndarray, " n"]:
        """Row of `segments` each time lies in, -1 outside all of them.

        >>> SpikeRecording.from_counts([[[1], [0]], [[2]]], 0.1, session="demo").segment_index([0.05, 0.2, 1.25])
        array([ 0, -1,  1])
        """
        times = np.asarray(times, np.float64)
        segments = self.segments
        shifted = times + _edge(times, 0.0)
        index = np.searchsorted(segments[:, 0], shifted, side="right") - 1
        inside = (index >= 0) & (shifted < segments[index, 1])
        return np.where(inside, index, -1)

    def binned(self, bin_s: float) -> list[BinnedSegment]:
        """Counts and mean behavior in bins of `bin_s` seconds, one `BinnedSegment` a segment.

        Each segment's grid starts at its start; its last bin may reach past its stop but holds nothing from there.
        A bin without behavior samples is nan.  Every spike inside a segment is counted exactly once.
        """
        _check_bin(bin_s)
        spikes, samples = self._within(self.times), self._within(self.behavior_times)
        return [
            self._binned_segment(start, stop, bin_s, slice(*spikes[row]), slice(*samples[row]))
            for row, (start, stop) in enumerate(self.segments.tolist())
        ]

    def _within(self, times: np.ndarray) -> list[tuple[int, int]]:
        """For each segment the slice of the sorted `times` whose `segment_index` it is."""
        edges = np.searchsorted(times + _edge(times, 0.0), self.segments, side="left")
        return [(int(first), int(last)) for first, last in edges]

    def _binned_segment(self, start: float, stop: float, bin_s: float, spikes: slice, samples: slice) -> BinnedSegment:
        n_bins = bin_count(start, stop, bin_s)
        # the clips only absorb the rounding of n * bin_s against `stop`: membership was decided by the segment
        rows = np.clip(bin_index(self.times[spikes], start, bin_s), 0, n_bins - 1)
        cells = rows * self.n_units + self.units[spikes]
        counts = np.bincount(cells, minlength=n_bins * self.n_units).reshape(n_bins, self.n_units).astype(np.float64)
        rows = np.clip(bin_index(self.behavior_times[samples], start, bin_s), 0, n_bins - 1)
        behavior = _bin_means(self.behavior[samples], rows, n_bins)
        auxiliary = None if self.auxiliary is None else _bin_means(self.auxiliary[samples], rows, n_bins)
        return BinnedSegment(counts, behavior, auxiliary, start + (np.arange(n_bins) + 0.5) * bin_s, start)

    def select_trials(self, index: ArrayLike) -> SpikeRecording:
        """The recording of some trials only, in time order: `index` holds distinct trial numbers, or is a mask.

        Spikes and samples of other trials are left out, epochs are cut to the trials kept; times are unchanged.

        >>> recording = SpikeRecording.from_counts([[[1], [0]], [[2]]], 0.1, session="demo")
        >>> recording.select_trials([1]).times.round(3).tolist()
        [1.25, 1.25]
        """
        if self.trials is None:
            raise InputError("index", index, "a recording with trials", "pass trials= to SpikeRecording")
        chosen = np.asarray(index)
        if chosen.dtype == bool:
            if chosen.shape != (len(self.trials),):
                raise InputError("index", chosen.shape, f"a mask of shape ({len(self.trials)},)")
            chosen = np.flatnonzero(chosen)
        if chosen.ndim != 1 or not chosen.size or chosen.dtype.kind not in "iu":
            raise InputError("index", index, "one trial number or more", "pass for example [0, 2]")
        wrong = chosen[(chosen < 0) | (chosen >= len(self.trials))]
        if wrong.size:
            raise InputError("index", int(wrong[0]), f"trial numbers in 0..{len(self.trials) - 1}")
        if len(np.unique(chosen)) != len(chosen):
            raise InputError("index", chosen.tolist(), "each trial at most once")
        spikes = np.isin(self.segment_index(self.times), chosen)
        samples = np.isin(self.segment_index(self.behavior_times), chosen)
        trials = self.trials[np.sort(chosen)]
        return SpikeRecording(
            self.times[spikes],
            self.units[spikes],
            unit_ids=self.unit_ids,
            behavior=self.behavior[samples],
            behavior_times=self.behavior_times[samples],
            session=self.session,
            subject=self.subject,
            trials=trials,
            epochs={name: _intersection(intervals, trials) for name, intervals in self.epochs.items()},
            auxiliary=None if self.auxiliary is None else self.auxiliary[samples],
            bin_s=self.bin_s,
        )

    def between(self, start: float, stop: float) -> SpikeRecording:
        """The part of a continuous recording in `[start, stop)` (seconds); epochs are cut to it."""
        if self.trials is not None:
            raise InputError("recording", "a recording with trials", "a continuous one", "use select_trials")
        if not start < stop:
            raise InputError("stop", stop, f"a time after start = {start} (seconds)")
        span = np.array([[start, stop]])
        spikes = (self.times >= start) & (self.times < stop)
        samples = (self.behavior_times >= start) & (self.behavior_times < stop)
        return replace(
            self,
            times=self.times[spikes],
            units=self.units[spikes],
            behavior=self.behavior[samples],
            behavior_times=self.behavior_times[samples],
            epochs={name: _intersection(intervals, span) for name, intervals in self.epochs.items()},
            auxiliary=None if self.auxiliary is None else self.auxiliary[samples],
        )

    @classmethod
    def from_counts(
        cls,
        counts: ArrayLike | Sequence[ArrayLike],
        bin_s: float,
        *,
        session: str,
        behavior: ArrayLike | Sequence[ArrayLike] | None = None,
        auxiliary: ArrayLike | Sequence[ArrayLike] | None = None,
        unit_ids: Sequence[str] | None = None,
        subject: str = "",
        start: float = 0.0,
        gap_s: float = 1.0,
    ) -> SpikeRecording:
        """A recording from binned spike counts: every spike and every sample sits at the center of its bin.

        `counts` is an integer array (time, n_units) for a continuous recording, or a list of such arrays, one a
        trial; `behavior` and `auxiliary` are then lists of as many arrays with as many rows.  Trials are laid one
        after the other from `start`, at least `gap_s` seconds apart (rounded up to whole bins).  Without `behavior`
        the samples have no columns.  `unit_ids` default to "SESSION/0", "SESSION/1", ...: other sessions, other units.

        >>> SpikeRecording.from_counts([[2, 0], [0, 1]], 0.1, session="demo").times.round(3).tolist()
        [0.05, 0.05, 0.15]
        """
        _check_bin(bin_s)
        if not np.isfinite(start):
            raise InputError("start", start, "a finite time (seconds)")
        if not (np.isfinite(gap_s) and gap_s >= 0):
            raise InputError("gap_s", gap_s, "a number >= 0 (seconds)")
        is_trials, blocks = _count_blocks(counts)
        lengths = [len(block) for block in blocks]
        samples = np.zeros((sum(lengths), 0)) if behavior is None else _rows("behavior", behavior, lengths, is_trials)
        extra = None if auxiliary is None else _rows("auxiliary", auxiliary, lengths, is_trials)
        gap = int(np.ceil((gap_s - _EDGE_S) / bin_s)) if gap_s > 0 else 0
        offsets = np.concatenate([[0], np.cumsum(np.asarray(lengths) + gap)[:-1]])
        starts = start + offsets * bin_s
        centers = np.concatenate([s + (np.arange(n) + 0.5) * bin_s for s, n in zip(starts, lengths, strict=True)])
        stacked = np.concatenate(blocks)
        rows, units = np.nonzero(stacked)
        repeats = stacked[rows, units]
        return cls(
            np.repeat(centers[rows], repeats),
            np.repeat(units, repeats),
            unit_ids=tuple(f"{session}/{unit}" for unit in range(stacked.shape[1]))
            if unit_ids is None
            else tuple(unit_ids),
            behavior=samples,
            behavior_times=centers,
            session=session,
            subject=subject,
            trials=np.stack([starts, start + (offsets + lengths) * bin_s], axis=1) if is_trials else None,
            auxiliary=extra,
            bin_s=float(bin_s),
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the recording to an .npz file that needs no pickle; an existing file is replaced in one step."""
        arrays: dict[str, np.ndarray] = {
            "times": self.times,
            "units": self.units,
            "unit_ids": np.array(self.unit_ids, dtype=np.str_),
            "behavior": self.behavior,
            "behavior_times": self.behavior_times,
            "session": np.array(self.session),
            "subject": np.array(self.subject),
        }
        for name in ("trials", "auxiliary", "bin_s"):
            if getattr(self, name) is not None:
                arrays[name] = np.asarray(getattr(self, name), np.float64)
        arrays |= {f"epochs/{name}": intervals for name, intervals in self.epochs.items()}
        with replacing(path) as partial, partial.open("wb") as file:
            np.savez_compressed(file, allow_pickle=False, **arrays)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SpikeRecording:
        """Read a file written by `save`; nothing in it can run code."""
        path = Path(path)
        if not path.is_file():
            raise InputError("path", str(path), "an existing .npz file written by SpikeRecording.save")
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
                arrays = dict(archive.items())
            epochs = {name.removeprefix("epochs/"): x for name, x in arrays.items() if name.startswith("epochs/")}
            return cls(
                arrays["times"],
                arrays["units"],
                unit_ids=tuple(arrays["unit_ids"].tolist()),
                behavior=arrays["behavior"],
                behavior_times=arrays["behavior_times"],
                session=str(arrays["session"]),
                subject=str(arrays["subject"]),
                trials=arrays.get("trials"),
                epochs=epochs,
                auxiliary=arrays.get("auxiliary"),
                bin_s=float(arrays["bin_s"]) if "bin_s" in arrays else None,
            )
        except InputError:
            raise
        except Exception as error:  # zipfile, zlib, KeyError, ValueError, EOFError: whatever a damaged file causes
            raise InputError("path", str(path), f"a file written by SpikeRecording.save ({error})") from error


def _edge(times: np.ndarray, start: float) -> np.ndarray:
    return np.asarray(np.maximum(_EDGE_S, 2 * np.spacing(np.maximum(np.abs(times), abs(start)))))


def _check_bin(bin_s: float) -> None:
    if not (np.isfinite(bin_s) and bin_s >= _SMALLEST_BIN_S):
        raise InputError("bin_s", bin_s, f"a number >= {_SMALLEST_BIN_S} (seconds)", "pass for example bin_s=0.05")


def _finite(name: str, values: ArrayLike, ndim: int) -> np.ndarray:
    try:
        array = np.array(values, np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(name, type(values).__name__, f"a {ndim}-dimensional array of numbers ({error})") from None
    if array.ndim != ndim:
        raise InputError(name, array.shape, f"a {ndim}-dimensional array")
    wrong = np.argwhere(~np.isfinite(array))
    if len(wrong):
        where = ", ".join(map(str, wrong[0].tolist()))
        raise InputError(f"{name}[{where}]", float(array[tuple(wrong[0])]), "finite numbers", "remove or repair it")
    return array


def _check_increasing(name: str, times: np.ndarray) -> None:
    back = np.flatnonzero(np.diff(times) <= 0)
    if back.size:
        first = int(back[0]) + 1
        allowed = f"a time after {name}[{first - 1}] = {float(times[first - 1])}"
        raise InputError(f"{name}[{first}]", float(times[first]), allowed, "sort the samples by time, without repeats")


def _checked_unit_ids(unit_ids: Sequence[str]) -> tuple[str, ...]:
    ids = tuple(unit_ids) if not isinstance(unit_ids, str) else ()
    if not ids:
        raise InputError(
            "unit_ids", unit_ids, "a sequence of one name or more", "pass for example ('unit-0', 'unit-1')"
        )
    seen: set[str] = set()
    for position, name in enumerate(ids):
        if not isinstance(name, str):
            raise InputError(f"unit_ids[{position}]", name, "a string", "convert it with str()")
        if name in seen:
            raise InputError(f"unit_ids[{position}]", name, "each name once", "make the names unique")
        seen.add(name)
    return ids


def _checked_spikes(times: ArrayLike, units: ArrayLike, unit_ids: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
    spike_times = _finite("times", times, 1)
    given = np.asarray(units)
    if given.shape != spike_times.shape:
        raise InputError("units", given.shape, f"one entry a spike, shape {spike_times.shape}")
    if not spike_times.size:
        return spike_times, np.zeros(0, np.int64)
    if given.dtype.kind not in "iu":
        raise InputError("units", str(given.dtype), "integers, rows of unit_ids", "convert with .astype(int)")
    rows = given.astype(np.int64)
    wrong = np.flatnonzero((rows < 0) | (rows >= len(unit_ids)))
    if wrong.size:
        first = int(wrong[0])
        fix = "add the unit to unit_ids or drop its spikes"
        raise InputError(f"units[{first}]", int(rows[first]), f"0..{len(unit_ids) - 1} ({len(unit_ids)} unit_ids)", fix)
    if np.any(np.diff(spike_times) < 0):
        first = int(np.flatnonzero(np.diff(spike_times) < 0)[0]) + 1
        warnings.warn(
            f"times[{first}] is before times[{first - 1}]: the spikes were sorted by time", CommissureWarning, 4
        )
        order = np.argsort(spike_times, kind="stable")
        spike_times, rows = spike_times[order], rows[order]
    return spike_times, rows


def _samples(name: str, values: ArrayLike, n_samples: int) -> np.ndarray:
    array = _finite(name, values, 2)
    if len(array) != n_samples:
        raise InputError(name, array.shape, f"{n_samples} rows, one for each of behavior_times")
    return array


def _intervals(name: str, values: ArrayLike) -> np.ndarray:
    array = _finite(name, values, 2)
    if array.shape[1] != 2:
        raise InputError(name, array.shape, "shape (n, 2): start and stop (seconds)")
    wrong = np.flatnonzero(array[:, 1] <= array[:, 0])
    if wrong.size:
        raise InputError(f"{name}[{int(wrong[0])}]", array[wrong[0]].tolist(), "start < stop")
    return array


def _doubt_time_units(spikes: np.ndarray, samples: np.ndarray) -> None:
    """Warn where times look like milliseconds: spikes and behavior hardly overlap, or both are seconds apart."""
    if len(spikes) < _ENOUGH_SPIKES or len(samples) < 2:
        return
    gaps = np.median(np.diff(spikes)), np.median(np.diff(samples))
    if min(_share_near(spikes, samples), _share_near(samples, spikes)) < 0.5:
        message = (
            f"spikes last from {spikes[0]:g} to {spikes[-1]:g} s, behavior from {samples[0]:g} to {samples[-1]:g} s"
        )
    elif gaps[0] > 0.5 and gaps[1] > 1.0:
        message = f"spikes come {gaps[0]:.1f} s and samples {gaps[1]:.1f} s apart"
    else:
        return
    warnings.warn(f"{message}; times are in seconds: divide milliseconds by 1000", CommissureWarning, stacklevel=4)


def _share_near(times: np.ndarray, others: np.ndarray) -> float:
    """Share of `times` within the span of `others`, widened by half of it on each side."""
    margin = 0.5 * (others[-1] - others[0])
    return float(((times >= others[0] - margin) & (times <= others[-1] + margin)).mean())


def _checked_trials(values: ArrayLike) -> np.ndarray:
    trials = _intervals("trials", values)
    if not len(trials):
        raise InputError("trials", trials.shape, "one trial or more", "pass trials=None for one continuous stretch")
    wrong = np.flatnonzero(trials[1:, 0] < trials[:-1, 1])
    if wrong.size:
        first = int(wrong[0]) + 1
        allowed = f"a start at or after the stop {float(trials[first - 1, 1])} of trial {first - 1}"
        raise InputError(f"trials[{first}]", trials[first].tolist(), allowed, "sort the trials and remove overlaps")
    return trials


def _bin_means(values: np.ndarray, rows: np.ndarray, n_bins: int) -> np.ndarray:
    number = np.bincount(rows, minlength=n_bins).astype(np.float64)
    number[number == 0] = np.nan
    columns = [np.bincount(rows, weights=column, minlength=n_bins) / number for column in values.T]
    return np.stack(columns, axis=1) if columns else np.zeros((n_bins, 0))


def _intersection(intervals: np.ndarray, trials: np.ndarray) -> np.ndarray:
    start = np.maximum(intervals[:, None, 0], trials[None, :, 0]).ravel()
    stop = np.minimum(intervals[:, None, 1], trials[None, :, 1]).ravel()
    cut = np.stack([start, stop], axis=1)[stop > start]
    return cut[np.argsort(cut[:, 0], kind="stable")]


def _count_blocks(counts: Any) -> tuple[bool, list[np.ndarray]]:
    """Whether `counts` is a list of trials, and its integer blocks (time, n_units)."""
    if isinstance(counts, np.ndarray):
        is_trials = counts.ndim == 3 or counts.dtype == object
    else:
        is_trials = len(counts) > 0 and np.ndim(counts[0]) == 2
    blocks: list[np.ndarray] = []
    for position, block in enumerate(counts if is_trials else [counts]):
        name = f"counts[{position}]" if is_trials else "counts"
        array = _finite(name, block, 2)
        if not array.size:
            raise InputError(name, array.shape, "one bin and one unit or more")
        if blocks and array.shape[1] != blocks[0].shape[1]:
            raise InputError(name, array.shape, f"{blocks[0].shape[1]} units, as in counts[0]")
        wrong = np.argwhere((array < 0) | (array >= 2**31) | (array != np.round(array)))
        if len(wrong):
            where = tuple(wrong[0].tolist())
            fix = "counts are spikes per bin: multiply rates by bin_s and round"
            raise InputError(
                f"{name}[{where[0]}, {where[1]}]", float(array[where]), "an integer >= 0, below 2**31", fix
            )
        blocks.append(array.astype(np.int64))
    return is_trials, blocks


def _rows(name: str, values: Any, lengths: list[int], is_trials: bool) -> np.ndarray:
    """The samples of all trials, one below the other, after checking each trial's number of rows."""
    parts = list(values) if is_trials else [values]
    if len(parts) != len(lengths):
        raise InputError(name, len(parts), f"{len(lengths)} arrays, one a trial")
    arrays: list[np.ndarray] = []
    for position, (part, length) in enumerate(zip(parts, lengths, strict=True)):
        label = f"{name}[{position}]" if is_trials else name
        array = _finite(label, part, 2)
        if len(array) != length:
            raise InputError(label, array.shape, f"{length} rows, one a bin of counts")
        if arrays and array.shape[1] != arrays[0].shape[1]:
            raise InputError(label, array.shape, f"{arrays[0].shape[1]} columns, as in {name}[0]")
        arrays.append(array)
    return np.concatenate(arrays)
