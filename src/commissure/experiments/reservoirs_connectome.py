"""Claim `reservoirs.connectome`: what the modules of a human connectome, and their hierarchy, add to memory.

    score = mean over the modules driven, one at a time, over the other modules and over delays 1..16 of R^2

Of every module not driven ten nodes are read, or as many as the smallest module has.  Beside the connectome, each seed
has three rewirings of it, which keep the degrees of every node: within the smallest modules and between modules of each
level apart (`degree+levels`), within and between modules (`degree+modules`), anywhere (`degree`).  A seed draws
rewirings, series and nodes read.  Readout and gain are those of `inferred`; the paper's own for this arm are not known.
Effects: P(a network of one kind scores above one of another), all pairs of seeds.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from commissure.core.errors import InputError
from commissure.experiments.claims import Budget, Context, Outcome, Row
from commissure.experiments.reservoirs_scores import FIRST_SEED, SETTINGS, effect, memory
from commissure.report.style import COLORS, figure, to_svg
from commissure.reservoirs.communities import louvain_hierarchy
from commissure.reservoirs.connectome import Connectome
from commissure.reservoirs.datasets import hcp_s400
from commissure.reservoirs.io_map import IOMap
from commissure.reservoirs.nulls import Preserve, rewire

__all__ = ["connectome", "maps", "networks", "run"]

RADII = (0.6, 0.8, 1.0, 1.2)
NULLS: tuple[Preserve, ...] = ("degree+levels", "degree+modules", "degree")
KINDS = ("connectome", *NULLS)
RUNS_OF_LOUVAIN, SWAPS_PER_EDGE, N_READ = 100, 25, 10
_SIZES: dict[Budget, tuple[int, int]] = {"smoke": (1, 2), "quick": (3, 5), "full": (24, 15)}  # seeds, modules driven

Scores = dict[str, np.ndarray]  # kind: (seeds, radii)


def run(ctx: Context) -> Outcome:
    """Score the connectome and its rewirings; judge the effects that the statement names."""
    n_seeds, n_driven = _SIZES[ctx.budget]
    try:
        base = connectome()
    except InputError as error:
        return Outcome((), "NOT RUN", note=f"the connectome could not be had ({error})")
    scores: Scores = {kind: np.empty((n_seeds, len(RADII))) for kind in KINDS}
    gain, penalty, _ = SETTINGS["inferred"]
    for i in range(n_seeds):
        for kind, network in networks(base, FIRST_SEED + i):
            io = maps(base, FIRST_SEED + i)[:n_driven]
            told = memory(network, FIRST_SEED + i, io=io, radii=RADII, input_gain=gain, penalties=penalty)
            scores[kind][i] = told[0.0, None]
        ctx.progress((i + 1) / n_seeds, f"seed {FIRST_SEED + i}")
    rows = _rows(scores)
    sizes = " in ".join(str(int(level.max()) + 1) for level in base.levels[:2])
    data = f"real: HCP group consensus, 400 parcels; {sizes} modules"
    return Outcome(tuple(rows), ctx.judge(rows, n_seeds), _figure(scores), n_seeds, data=data)


def connectome() -> Connectome:
    """The connectome with its two finest levels of modules, the medoid of 100 runs of Louvain."""
    base = hcp_s400()
    return base.with_levels(louvain_hierarchy(base, n_runs=RUNS_OF_LOUVAIN, seed=0).levels[:2])


def networks(base: Connectome, seed: int) -> Iterator[tuple[str, Connectome]]:
    """The connectome and its rewirings of this seed."""
    yield "connectome", base
    for preserve in NULLS:
        yield preserve, rewire(base, preserve=preserve, swaps_per_edge=SWAPS_PER_EDGE, seed=seed).connectome


def maps(base: Connectome, seed: int) -> list[IOMap]:
    """One for each module driven: some nodes of every other module are read."""
    modules = base.modules()
    n_read = min(N_READ, *map(len, modules))
    return [IOMap.from_modules(modules, inputs=[i], n_outputs=n_read, seed=seed) for i in range(len(modules))]


def _rows(scores: Scores) -> list[Row]:
    levels, modules, degree = (scores[kind] for kind in NULLS)
    own = effect(scores["connectome"], modules)
    rows = [
        Row(
            "hierarchical_over_modular",
            "P(degree+levels > degree+modules), least",
            float(effect(levels, modules).min()),
        ),
        Row(
            "modular_over_degree", "P(degree+modules > degree), least over radii", float(effect(modules, degree).min())
        ),
        *(
            Row(
                f"empirical_over_modular_{radius * 10:02.0f}",
                f"P(connectome > degree+modules), radius {radius:g}",
                float(p),
            )
            for radius, p in zip(RADII, own, strict=True)
        ),
    ]
    for kind in KINDS:
        for radius, median in zip(RADII, np.median(scores[kind], 0), strict=True):
            rows.append(Row(f"{kind}_{radius:g}", f"median score, {kind}, radius {radius:g}", float(median)))
    return rows


def _figure(scores: Scores) -> str:
    with figure(6.4, 3.6) as (fig, ax):
        for kind, values in scores.items():
            ax.fill_between(RADII, values.min(0), values.max(0), color=COLORS[kind], alpha=0.2, linewidth=0)
            ax.plot(RADII, np.median(values, 0), "o-", color=COLORS[kind], label=kind, markersize=4)
        ax.set_xticks(RADII)
        ax.set_xlabel("spectral radius")
        ax.set_ylabel("mean R² of the delays")
        ax.legend()
        return to_svg(fig, label="Memory against spectral radius for a human connectome and three rewirings of it")
