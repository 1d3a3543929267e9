"""SpikeRecording: validation, bins, trials, counts, files."""

from __future__ import annotations

import math
import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from commissure.core.errors import CommissureWarning, InputError
from commissure.decode.recording import SpikeRecording, bin_count, bin_index


def _recording(**changes: Any) -> SpikeRecording:
    fields: dict[str, Any] = {
        "times": [0.01, 0.12, 0.31, 0.55],
        "units": [0, 1, 1, 0],
        "unit_ids": ("a", "b"),
        "behavior": np.arange(12.0).reshape(6, 2),
        "behavior_times": np.arange(6) / 10,
        "session": "s",
    }
    fields |= changes
    return SpikeRecording(fields.pop("times"), fields.pop("units"), **fields)


# oracle 12 of the method's specification: edges


@settings(max_examples=300, deadline=None)
@given(
    n=st.integers(0, 1_000_000),
    bin_s=st.sampled_from([0.02, 0.05, 0.1]),
    start=st.sampled_from([0.0, 2282.6, 1e6, -3.3]),
    ulps=st.integers(-1, 1),
)
def test_a_time_on_an_edge_belongs_to_the_bin_it_opens(n: int, bin_s: float, start: float, ulps: int) -> None:
    for time in (start + n * bin_s, math.fsum([start, n * bin_s]), (start / bin_s + n) * bin_s):
        time += ulps * np.spacing(time)
        assert bin_index(time, start, bin_s) == n
    assert bin_index(start + n * bin_s - 1e-6, start, bin_s) == n - 1


def test_a_time_summed_bin_by_bin_belongs_to_the_bin_it_opens() -> None:
    edges = np.cumsum(np.full(2000, 0.05))  # rounding of its own: 0.15000000000000002 is the third
    assert edges[2] == 0.15000000000000002
    assert bin_index(edges, 0.0, 0.05).tolist() == list(range(1, 2001))


def test_edges_hold_in_unix_time() -> None:
    start = 1_700_000_000.25
    assert bin_index(start + 0.05 * np.arange(1000), start, 0.05).tolist() == list(range(1000))


@settings(max_examples=100, deadline=None)
@given(
    cells=st.lists(st.tuples(st.integers(0, 399), st.sampled_from([0.0, 0.3, 0.999])), min_size=1, max_size=60),
    bin_s=st.sampled_from([0.02, 0.05, 0.1]),
    start=st.sampled_from([0.0, 2282.6]),
    trial_bins=st.sampled_from([400, 100, 7]),
)
def test_every_spike_is_counted_once(
    cells: list[tuple[int, float]], bin_s: float, start: float, trial_bins: int
) -> None:
    times = np.array([start + (n + part) * bin_s for n, part in cells])
    times = np.sort(times - np.spacing(times) * np.array([part == 0 for _, part in cells]))  # rounded the wrong way
    edges = start + bin_s * np.append(np.arange(0, 400, trial_bins), 400)
    recording = SpikeRecording(
        times,
        np.zeros(len(times), int),
        unit_ids=("a",),
        behavior=np.zeros((1, 1)),
        behavior_times=[start],
        session="s",
        trials=np.stack([edges[:-1], edges[1:]], axis=1),  # contiguous: each edge closes one trial and opens the next
    )
    counts = np.concatenate([segment.counts[:, 0] for segment in recording.binned(bin_s)])
    assert counts.tolist() == np.bincount([n for n, _ in cells], minlength=400).tolist()


def test_a_spike_on_the_stop_belongs_to_no_bin() -> None:
    recording = _recording(
        times=[0.1, 0.3], units=[0, 0], trials=[[0.0, 0.3], [0.4, 0.6]], behavior_times=[0, 0.1, 0.2, 0.4, 0.5, 0.55]
    )
    assert sum(segment.counts.sum() for segment in recording.binned(0.05)) == 1


