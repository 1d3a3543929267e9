"""Claim `mesa.compute_curve`: what each conjugate-gradient step buys, early and late in a sequence, and when to stop.

The regression of `mesa.in_context` with D = 64, Lambda = .25, T = 512 and power-law keys.  `error` is the relative one
at fresh queries; what k steps lack is measured against the exact answer of the Cholesky solver:

    largest_ratio    the answers' squared distance to the exact ones at k' steps over that at the k before it, the
                     largest over neighbors in 1, 2, 5, 10, 20, 30 steps (t = 64 and 512, mean over seeds): below 1
    late_over_early  [error / exact error] with 10 steps at t = 512 over the same at t = 64: above 1 when the excess
                     is larger late
    eps_excess       |error / exact error - 1| with the relative stop at 1e-4, the largest over t = 64, 128, 256, 512
                     and both kinds of keys
    eps_steps        mean number of steps of that stop over tokens, isotropic keys (`eps_steps_power`: power law)

The published average, about 9 steps, is one over heads of trained models, most of which forget; nothing forgets here.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from commissure.experiments.claims import Budget, Context, Outcome, Row
from commissure.experiments.mesa_in_context import Regression, errors, regression
from commissure.experiments.rows import interval_row
from commissure.nn.mesa import MesaOutput, mesa_attention
from commissure.report.style import COLORS, figure, to_svg

__all__ = ["run"]

DIM, TIME, PENALTY = 64, 512, 0.25
STEPS, EPS, MOST_STEPS = (1, 2, 5, 10, 20, 30), 1e-4, 200
AT = (64, 128, 256, 512)
_SIZES: dict[Budget, tuple[int, int]] = {"smoke": (1, 4), "quick": (5, 16), "full": (20, 32)}  # seeds, sequences


def run(ctx: Context) -> Outcome:
    """Solve the same sequences exactly, with k steps and with the relative stop; intervals over seeds."""
    n_seeds, sequences = _SIZES[ctx.budget]
    excess: dict[int, list[np.ndarray]] = {k: [] for k in STEPS}
    distance: dict[int, list[np.ndarray]] = {k: [] for k in STEPS}
    stopped: dict[str, list[tuple[float, float]]] = {"isotropic": [], "power_law": []}
    exact_errors = []
    for seed in range(n_seeds):
        for kind, found in stopped.items():
            task = regression(seed, kind=kind, dim=DIM, time=TIME, sequences=sequences)
            exact = solve(task, solver="cholesky").output
            error = errors(exact, task)[positions()]
            eps = solve(task, solver="cg", cg_eps=EPS, max_cg_steps=MOST_STEPS, return_info=True)
            assert eps.info is not None
            worst = np.abs(errors(eps.output, task)[positions()] / error - 1).max()
            found.append((float(worst), float(eps.info.cg_steps.double().mean())))
        exact_errors.append(error)
        for k in STEPS:
            o = solve(task, solver="cg", max_cg_steps=k).output
            excess[k].append(errors(o, task)[positions()] / error - 1)
            distance[k].append(_squared(o - exact) / _squared(exact))
        ctx.progress((seed + 1) / n_seeds, f"seed {seed}")
    rows = _rows(excess, distance, stopped, np.array(exact_errors))
    data = f"simulated regressions, {sequences} sequences a seed"
    note = f"D = {DIM}, Λ = {PENALTY}, no forgetting, solvers in float32"
    return Outcome(tuple(rows), ctx.judge(rows, n_seeds), _figure(distance), n_seeds, note, data)


def positions() -> np.ndarray:
    """Indices of the tokens `AT`."""
    return np.array(AT) - 1


def solve(task: Regression, **options: object) -> MesaOutput:
    """The Mesa layer in float32 on a task's sequences."""
    q, k, v, one = (x.float() for x in (task.q, task.k, task.v, task.ones))
    return mesa_attention(q, k, v, 0 * one, one, torch.full((1, DIM), PENALTY), **options)  # type: ignore[arg-type]


def _squared(o: Tensor) -> np.ndarray:
    return (o[:, positions()] ** 2).sum((0, 2, 3)).double().numpy()


def _rows(
    excess: dict[int, list[np.ndarray]],
    distance: dict[int, list[np.ndarray]],
    stopped: dict[str, list[tuple[float, float]]],
    exact_errors: np.ndarray,
) -> list[Row]:
    first, last = 0, len(AT) - 1
    mean = {k: np.mean(distance[k], 0)[[first, last]] for k in STEPS}
    ratio = max(float((mean[after] / mean[before]).max()) for before, after in pairwise(STEPS))
    at_10 = 1 + np.array(excess[10])
    (isotropic, power_law) = (np.array(stopped[kind]) for kind in ("isotropic", "power_law"))
    late = at_10[:, last] / at_10[:, first]
    worst = float(max(isotropic[:, 0].max(), power_law[:, 0].max()))
    stop = "relative stop at 1e-4"
    rows = [
        Row("largest_ratio", "distance to the exact answer, more steps / fewer, largest", ratio),
        interval_row("late_over_early", "error / exact error at 10 steps, t = 512 over t = 64", late, "x"),
        Row("eps_excess", f"{stop}: |error / exact error - 1|, largest", worst),
        interval_row("eps_steps", f"{stop}: mean steps, isotropic keys", isotropic[:, 1]),
        interval_row("eps_steps_power", f"{stop}: mean steps, power-law keys", power_law[:, 1]),
    ]
    for i, t in ((first, AT[first]), (last, AT[last])):
        rows.append(interval_row(f"exact_{t}", f"exact: error at t = {t}", exact_errors[:, i]))
        for k in STEPS:
            label = f"{k} steps: excess over the exact error at t = {t}"
            rows.append(interval_row(f"excess_{k}_{t}", label, np.array(excess[k])[:, i]))
    return rows


def _figure(distance: dict[int, list[np.ndarray]]) -> str:
    with figure(6.4, 3.4) as (fig, ax):
        colors = (COLORS["Gated DeltaNet"], COLORS["gated linear attention"], COLORS["DeltaNet"], COLORS["Mesa"])
        for i, (t, color) in enumerate(zip(AT, colors, strict=True)):
            ax.loglog(STEPS, [np.mean(distance[k], 0)[i] for k in STEPS], "o-", color=color, label=f"t = {t}")
        ax.set_xticks(STEPS, [str(k) for k in STEPS])
        ax.minorticks_off()
        ax.set_xlabel("conjugate-gradient steps")
        ax.set_ylabel("squared distance to exact (relative)")
        ax.legend(loc="lower left")
        return to_svg(fig, label="Distance to the exact answers against conjugate-gradient steps, at four positions")
