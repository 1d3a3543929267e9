"""Claim `decode.latency`: what one 50 ms chunk costs, and that it costs the same after ten minutes.

`possm-ss` with a GRU, 300 units, 5 outputs a chunk, untrained weights (their values do not change the work), one
thread.  A step is push + poll + idle; CPU time of the thread, median over chunks, contenders in turns in one process.
`eager_over_cpp` is against the faster of two eager rivals: our torch engine, and the public code's padded layout.
`drift` is the median step in the last minute of a ten-minute stream over that in the first minute of a new stream, the
two timed in turns: the machine's own changes of speed hit both.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch

from commissure.core.stats import mean_interval
from commissure.decode.bench import N_UNITS, Steps, bench_drift, contenders, time_steps
from commissure.experiments.claims import Budget, Context, Outcome, Row
from commissure.native import backend
from commissure.report.style import COLORS, figure, to_svg

__all__ = ["run"]

SPIKES = (50, 200, 1000)
_PAPER = "2,440 µs on an EPYC 7502"


class Sizes(NamedTuple):
    """What a budget buys: seeds, chunks of the C++ engine, of the eager rivals, of the window decoder, minutes."""

    n_seeds: int
    cpp: int
    eager: int
    window: int
    minutes: int


_SIZES: dict[Budget, Sizes] = {
    "smoke": Sizes(1, 200, 50, 5, 2),
    "quick": Sizes(3, 1000, 200, 20, 10),
    "full": Sizes(5, 4000, 1000, 100, 10),
}


def run(ctx: Context) -> Outcome:
    """Time the contenders; every seed draws new weights and spikes."""
    if backend() != "c++":
        return Outcome((), "NOT RUN", note="this installation has no C++ kernels: install a compiler and reinstall")
    torch.set_num_threads(1)
    sizes = _SIZES[ctx.budget]
    per_spikes: dict[int, list[dict[str, Steps]]] = {n: [] for n in SPIKES}
    drifts = []
    for seed in range(sizes.n_seeds):
        for n in SPIKES:
            counts = {"C++ engine": sizes.cpp, "torch engine": sizes.eager, "padded eager": sizes.eager}
            counts |= {"window decoder": sizes.window}
            steppers = {k: v for k, v in contenders(seed=seed).items() if n == 200 or k != "window decoder"}
            per_spikes[n].append(time_steps(steppers, n_spikes=n, n_chunks=counts, n_blocks=5, seed=seed))
            ctx.progress((seed + 0.3) / sizes.n_seeds, f"seed {seed}, {n} spikes a chunk")
        drifts.append(bench_drift(minutes=sizes.minutes, seed=seed))
        ctx.progress((seed + 1) / sizes.n_seeds, f"seed {seed}, {sizes.minutes}-minute stream")
    rows = _rows(per_spikes, drifts)
    note = f"{N_UNITS} units, 5 outputs a chunk, one thread; intervals over {sizes.n_seeds} seeds of weights and spikes"
    return Outcome(
        tuple(rows), ctx.judge(rows, sizes.n_seeds), _figure(per_spikes), sizes.n_seeds, note, "simulated spikes"
    )


def _rows(per_spikes: dict[int, list[dict[str, Steps]]], drifts: list[float]) -> list[Row]:
    def medians(n: int, name: str) -> np.ndarray:
        return np.array([np.median(steps[name].cpu) for steps in per_spikes[n]])

    at_200 = [steps["C++ engine"] for steps in per_spikes[200]]
    cpp = medians(200, "C++ engine")
    eager = np.minimum(medians(200, "torch engine"), medians(200, "padded eager"))
    wall = np.concatenate([steps.wall for steps in at_200]) * 1e3
    rows = [
        _row("eager_over_cpp", "faster eager torch / C++, 200 spikes", eager / cpp, "x"),
        _row("window_over_cpp", "window decoder / C++, 200 spikes", medians(200, "window decoder") / cpp, "x"),
        _row("p99_cpu_ms", "p99 CPU, 200 spikes", np.array([np.percentile(s.cpu, 99) for s in at_200]) * 1e3, "ms"),
        _row("drift", "last minute / first minute of the stream", np.array(drifts), "x"),
        _row("poll_us", "after the last spike: poll alone", np.array([np.median(s.poll) for s in at_200]) * 1e6, "µs"),
        Row("wall_p99_ms", "p99 wall, 200 spikes", float(np.percentile(wall, 99)), unit="ms",
            note=f"largest {wall.max():.2f} ms: includes other processes of this machine"),
    ]  # fmt: skip
    for n in SPIKES:
        for name in per_spikes[n][0]:
            key = f"{name.split()[0].lower().replace('+', 'p')}_{n}_us"
            row = _row(key, f"{name}, {n} spikes a chunk", medians(n, name) * 1e6, "µs")
            rows.append(replace(row, paper=_PAPER) if name == "padded eager" and n == 200 else row)
    return rows


def _row(key: str, label: str, values: np.ndarray, unit: str) -> Row:
    if len(values) < 2:
        return Row(key, label, float(values[0]), unit=unit)
    interval = mean_interval(values)
    return Row(key, label, interval.estimate, interval.low, interval.high, unit=unit)


def _figure(per_spikes: dict[int, list[dict[str, Steps]]]) -> str:
    with figure(6.4, 3.4) as (fig, axes):
        for name, marker in (
            ("C++ engine", "o"),
            ("torch engine", "s"),
            ("padded eager", "^"),
            ("window decoder", "D"),
        ):
            counts = [n for n in SPIKES if name in per_spikes[n][0]]
            values = [1e6 * np.mean([np.median(s[name].cpu) for s in per_spikes[n]]) for n in counts]
            axes.plot(counts, values, marker=marker, color=COLORS.get(name, COLORS["Wiener"]), label=name)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xticks(SPIKES, [str(n) for n in SPIKES])
        axes.minorticks_off()
        axes.set_xlabel("spikes a chunk (50 ms)")
        axes.set_ylabel("CPU a chunk (µs)")
        axes.legend()
        return to_svg(fig, label="CPU microseconds a chunk against spikes a chunk, four decoders, log scales")