def test_partial_last_bin() -> None:
    assert [bin_count(0.0, stop, 0.1) for stop in (0.05, 0.1, 0.30000000000000004, 0.3001)] == [1, 1, 3, 4]
    recording = _recording(trials=[[0.0, 0.56]])
    assert [segment.counts.sum(0).tolist() for segment in recording.binned(0.1)] == [[2, 2]]
    assert len(recording.binned(0.1)[0].counts) == 6


# segments, bins, behavior


def test_a_continuous_recording_is_one_segment() -> None:
    recording = _recording()
    np.testing.assert_allclose(recording.segments, [[0.0, 0.6]], rtol=1e-15)
    np.testing.assert_allclose(recording.duration, 0.6, rtol=1e-15)
    late = _recording(times=[-0.5, 0.9], units=[0, 0])
    assert late.segments.tolist() == [[-0.5, 0.9 + 1e-6]]


def test_binned_behavior_is_the_mean_of_the_samples_in_the_bin() -> None:
    [segment] = _recording(auxiliary=np.arange(6.0)[:, None]).binned(0.2)
    assert segment.behavior.tolist() == [[1, 2], [5, 6], [9, 10]]
    assert segment.auxiliary is not None
    assert segment.auxiliary.ravel().tolist() == [0.5, 2.5, 4.5]
    assert segment.counts.tolist() == [[1, 1], [0, 1], [1, 0]]
    np.testing.assert_allclose(segment.times, [0.1, 0.3, 0.5])
    [fine] = _recording().binned(0.05)
    assert np.isnan(fine.behavior[1::2]).all()
    assert not np.isnan(fine.behavior[::2]).any()


def test_segment_index() -> None:
    recording = _recording(trials=[[0.0, 0.3], [0.3, 0.6]])
    assert recording.segment_index([-0.1, 0.0, 0.1 + 0.2, 0.29, 0.6, 0.59]).tolist() == [-1, 0, 1, 0, -1, 1]


def test_select_trials() -> None:
    recording = _recording(
        trials=[[0.0, 0.2], [0.2, 0.4], [0.4, 0.6]], epochs={"reach": [[0.1, 0.5]]}, auxiliary=np.ones((6, 3))
    )
    for index in ([2, 0], np.array([True, False, True])):
        part = recording.select_trials(index)
        assert part.times.tolist() == [0.01, 0.12, 0.55]
        assert part.behavior_times.tolist() == recording.behavior_times[[0, 1, 4, 5]].tolist()
        assert part.epochs["reach"].tolist() == [[0.1, 0.2], [0.4, 0.5]]
        assert part.auxiliary is not None
        assert part.auxiliary.shape == (4, 3)
        assert [s.start for s in part.binned(0.1)] == [0.0, 0.4]


@pytest.mark.parametrize("index", [[3], [-1], [0, 0], [], [0.5], [[0]], np.array([True])])
def test_select_trials_refuses(index: Any) -> None:
    with pytest.raises(InputError, match=r"^index = "):
        _recording(trials=[[0.0, 0.2], [0.2, 0.4], [0.4, 0.6]]).select_trials(index)


def test_select_trials_needs_trials() -> None:
    with pytest.raises(InputError, match="a recording with trials"):
        _recording().select_trials([0])


# counts


