"""The streaming decoder: online equals offline on any engine, and every spike and chunk is accounted for."""

from __future__ import annotations

import copy
import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from commissure.core.errors import InputError
from commissure.decode import streaming
from commissure.decode.possm import POSSM
from commissure.decode.presets import FitConfig
from commissure.decode.recording import SpikeRecording
from commissure.decode.stream_stats import LatencyHistogram
from commissure.decode.streaming import Prediction, StreamingDecoder
from commissure.native import backend
from commissure.nn import GRU

CHUNK, UNITS, CHUNKS = 0.05, 12, 24
OFFSETS = (0.001, 0.011, 0.021, 0.031, 0.041)
needs_kernels = pytest.mark.skipif(backend() == "python", reason="built without the C++ kernels")
ENGINES = (pytest.param("c++", marks=needs_kernels), "torch")
TICK = 2.0**-15  # sampling interval: its multiples are exact in float64 at any origin used here


def recording(*, t0: float = 0.0, seed: int = 0, n: int = 600, session: str = "monday") -> SpikeRecording:
    rng = np.random.default_rng(seed)
    times = np.sort(rng.integers(0, int(CHUNKS * CHUNK / TICK), n)) * TICK
    times = times[(times < 0.4) | (times >= 0.55)]  # three empty chunks
    at = (np.arange(CHUNKS)[:, None] * CHUNK + np.array(OFFSETS)).ravel()
    return SpikeRecording(
        t0 + times,
        rng.integers(0, UNITS, times.size),
        unit_ids=tuple(f"unit-{i}" for i in range(UNITS)),
        behavior=rng.normal(size=(at.size, 2)),
        behavior_times=t0 + at,
        session=session,
        trials=np.array([[t0, t0 + CHUNKS * CHUNK]]),
    )


def model(preset: str = "possm-ss", *, backbone: Any = "gru", double: bool = True, t_min: float | None = None) -> POSSM:
    made = POSSM.from_preset(preset, backbone=backbone, chunk_s=CHUNK)
    if t_min is not None:
        made = POSSM(**{**made.config.model_dump(), "t_min": t_min})
    made = made.double() if double else made
    for session in ("sunday", "monday", "tuesday"):
        made.add_session(recording(seed=7, session=session))
    with torch.no_grad():  # published embeddings are small; at this size every part of the network matters
        made.unit_embedding.normal_(generator=torch.Generator().manual_seed(0))
        made.session_embedding.normal_(generator=torch.Generator().manual_seed(1))
    made.target_mean = torch.linspace(-2, 1, made.target_mean.numel()).to(made.target_mean)
    made.target_std = torch.linspace(3, 20, made.target_std.numel()).to(made.target_std)
    return made.eval()


@pytest.fixture(scope="module")
def gru() -> POSSM:
    return model()


def decoder(made: POSSM, **options: Any) -> StreamingDecoder:
    return StreamingDecoder(made, session="monday", **{"output_offsets": OFFSETS, **options})


def replay(stream: StreamingDecoder, rec: SpikeRecording, *, t0: float = 0.0, pieces: int = 1) -> list[Prediction]:
    """Push chunk by chunk (each in `pieces` calls) and poll at each chunk's end."""
    stream.reset(t0)
    predictions = []
    for b in range(CHUNKS):
        inside = (rec.times >= t0 + b * CHUNK) & (rec.times < t0 + (b + 1) * CHUNK)
        for part in np.array_split(np.flatnonzero(inside), pieces):
            stream.push(rec.times[part], rec.units[part])
        made = stream.poll(t0 + (b + 1) * CHUNK)
        assert made is not None
        predictions.append(made)
        assert stream.poll(t0 + (b + 1) * CHUNK) is None
    return predictions


def leaves(state: Any) -> list[np.ndarray]:
    """The arrays of an engine's state, of either kind."""
    return [a for part in state for a in (leaves(part) if isinstance(part, tuple) else [np.asarray(part)])]


def values(predictions: list[Prediction]) -> np.ndarray:
    return np.concatenate([p.values for p in predictions])


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("backbone", ["gru", "s4d", "mamba"])
@pytest.mark.parametrize("preset", ["possm-ss", "possm-direct"])
def test_online_equals_offline(preset: str, backbone: str, engine: str) -> None:
    rec = recording()
    for double, limit in ((True, 1e-10), (False, 1e-5)):
        made = model(preset, backbone=backbone, double=double)
        offline = made.predict(rec)
        for pieces in (1, 3):
            online = replay(decoder(made, engine=engine), rec, pieces=pieces)
            assert np.abs(values(online) - offline).max() <= limit * np.abs(offline).max()
    np.testing.assert_allclose(np.concatenate([p.times for p in online]), rec.behavior_times, rtol=0, atol=1e-12)


