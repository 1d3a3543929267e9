"""A trial in which no unit fires is data like any other: selected, cut, saved, decoded, scored and streamed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from commissure.decode import POSSM, BinnedGRU, BinnedMLP, KalmanFilter, SpikeRecording, WienerFilter
from commissure.decode.replay import replay_stream
from commissure.train import TrainConfig

CHUNK, BINS, SILENT = 0.05, 12, 2
QUICK = TrainConfig(steps=2, batch_size=3)


def _recording() -> SpikeRecording:
    """Ten trials of three units; nobody fires in trial `SILENT`."""
    rng = np.random.default_rng(0)
    counts = rng.poisson(1.5, size=(10, BINS, 3))
    counts[SILENT] = 0
    return SpikeRecording.from_counts(list(counts), CHUNK, behavior=list(rng.normal(size=(10, BINS, 2))), session="s")


def test_it_is_selected_binned_and_saved(tmp_path: Path) -> None:
    whole = _recording()
    silent = whole.select_trials([SILENT])
    silent.save(tmp_path / "silent.npz")
    for recording in (silent, SpikeRecording.load(tmp_path / "silent.npz")):
        assert recording.times.shape == recording.units.shape == (0,)
        assert recording.units.dtype == np.int64
        np.testing.assert_array_equal(recording.trials, whole.segments[[SILENT]])
        [segment] = recording.binned(CHUNK)
        np.testing.assert_array_equal(segment.counts, np.zeros((BINS, 3)))
        np.testing.assert_array_equal(segment.behavior, whole.binned(CHUNK)[SILENT].behavior)
        assert recording.duration == pytest.approx(BINS * CHUNK)
        assert recording.select_trials([0]).times.size == 0


def test_a_continuous_recording_is_cut_where_it_is_silent() -> None:
    at = np.arange(20) * 0.1
    whole = SpikeRecording(
        [0.05, 1.85], [0, 1], unit_ids=("a", "b"), behavior=at[:, None], behavior_times=at, session="s"
    )
    part = whole.between(0.5, 1.0)
    assert part.times.size == 0
    np.testing.assert_allclose(part.segments, [[0.5, 1.0]])
    np.testing.assert_array_equal(part.binned(0.1)[0].counts, np.zeros((5, 2)))


def test_trials_alone_are_enough() -> None:
    nothing: dict[str, Any] = {"behavior": np.zeros((0, 2)), "behavior_times": []}
    recording = SpikeRecording([], [], unit_ids=("a",), session="s", trials=np.array([[0.0, 0.2]]), **nothing)
    assert recording.binned(0.1)[0].counts.tolist() == [[0.0], [0.0]]


@pytest.mark.parametrize(
    "make",
    [
        lambda: WienerFilter(CHUNK, folds=3),
        lambda: KalmanFilter(CHUNK, folds=2, lead=0, shrinkage=0.3, power=0.5),
        lambda: BinnedGRU(CHUNK, hidden_dim=8, training=QUICK),
        lambda: BinnedMLP(CHUNK, hidden_dim=8, training=QUICK),
    ],
)
def test_binned_decoders_predict_it_as_in_the_whole(make: Any) -> None:
    whole = _recording()
    decoder = make().fit(whole)
    silent = whole.select_trials([SILENT])
    inside = whole.segment_index(whole.behavior_times) == SILENT
    np.testing.assert_allclose(decoder.predict(silent), decoder.predict(whole)[inside], rtol=0, atol=1e-6)
    assert np.isfinite(decoder.score(silent))


@pytest.mark.parametrize("encoder", ["softmax", "additive"])
@pytest.mark.parametrize("engine", ["auto", "torch"])
def test_possm_predicts_and_streams_it(encoder: Any, engine: Any) -> None:
    whole = _recording()
    silent = whole.select_trials([SILENT])
    model = POSSM(dim=32, rnn_dim=8, encoder=encoder).double()
    model.add_session(whole)
    model.eval()
    inside = whole.segment_index(whole.behavior_times) == SILENT
    np.testing.assert_allclose(model.predict(silent), model.predict(whole)[inside], rtol=0, atol=1e-9)
    assert np.isfinite(model.score(silent))
    summary = replay_stream(model, silent, engine=engine)
    assert summary.chunks == summary.predictions == BINS
    assert summary.spikes == 0
    fresh = POSSM(dim=32, rnn_dim=8, encoder=encoder)
    fresh.add_session(silent)  # the additive encoder scales by the session's counts: there are none
    assert torch.isfinite(fresh.unit_table()).all()
