"""Claim `geometry.bias`: what few samples do to an effective rank, and how much of it the correction takes back.

    rows ~ N(0, diag(i^-a)), i = 1..512; N rows; relative error of RankMe against the spectrum they are drawn from

The published curves are plug-in values at N / d of 2.4 and more; `estimate(correction="half")` extrapolates from two
halves.  Every cell of the table draws its own rows by seed.  Beside RankMe: the participation ratio, plug-in and
unbiased, and how often an interval of two jackknife errors around the corrected value holds the truth.
arXiv 2509.23024 reports plug-in values without errors.
"""

from __future__ import annotations

import warnings

import numpy as np
import torch

from commissure.core.rng import torch_generator
from commissure.experiments.claims import Budget, Context, Outcome, Row
from commissure.experiments.rows import interval_row
from commissure.geometry.effective_rank import participation_ratio, rankme
from commissure.geometry.estimation import estimate, folds_of
from commissure.geometry.spectra import FewSamplesWarning, Spectrum
from commissure.report.style import COLORS, figure, to_svg

__all__ = ["run"]

DIM = 512
DECAYS = (0.75, 1.0, 1.5)
RATIOS = (1, 2, 4)  # rows over components
_SEEDS: dict[Budget, int] = {"smoke": 1, "quick": 4, "full": 24}

Errors = dict[tuple[float, int], dict[str, np.ndarray]]


def run(ctx: Context) -> Outcome:
    """Relative errors of every cell and seed; the corrected ones are judged where rows are twice the components."""
    n_seeds = _SEEDS[ctx.budget]
    found: Errors = {}
    cells = [(decay, ratio) for decay in DECAYS for ratio in RATIOS]
    for k, cell in enumerate(cells):
        told = [_cell(*cell, seed=seed) for seed in range(n_seeds)]
        found[cell] = {name: np.array([one[name] for one in told]) for name in told[0]}
        ctx.progress((k + 1) / len(cells), f"decay {cell[0]}, {cell[1]} rows a component")
    rows = _rows(found)
    return Outcome(tuple(rows), ctx.judge(rows, n_seeds), _figure(found), n_seeds, data="simulated: Gaussian rows")


def _cell(decay: float, ratio: int, *, seed: int) -> dict[str, float]:
    """Relative errors of one draw; `held`: whether the interval of the corrected value holds the truth."""
    values = torch.arange(1, DIM + 1, dtype=torch.float64) ** -decay
    truth = rankme(Spectrum.of(values.numpy()))
    ratio_truth = participation_ratio(Spectrum.of(values.numpy()))
    drawn = torch_generator(seed, "bias", f"{decay}", ratio)
    x = torch.randn(ratio * DIM, DIM, generator=drawn, dtype=torch.float64) * values.sqrt()
    is_correctable = ratio > 1  # a half must have as many rows as components
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FewSamplesWarning)  # what few rows do is the question
        folds = folds_of(x, n_folds=16 if is_correctable else 2)
        told = estimate(rankme, folds, correction="half" if is_correctable else None)
        plug_in, unbiased = (participation_ratio(x, unbiased=choice) for choice in (False, True))
    corrected = float("nan") if told.corrected is None else told.corrected
    return {
        "plug_in": told.value / truth - 1,
        "corrected": corrected / truth - 1,
        "held": float(abs(corrected - truth) <= 2 * told.stderr * corrected / told.value),
        "ratio_plug_in": plug_in / ratio_truth - 1,
        "ratio_unbiased": unbiased / ratio_truth - 1,
    }


def _rows(found: Errors) -> list[Row]:
    kept = [cell for cell in found if cell[1] > 1]
    means = {name: {cell: found[cell][name].mean() for cell in found} for name in next(iter(found.values()))}
    worst = max(kept, key=lambda cell: abs(means["corrected"][cell]))
    rows = [
        Row("corrected", "largest mean |error| of the corrected RankMe, 2 and 4 rows a component",
            abs(means["corrected"][worst]), note=f"decay {worst[0]}, {worst[1]} rows a component"),
        interval_row("plug_in", "mean error of the plug-in RankMe, decay .75, 2 rows a component",
                     found[0.75, 2]["plug_in"], note="near the published 2.4 rows a component"),
        Row("unbiased", "largest mean |error| of the unbiased participation ratio, 2 and 4 rows a component",
            max(abs(means["ratio_unbiased"][cell]) for cell in kept)),
        Row("held", "share of draws whose interval (2 jackknife errors) holds the truth, 2 and 4 rows a component",
            float(np.mean([means["held"][cell] for cell in kept]))),
    ]  # fmt: skip
    for (decay, ratio), told in found.items():
        key = f"{decay:g}_{ratio}".replace(".", "")
        label = f"decay {decay:g}, {ratio} rows a component"
        rows.append(interval_row(f"plug_in_{key}", f"RankMe, {label}", told["plug_in"]))
        if ratio > 1:
            rows.append(interval_row(f"corrected_{key}", f"corrected, {label}", told["corrected"]))
    return rows


def _figure(found: Errors) -> str:
    with figure(7.0, 3.4) as (fig, ax):
        for k, decay in enumerate(DECAYS):
            for name, color in (("plug_in", "plug-in"), ("corrected", "corrected")):
                cells = [ratio for ratio in RATIOS if np.isfinite(found[decay, ratio][name]).all()]
                means = [100 * found[decay, ratio][name].mean() for ratio in cells]
                style = ("-", "--", ":")[k]
                ax.plot(cells, means, style, marker="o", color=COLORS[color], label=f"{color}, decay {decay:g}")
        ax.axhline(0, color=COLORS["degree"], linewidth=0.8)
        ax.set_xscale("log")
        ax.set_xticks(RATIOS, [str(ratio) for ratio in RATIOS])
        ax.minorticks_off()
        ax.set(xlabel="rows a component", ylabel="error of RankMe (%)")
        ax.legend(ncols=2, fontsize=9)
        return to_svg(fig, label="Relative error of RankMe by rows a component, plug-in and corrected")
