"""Replay of a recording through the streaming decoder, against the clock or as fast as possible.

Every `PACKET_S` of the recording's time, or as soon as the computer gets to it, the spikes that have arrived by then
are pushed, as an acquisition system would send them, and the decoder is polled.  Every segment is a new stream.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from commissure.core.errors import InputError
from commissure.decode.recording import SpikeRecording, bin_count
from commissure.decode.streaming import Prediction, StreamingDecoder

if TYPE_CHECKING:
    from commissure.decode.possm import POSSM

__all__ = ["ReplaySummary", "replay_stream"]

PACKET_S = 0.01
_NO_TIMES, _NO_UNITS = np.zeros(0), np.zeros(0, np.int64)


class ReplaySummary(NamedTuple):
    """What a replay did; latencies in microseconds of computing, from the close of a chunk to its prediction."""

    chunks: int
    predictions: int
    skipped: int
    spikes: int
    late: int
    dropped: int
    rate_hz: float
    p50_us: float
    p99_us: float
    max_us: float
    wall_s: float

    def line(self) -> str:
        """One line for a person who watches."""
        return (
            f"{self.rate_hz:8.1f} chunks/s   latency p50 {self.p50_us:6.1f} us  p99 {self.p99_us:6.1f} us   "
            f"late {self.late}   dropped {self.dropped}   skipped {self.skipped}"
        )


def replay_stream(
    model: POSSM,
    recording: SpikeRecording,
    *,
    speed: float = 0.0,
    engine: Literal["auto", "c++", "torch"] = "auto",
    live: bool = False,
) -> ReplaySummary:
    """Stream `recording` through `model` at `speed` times real time (0: as fast as possible).

    `live` shows rate, latencies, late and dropped counts on stderr while it runs.
    """
    if not (np.isfinite(speed) and speed >= 0):
        raise InputError("speed", speed, "a number >= 0 (0: as fast as possible)")
    model.add_known(recording)
    decoder = StreamingDecoder(model, session=recording.session, engine=engine)
    decoder.warmup()
    begin = time.perf_counter()
    latencies: list[float] = []
    finished: Counter[str] = Counter()

    def summary() -> ReplaySummary:
        return _summary(finished + _counters(decoder), latencies, time.perf_counter() - begin)

    with _display(live) as show:
        for start, stop in recording.segments.tolist():
            finished += _counters(decoder)
            for prediction in _stream_segment(decoder, recording, start, stop=stop, speed=speed):
                latencies.append(prediction.latency_us)
                show(summary)
    return summary()


def _counters(decoder: StreamingDecoder) -> Counter[str]:
    return Counter({name: value for name, value in asdict(decoder.stats()).items() if isinstance(value, int)})


def _stream_segment(
    decoder: StreamingDecoder, recording: SpikeRecording, start: float, *, stop: float, speed: float
) -> Iterator[Prediction]:
    decoder.reset(start)
    inside = recording.segment_index(recording.times) == recording.segment_index([start])[0]
    times, units = recording.times[inside], recording.units[inside]
    begin, first, now = time.perf_counter(), 0, start
    while now < stop:
        due = now + PACKET_S
        if speed:
            time.sleep(max(0.0, begin + (due - start) / speed - time.perf_counter()))
            due = max(due, start + (time.perf_counter() - begin) * speed)
        now = min(due, stop, now + decoder.horizon_s / 2)  # however far the replay is behind, no clock has jumped
        last = len(times) if now == stop else int(np.searchsorted(times, now))
        decoder.push(times[first:last], units[first:last])  # all that has arrived by now, before asking for results
        first = last
        while (prediction := decoder.poll(now)) is not None:
            yield prediction
        decoder.idle()
    while decoder.stats().chunks < bin_count(start, stop, decoder.chunk_s):  # a segment's last, partial chunk
        yield decoder.step(_NO_TIMES, _NO_UNITS)


def _summary(finished: Counter[str], latencies: list[float], wall_s: float) -> ReplaySummary:
    p50, p99 = np.percentile(latencies, [50, 99]) if latencies else (np.nan, np.nan)
    return ReplaySummary(
        chunks=len(latencies),
        predictions=finished["predictions"],
        skipped=finished["skipped"],
        spikes=finished["used"],
        late=finished["late"],
        dropped=finished["late_dropped"] + finished["duplicates_dropped"] + finished["unknown_dropped"],
        rate_hz=len(latencies) / wall_s,
        p50_us=float(p50),
        p99_us=float(p99),
        max_us=max(latencies, default=float("nan")),
        wall_s=wall_s,
    )


@contextmanager
def _display(live: bool) -> Iterator[Callable[[Callable[[], ReplaySummary]], None]]:
    """A function to call after each prediction: it rewrites one line on stderr four times a second."""
    if not live:
        yield lambda summary: None
        return
    from rich.console import Console
    from rich.status import Status

    shown = 0.0
    with Status("streaming", console=Console(stderr=True)) as status:

        def show(summary: Callable[[], ReplaySummary]) -> None:
            nonlocal shown
            if time.perf_counter() - shown >= 0.25:
                status.update(summary().line())
                shown = time.perf_counter()

        yield show
