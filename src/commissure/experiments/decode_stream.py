"""Claim `decode.stream`: a monkey's spikes replayed at their true times, decoded online as offline, through a stall.

The recording is one MC-Maze trial (182 units, 3.2 s, 1 ms spike times); the weights are untrained and of fixed seeds:
nothing is claimed about accuracy.  Online: the C++ engine in single precision, fed in 10 ms packets.  Offline: the
torch model in double precision on the whole recording.  The error is the largest difference of the outputs in the
model's own units, standard deviations of the behavior.  Then the computer stalls for 200 ms: every chunk must still be
encoded, the stale readouts skipped and counted, and what follows must equal the stream without the stall.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np

from commissure.core.errors import InputError
from commissure.decode import POSSM, SpikeRecording, StreamingDecoder, recordings, simulate_reaching
from commissure.decode.streaming import Prediction
from commissure.experiments.claims import Budget, Context, Outcome, Row
from commissure.report.style import COLORS, figure, to_svg

__all__ = ["run", "stream"]

PACKET_S, STALL_S, STALL_AT_S = 0.01, 0.2, 1.0
_SEEDS: dict[Budget, int] = {"smoke": 1, "quick": 3, "full": 5}
_MODELS = tuple((preset, backbone) for preset in ("possm-ss", "possm-direct") for backbone in ("gru", "s4d", "mamba"))


class Streamed(NamedTuple):
    """Predictions of one pass, and how its counters differ from what they must be."""

    predictions: list[Prediction]
    n_chunks: int
    lost_chunks: int
    miscounted: int


def run(ctx: Context) -> Outcome:
    """Compare online and offline for every preset, backbone and seed; stall once in each."""
    recording, data, note = _recording()
    n_seeds, after, lost, wrong = _SEEDS[ctx.budget], 0.0, 0, 0
    errors: dict[tuple[str, str], float] = {}
    example: tuple[np.ndarray, np.ndarray] | None = None
    relative = 0.0
    for seed in range(n_seeds):
        for i, (preset, backbone) in enumerate(_MODELS):
            model = POSSM.from_preset(preset, backbone=backbone, auxiliary_dim=0, seed=seed)
            model.add_session(recording)
            plain, stalled = (stream(model, recording, stall=stall) for stall in (False, True))
            times = np.concatenate([p.times for p in plain.predictions])
            online = np.concatenate([p.values for p in plain.predictions])
            offline = model.double().predict(recording, at=times)
            difference = np.abs(online - offline).max(1)
            errors[preset, backbone] = max(float(difference.max()), errors.get((preset, backbone), 0.0))
            relative = max(relative, float(difference.max() / offline.std(0).min()))
            after = max(after, _difference(plain.predictions, stalled.predictions))
            lost += plain.lost_chunks + stalled.lost_chunks
            wrong += plain.miscounted + stalled.miscounted
            example = example or (times - times[0], difference)
            ctx.progress((seed + (i + 1) / len(_MODELS)) / n_seeds, f"seed {seed}, {preset} {backbone}")
    rows = [
        Row("max_error", "largest online - offline difference, in behavior standard deviations", max(errors.values())),
        Row("relative", "the same over each untrained output's own standard deviation", relative),
        Row("lost_chunks", "chunks lost, with and without a 200 ms stall", float(lost)),
        Row("miscounted", "skipped readouts or spikes that the counters missed", float(wrong)),
        Row("after_stall", "largest difference after the stall", after),
    ]
    rows += [Row(f"error_{p}_{b}", f"{p}, {b}", error) for (p, b), error in errors.items()]
    assert example is not None
    return Outcome(tuple(rows), ctx.judge(rows, n_seeds), _figure(*example), n_seeds, note, data)


def stream(model: POSSM, recording: SpikeRecording, *, stall: bool) -> Streamed:
    """Feed the recording in packets; with `stall`, nothing is polled for 200 ms from 1 s on."""
    (start, stop) = recording.segments[0]
    decoder = StreamingDecoder(model, session=recording.session, engine="auto")
    decoder.reset(start)
    edges = start + PACKET_S * np.arange(1 + int(np.floor((stop - start) / PACKET_S + 1e-6)))
    predictions = []
    for first, last in itertools.pairwise(edges):
        inside = (recording.times >= first) & (recording.times < last)
        decoder.push(recording.times[inside], recording.units[inside])
        if stall and STALL_AT_S <= last - start < STALL_AT_S + STALL_S - 1e-9:
            continue
        while (prediction := decoder.poll(last)) is not None:
            predictions.append(prediction)
    n_chunks = int(np.floor((edges[-1] - start) / decoder.chunk_s + 1e-6))
    expected_skips = int(STALL_S / decoder.chunk_s + 1e-6) - 1 if stall else 0
    stats = decoder.stats()
    given = int((recording.times < edges[-1]).sum())
    miscounted = abs(sum(p.skipped for p in predictions) - expected_skips) + abs(stats.skipped - expected_skips)
    miscounted += abs(stats.used + stats.queued - given)
    return Streamed(predictions, n_chunks, n_chunks - len(predictions), miscounted)


def _difference(plain: list[Prediction], stalled: list[Prediction]) -> float:
    return max(
        (float(np.abs(a.values - b.values).max()) for a, b in zip(plain, stalled, strict=True) if not b.skipped),
        default=float("nan"),
    )


def _recording() -> tuple[SpikeRecording, str, str]:
    try:
        return recordings.mc_maze_trial(), "real: one MC-Maze trial, 182 units at 1 ms", ""
    except InputError as error:
        (simulated,) = simulate_reaching(duration_s=3.0, n_units=182)
        return simulated, "SIMULATED reaching", f"the recording could not be had ({error})"


def _figure(times: np.ndarray, error: np.ndarray) -> str:
    with figure(6.4, 2.8) as (fig, axes):
        axes.semilogy(times, np.maximum(error, 1e-9), color=COLORS["C++ engine"], label="online - offline")
        axes.axhline(1e-5, color=COLORS["Wiener"], linestyle="--", label="gate")
        axes.set_xlabel("time in the trial (s)")
        axes.set_ylabel("difference (behavior s.d.)")
        axes.legend()
        return to_svg(fig, label="Difference between online and offline outputs over the trial, below the gate of 1e-5")
