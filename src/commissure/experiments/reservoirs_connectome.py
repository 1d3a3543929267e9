"""Claim `reservoirs.connectome`: what the modules of a human connectome, and their levels, add to its memory.

    score = mean over delays 1..16, over the other modules' readouts, and over all modules as input in turn, of R^2
    effect = P(a network of one kind scores above one of another)                        (all pairs of seeds)

The connectome has 400 regions, its modules are the medoid of Louvain's partitions and the level above it.  Its nulls
keep every node's degree: in each module and level (`degree+levels`), within and across modules (`degree+modules`), or
no more than that (`degree`).  Ten nodes of each module are read.  The authors' gain and penalty on this network are not
known: those of the block models are used.  Every seed has its own nulls, series and nodes read.
Protocol: bioRxiv 2025.06.20.660760.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from commissure.core.errors import InputError
from commissure.experiments.claims import Budget, Context, Outcome, Row
from commissure.experiments.reservoirs_scores import FIRST_SEED, SETTINGS, memory
from commissure.experiments.rows import effect_row, interval_row
from commissure.report.style import COLORS, figure, to_svg
from commissure.reservoirs.cells import ModuleInputs
from commissure.reservoirs.communities import louvain_hierarchy
from commissure.reservoirs.connectome import Connectome
from commissure.reservoirs.datasets import hcp_s400
from commissure.reservoirs.nulls import Preserve, rewire

__all__ = ["NULLS", "networks", "run", "with_modules"]

NULLS: tuple[Preserve, ...] = ("degree+levels", "degree+modules", "degree")
RADII = (0.6, 0.8, 1.0, 1.2)
SWAPS_PER_EDGE = 100  # proposals: two in three fail within small modules, and the published nulls have 25 that do not
_SEEDS: dict[Budget, int] = {"smoke": 1, "quick": 2, "full": 24}

Scores = dict[str, np.ndarray]  # network: (seeds, radii)


def run(ctx: Context) -> Outcome:
    """Score the connectome and its three nulls at every radius; judge the effects that the statement names."""
    n_seeds = _SEEDS[ctx.budget]
    try:
        original = with_modules()
    except InputError as error:
        return Outcome((), "NOT RUN", note=f"the connectome could not be had ({error})")
    scores: Scores = {kind: np.empty((n_seeds, len(RADII))) for kind in ("connectome", *NULLS)}
    for i in range(n_seeds):
        for k, (kind, network) in enumerate(networks(original, FIRST_SEED + i)):
            scores[kind][i] = _memory(network, FIRST_SEED + i)
            ctx.progress((i + (k + 1) / len(scores)) / n_seeds, f"seed {FIRST_SEED + i}, {kind}")
    rows = _rows(scores)
    sizes = " and ".join(str(int(level.max()) + 1) for level in original.levels[:2])
    note = f"{sizes} modules; gain and penalty of the block models"
    return Outcome(
        tuple(rows), ctx.judge(rows, n_seeds), _figure(scores), n_seeds, note, "real: HCP group consensus, 400 regions"
    )


def with_modules() -> Connectome:
    """The connectome and its modules on two levels."""
    connectome = hcp_s400()
    return connectome.with_levels(louvain_hierarchy(connectome, seed=0).levels[:2])


def networks(original: Connectome, seed: int) -> Iterator[tuple[str, Connectome]]:
    """The connectome and one null of each kind."""
    yield "connectome", original
    for kind in NULLS:
        null = rewire(original, preserve=kind, swaps_per_edge=SWAPS_PER_EDGE, keep_connected=True, seed=seed)
        yield kind, null.connectome


def _memory(network: Connectome, seed: int) -> np.ndarray:
    n_outputs = min(10, *(len(module) for module in network.modules()))
    io, (gain, penalty, _) = ModuleInputs(which="each", n_outputs=n_outputs)(network, seed), SETTINGS["inferred"]
    return memory(network, seed, io=io, radii=RADII, input_gain=gain, penalties=penalty)[0.0, None]


def _rows(scores: Scores) -> list[Row]:
    empirical, levels, modular, degree = (scores[kind] for kind in ("connectome", *NULLS))
    rows = [
        effect_row("hierarchical_over_modular", "P(levels kept > modules kept), least over radii", levels, modular),
        effect_row("modular_over_degree", "P(modules kept > degrees kept), least over radii", modular, degree),
    ]
    for radius in (1.0, 1.2):
        at, key = [RADII.index(radius)], f"empirical_over_modular_{10 * radius:.0f}"
        label = f"P(connectome > modules kept), radius {radius:g}"
        rows.append(effect_row(key, label, empirical[:, at], modular[:, at]))
    for i, radius in enumerate(RADII):
        key, label = f"empirical_over_hierarchical_{radius:g}", f"P(connectome > levels kept), radius {radius:g}"
        rows.append(effect_row(key, label, empirical[:, [i]], levels[:, [i]]))
    for i, radius in enumerate(RADII):
        for key, kind, values in (("levels", "levels kept", levels), ("connectome", "connectome", empirical)):
            label = f"{kind} minus modules kept, paired, radius {radius:g}"
            rows.append(interval_row(f"gain_{key}_{radius:g}", label, (values - modular)[:, i]))
    for kind, values in scores.items():
        for radius, median in zip(RADII, np.median(values, 0), strict=True):
            key = f"median_{kind.replace('+', '_')}_{radius:g}"
            rows.append(Row(key, f"median score, {kind}, radius {radius:g}", float(median)))
    return rows


def _figure(scores: Scores) -> str:
    with figure(6.4, 3.6) as (fig, ax):
        for kind, values in scores.items():
            low, mid, high = np.percentile(values, [0, 50, 100], axis=0)
            ax.fill_between(RADII, low, high, color=COLORS[kind], alpha=0.2, linewidth=0)
            ax.plot(
                RADII, mid, "o-", color=COLORS[kind], label=f"null: {kind}" if kind in NULLS else kind, markersize=4
            )
        ax.set_xticks(RADII)
        ax.set_xlabel("spectral radius")
        ax.set_ylabel("mean R² of the delays")
        ax.legend()
        return to_svg(fig, label="Memory of a human connectome and three nulls against spectral radius")