def test_a_backbone_without_kernel_streams_on_torch() -> None:
    made = model(backbone=lambda dim: GRU(dim), double=True)
    rec = recording()
    stream = decoder(made)
    assert stream.backend == "torch"
    np.testing.assert_allclose(values(replay(stream, rec)), made.predict(rec), rtol=0, atol=1e-9)
    with pytest.raises(InputError, match="backbone"):
        decoder(made, engine="c++")


def test_without_the_extension_torch_streams(gru: POSSM, monkeypatch: pytest.MonkeyPatch) -> None:
    assert decoder(gru, engine="torch").backend == "torch"
    monkeypatch.setattr(streaming, "kernels", lambda: None)
    assert decoder(gru).backend == "torch"


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("t0", [1e3, 1e6, -1e4])
def test_a_shift_of_all_times_changes_nothing(gru: POSSM, engine: str, t0: float) -> None:
    stream = decoder(gru, engine=engine)
    expected = values(replay(stream, recording()))
    np.testing.assert_allclose(values(replay(stream, recording(t0=t0), t0=t0)), expected, rtol=0, atol=1e-6)


def test_spikes_on_edges_are_taken_once(gru: POSSM) -> None:
    edges = np.array([0.05, 0.15, 0.15000000000000002, 0.35, 7 * 0.05, 0.6, 0.6000000000000001])  # 0.15 / 0.05 < 3
    stream = decoder(gru)
    stream.push(edges, np.zeros(7, int))
    counts = [p.n_spikes for p in (stream.poll((b + 1) * CHUNK) for b in range(14)) if p is not None]
    assert counts == [0, 1, 0, 2, 0, 0, 0, 2, 0, 0, 0, 0, 2, 0]
    assert stream.stats().late == 0


def test_future_spikes_wait_in_any_order(gru: POSSM) -> None:
    rec = recording()
    expected = values(replay(decoder(gru), rec))
    stream = decoder(gru)
    order = np.random.default_rng(2).permutation(rec.times.size)
    stream.push(rec.times[order], rec.units[order])
    assert stream.stats().queued + stream.stats().used == rec.times.size
    found = values([p for b in range(CHUNKS) if (p := stream.poll((b + 1) * CHUNK)) is not None])
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-9)
    assert stream.stats().queued == 0


def test_a_stall_skips_stale_readouts_and_nothing_else(gru: POSSM) -> None:
    rec = recording()
    expected = replay(decoder(gru), rec)
    stream = decoder(gru)
    found = []
    for b in range(CHUNKS):
        inside = (rec.times >= b * CHUNK) & (rec.times < (b + 1) * CHUNK)
        stream.push(rec.times[inside], rec.units[inside])
        if not 8 <= b < 12:  # 200 ms without a poll
            while (made := stream.poll((b + 1) * CHUNK)) is not None:
                found.append(made)
    assert [p.chunk for p in found] == list(range(CHUNKS))
    # Polled at the end of chunk 12: chunks 8 to 10 are more than one chunk late, 11 exactly one.
    assert [p.chunk for p in found if p.skipped] == [8, 9, 10]
    for p, q in zip(found, expected, strict=True):
        assert p.n_spikes == q.n_spikes
        if p.skipped:
            assert p.values.shape == (0, 2)
            assert p.times.size == 0
        else:
            np.testing.assert_allclose(p.values, q.values, rtol=0, atol=1e-9)
    stats = stream.stats()
    assert (stats.chunks, stats.predictions, stats.skipped, stats.late) == (CHUNKS, CHUNKS - 3, 3, 0)
    assert stats.used == rec.times.size


