"""The torch engine with a backbone whose state grows: attention's cache of everything seen."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from commissure.core.errors import InputError
from commissure.decode.possm import POSSM
from commissure.decode.recording import SpikeRecording
from commissure.decode.streaming import StreamingDecoder


def _stream() -> StreamingDecoder:
    model = POSSM(dim=32, rnn_dim=8, rnn_layers=2, backbone="attention")
    model.add_session(SpikeRecording.from_counts(np.ones((2, 3), int), 0.05, session="s"))
    return StreamingDecoder(model, session="s")


def test_a_growing_state_is_saved_and_goes_on_bit_identically(tmp_path: Path) -> None:
    stream, loaded = _stream(), _stream()
    for b in range(5):
        stream.step([(b + 0.3) * 0.05], [b % 3])
    stream.push([0.26], [1])
    stream.save(tmp_path / "state")
    loaded.load(tmp_path / "state")
    for each in (stream, loaded):
        each.push([0.28], [2])
    first, second = stream.poll(0.3), loaded.poll(0.3)
    assert first is not None
    assert second is not None
    assert first.n_spikes == second.n_spikes == 2
    np.testing.assert_array_equal(first.values, second.values)


def test_states_of_other_shapes_are_refused() -> None:
    stream = _stream()
    stream.step([], [])
    state = stream.state()
    tensors = state.engine.tensors  # type: ignore[union-attr]
    for wrong in (tensors[:-1], (tensors[0][..., :1], *tensors[1:]), (tensors[0][0], *tensors[1:])):
        with pytest.raises(InputError, match=r"state\.tensors"):
            _stream().load_state(state._replace(engine=state.engine._replace(tensors=wrong)))  # type: ignore[union-attr]