@settings(max_examples=50, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=5),
    bin_s=st.sampled_from([0.02, 0.05, 0.1]),
    start=st.sampled_from([0.0, 2282.6]),
    gap_s=st.sampled_from([0.0, 0.33, 1.0]),
    seed=st.integers(0, 100),
)
def test_counts_survive_the_round_trip(lengths: list[int], bin_s: float, start: float, gap_s: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    counts = [rng.poisson(1.0, (n, 3)) for n in lengths]
    counts[0][0, 0] += 1
    behavior = [rng.standard_normal((n, 2)) for n in lengths]
    recording = SpikeRecording.from_counts(counts, bin_s, session="s", behavior=behavior, start=start, gap_s=gap_s)
    segments = recording.binned(bin_s)
    assert len(segments) == len(lengths)
    for segment, count, velocity in zip(segments, counts, behavior, strict=True):
        np.testing.assert_array_equal(segment.counts, count)
        np.testing.assert_array_equal(segment.behavior, velocity)
    assert recording.trials is not None
    assert (recording.trials[1:, 0] - recording.trials[:-1, 1] >= gap_s - 1e-9).all()
    assert recording.bin_s == bin_s


def test_continuous_counts() -> None:
    counts = np.array([[0, 0], [2, 1], [0, 0]])
    recording = SpikeRecording.from_counts(counts, 0.1, session="s", behavior=[[1.0], [2.0], [3.0]], start=5.0)
    np.testing.assert_allclose(recording.segments, [[5.0, 5.3]])
    assert recording.trials is None
    assert recording.unit_ids == ("s/0", "s/1")
    [segment] = recording.binned(0.1)
    assert segment.counts.tolist() == counts.tolist()
    assert segment.behavior.ravel().tolist() == [1.0, 2.0, 3.0]
    assert SpikeRecording.from_counts(counts, 0.1, session="s").behavior.shape == (3, 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"counts": [[0, -1]]}, r"^counts\[0, 1\] = -1.0: expected an integer >= 0"),
        ({"counts": [[0, 1e20]]}, r"^counts\[0, 1\] = 1e\+20: expected an integer >= 0, below"),
        ({"counts": [[0, 0.5]]}, r"^counts\[0, 1\] = 0.5: .*multiply rates by bin_s"),
        ({"counts": [[0, np.nan]]}, r"^counts\[0, 1\] = nan: expected finite"),
        ({"counts": [0, 1]}, r"^counts = \(2,\): expected a 2-dimensional array"),
        ({"counts": np.zeros((0, 2))}, r"^counts = \(0, 2\): expected one bin"),
        ({"counts": []}, r"^counts = \(0,\)"),
        ({"counts": [[[1, 0]], [[1]]]}, r"^counts\[1\] = \(1, 1\): expected 2 units"),
        ({"counts": [[[1, 0]], np.zeros((0, 2))]}, r"^counts\[1\] = \(0, 2\)"),
        ({"behavior": [[1.0], [2.0]]}, r"^behavior = \(2, 1\): expected 1 rows"),
        ({"counts": [[[1, 0]], [[1, 0]]], "behavior": [[[1.0]]]}, r"^behavior = 1: expected 2 arrays"),
        ({"counts": [[[1]], [[1]]], "behavior": [[[1.0]], [[1.0, 2.0]]]}, r"^behavior\[1\] = .* 1 columns"),
        ({"auxiliary": [[1.0], [2.0]]}, r"^auxiliary = \(2, 1\): expected 1 rows"),
        ({"bin_s": 0.0}, r"^bin_s = 0.0"),
        ({"bin_s": np.nan}, r"^bin_s = nan"),
        ({"gap_s": -1.0}, r"^gap_s = -1.0"),
        ({"start": np.inf}, r"^start = inf"),
        ({"unit_ids": ("a",)}, r"^units\[1\] = 1|^units\[0\] = 1"),
    ],
)
def test_from_counts_refuses(changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"counts": [[1, 1]], "bin_s": 0.1, "session": "s"}
    arguments |= changes
    with pytest.raises(InputError, match=message):
        SpikeRecording.from_counts(arguments.pop("counts"), arguments.pop("bin_s"), **arguments)