@pytest.mark.parametrize("engine", ENGINES)
def test_a_full_queue_closes_chunks_early_and_loses_nothing(gru: POSSM, engine: str) -> None:
    rec = recording()
    whole, small = decoder(gru, engine=engine), decoder(gru, engine=engine, capacity=50)
    for stream in (whole, small):
        stream.push(rec.times, rec.units)
    assert small.stats().skipped > 0
    assert small.stats().queued <= 50
    assert small.stats().used + small.stats().queued == rec.times.size
    last = [[p for b in range(CHUNKS) if (p := s.poll((b + 1) * CHUNK)) is not None][-1] for s in (whole, small)]
    assert last[0].chunk == last[1].chunk == CHUNKS - 1
    np.testing.assert_allclose(last[1].values, last[0].values, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("policy", "tolerance", "folded"), [("drop", 0.0, 0), ("fold", 0.0, 3), ("drop", 0.02, 1)])
def test_late_spikes_follow_the_policy(gru: POSSM, policy: str, tolerance: float, folded: int) -> None:
    stream = decoder(gru, late=policy, late_tol=tolerance)
    other = decoder(gru)
    for each in (stream, other):
        each.advance(4)  # the open chunk is [0.2, 0.25)
        each.push([0.21], [0])
    stream.push([0.0, 0.17, 0.185], [1, 2, 3])
    other.push(np.full(folded, 0.2), [1, 2, 3][3 - folded :])
    stats = stream.stats()
    assert (stats.late, stats.late_dropped, stats.used) == (3, 3 - folded, 1 + folded)
    found, expected = stream.poll(0.25), other.poll(0.25)
    assert found is not None
    assert expected is not None
    assert found.late == 3
    np.testing.assert_allclose(found.values, expected.values, rtol=0, atol=1e-10)
    after = stream.poll(0.3)
    assert after is not None
    assert after.late == 0


@pytest.mark.parametrize(("policy", "found", "dropped"), [("keep", 0, 0), ("count", 3, 0), ("drop", 3, 3)])
def test_duplicates_follow_the_policy(policy: str, found: int, dropped: int) -> None:
    made = model("possm-direct")
    stream, other = decoder(made, duplicates=policy), decoder(made)
    stream.push([0.01, 0.01, 0.01, 0.07], [1, 1, 2, 1])
    stream.push([0.02, 0.01, 0.07], [1, 2, 1])
    other.push([0.01, 0.01, 0.02, 0.07], [1, 2, 1, 1])
    if policy != "drop":
        other.push([0.01, 0.01, 0.07], [1, 2, 1])
    stats = stream.stats()
    assert (stats.duplicates, stats.duplicates_dropped) == (found, dropped)
    assert stats.used + stats.queued + stats.duplicates_dropped == 7
    for end in (0.05, 0.1):
        np.testing.assert_allclose(stream.poll(end).values, other.poll(end).values, rtol=0, atol=1e-10)  # type: ignore[union-attr]


def test_unknown_units(gru: POSSM) -> None:
    strict, lenient, plain = decoder(gru), decoder(gru, unknown_units="ignore"), decoder(gru)
    with pytest.raises(InputError, match=rf"units\[1\] = {UNITS}"):
        strict.push([0.01, 0.02], [0, UNITS])
    with pytest.raises(InputError, match=r"units\[0\] = 'nobody'"):
        strict.push([0.01], ["nobody"])
    with pytest.raises(InputError, match=r"units\[0\] = -1"):
        strict.push([0.06], [-1])
    assert strict.stats().used == strict.stats().queued == 0
    lenient.push([0.01, 0.02, 0.03], [0, UNITS, -1])
    lenient.push([0.02], ["nobody"])
    plain.push([0.01], ["unit-0"])
    assert lenient.stats().unknown_dropped == 3
    assert np.array_equal(lenient.poll(0.05).values, plain.poll(0.05).values)  # type: ignore[union-attr]


def test_counts_are_spikes_at_bin_centers(gru: POSSM) -> None:
    rng = np.random.default_rng(4)
    counts = rng.poisson(0.7, (6, UNITS))
    whole, rows, fine, spikes = (decoder(gru, duplicates="drop") for _ in range(4))
    spikes = decoder(gru)
    whole.push_counts(counts)
    b, u = np.nonzero(counts)
    spikes.push(np.repeat((b + 0.5) * CHUNK, counts[b, u]), np.repeat(u, counts[b, u]))
    halves = np.zeros((12, UNITS), int)
    halves[::2] = counts
    fine.push_counts(halves, start=CHUNK / 4, bin_s=CHUNK / 2)  # the center of every second bin is a chunk's
    for i in range(6):
        rows.push_counts(counts[i])
        expected = spikes.poll((i + 1) * CHUNK)
        assert expected is not None
        assert expected.n_spikes == counts[i].sum()
        for stream in (whole, rows, fine):
            np.testing.assert_allclose(stream.poll((i + 1) * CHUNK).values, expected.values, rtol=0, atol=1e-9)  # type: ignore[union-attr]
    for bad, name in (([[-1] * UNITS], r"counts\[0, 0\]"), ([[0.5] * UNITS], r"counts\[0, 0\]"), ([[1, 2]], "counts")):
        with pytest.raises(InputError, match=name):
            whole.push_counts(bad)
    with pytest.raises(InputError, match="bin_s"):
        whole.push_counts(counts, bin_s=0.0)


