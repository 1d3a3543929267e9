"""The real recordings, where COMMISSURE_DATA holds them."""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
import pytest

from commissure import datasets
from commissure.core.errors import InputError
from commissure.decode.recordings import mc_maze_trial, mihi_chewie

pytestmark = pytest.mark.skipif(
    not os.environ.get("COMMISSURE_DATA"), reason="real data: set COMMISSURE_DATA to a folder that holds them"
)


@pytest.fixture(scope="module", autouse=True)
def _home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COMMISSURE_HOME", str(tmp_path_factory.mktemp("home")))
        yield


@pytest.mark.parametrize(
    ("session", "bin_s", "n_trials", "n_bins", "n_units", "shortest", "longest"),
    [
        ("chewie-2013-10-03", 0.05, 159, 1731, 174, 7, 16),
        ("chewie-2013-10-03", 0.1, 159, 895, 174, 4, 8),
        ("chewie-2013-12-19", 0.1, 180, 835, 155, 3, 9),
        ("mihi-2014-03-03", 0.1, 209, 1082, 187, 4, 8),
    ],
)
def test_mihi_chewie(
    session: str, bin_s: float, n_trials: int, n_bins: int, n_units: int, shortest: int, longest: int
) -> None:
    source = datasets.mihi_chewie(session, bin_s)
    recording = mihi_chewie(session, bin_s)
    segments = recording.binned(bin_s)
    lengths = [len(segment.counts) for segment in segments]
    assert (len(segments), sum(lengths), recording.n_units) == (n_trials, n_bins, n_units)
    assert (min(lengths), max(lengths)) == (shortest, longest)
    for segment, counts, velocity in zip(segments, source.counts, source.velocity, strict=True):
        np.testing.assert_array_equal(segment.counts, counts)
        np.testing.assert_array_equal(segment.behavior, velocity)
    assert (recording.session, recording.subject) == (session, session.partition("-")[0])
    speed = np.hypot(*recording.behavior.T)
    assert speed.min() > 5.0  # what the source kept, cm/s
    assert 25 < speed.max() < 50
    is_mihi = session.startswith("mihi")
    assert (recording.auxiliary is None) == is_mihi
    assert len(set(recording.unit_ids)) == n_units


def test_position_is_in_cm_where_velocity_is_in_cm_per_second() -> None:
    recording = mihi_chewie("chewie-2013-10-03", 0.05)
    source = datasets.mihi_chewie("chewie-2013-10-03", 0.05)
    slopes, speeds = [], []
    for segment, step in zip(recording.binned(0.05), source.timestep, strict=True):
        assert segment.auxiliary is not None
        whole = np.flatnonzero((np.diff(step)[1:] == 1) & (np.diff(step)[:-1] == 1)) + 1
        slopes.append((segment.auxiliary[whole + 1] - segment.auxiliary[whole - 1]) / 0.1)
        speeds.append(segment.behavior[whole])
    derivative, velocity = np.concatenate(slopes), np.concatenate(speeds)
    assert 0.95 < (derivative * velocity).sum() / (velocity**2).sum() < 1.0  # a central difference loses some
    assert np.corrcoef(derivative.ravel(), velocity.ravel())[0, 1] > 0.998


def test_targets_say_where_the_hand_went() -> None:
    source = datasets.mihi_chewie("mihi-2014-03-03")
    mean = np.array([velocity.mean(0) for velocity in source.velocity])
    toward = np.pi / 2 - source.target * np.pi / 4
    error = np.angle(np.exp(1j * (np.arctan2(mean[:, 1], mean[:, 0]) - toward)))
    assert np.abs(error).max() < np.pi / 4


@pytest.mark.parametrize(
    ("session", "bin_s", "n"),
    [
        ("chewie-2013-10-03", 0.05, 13),
        ("chewie-2013-10-03", 0.1, 12),
        ("chewie-2013-12-19", 0.1, 7),
        ("mihi-2014-03-03", 0.1, 5),
    ],
)
def test_trials_with_bins_removed_in_the_middle(session: str, bin_s: float, n: int) -> None:
    assert sum((np.diff(step) > 1).any() for step in datasets.mihi_chewie(session, bin_s).timestep) == n


def test_an_unknown_session_names_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"'chewie-2014', 0.1.*chewie-2013-10-03.*mihi-2014-03-03"):
        mihi_chewie("chewie-2014")
    with pytest.raises(InputError, match=r"0\.05"):
        mihi_chewie("mihi-2014-03-03", bin_s=0.05)


def test_mc_maze_trial() -> None:
    recording = mc_maze_trial()
    assert (recording.n_units, len(recording.times), len(recording.behavior)) == (182, 1654, 3236)
    np.testing.assert_allclose(recording.segments, [[2282.6, 2285.836]], rtol=0, atol=1e-9)
    milliseconds = (recording.times - 2282.6) * 1000
    assert np.abs(milliseconds - np.round(milliseconds)).max() < 1e-6
    [fine], [chunks] = recording.binned(0.001), recording.binned(0.05)
    np.testing.assert_array_equal(fine.counts, datasets.mc_maze_trial().spikes)
    assert chunks.counts.sum() == 1654
    np.testing.assert_array_equal(chunks.counts[:64], fine.counts[:3200].reshape(64, 50, 182).sum(1))
    assert recording.auxiliary is not None
    derivative = np.gradient(recording.auxiliary, 0.001, axis=0)
    np.testing.assert_allclose(derivative[1:-1], recording.behavior[1:-1], atol=1e-6)