# bad input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"times": [0.0, np.nan, 0.1, 0.2]}, r"^times\[1\] = nan: expected finite numbers"),
        ({"times": [0.0, 0.1, 0.2, np.inf]}, r"^times\[3\] = inf"),
        ({"times": [[0.0], [0.1]]}, r"^times = \(2, 1\): expected a 1-dimensional"),
        ({"times": ["a"]}, r"^times = 'list': expected a 1-dimensional array of numbers"),
        (
            {"times": [], "units": [], "behavior": np.zeros((0, 2)), "behavior_times": []},
            r"^times = \(0,\): expected at least one spike, behavior sample or trial; the recording is empty",
        ),
        ({"times": [], "units": [0]}, r"^units = \(1,\): expected one entry a spike, shape \(0,\)"),
        ({"units": [0, 1]}, r"^units = \(2,\): expected one entry a spike, shape \(4,\)"),
        ({"units": [0, 1, 2, 0]}, r"^units\[2\] = 2: expected 0..1 \(2 unit_ids\); add the unit"),
        ({"units": [0, -1, 1, 0]}, r"^units\[1\] = -1"),
        ({"units": [0.0, 1.0, 1.0, 0.0]}, r"^units = 'float64': expected integers"),
        ({"unit_ids": ()}, r"^unit_ids = \(\)"),
        ({"unit_ids": "ab"}, r"^unit_ids = 'ab'"),
        ({"unit_ids": ("a", "a")}, r"^unit_ids\[1\] = 'a': expected each name once"),
        ({"unit_ids": ("a", 1)}, r"^unit_ids\[1\] = 1: expected a string"),
        ({"behavior": np.zeros((5, 2))}, r"^behavior = \(5, 2\): expected 6 rows"),
        ({"behavior": np.zeros(6)}, r"^behavior = \(6,\): expected a 2-dimensional"),
        ({"behavior": np.full((6, 1), np.nan)}, r"^behavior\[0, 0\] = nan"),
        ({"behavior_times": [0, 0.1, 0.2, 0.2, 0.4, 0.5]}, r"^behavior_times\[3\] = 0.2: expected a time after"),
        ({"behavior_times": [0, 0.1, 0.2, 0.15, 0.4, 0.5]}, r"^behavior_times\[3\] = 0.15"),
        ({"auxiliary": np.zeros((2, 1))}, r"^auxiliary = \(2, 1\): expected 6 rows"),
        ({"trials": np.zeros((0, 2))}, r"^trials = \(0, 2\): expected one trial or more"),
        ({"trials": [[0.0, 0.3], [0.2, 0.6]]}, r"^trials\[1\] = \[0.2, 0.6\]: expected a start at or after"),
        ({"trials": [[0.3, 0.6], [0.0, 0.3]]}, r"^trials\[1\] = .*sort the trials"),
        ({"trials": [[0.3, 0.3]]}, r"^trials\[0\] = .*start < stop"),
        ({"trials": [0.0, 0.3]}, r"^trials = \(2,\)"),
        ({"trials": [[0.0, 0.3, 0.4]]}, r"^trials = \(1, 3\)"),
        ({"trials": [[0.0, 0.3]]}, r"^behavior_times\[3\] = .* inside one of the trials; drop"),
        ({"epochs": {"reach": [[0.2, 0.1]]}}, r"^epochs\['reach'\]\[0\] = .*start < stop"),
        ({"bin_s": -0.1}, r"^bin_s = -0.1"),
        ({"session": 3}, r"^session = 3: expected a string"),
    ],
)
def test_bad_input(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        _recording(**changes)


@pytest.mark.parametrize("bin_s", [0.0, -1.0, np.inf, 1e-9])
def test_bins_refuse(bin_s: float) -> None:
    for call in (lambda: _recording().binned(bin_s), lambda: bin_index([0.1], 0.0, bin_s)):
        with pytest.raises(InputError, match=r"^bin_s = "):
            call()


def test_unsorted_spikes_are_sorted_with_a_warning() -> None:
    with pytest.warns(CommissureWarning, match=r"times\[2\] is before times\[1\]"):
        recording = _recording(times=[0.1, 0.5, 0.2, 0.5], units=[0, 1, 1, 0])
    assert recording.times.tolist() == [0.1, 0.2, 0.5, 0.5]
    assert recording.units.tolist() == [0, 1, 1, 0]  # stable: of the two at 0.5, the first given stays first


def test_arguments_are_copied() -> None:
    times, behavior = np.array([0.1, 0.2]), np.zeros((1, 1))
    recording = _recording(times=times, units=[0, 0], behavior=behavior, behavior_times=[0.0])
    times[0] = behavior[0, 0] = 9.0
    assert recording.times[0] == 0.1
    assert recording.behavior[0, 0] == 0.0


# files


def test_save_and_load(tmp_path: Any) -> None:
    path = tmp_path / "recording.npz"
    recording = _recording(
        subject="m",
        trials=[[0.0, 0.3], [0.3, 0.6]],
        epochs={"reach/1": [[0.1, 0.2]]},
        auxiliary=np.ones((6, 1)),
        bin_s=0.1,
    )
    recording.save(path)
    recording.save(path)
    assert [file.name for file in tmp_path.iterdir()] == ["recording.npz"]
    again = SpikeRecording.load(path)
    for name in ("times", "units", "behavior", "behavior_times", "trials", "auxiliary"):
        np.testing.assert_array_equal(getattr(again, name), getattr(recording, name))
        assert getattr(again, name).dtype == getattr(recording, name).dtype
    assert (again.unit_ids, again.session, again.subject, again.bin_s) == (("a", "b"), "s", "m", 0.1)
    assert again.epochs["reach/1"].tolist() == [[0.1, 0.2]]
    bare = _recording()
    bare.save(path)
    again = SpikeRecording.load(path)
    assert (again.trials, again.auxiliary, again.bin_s, dict(again.epochs)) == (None, None, None, {})


def test_load_refuses_what_is_not_a_recording(tmp_path: Any) -> None:
    path = tmp_path / "bad.npz"
    with pytest.raises(InputError, match="an existing"):
        SpikeRecording.load(path)
    path.write_bytes(b"PK not a zip")
    with pytest.raises(InputError, match=r"written by SpikeRecording.save"):
        SpikeRecording.load(path)
    np.savez(path, times=np.array([print], dtype=object))  # an object array needs pickle
    with pytest.raises(InputError, match=r"written by SpikeRecording.save"):
        SpikeRecording.load(path)
    _recording().save(path)
    content = bytearray(path.read_bytes())
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=r"written by SpikeRecording.save"):
        SpikeRecording.load(path)


