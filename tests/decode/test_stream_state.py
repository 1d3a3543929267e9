"""States that no stream can have are refused with the field's name, and the decoder they were given to is unchanged."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from commissure.core.errors import InputError
from commissure.decode.possm import POSSM
from commissure.decode.recording import SpikeRecording
from commissure.decode.stream_store import StreamState
from commissure.decode.streaming import StreamingDecoder
from commissure.native import backend

needs_kernels = pytest.mark.skipif(backend() == "python", reason="built without the C++ kernels")
ENGINES = (pytest.param("c++", marks=needs_kernels), "torch")


def _stream(engine: str) -> StreamingDecoder:
    """A stream in the middle of chunk 3, with queued spikes and pairs seen."""
    model = POSSM(dim=32, rnn_dim=8)
    model.add_session(SpikeRecording.from_counts(np.ones((2, 3), int), 0.05, session="s"))
    stream = StreamingDecoder(model, session="s", engine=engine, duplicates="count")  # type: ignore[arg-type]
    stream.push([0.01, 0.06, 0.07, 0.16, 0.21, 0.31], [0, 1, 2, 0, 1, 2])
    for b in range(3):
        stream.poll(0.05 * (b + 1))
    return stream


def _leaves(state: Any) -> Iterator[Any]:
    for part in state:
        yield from _leaves(part) if isinstance(part, tuple) else [part]


def _assert_refused(stream: StreamingDecoder, state: StreamState, message: str) -> None:
    before = stream.state()
    with pytest.raises(InputError, match=message):
        stream.load_state(state)
    for ours, theirs in zip(_leaves(before), _leaves(stream.state()), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def _at(index: Any, value: float) -> Any:
    def changed(array: np.ndarray) -> np.ndarray:
        array = array.copy()
        array[index] = value
        return array

    return changed


STREAM_FAULTS: list[tuple[str, Any, str]] = [
    ("t0", lambda x: np.nan, "t0 = nan"),
    ("t0", lambda x: np.zeros(2), "t0"),
    ("chunk", lambda x: -1, "chunk = -1"),
    ("chunk", lambda x: 3.5, "chunk"),
    ("chunk", lambda x: 6, r"queue_chunks\[0\]"),
    ("queue_units", _at(1, 3), r"queue_units\[1\] = 3"),
    ("queue_units", _at(0, -1), r"queue_units\[0\] = -1"),
    ("queue_units", lambda x: x.astype(float), "queue_units"),
    ("queue_units", lambda x: x[:, None], "queue_units"),
    ("queue_chunks", _at(0, 2), r"queue_chunks\[0\] = 2"),
    ("queue_chunks", _at(0, -4), r"queue_chunks\[0\] = -4"),
    ("queue_chunks", lambda x: x[:-1], "queue_chunks"),
    ("queue_chunks", lambda x: x.astype(float), "queue_chunks"),
    ("queue_times", _at(1, np.nan), r"queue_times\[1\] = nan"),
    ("queue_times", _at(1, 0.21), r"queue_times\[1\] = 0.21"),
    ("queue_times", lambda x: x[:0], "queue_times"),
    ("seen", lambda x: x[:, :2], "seen"),
    ("seen", _at((0, 0), np.nan), r"seen\[0, 0\]"),
    ("seen", _at((0, 1), 3.0), r"seen\[0\]"),
    ("seen", _at((0, 2), 1.0), r"seen\[0\]"),
    ("counters", _at(2, -1), r"counters\[2\] = -1"),
    ("counters", lambda x: x[:-1], "counters"),
    ("counters", lambda x: x.astype(float), "counters"),
    ("latencies", _at(5, -1), r"latencies\[5\] = -1"),
    ("latencies", lambda x: x[:-1], "latencies"),
    ("latencies", lambda x: x * 0, "largest_us"),
    ("largest_us", lambda x: np.nan, "largest_us = nan"),
    ("largest_us", lambda x: -1.0, "largest_us = -1"),
]


@pytest.mark.parametrize(("field", "change", "message"), STREAM_FAULTS)
def test_impossible_streams_are_refused(field: str, change: Any, message: str) -> None:
    stream = _stream("torch")
    state = stream.state()
    bad = state._replace(**{field: change(getattr(state, field))})
    _assert_refused(stream, bad, rf"state\.{message}")


KERNEL_FAULTS: list[tuple[str, Any]] = [
    ("n_spikes", lambda x: -1),
    ("n_spikes", lambda x: 1.5),
    ("n_contexts", lambda x: -1),
    ("n_contexts", lambda x: np.nan),
    ("is_idle", lambda x: 0.5),
    ("top", lambda x: np.nan),
    ("top", lambda x: -np.inf),
    ("mass", lambda x: -1.0),
    ("mass", lambda x: 0.0),
    ("mass", lambda x: np.inf),
    ("total", _at(0, np.nan)),
    ("keys", _at((0, 1), np.inf)),
    ("values", lambda x: x.astype(int)),
    ("hidden", _at(3, np.nan)),
    ("hidden", lambda x: 0.0),
]


@needs_kernels
@pytest.mark.parametrize(("field", "change"), KERNEL_FAULTS)
def test_impossible_kernel_states_are_refused(field: str, change: Any) -> None:
    stream = _stream("c++")
    state = stream.state()
    bad = state._replace(engine=state.engine._replace(**{field: change(getattr(state.engine, field))}))
    _assert_refused(stream, bad, rf"state\.{field}")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e: e._replace(units=e.units + 3), r"units\[0\] = 3"),
        (lambda e: e._replace(offsets=e.offsets * np.nan), r"offsets\[0\] = nan"),
        (lambda e: e._replace(offsets=e.offsets.astype(int)), r"state\.offsets"),
        (lambda e: e._replace(tensors=(e.tensors[0] * np.nan, *e.tensors[1:])), r"state\.tensors\[0\]"),
        (lambda e: e._replace(tensors=(e.tensors[0].astype(int), *e.tensors[1:])), r"state\.tensors\[0\]"),
        (lambda e: e._replace(tensors=(*e.tensors[:-1], e.tensors[-1] - 9)), r"state\.tensors\[\d\] \(n_chunks\)"),
    ],
)
def test_impossible_torch_states_are_refused(change: Any, message: str) -> None:
    stream = _stream("torch")
    state = stream.state()
    _assert_refused(stream, state._replace(engine=change(state.engine)), message)


@pytest.mark.parametrize("engine", ENGINES)
def test_files_with_fields_missing_or_unknown_are_refused(tmp_path: Path, engine: str) -> None:
    stream = _stream(engine)
    good, bad = tmp_path / "good", tmp_path / "bad"
    stream.save(good)
    with safe_open(str(good), "np") as file:
        metadata = file.metadata()
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

    def refused(changed: dict[str, np.ndarray], message: str, **extra: str) -> None:
        save_file(changed, bad, metadata=metadata | extra)
        with pytest.raises(InputError, match=message):
            stream.load(bad)

    for name in arrays:
        refused({n: a for n, a in arrays.items() if n != name}, r"state\.")
    for name in ("t0", "queue_units", "counters"):
        refused({n: a for n, a in arrays.items() if n != name}, rf"state\.{name} = 'missing'")
    refused(arrays | {"engine.extra": np.zeros(1)}, r"state\.engine\.")
    refused(arrays | {"extra": np.zeros(1)}, r"state\.extra = 'unknown'")
    refused(arrays | {"counters": arrays["counters"] - 100}, r"state\.counters\[0\]")
    refused(arrays, r"state\.engine = 'NoState'", engine="NoState")
    stream.load(good)


def test_saving_into_a_missing_folder_is_refused(tmp_path: Path) -> None:
    stream = _stream("torch")
    for path in (tmp_path / "missing" / "state", tmp_path):
        with pytest.raises(InputError, match="path"):
            stream.save(path)
    assert not list(tmp_path.iterdir())
