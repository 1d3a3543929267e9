"""Replaying a recording: every chunk of every segment, the last partial one included, and every spike."""

from __future__ import annotations

import numpy as np
import pytest

from commissure.core.errors import InputError
from commissure.decode.possm import POSSM
from commissure.decode.recording import SpikeRecording
from commissure.decode.replay import replay_stream
from commissure.native import backend


def _recording(*lengths: float, bin_s: float | None = None) -> SpikeRecording:
    """Trials of these lengths, a second apart, with a spike every 7 ms and one just before each stop."""
    starts = np.cumsum([0.0, *(length + 1 for length in lengths[:-1])])
    times = [np.append(s + np.arange(0, n - 1e-3, 0.007), s + n - 1e-4) for s, n in zip(starts, lengths, strict=True)]
    spikes = np.concatenate(times)
    return SpikeRecording(
        spikes,
        np.arange(len(spikes)) % 3,
        unit_ids=("a", "b", "c"),
        behavior=np.zeros((len(starts), 2)),
        behavior_times=starts,
        session="s",
        trials=np.stack([starts, starts + lengths], axis=1),
        bin_s=bin_s,
    )


needs_kernels = pytest.mark.skipif(backend() == "python", reason="built without the C++ kernels")


@pytest.mark.parametrize("engine", [pytest.param("c++", marks=needs_kernels), "torch"])
def test_every_chunk_and_spike_of_every_trial(engine: str) -> None:
    recording, model = _recording(0.5, 0.51, 0.53, 0.02), POSSM(dim=32, rnn_dim=8)
    model.add_session(recording)
    summary = replay_stream(model, recording, engine=engine)  # type: ignore[arg-type]
    assert (
        summary.chunks == summary.predictions == sum(len(s.counts) for s in recording.binned(0.05)) == 10 + 11 + 11 + 1
    )
    assert summary.spikes == len(recording.times)
    assert (summary.skipped, summary.late, summary.dropped) == (0, 0, 0)


def test_bad_input() -> None:
    recording, model = _recording(0.5), POSSM(dim=32, rnn_dim=8)
    model.add_session(recording)
    for speed in (-1.0, np.nan, np.inf):
        with pytest.raises(InputError, match="speed"):
            replay_stream(model, recording, speed=speed)
    with pytest.raises(InputError, match=r"chunk_s=0.1"):
        replay_stream(model, _recording(0.5, bin_s=0.1))