def test_a_recording_travels_to_worker_processes() -> None:
    again = pickle.loads(pickle.dumps(_recording()))
    assert again.times.tolist() == _recording().times.tolist()


def test_between_cuts_a_continuous_recording() -> None:
    recording = SpikeRecording(
        [0.1, 0.5, 0.9],
        [0, 1, 0],
        unit_ids=("a", "b"),
        behavior=np.arange(10.0)[:, None],
        behavior_times=np.arange(10) / 10,
        session="s",
        epochs={"reach": [[0.2, 0.7]]},
    )
    part = recording.between(0.4, 0.6)
    assert part.times.tolist() == [0.5]
    assert part.behavior[:, 0].tolist() == [4.0, 5.0]
    np.testing.assert_allclose(part.epochs["reach"], [[0.4, 0.6]])
    with pytest.raises(InputError, match="stop"):
        recording.between(0.6, 0.4)
    with pytest.raises(InputError, match="select_trials"):
        SpikeRecording.from_counts([[[1]], [[1]]], 0.1, session="s").between(0.0, 1.0)


@pytest.mark.parametrize(("spike_scale", "sample_scale"), [(1000.0, 1.0), (1.0, 1000.0), (1000.0, 1000.0)])
def test_times_that_look_like_milliseconds_are_doubted(spike_scale: float, sample_scale: float) -> None:
    rng = np.random.default_rng(0)
    spikes, samples = np.sort(rng.uniform(0, 60, 3000)), np.arange(0, 60, 0.02)

    def recording(a: float, b: float) -> SpikeRecording:
        return SpikeRecording(
            a * spikes, np.zeros(3000, np.int64), unit_ids=("u",), behavior=np.zeros((3000, 1)),
            behavior_times=b * samples, session="s",
        )  # fmt: skip

    recording(1.0, 1.0)
    with pytest.warns(CommissureWarning, match="times are in seconds: divide milliseconds by 1000"):
        recording(spike_scale, sample_scale)