@pytest.mark.parametrize("engine", ENGINES)
def test_step_and_advance(gru: POSSM, engine: str) -> None:
    rec = recording()
    expected = replay(decoder(gru, engine=engine), rec)
    stream = decoder(gru, engine=engine)
    for b in range(8):
        inside = (rec.times >= b * CHUNK) & (rec.times < (b + 1) * CHUNK)
        made = stream.step(rec.times[inside], rec.units[inside])
        assert np.array_equal(made.values, expected[b].values)
    stream.advance(3)  # the gap of the recording
    assert (stream.stats().gaps, stream.stats().skipped, stream.stats().chunks) == (3, 0, 11)
    assert stream.next_end == pytest.approx(12 * CHUNK)
    inside = (rec.times >= 11 * CHUNK) & (rec.times < 12 * CHUNK)
    made = stream.step(rec.times[inside], rec.units[inside])
    np.testing.assert_allclose(made.values, expected[11].values, rtol=0, atol=1e-12)


@pytest.mark.parametrize("engine", ENGINES)
def test_forecasts_and_default_offsets(gru: POSSM, engine: str) -> None:
    rec = recording()
    ahead = decoder(gru, engine=engine, output_offsets=(0.1, 0.15))
    at_first = replay(ahead, rec)[3]
    np.testing.assert_allclose(at_first.times, [3 * CHUNK + 0.1, 3 * CHUNK + 0.15])
    assert at_first.values.shape == (2, 2)
    default = StreamingDecoder(gru, session="monday")
    np.testing.assert_allclose(default.output_offsets, [0, 0.01, 0.02, 0.03, 0.04])


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("backbone", ["gru", "s4d", "mamba"])
def test_state_goes_on_bit_identically(tmp_path: Path, backbone: str, engine: str) -> None:
    made = model(backbone=backbone)
    rec = recording()
    stream = decoder(made, engine=engine, duplicates="drop", late="fold")
    stream.push(rec.times[:200], rec.units[:200])
    for b in range(5):
        stream.poll((b + 1) * CHUNK)
    stream.push(rec.times[100:230], rec.units[100:230])  # late ones, duplicates, and the middle of a chunk
    path = tmp_path / "stream.safetensors"
    stream.save(path)
    loaded, assigned = (decoder(made, engine=engine, duplicates="drop", late="fold") for _ in range(2))
    loaded.load(path)
    assigned.load_state(stream.state())
    copied = stream.copy()
    results = []
    for each in (stream, loaded, assigned, copied):
        each.push([5 * CHUNK + 0.0123], [0])
        each.push(rec.times[150:], rec.units[150:])
        results.append([p for b in range(5, CHUNKS) if (p := each.poll((b + 1) * CHUNK)) is not None])
    for other, each in zip(results[1:], (loaded, assigned, copied), strict=True):
        assert all(np.array_equal(p.values, q.values) for p, q in zip(results[0], other, strict=True))
        ours, theirs = vars(stream.stats()), vars(each.stats())
        measured = {"p50_us", "p99_us", "max_us", "overruns"}
        assert all(ours[name] == theirs[name] for name in ours.keys() - measured)


@needs_kernels
def test_a_state_of_another_model_is_refused(tmp_path: Path, gru: POSSM) -> None:
    path = tmp_path / "stream.safetensors"
    decoder(gru).save(path)
    other = copy.deepcopy(gru)
    with torch.no_grad():
        other.readout.output.bias += 1e-9
    with pytest.raises(InputError, match="this model"):
        decoder(other).load(path)
    with pytest.raises(InputError, match="this model"):
        decoder(gru, engine="torch").load(path)
    with pytest.raises(InputError, match="kind of engine"):
        decoder(gru, engine="torch").load_state(decoder(gru, engine="c++").state())
    full = decoder(gru)
    full.push(np.full(9, 0.06), np.arange(9))
    with pytest.raises(InputError, match="capacity"):
        decoder(gru, capacity=5).load_state(full.state())
    (tmp_path / "text").write_text(json.dumps({}))
    for bad in (tmp_path / "text", tmp_path / "missing"):
        with pytest.raises(InputError, match="path"):
            decoder(gru).load(bad)
    gru.save(tmp_path / "model")
    with pytest.raises(InputError, match="path"):
        decoder(gru).load(tmp_path / "model")


