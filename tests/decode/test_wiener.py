"""The Wiener filter: closed-form ridge, exact cross-validation, trial restarts, bad input."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest

from commissure.core.errors import DegenerateError, InputError, NotFittedError
from commissure.core.lsq import ridge_reference
from commissure.decode.metrics import r2_score
from commissure.decode.recording import SpikeRecording
from commissure.decode.segments import fold_of_rows
from commissure.decode.wiener import WienerFilter, _held_out_residuals, lagged_counts

LENGTHS = (5, 9, 3, 7, 8, 4, 6, 2)


def _recording(seed: int = 0, *, n_units: int = 6, lengths: tuple[int, ...] = LENGTHS) -> SpikeRecording:
    rng = np.random.default_rng(seed)
    weights = np.random.default_rng(99).normal(size=(2, n_units, 2))
    counts = [rng.poisson(1.5, size=(n, n_units)) for n in lengths]
    counts[0][0, 0] += 1  # never an empty recording
    behavior = []
    for c in counts:
        past = np.vstack([np.zeros((1, n_units)), c[:-1]])
        behavior.append(c @ weights[0] + past @ weights[1] + 0.3 * rng.normal(size=(len(c), 2)))
    return SpikeRecording.from_counts(counts, 0.1, behavior=behavior, session="s")


@pytest.mark.parametrize("transform", ["raw", "power", "sqrt", "zscored"])
def test_equals_closed_form_ridge(transform: Literal["raw", "power", "sqrt", "zscored"]) -> None:
    recording, penalty, lags = _recording(), 2.5, 3
    counts = [segment.counts for segment in recording.binned(0.1)]
    if transform == "zscored":
        every = np.sqrt(np.concatenate(counts))
        values = [(np.sqrt(c) - every.mean(0)) / every.std(0) for c in counts]
    else:
        values = [c ** {"raw": 1.0, "power": 0.75, "sqrt": 0.5}[transform] for c in counts]
    x, y = np.concatenate([lagged_counts(v, lags) for v in values]), recording.behavior
    design = np.hstack([np.ones((len(x), 1)), x])
    prior = penalty * np.diag([0.0] + [1.0] * x.shape[1])
    expected = design @ np.linalg.solve(design.T @ design + prior, design.T @ y)
    model = WienerFilter(lags=lags, penalty=penalty, transform=transform).fit(recording)
    np.testing.assert_allclose(model.predict(recording), expected, atol=1e-10)
    np.testing.assert_allclose(model.coefficients, ridge_reference(x, y, penalty=penalty).coefficients, atol=1e-10)


def test_lagged_counts_by_hand_loop() -> None:
    counts = np.random.default_rng(0).poisson(2.0, size=(6, 3)).astype(float)
    features = lagged_counts(counts, 4)
    assert features.shape == (6, 4 * 3 + 3)
    for t in range(6):
        for lag in range(4):
            expected = counts[t - lag] if t >= lag else np.zeros(3)
            np.testing.assert_array_equal(features[t, lag * 3 : lag * 3 + 3], expected)
            if lag:
                assert features[t, 12 + lag - 1] == (10.0 if t < lag else 0.0)


def test_lags_longer_than_the_segment() -> None:
    features = lagged_counts(np.ones((2, 1)), 5)
    np.testing.assert_array_equal(features[:, :5], [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0]])
    np.testing.assert_array_equal(features[:, 5:], [[10] * 4, [0, 10, 10, 10]])


@pytest.mark.parametrize("n_features", [4, 60])
def test_held_out_residuals_equal_refitting_without_the_fold(n_features: int) -> None:
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(40, n_features)), rng.normal(size=(40, 2))
    folds = fold_of_rows([4] * 10, 5, seed=0)
    penalties = [0.1, 3.0]
    fast = _held_out_residuals(x - x.mean(0), y - y.mean(0), folds, penalties)
    for penalty, residual in zip(penalties, fast, strict=True):
        for fold in range(5):
            held = folds == fold
            refit = ridge_reference(x[~held], y[~held], penalty=penalty)
            np.testing.assert_allclose(residual[held], y[held] - refit.predict(x[held]), atol=1e-10)


def test_reported_score_is_that_of_refits_without_whole_trials() -> None:
    recording = _recording(lengths=(3, 5, 4, 6, 2, 7, 5, 4, 3, 6))
    selection = WienerFilter(lags=2, transform="sqrt", folds=5).fit(recording, seed=3).selection
    segments = recording.binned(0.1)
    trial = np.repeat(np.arange(10), [len(segment.counts) for segment in segments])
    folds = fold_of_rows([len(segment.counts) for segment in segments], 5, seed=3)
    assert all(len(set(folds[trial == t])) == 1 for t in range(10))
    x = np.concatenate([lagged_counts(np.sqrt(segment.counts), 2) for segment in segments])
    y, predictions = recording.behavior, np.empty_like(recording.behavior)
    for fold in range(5):
        held = folds == fold
        predictions[held] = ridge_reference(x[~held], y[~held], penalty=selection.penalty).predict(x[held])
    assert selection.score == pytest.approx(r2_score(y, predictions), abs=1e-10)


def test_selection_finds_the_lag_and_reports_it() -> None:
    recording = _recording(lengths=(8,) * 30)
    model = WienerFilter().fit(recording)
    assert model.selection.lags == 2
    assert model.selection.transform == "raw"
    assert model.selection.score is not None
    assert model.selection.score > 0.9
    assert model.score(_recording(5, lengths=(8,) * 10)) > 0.9
    again = WienerFilter().fit(recording)
    np.testing.assert_array_equal(model.coefficients, again.coefficients)


def test_given_values_are_kept_and_none_means_no_score() -> None:
    recording = _recording()
    assert WienerFilter(lags=2, penalty=1.0, transform="zscored").fit(recording).selection.score is None
    partly = WienerFilter(lags=3, transform="sqrt", folds=4).fit(recording).selection
    assert (partly.lags, partly.transform) == (3, "sqrt")
    assert partly.score is not None


def test_nothing_crosses_trials() -> None:
    train, test = _recording(), _recording(3)
    model = WienerFilter(lags=4, penalty=1.0, transform="raw").fit(train)
    whole = model.predict(test)
    row = 0
    for trial, length in enumerate(LENGTHS):
        if np.isin(test.segment_index(test.times), trial).any():
            alone = model.predict(test.select_trials([trial]))
            np.testing.assert_allclose(alone, whole[row : row + length], atol=1e-12)
        row += length


def test_causal_in_bins() -> None:
    counts = np.random.default_rng(4).poisson(2.0, size=(12, 6))
    changed = counts.copy()
    changed[7:] += 3
    model = WienerFilter(lags=3, penalty=1.0, transform="raw").fit(_recording())
    a, b = (
        model.predict(SpikeRecording.from_counts(c, 0.1, behavior=np.zeros((12, 2)), session="s"))
        for c in (counts, changed)
    )
    np.testing.assert_array_equal(a[:7], b[:7])
    assert np.abs(a[7:] - b[7:]).min() > 0


def test_value_at_a_time_is_its_bin() -> None:
    recording = _recording()
    model = WienerFilter(lags=2, penalty=1.0, transform="raw").fit(recording)
    start = recording.segments[1, 0]
    values = model.predict(recording, at=[start + 0.1, start + 0.149, start + 0.199, start + 0.2])
    centers = model.predict(recording)[LENGTHS[0] :]
    np.testing.assert_array_equal(values[:3], np.repeat(centers[1:2], 3, axis=0))
    np.testing.assert_array_equal(values[3], centers[2])


def test_several_recordings_equal_their_trials_together() -> None:
    recording = _recording()
    parts = [recording.select_trials(range(4)), recording.select_trials(range(4, 8))]
    one = WienerFilter(lags=2, penalty=1.0, transform="sqrt").fit(recording)
    two = WienerFilter(lags=2, penalty=1.0, transform="sqrt").fit(parts)
    np.testing.assert_allclose(one.coefficients, two.coefficients, atol=1e-12)


def test_bins_without_behavior_are_not_targets() -> None:
    full = _recording(lengths=(40,))
    keep = np.arange(40) % 3 != 0
    partial = SpikeRecording(
        full.times,
        full.units,
        unit_ids=full.unit_ids,
        behavior=full.behavior[keep],
        behavior_times=full.behavior_times[keep],
        session="s",
        trials=full.segments,
    )
    x = lagged_counts(full.binned(0.1)[0].counts, 2)[keep]
    model = WienerFilter(lags=2, penalty=1.0, transform="raw").fit(partial)
    expected = ridge_reference(x, full.behavior[keep], penalty=1.0)
    np.testing.assert_allclose(model.coefficients, expected.coefficients, atol=1e-10)


def test_bad_input() -> None:
    recording = _recording()
    with pytest.raises(NotFittedError, match="call fit"):
        WienerFilter().predict(recording)
    with pytest.raises(NotFittedError):
        _ = WienerFilter().selection
    for argument, value in (("lags", 0), ("penalty", -1.0), ("transform", "log"), ("folds", 1)):
        with pytest.raises(InputError, match=argument):
            WienerFilter(**{argument: value})  # type: ignore[arg-type]
    with pytest.raises(InputError, match="recordings"):
        WienerFilter().fit([])
    with pytest.raises(InputError, match="SpikeRecording"):
        WienerFilter().fit([np.zeros(3)])  # type: ignore[list-item]
    no_behavior = SpikeRecording.from_counts([[1, 2], [0, 1]], 0.1, session="s")
    with pytest.raises(InputError, match="behavior to train on"):
        WienerFilter().fit(no_behavior)
    with pytest.raises(DegenerateError, match="penalty > 0"):
        WienerFilter(lags=8, penalty=0.0, transform="raw").fit(_recording(lengths=(3, 4)))


def test_other_units_are_named() -> None:
    model = WienerFilter(lags=1, penalty=1.0, transform="raw").fit(_recording())
    counts = np.ones((4, 6), dtype=int)

    def other(*ids: str) -> SpikeRecording:
        return SpikeRecording.from_counts(counts, 0.1, behavior=np.zeros((4, 2)), unit_ids=ids, session="t")

    known = _recording().unit_ids
    with pytest.raises(InputError, match=r"1 unknown \(x\); 1 missing \(s/5\)"):
        model.predict(other(*known[:5], "x"))
    with pytest.raises(InputError, match="another order"):
        model.predict(other(*reversed(known)))
    with pytest.raises(InputError, match=r"recordings\[1\]\.unit_ids"):
        WienerFilter().fit([_recording(), other(*known[:5], "x")])


def test_times_outside_are_refused() -> None:
    recording = _recording()
    model = WienerFilter(lags=1, penalty=1.0, transform="raw").fit(recording)
    with pytest.raises(InputError, match=r"at\[1\]"):
        model.predict(recording, at=[0.05, -1.0])
    with pytest.raises(InputError, match=r"at\[0\]"):
        model.predict(recording, at=[np.nan])
    with pytest.raises(InputError, match="1-dimensional"):
        model.predict(recording, at=[[0.1]])
