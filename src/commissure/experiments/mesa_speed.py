"""Claim `mesa.speed`: an exact solve a token against 30 steps of conjugate gradients, one CPU thread.

The rival is the fastest batched CG-30 we could write in torch (`commissure.mesa.rivals.best_cg`), not the public code,
whose loop is a row without a gate.  Layer against layer: both make the same output from their solution with the same
gated linear attention.  B = 1, H = 4, T = 2048, D = 64 and 128; CPU time of the thread, contenders in turns; a seed's
value is the median over its turns.

    forward_D, training_64   CG-30 / Cholesky kernel, benign gates
    hybrid_mixed             CG-30 / torch-only hybrid, D = 64, heads that forget at four rates, power-law keys
    error                    max |o - exact| / max |exact| of the kernel, the largest of all cases
    decode                   best CG-30 loop / layer, one token of 8 heads of 128
    of_sgemm_D               the kernel's rate over that of sgemm(256), by the D^3 / 3 + 3 D^2 operations that one
                             factorization a token and head takes; it needs fewer where gates are close to 1
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from commissure.experiments.claims import Budget, Context, Outcome, Row
from commissure.experiments.rows import interval_row
from commissure.mesa.bench import OURS, RIVAL, DecodeRow, KernelRow, LayerRow, bench_decode, bench_kernel, bench_layer
from commissure.native.mesa import mesa_kernel_available
from commissure.report.style import COLORS, figure, to_svg

__all__ = ["run"]

TIME, DIMS = 2048, (64, 128)
DECODE = ((1, 8, 128), (1, 6, 64), (8, 8, 128))
_DRAWN = (OURS, "hybrid", RIVAL, "CG to 1e-4", "attention", "gated linear attention")
_SIZES: dict[Budget, tuple[int, int]] = {"smoke": (1, 1), "quick": (5, 2), "full": (10, 5)}  # seeds, turns


@dataclass
class Timed:
    """Every row of the bench, over the seeds."""

    layers: list[LayerRow] = field(default_factory=list)
    decoded: list[DecodeRow] = field(default_factory=list)
    kernels: list[KernelRow] = field(default_factory=list)

    def gains(self, contender: str, dim: int, gates: str = "benign", *, backward: bool = False) -> np.ndarray:
        """Median gain over the best CG-30 of each seed."""
        case = (contender, dim, gates, backward, TIME)
        return np.array(
            [r.gain.median for r in self.layers if (r.contender, r.dim, r.gates, r.backward, r.time) == case]
        )


def run(ctx: Context) -> Outcome:
    """Time all contenders; every seed draws new inputs."""
    if not mesa_kernel_available():
        return Outcome((), "NOT RUN", note="this installation has no C++ kernels: install a compiler and reinstall")
    (n_seeds, turns), timed = _SIZES[ctx.budget], Timed()
    for seed in range(n_seeds):
        _time(timed, seed, turns, is_full=ctx.budget == "full")
        ctx.progress((seed + 1) / n_seeds, f"seed {seed}")
    rows = _rows(timed)
    note = f"B = 1, H = 4, T = {TIME}, one thread; intervals over {n_seeds} seeds of inputs"
    return Outcome(tuple(rows), ctx.judge(rows, n_seeds), _figure(timed), n_seeds, note, "random inputs")


def _time(timed: Timed, seed: int, turns: int, *, is_full: bool) -> None:
    names = _DRAWN if is_full else (OURS, "hybrid")
    for dim in DIMS:
        timed.layers += bench_layer(batch=1, time=TIME, dim=dim, names=names, repeats=turns, seed=seed)
        timed.kernels.append(bench_kernel(dim=dim, repeats=turns + 2, seed=seed))
    mixed = (OURS, "hybrid", "CG to 1e-4") if is_full else ("hybrid", OURS)
    timed.layers += bench_layer(batch=1, time=TIME, dim=64, gates="mixed", names=mixed, repeats=turns, seed=seed)
    timed.layers += bench_layer(batch=1, time=TIME, dim=64, backward=True, names=(OURS,), repeats=turns, seed=seed)
    if is_full:
        timed.layers += bench_layer(batch=1, time=512, dim=64, names=(OURS, "literal CG-30"), repeats=turns, seed=seed)
    timed.decoded += [bench_decode(batch=b, heads=h, dim=d, repeats=10 * turns, seed=seed) for b, h, d in DECODE]


def _rows(timed: Timed) -> list[Row]:
    def gain(key: str, label: str, contender: str, dim: int, gates: str = "benign", backward: bool = False) -> Row:
        values = timed.gains(contender, dim, gates, backward=backward)
        return interval_row(key, f"{RIVAL} / {contender}, {label}, D = {dim}", values, "x")

    rows = [
        gain("forward_64", "forward", OURS, 64),
        gain("forward_128", "forward", OURS, 128),
        gain("training_64", "forward and backward", OURS, 64, backward=True),
        gain("hybrid_mixed", "mixed gates, forward", "hybrid", 64, "mixed"),
        gain("kernel_mixed", "mixed gates, forward", OURS, 64, "mixed"),
        Row("error", f"{OURS}: largest error", max(row.error for row in timed.layers if row.contender == OURS)),
    ]
    for size in DECODE:
        decoded = [row for row in timed.decoded if (row.batch, row.heads, row.dim) == size]
        name, label = "_".join(map(str, size)), f"/ layer, one token, (B, H, D) = {size}"
        gains, literal = ([r.gain.median for r in decoded], [r.literal_us / r.mesa_us for r in decoded])
        key = "decode" if size == DECODE[0] else f"decode_{name}"
        rows.append(interval_row(key, f"CG-30 loop {label}", np.array(gains), "x"))
        rows.append(interval_row(f"decode_literal_{name}", f"literal CG-30 loop {label}", np.array(literal), "x"))
    for dim in DIMS:
        kernels = [row for row in timed.kernels if row.dim == dim]
        shares, rates = np.array([r.share.median for r in kernels]), np.array([r.gflops for r in kernels])
        rows.append(interval_row(f"of_sgemm_{dim}", f"kernel / sgemm(256), rate, D = {dim}", shares))
        rows.append(interval_row(f"gflops_{dim}", f"kernel, rate, D = {dim}", rates, "GF/s"))
    return rows + _costs(timed.layers)


def _costs(layers: Sequence[LayerRow]) -> list[Row]:
    """Microseconds a token and head, and errors, of every contender that was timed."""
    cases: dict[tuple[str, int, int, str, bool], list[LayerRow]] = {}
    for row in layers:
        cases.setdefault((row.contender, row.dim, row.time, row.gates, row.backward), []).append(row)
    rows = []
    for (name, dim, length, gates, backward), found in cases.items():
        kind = "training" if backward else "forward"
        key = f"us_{name.lower().replace(' ', '_')}_{dim}_{length}_{gates}_{kind}"
        label = f"{name}: {kind}, D = {dim}, T = {length}, {gates} gates, a token and head"
        worst = max(row.error for row in found)
        note = "" if np.isnan(worst) else f"error {worst:.1e}"
        rows.append(interval_row(key, label, np.array([row.us_a_token for row in found]), "µs", note))
    return rows


def _figure(timed: Timed) -> str:
    shown = [row for row in timed.layers if row.gates == "benign" and not row.backward and row.time == TIME]
    names = [name for name in _DRAWN if any(row.contender == name for row in shown)]
    with figure(6.4, 1.4 + 0.4 * len(names)) as (fig, ax):
        for place, name in enumerate(reversed(names)):
            for dim, height in zip(DIMS, (0.18, -0.18), strict=True):
                cost = float(np.mean([row.us_a_token for row in shown if (row.contender, row.dim) == (name, dim)]))
                ax.barh(place + height, cost, 0.34, color=COLORS[name], alpha=1.0 if dim == 64 else 0.55)
                ax.annotate(f" D = {dim}: {cost:.1f}", (cost, place + height), va="center", fontsize=9)
        ax.set_yticks(range(len(names)), list(reversed(names)))
        ax.set_xlabel("CPU a token and head, forward (µs)")
        ax.margins(x=0.25)
        ax.grid(visible=False, axis="y")
        return to_svg(fig, label="Microseconds a token and head of each contender, head dimension 64 and 128")
