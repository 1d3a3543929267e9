"""Scores within intervals: what lies outside does not count, for every decoder."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from commissure.core.errors import InputError
from commissure.decode import (
    POSSM,
    BinnedGRU,
    BinnedMLP,
    FitConfig,
    KalmanFilter,
    SpikeRecording,
    WienerFilter,
    r2_score,
)
from commissure.train import TrainConfig

BIN = 0.1
QUICK = TrainConfig(steps=2, batch_size=3)
INTERVAL = np.array([[0.2, 0.6], [3.0, 3.4], [0.5, 0.8]])  # in no order, two of them overlap


def _recording() -> SpikeRecording:
    rng = np.random.default_rng(0)
    behavior = np.cumsum(rng.normal(size=(6, 10, 2)), axis=1)
    counts = rng.poisson(np.exp(0.3 * behavior @ rng.normal(size=(2, 4))))
    return SpikeRecording.from_counts(list(counts), BIN, behavior=list(behavior), session="s")


DECODERS = [
    lambda: WienerFilter(BIN, folds=3),
    lambda: KalmanFilter(BIN, folds=2, lead=0, shrinkage=0.3, power=0.5),
    lambda: BinnedGRU(BIN, hidden_dim=8, training=QUICK),
    lambda: BinnedMLP(BIN, hidden_dim=8, training=QUICK),
    lambda: POSSM(dim=32, rnn_dim=8, chunk_s=BIN),
]


@pytest.mark.parametrize("make", DECODERS)
def test_only_samples_inside_count(make: Any) -> None:
    recording, made = _recording(), make()
    options = {"config": FitConfig(steps=2, batch_size=2)} if isinstance(made, POSSM) else {}
    decoder = made.fit(recording, **options)
    at = recording.behavior_times
    inside = ((at > 0.2) & (at < 0.8)) | ((at > 3.0) & (at < 3.4))
    assert 0 < inside.sum() < len(at)
    changed = replace(recording, behavior=np.where(inside[:, None], recording.behavior, 1e3 * recording.behavior + 7))
    score = decoder.score(recording, interval=INTERVAL)
    assert decoder.score(changed, interval=INTERVAL) == score
    assert decoder.score(changed) != decoder.score(recording)
    assert score == r2_score(recording.behavior[inside], decoder.predict(recording)[inside])
    assert decoder.score(recording, interval=recording.segments) == decoder.score(recording)
    for wrong in ([[100.0, 101.0]], np.zeros((0, 2)), [0.2, 0.6], [[0.6, 0.2]], [[np.nan, 1.0]]):
        with pytest.raises(InputError, match=r"^interval"):
            decoder.score(recording, interval=wrong)


def test_intervals_are_half_open_on_rounded_edges() -> None:
    at = np.arange(8) * 0.1  # 3 * 0.1 is above 0.3
    recording = SpikeRecording([0.0], [0], unit_ids=("a",), behavior=at[:, None] ** 2, behavior_times=at, session="s")
    decoder = WienerFilter(0.1, lags=1, penalty=1.0, transform="raw").fit(recording)
    rows = slice(1, 3)
    expected = r2_score(recording.behavior[rows], decoder.predict(recording)[rows])
    assert decoder.score(recording, interval=[[0.1, 0.3]]) == expected
