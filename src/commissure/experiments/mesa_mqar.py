"""Claim `mesa.mqar`: multi-query associative recall learned by two-layer models with keys of 16 dimensions.

    n pairs in T tokens, vocabulary 128; width 64, two mixers, 2 heads of width 16, no MLPs: about 34,000 parameters
    AdamW, 600 steps of 32 new sequences, one cycle; accuracy on 1,024 sequences nobody trained on

The recurrent mixers have the same projections, convolution, norms and training; the learning rate of each is the best
of one grid, chosen on a seed of its own (`search`; figures in LOG.md).  Attention, with rotary positions and no
convolution, is context and not a rival: it keeps every token, and 600 steps do not teach it this task.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from commissure.experiments.claims import Budget, Context, Outcome, Row
from commissure.experiments.rows import interval_row
from commissure.mesa.fit import FitConfig, FitResult, fit
from commissure.mesa.tasks import MQAR
from commissure.report.style import COLORS, figure, to_svg

__all__ = ["run", "search"]

MIXERS = {
    "Mesa": "mesa",
    "Gated DeltaNet": "gated_deltanet",
    "gated linear attention": "gated_linear",
    "attention": "attention",
}
TASKS = {n_pairs: MQAR(n_pairs=n_pairs, length=length, vocab=128) for n_pairs, length in ((16, 64), (24, 96))}
GRID = (2e-3, 5e-3, 1e-2, 2e-2, 4e-2)
SEARCH_SEED = 100
RATES = {
    16: {"Mesa": 1e-2, "Gated DeltaNet": 1e-2, "gated linear attention": 2e-2, "attention": 5e-3},
    24: {"Mesa": 2e-2, "Gated DeltaNet": 1e-2, "gated linear attention": 2e-2, "attention": 1e-2},
}
_SIZES: dict[Budget, tuple[int, int]] = {"smoke": (1, 10), "quick": (1, 10), "full": (3, 600)}  # seeds, steps


def _fit(name: str, n_pairs: int, *, lr: float, steps: int, seed: int) -> FitResult:
    config = FitConfig(lr=lr, steps=steps, validate_every=steps, test_size=1024)
    return fit(TASKS[n_pairs], MIXERS[name], config=config, seed=seed)


def search() -> Iterator[tuple[int, str, float, float]]:
    """Accuracy of every mixer at every rate of the grid: (pairs, mixer, rate, accuracy); about half an hour."""
    for n_pairs in TASKS:
        for name in MIXERS:
            for lr in GRID:
                fitted = _fit(name, n_pairs, lr=lr, steps=_SIZES["full"][1], seed=SEARCH_SEED)
                yield n_pairs, name, lr, fitted.final.value


def run(ctx: Context) -> Outcome:
    """Train every mixer on both sizes; differences are paired by seed: same batches, same test sequences."""
    n_seeds, steps = _SIZES[ctx.budget]
    found: dict[tuple[str, int], np.ndarray] = {}
    done, total = 0, len(TASKS) * len(MIXERS) * n_seeds
    for n_pairs in TASKS:
        for name in MIXERS:
            values = []
            for seed in range(n_seeds):
                fitted = _fit(name, n_pairs, lr=RATES[n_pairs][name], steps=steps, seed=seed)
                values.append(fitted.final.value)
                done += 1
                ctx.progress(done / total, f"{n_pairs} pairs, {name}, seed {seed}: {values[-1]:.3f}")
            found[name, n_pairs] = np.array(values)
    rows = _rows(found)
    rates = "; ".join(
        f"{n} pairs: " + ", ".join(f"{name} {lr:g}" for name, lr in rates.items()) for n, rates in RATES.items()
    )
    note = f"learning rates, the best of {', '.join(f'{lr:g}' for lr in GRID)} on another seed: {rates}"
    return Outcome(tuple(rows), ctx.judge(rows, n_seeds), _figure(found), n_seeds, note, "generated sequences")


def _rows(found: dict[tuple[str, int], np.ndarray]) -> list[Row]:
    rows = []
    for n_pairs in TASKS:
        for name in MIXERS:
            key = f"{MIXERS[name]}_{n_pairs}"
            note = "context: keeps every token, has no convolution" if name == "attention" else ""
            rows.append(interval_row(key, f"{name}: accuracy, {n_pairs} pairs", found[name, n_pairs], note=note))
        for name in ("gated linear attention", "Gated DeltaNet"):
            lead = found["Mesa", n_pairs] - found[name, n_pairs]
            key = f"over_{MIXERS[name]}_{n_pairs}"
            rows.append(interval_row(key, f"Mesa - {name}, accuracy, {n_pairs} pairs", lead))
    return rows


def _figure(found: dict[tuple[str, int], np.ndarray]) -> str:
    with figure(6.4, 3.2) as (fig, ax):
        for i, n_pairs in enumerate(TASKS):
            for j, name in enumerate(MIXERS):
                place, values = i * (len(MIXERS) + 1) + j, 100 * (1 - found[name, n_pairs])
                label = name if i == 0 else None
                ax.bar(place, values.mean(), 0.8, color=COLORS[name], label=label)
                ax.plot(np.full(len(values), place), values, "o", ms=3, mfc="none", color="#010203")
        centers = [i * (len(MIXERS) + 1) + (len(MIXERS) - 1) / 2 for i in range(len(TASKS))]
        ax.set_xticks(centers, [f"{n} pairs, {task.length} tokens" for n, task in TASKS.items()])
        ax.set_ylabel("wrong answers (%)")
        ax.legend()
        return to_svg(fig, label="Wrong answers in percent after training, four mixers, at 16 and at 24 pairs")
