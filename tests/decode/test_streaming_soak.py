"""One hour of stream: exact counters under injected stalls, no NaN, memory that does not grow."""

from __future__ import annotations

import gc

import numpy as np
import psutil
import pytest

from commissure.decode.possm import POSSM
from commissure.decode.recording import SpikeRecording
from commissure.decode.streaming import StreamingDecoder
from commissure.native import backend

CHUNK, UNITS, SECONDS = 0.05, 96, 3600
STALL_EVERY, STALL = 1200, 4  # once a minute, 200 ms without a poll


@pytest.mark.soak
@pytest.mark.skipif(backend() == "python", reason="built without the C++ kernels, which an hour of stream needs")
def test_one_hour_of_stream() -> None:
    made = POSSM.from_preset("possm-ss", chunk_s=CHUNK)
    made.add_session(SpikeRecording.from_counts(np.ones((1, UNITS), int), CHUNK, session="hour"))
    stream = StreamingDecoder(made, session="hour", duplicates="drop", late="drop")
    rng = np.random.default_rng(0)
    process = psutil.Process()
    n_chunks = int(SECONDS / CHUNK)
    expected = {"pushed": 0, "late": 0, "duplicates": 0, "skipped": 0}
    closed, memory = 0, []
    for b in range(n_chunks):
        n = int(rng.poisson(40))
        times, units = (b + rng.random(n)) * CHUNK, rng.integers(0, UNITS, n)
        stream.push(times, units)
        expected["pushed"] += n
        if b % 50 == 7 and n:  # the last spike once more
            stream.push(times[-1:], units[-1:])
            expected["pushed"] += 1
            expected["duplicates"] += 1
        is_stalled = b % STALL_EVERY >= STALL_EVERY - STALL
        if b % 97 == 5 and not is_stalled and closed == b:
            stream.push([(b - 1) * CHUNK], [0])
            expected["pushed"] += 1
            expected["late"] += 1
        if not is_stalled:
            waiting = b - closed
            expected["skipped"] += max(0, waiting - 1)
            while (made_now := stream.poll((b + 1) * CHUNK)) is not None:
                assert np.isfinite(made_now.values).all()
                assert made_now.chunk == closed
                closed += 1
        if b % 6000 == 0:
            gc.collect()
            memory.append(process.memory_info().rss)
    while stream.poll(n_chunks * CHUNK) is not None:
        closed += 1
    stats = stream.stats()
    assert closed == stats.chunks == n_chunks
    assert stats.late == stats.late_dropped == expected["late"]
    assert stats.duplicates == stats.duplicates_dropped == expected["duplicates"]
    assert stats.used == expected["pushed"] - expected["late"] - expected["duplicates"]
    # The last stall ends with the stream: its four chunks are polled at the end of the last, two of them too late.
    assert stats.skipped == expected["skipped"] + 2
    assert stats.predictions + stats.skipped == n_chunks
    assert max(memory[2:]) - memory[2] < 5e6