def test_training_on_does_not_change_a_running_stream(gru: POSSM) -> None:
    made = copy.deepcopy(gru).train()
    streams = [decoder(made, engine=engine) for engine in ("auto", "torch")]
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.zero_()
    rec = recording()
    for stream in streams:
        np.testing.assert_allclose(values(replay(stream, rec)), gru.predict(rec), rtol=0, atol=1e-9)
    assert made.training


BAD_PUSHES: list[tuple[list[Any], list[Any], str]] = [
    ([0.01, np.nan], [0, 1], r"times\[1\]"),
    ([np.inf], [0], r"times\[0\]"),
    ([0.01, 61.0], [0, 1], r"times\[1\].*reset"),
    ([-2e9], [0], r"times\[0\]"),
    ([1e300], [0], r"times\[0\]"),
    ([0.01], [0, 1], "units"),
    ([0.01], [0.5], "units"),
    ([[0.01]], [[0]], "units"),
]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("times", "units", "message"), BAD_PUSHES)
def test_bad_spikes_change_nothing(gru: POSSM, engine: str, times: list, units: list, message: str) -> None:
    stream = decoder(gru, engine=engine)
    stream.push([0.02], [3])
    before = stream.state()
    with pytest.raises(InputError, match=message):
        stream.push(times, units)
    after = stream.state()
    assert np.array_equal(before.counters, after.counters)
    assert stream.stats().queued == 0
    stream.push([], [])


def test_bad_arguments(gru: POSSM) -> None:
    for options, name in (
        ({"engine": "numba"}, "engine"),
        ({"late": "wait"}, "late"),
        ({"late_tol": -1.0}, "late_tol"),
        ({"duplicates": "no"}, "duplicates"),
        ({"unknown_units": "mean"}, "unknown_units"),
        ({"capacity": 0}, "capacity"),
        ({"horizon_s": 0.01}, "horizon_s"),
        ({"output_offsets": (0.0, np.nan)}, r"output_offsets\[1\]"),
    ):
        with pytest.raises(InputError, match=name):
            decoder(gru, **options)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="session"):
        StreamingDecoder(gru, session="friday")
    stream = decoder(gru)
    for call, name in (
        (lambda: stream.poll(np.nan), "now"),
        (lambda: stream.reset(np.inf), "t0"),
        (lambda: stream.advance(-1), "n"),
    ):
        with pytest.raises(InputError, match=name):
            call()


@pytest.mark.parametrize("t0", [0.0, 1e6])
def test_a_clock_that_jumps_is_named(gru: POSSM, t0: float) -> None:
    rec = recording(t0=t0)
    stream = decoder(gru)
    stream.reset(t0)
    stream.push(rec.times, rec.units)
    before = stream.state()
    with pytest.raises(InputError, match=r"^now = .* horizon_s = 60 s .* open chunk's end at .*reset\(t0\) or advance"):
        stream.poll(t0 + CHUNK + 60.1)
    assert stream.state().chunk == before.chunk == 0
    assert np.array_equal(stream.state().counters, before.counters)
    made = stream.poll(t0 + CHUNK + 59.9)  # a stall, however long, is none
    assert made is not None
    assert made.skipped
    stream.advance(1198)
    assert stream.poll(t0 + CHUNK + 60.1) is not None
    stream.reset(t0 + 1e5)
    assert stream.poll(t0 + 1e5 + CHUNK) is not None


