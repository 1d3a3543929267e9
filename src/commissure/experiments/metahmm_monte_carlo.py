"""Claim `metahmm.monte_carlo`: predictors that sample tasks against one that does not, at matched test compute.

On "e64", trained on 56 of 64 tasks; a seed draws environment, split, weights and batches (`metahmm_contenders`).  K
codes a position, each distinct one decoded once a sequence.  `gated` samples by importance where the sampler's own
entropy is below a threshold, and leaves the other positions to the implicit predictor.

    rival       an implicit predictor of the least width whose operations a predicted token are at least those of
                `gated`: encoder, table of proposals, fallback, and the conditional predictor at each position it
                decodes; trained as many steps as each part of `gated`, which are more operations than theirs together
    all, amb    mean Div over all positions; over those where 1 <= H < 4.5 nats, H the exact entropy of the task
    rival_...   rival's Div / gated Div, paired by seed

Every part, the rival too, has the best of three learning rates on a seed of its own (`metahmm_search`); K and threshold
of `gated` are from that seed too.
"""

from __future__ import annotations

import numpy as np

from commissure.experiments.claims import Budget, Context, Outcome, Row
from commissure.experiments.metahmm_contenders import CHOSEN, DIM, NARROW, STEPS, World, implicit, stack, world
from commissure.experiments.metahmm_mixtures import BANDS, FEW, N_SAMPLES, contenders, cost, evaluate
from commissure.experiments.rows import interval_row
from commissure.report.style import COLORS, figure, to_svg

__all__ = ["rival_width", "run"]

WIDTH_STEP = 4
SETS = {"train": "training tasks", "held_out": "held-out tasks"}
SHOWN = {
    "implicit": "implicit",
    "rival": "implicit, widened to the cost of gated",
    "gated": f"gated importance, K = {N_SAMPLES}",
    "plain_few": f"plain, K = {FEW}",
    "plain": f"plain, K = {N_SAMPLES}",
    "importance_few": f"importance, K = {FEW}",
    "importance": f"importance, K = {N_SAMPLES}",
    "smc": f"particles, K = {FEW}",
    "posterior": f"exact posterior, plain, K = {N_SAMPLES}",
    "enumeration": "all 64 tasks",
}
_SIZES: dict[Budget, tuple[int, int]] = {"smoke": (1, 4), "quick": (1, 100), "full": (3, STEPS)}  # seeds, steps


def run(ctx: Context) -> Outcome:
    """Train and measure every seed."""
    n_seeds, steps = _SIZES[ctx.budget]
    found = []
    for seed in range(n_seeds):
        found.append(measure(world(seed, steps)))
        gain = found[-1]["rival train all"] / found[-1]["gated train all"]
        ctx.progress((seed + 1) / n_seeds, f"seed {seed}: rival / gated = {gain:.2f}")
    rows = _rows(found)
    widths = ", ".join(f"{f['width']:.0f}" for f in found)
    note = f"{steps} steps each; widths: rivals {widths}, implicit {DIM}, conditional and sampler {NARROW}"
    data = "generated sequences, e64"
    return Outcome(tuple(rows), ctx.judge(rows, n_seeds), _figure(found), n_seeds, note, data)


def measure(w: World) -> dict[str, float]:
    """'<contender> <set> <band>': mean Div in nats; '<contender> cost': operations a predicted token."""
    base = implicit(w, DIM, CHOSEN["implicit"])
    found: dict[str, float] = {}
    for name, predictor in contenders(w, base).items():
        found |= evaluate(w, name, predictor)
    width = rival_width(w, found["gated cost"])
    rival = implicit(w, width, CHOSEN["rival"])
    return found | {"width": float(width)} | evaluate(w, "rival", rival)


def rival_width(w: World, operations: float) -> int:
    """The least width, in steps of 4, of an implicit predictor that costs as much."""
    return next(dim for dim in range(DIM, 1024, WIDTH_STEP) if cost(stack(w, dim)) >= operations)


def _rows(found: list[dict[str, float]]) -> list[Row]:
    def values(key: str) -> np.ndarray:
        return np.array([f[key] for f in found])

    rows = []
    for which, label in SETS.items():
        for band in ("all", "amb", "low"):
            for name in ("rival", "implicit"):
                ratio = values(f"{name} {which} {band}") / values(f"gated {which} {band}")
                rows.append(
                    interval_row(f"{name}_{which}_{band}", f"{SHOWN[name]} / gated, Div, {label}, {band}", ratio, "x")
                )
    for name, label in SHOWN.items():
        cost = values(f"{name} cost") / values("implicit cost")
        rows.append(interval_row(f"{name}_cost", f"{label}: operations a token, of the implicit one's", cost, "x"))
        for which, of in SETS.items():
            for band in BANDS:
                key = f"div_{name}_{which}_{band}"
                rows.append(interval_row(key, f"{label}: Div, {of}, {band}", values(f"{name} {which} {band}"), "nats"))
    return rows


def _figure(found: list[dict[str, float]]) -> str:
    with figure(7.2, 4.0) as (fig, ax):
        ax.remove()
        panels = fig.subplots(1, 2, sharey=True)
        for panel, band in zip(panels, ("all", "amb"), strict=True):
            for place, name in enumerate(reversed(SHOWN)):
                for which, marker, color in (("train", "o", COLORS["Mesa"]), ("held_out", "x", COLORS["GRU"])):
                    values = [f[f"{name} {which} {band}"] for f in found]
                    label = SETS[which] if place == 0 else None
                    panel.plot(values, [place] * len(values), marker, color=color, label=label)
            panel.set_xscale("log")
            ticks = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
            panel.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            panel.minorticks_off()
            panel.set_xlabel("Div from the optimum (nats)")
            panel.set_title("all positions" if band == "all" else "1 ≤ H < 4.5 nats")
        panels[0].set_yticks(range(len(SHOWN)), list(reversed(SHOWN.values())))
        fig.legend(*panels[0].get_legend_handles_labels(), loc="outside upper right", ncols=2)
        return to_svg(fig, label="Divergence of each predictor from the optimum, one dot a seed, log scale")
