"""Claim `reservoirs.hierarchy`: levels of modules in modules add memory, at one number of edges.

    score = mean over delays 1..16 and over the seven modules not driven of R^2 on a series never seen
    effect = P(a network with three levels scores above one with fewer)             (all pairs of seeds)

L1, L2, L3: networks of 8 modules with one to three levels of hierarchy.  Three settings: `inferred` (what the paper
seems to have used), `gain1` (the input four times as strong) and `default` (the published program's defaults, where
the effect is weak and nothing is claimed).  Published score: bioRxiv 2025.06.20.660760, memory capacity.
"""

from __future__ import annotations

import numpy as np

from commissure.core.stats import paired_bootstrap, wilcoxon
from commissure.experiments.claims import Budget, Context, Outcome, Row
from commissure.experiments.reservoirs_scores import FIRST_SEED, RADII, SETTINGS, block_model, memory
from commissure.experiments.rows import effect_row
from commissure.report.style import COLORS, figure, to_svg

__all__ = ["run"]

LEVELS = (1, 2, 3)
NAMES = {"inferred": "inferred setting", "gain1": "input gain 1", "default": "the program's defaults"}
_SEEDS: dict[Budget, int] = {"smoke": 2, "quick": 8, "full": 24}

Scores = dict[str, np.ndarray]  # setting: (levels, seeds, radii)


def run(ctx: Context) -> Outcome:
    """Score networks of every level at every setting; judge the effects that the statement names."""
    n_seeds = _SEEDS[ctx.budget]
    scores: Scores = {name: np.empty((len(LEVELS), n_seeds, len(RADII))) for name in SETTINGS}
    for i in range(n_seeds):
        for name, setting in SETTINGS.items():
            for k, level in enumerate(LEVELS):
                network = block_model(level, prune=setting.prune).sample(FIRST_SEED + i)
                told = memory(network, FIRST_SEED + i, input_gain=setting.input_gain, penalties=setting.penalty)
                scores[name][k, i] = told[0.0, None]
        ctx.progress((i + 1) / n_seeds, f"seed {FIRST_SEED + i}")
    rows = _rows(scores)
    return Outcome(tuple(rows), ctx.judge(rows, n_seeds), _figure(scores), n_seeds, data="sampled networks")


def _rows(scores: Scores) -> list[Row]:
    l1, l2, l3 = scores["inferred"]
    g1, g2, g3 = scores["gain1"]
    below = np.array(RADII) <= 1
    peak = RADII[int(np.median(l3, 0).argmax())]
    rows = [
        effect_row("inferred_l3_over_l1", "P(L3 > L1), least over radii", l3, l1),
        effect_row("inferred_l3_over_l2", "P(L3 > L2), least over radii", l3, l2),
        Row("inferred_peak", "radius of the best median score, L3", peak),
        effect_row(
            "gain1_l3_over_l1", "P(L3 > L1), input gain 1, least over radii up to 1", g3[:, below], g1[:, below]
        ),
        effect_row("gain1_l3_over_l1_above", "P(L3 > L1), input gain 1, least above 1", g3[:, ~below], g1[:, ~below]),
        effect_row("gain1_l3_over_l2", "P(L3 > L2), input gain 1, least over radii", g3, g2),
    ]
    d1, d3 = scores["default"][0], scores["default"][2]
    for i, radius in enumerate(RADII):
        label = f"P(L3 > L1), program's defaults, radius {radius:g}"
        rows.append(effect_row(f"default_l3_over_l1_{radius:g}", label, d3[:, [i]], d1[:, [i]]))
    at = RADII.index(0.8)
    if len(l3) > 1:
        gain = paired_bootstrap(l3[:, at], l1[:, at], seed=0)
        note = f"paired Wilcoxon p = {wilcoxon(l3[:, at], l1[:, at]).p_value:.2g}"
        rows.append(Row("gain_08", "L3 minus L1, paired, radius .8", *gain, note=note))
    for k, level in enumerate(LEVELS):
        median = float(np.median(scores["inferred"][k][:, at]))
        rows.append(Row(f"median_l{level}_08", f"median score, L{level}, radius .8", median))
    return rows


def _figure(scores: Scores) -> str:
    with figure(8.4, 3.4) as (fig, ax):
        ax.remove()
        panels = fig.subplots(1, len(scores), sharex=True)
        for panel, (name, by_level) in zip(panels, scores.items(), strict=True):
            for level, values in zip(LEVELS, by_level, strict=True):
                color = COLORS[f"L{level}"]
                low, mid, high = np.percentile(values, [10, 50, 90], axis=0)
                panel.fill_between(RADII, low, high, color=color, alpha=0.2, linewidth=0)
                panel.plot(RADII, mid, "o-", color=color, label=f"L{level}", markersize=4)
            panel.set_title(NAMES[name])
            panel.set_xticks(RADII)
            panel.set_xlabel("spectral radius")
        panels[0].set_ylabel("mean R² of the delays")
        panels[0].legend()
        return to_svg(fig, label="Memory against spectral radius for one to three levels of modules, at three settings")