def test_arguments_that_are_no_numbers(gru: POSSM) -> None:
    stream = decoder(gru)
    calls: list[tuple[Any, str]] = [
        (lambda: stream.poll(None), "now = None"),  # type: ignore[arg-type]
        (lambda: stream.poll("0.05"), "now = '0.05'"),  # type: ignore[arg-type]
        (lambda: stream.reset("0"), "t0 = '0'"),  # type: ignore[arg-type]
        (lambda: stream.advance(1.5), "n = 1.5"),  # type: ignore[arg-type]
        (lambda: stream.push(["0.01"], [0]), "times = '<U4'"),
        (lambda: stream.push([None], [0]), "times = 'object'"),
        (lambda: stream.push([[0.01], [0.01, 0.02]], [0]), "times = 'list'"),
        (lambda: stream.step("now", [0]), "times = '<U3'"),
        (lambda: stream.push_counts([["1"] * UNITS]), "counts = '<U1'"),
        (lambda: stream.push_counts(np.ones((1, UNITS)), start="0"), "start = '0'"),  # type: ignore[arg-type]
        (lambda: stream.push_counts(np.ones((1, UNITS)), bin_s="0.01"), "bin_s = '0.01'"),  # type: ignore[arg-type]
        (lambda: stream.push_counts(np.ones((1, UNITS)), bin_s=0.051), r"bin_s = 0.051: .* chunk_s = 0.05"),
    ]
    for call, message in calls:
        with pytest.raises(InputError, match=f"^{message}"):
            call()
    assert stream.stats().used == stream.stats().chunks == 0
    stream.push_counts(np.ones((1, UNITS), int), bin_s=0.05)


def test_one_thread_pushes_while_another_polls(gru: POSSM) -> None:
    rec = recording()
    expected = values(replay(decoder(gru), rec))[-5:]
    stream = decoder(gru, late="fold")

    def push() -> None:
        for i in range(0, rec.times.size, 7):
            stream.push(rec.times[i : i + 7], rec.units[i : i + 7])

    pusher = threading.Thread(target=push)
    pusher.start()
    while pusher.is_alive():
        stream.stats(), stream.idle(), stream.poll(-1.0)
    pusher.join()
    found = [p for b in range(CHUNKS) if (p := stream.poll((b + 1) * CHUNK)) is not None]
    np.testing.assert_allclose(found[-1].values, expected, rtol=0, atol=1e-9)
    assert stream.stats().used == rec.times.size


def test_reset_starts_again_and_warmup_leaves_no_trace(gru: POSSM) -> None:
    rec = recording()
    stream = decoder(gru, duplicates="drop")
    expected = values(replay(stream, rec))
    stream.push([2.0], [0])
    assert np.array_equal(values(replay(stream, rec)), expected)
    before = stream.state()
    stream.warmup(3)
    after = stream.state()
    assert after.chunk == before.chunk
    assert all(map(np.array_equal, leaves(before.engine), leaves(after.engine)))
    assert stream.stats().max_us > 0


def test_histogram_percentiles() -> None:
    sample = np.random.default_rng(0).lognormal(4, 1, 20_000)
    histogram = LatencyHistogram()
    assert np.isnan(histogram.percentile(50))
    for us in sample.tolist():
        histogram.add(us)
    for percent in (1, 50, 99, 99.9):
        assert histogram.percentile(percent) == pytest.approx(np.percentile(sample, percent), rel=0.02)
    assert histogram.percentile(100) <= histogram.largest == sample.max()
    for us in (0.0, 1e12):
        histogram.add(us)
    assert histogram.counts.sum() == 20_002


def test_pairs_of_closed_chunks_are_forgotten(gru: POSSM) -> None:
    stream = decoder(gru, duplicates="drop")
    replay(stream, recording())
    assert len(stream._seen) == 0


def test_a_stream_reads_out_where_the_model_was_trained(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    counts, velocity = rng.poisson(1.0, (12, 6, 5)), rng.normal(size=(12, 6, 2))
    binned = SpikeRecording.from_counts(list(counts), 0.1, behavior=list(velocity), session="binned")
    model = POSSM(dim=32, rnn_dim=16, chunk_s=0.1)
    model.fit(binned, config=FitConfig(steps=2, batch_size=4))
    model.save(tmp_path / "model.safetensors")
    for each in (model, POSSM.load(tmp_path / "model.safetensors")):
        decoder = StreamingDecoder(each, session="binned")
        assert decoder.output_offsets.tolist() == pytest.approx([0.05])
    continuous = SpikeRecording.from_counts(counts.reshape(-1, 5), 0.1, behavior=velocity.reshape(-1, 2), session="c")
    model.fit(continuous, config=FitConfig(steps=1, batch_size=2))
    assert model.output_offsets is None
    with pytest.raises(InputError, match=r"output_offsets = 25.0.*not ms"):
        StreamingDecoder(model, session="c", output_offsets=(0, 25))
