"""Claim `geometry.phases_olmo`: the segmentation finds the phases that were drawn by hand into the published curve.

The curve is RankMe of OLMo-2-7B over its pretraining, 22 points read from a figure (within about 5 %): nothing was
computed from the model.  Between which tokens the phases meet, as the hand and the late rise have it, was written down
before the run; then noise is added, to see what errors of the reading do.

| boundary | between (tokens) | who drew it                   |
|----------|------------------|--------------------------------|
| first    | .65e9 and 2.5e9  | shaded in the figure (2.5e9)    |
| second   | 45e9 and 60e9    | shaded in the figure (60e9)      |
| third    | 1500e9 and 2000e9 | the late rise, not shaded         |

A turning point is one of the two checkpoints at a cut.  arXiv 2509.23024, figure 2.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float64

from commissure.core.rng import generator
from commissure.experiments.claims import Budget, Context, Outcome, Row
from commissure.experiments.rows import share_row
from commissure.geometry.phases import Phase, segment_phases
from commissure.report.style import COLORS, figure, to_svg

__all__ = ["run"]

TOKENS = np.array(
    [0.4, 0.65, 2.5, 4, 6, 9, 13, 20, 30, 45, 60, 90, 140, 200, 300, 450, 700, 1000, 1500, 2000, 3000, 3900]
)  # 1e9
RANKS = np.array(
    [160, 75, 150, 330, 520, 740, 850, 930, 1000, 1035, 1040, 990, 860, 730, 580, 460, 410, 340, 350, 335, 370, 430.0]
)
BOUNDARIES = ((0.65, 2.5), (45, 60), (1500, 2000))
_READING = 0.05  # relative error of a value read from the figure
_NOISE = (0.03, 0.06)
_SEEDS: dict[Budget, int] = {"smoke": 1, "quick": 20, "full": 100}


def run(ctx: Context) -> Outcome:
    """Phases of the curve as read, and of draws around it; judge the turning points."""
    n_seeds = _SEEDS[ctx.budget]
    phases = segment_phases(TOKENS, RANKS, stderr=_READING * RANKS)
    turns = [phase.start for phase in phases[1:]]
    rows = [Row("phases", "phases found", len(phases), paper="3 and a late rise")]
    for k, (name, (first, last)) in enumerate(zip(("first", "second", "third"), BOUNDARIES, strict=True)):
        at = turns[k] if k < len(turns) else float("nan")
        note = f"drawn by hand between {first:g} and {last:g}"
        rows.append(Row(name, f"{name} turning point", at, unit="1e9 tokens", note=note))
    for level in _NOISE:
        rng = generator(int(1000 * level), "olmo curve")
        kept = np.array([_kept(RANKS * np.exp(level * rng.standard_normal(len(RANKS))), level) for _ in range(n_seeds)])
        label = f"draws with {level:.0%} more noise: same phases, boundaries within one checkpoint"
        rows.append(share_row(f"noise_{100 * level:.0f}", label, kept))
    data = "22 values read from a published figure"
    return Outcome(tuple(rows), ctx.judge(rows, n_seeds), _figure(phases), n_seeds, data=data)


def _kept(ranks: Float64[np.ndarray, " checkpoints"], level: float) -> bool:
    """Whether a noisy curve has the four phases, each boundary at most one checkpoint off its two."""
    phases = segment_phases(TOKENS, ranks, stderr=np.hypot(level, _READING) * ranks)
    if [phase.change > 0 for phase in phases] != [False, True, False, True]:
        return False
    places = np.searchsorted(TOKENS, np.array(BOUNDARIES))
    return all(
        low - 1 <= phase.first <= high + 1 for phase, (low, high) in zip(phases[1:], places.tolist(), strict=True)
    )


def _figure(phases: tuple[Phase, ...]) -> str:
    with figure(7.0, 3.6) as (fig, ax):
        for k, phase in enumerate(phases):
            ax.axvspan(phase.start, phase.stop, color=COLORS["rank"], alpha=0.16 if k % 2 else 0.05, linewidth=0)
            middle = np.sqrt(phase.start * phase.stop)
            ax.text(middle, 1500 if k % 2 else 1230, phase.kind, ha="center", fontsize=10)
        ax.plot(TOKENS, RANKS, "o-", color=COLORS["rank"], markersize=4)
        ax.set(xscale="log", yscale="log", ylim=(60, 1900), xlabel="tokens (1e9)", ylabel="RankMe, read from a figure")
        return to_svg(
            fig, label="Published RankMe of OLMo-2-7B over tokens with the phases that the segmentation finds"
        )
