"""Claim `reservoirs.timescales`: slow regions are slow units of the connectome, and levels spread timescales.

    tau_i = -1 / slope of the log autocorrelation of unit i, mean over the modules driven that do not hold i
    map   = Spearman correlation of tau with the timescales of the regions' magnetoencephalograms, radius .8
    spread = standard deviation of tau over the units of one block model that are not driven, radius 1

The same networks, gain and series as `reservoirs.connectome` and `reservoirs.hierarchy`.  The published range of the
mean tau, 4.59 to 5.49 steps, is shown beside ours and not claimed.
bioRxiv 2025.06.20.660760: Spearman .444.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int

from commissure.core.errors import InputError
from commissure.experiments.claims import Budget, Context, Outcome, Row
from commissure.experiments.reservoirs_connectome import NULLS, networks, with_modules
from commissure.experiments.reservoirs_scores import FIRST_SEED, SETTINGS, TASK, block_model
from commissure.experiments.rows import effect_row, interval_row
from commissure.native.reservoir import reservoir_matrix, reservoir_scan
from commissure.report.style import COLORS, figure, to_svg
from commissure.reservoirs.cells import ModuleInputs
from commissure.reservoirs.connectome import Connectome
from commissure.reservoirs.datasets import meg_timescales
from commissure.reservoirs.spectral import spectral_radius
from commissure.reservoirs.timescales import timescales

__all__ = ["run"]

LEVELS = (1, 2, 3)
PUBLISHED = {"low": 4.59, "high": 5.49}  # steps, 2.5th and 97.5th percentile of the mean tau over units
_SEEDS: dict[Budget, int] = {"smoke": 1, "quick": 6, "full": 12}

Found = dict[str, np.ndarray]


def run(ctx: Context) -> Outcome:
    """Timescale maps of the connectome and its nulls, and of the block models of every level; judge them."""
    n_seeds = _SEEDS[ctx.budget]
    try:
        original, meg = with_modules(), meg_timescales()
    except InputError as error:
        return Outcome((), "NOT RUN", note=f"the connectome could not be had ({error})")
    found: Found = {name: np.empty(n_seeds) for name in ("connectome", *NULLS, "low", "high")}
    spread: Found = {f"L{level}": np.empty(n_seeds) for level in LEVELS}
    for i in range(n_seeds):
        seed = FIRST_SEED + i
        for kind, network in networks(original, seed):
            tau = timescale_map(network, network.modules(), radius=0.8, seed=seed)
            found[kind][i] = rank_correlation(tau, meg)
            if kind == "connectome":
                found["low"][i], found["high"][i] = np.nanpercentile(tau, [2.5, 97.5])
        for level in LEVELS:
            model = block_model(level, prune=SETTINGS["inferred"].prune).sample(seed)
            driven = ModuleInputs()(model, seed)[0].inputs
            spread[f"L{level}"][i] = np.nanstd(timescale_map(model, driven, radius=1.0, seed=seed))
        ctx.progress((i + 1) / n_seeds, f"seed {seed}: Spearman {found['connectome'][i]:.3f}")
    rows = _rows(found, spread)
    data = "real: HCP group consensus and MEG, 400 regions; sampled networks"
    return Outcome(tuple(rows), ctx.judge(rows, n_seeds), _figure(found, spread), n_seeds, data=data)


def timescale_map(
    network: Connectome, driven: Sequence[Int[np.ndarray, " members"]], *, radius: float, seed: int
) -> Float[np.ndarray, " nodes"]:
    """Steps, of every node: the mean over the `driven` modules that do not hold it; nan where all do."""
    data = TASK.data(seed, "train")
    inputs = np.zeros((len(driven), 1, network.n_nodes))
    for row, nodes in zip(inputs, driven, strict=True):
        row[0, nodes] = SETTINGS["inferred"].input_gain
    states = reservoir_scan(
        reservoir_matrix(network.weights, dtype=torch.float32),
        torch.from_numpy(data.inputs).float().expand(len(driven), -1, -1).contiguous(),
        torch.zeros(len(driven), network.n_nodes),
        torch.from_numpy(inputs).float(),
        scale=torch.full((len(driven),), radius / spectral_radius(network.weights).value),
    ).states
    tau = timescales(states[:, data.warmup :].numpy()).values
    free = np.isfinite(tau) & (inputs[:, 0] == 0)
    with np.errstate(invalid="ignore"):
        return np.where(free, tau, 0.0).sum(0) / free.sum(0)


def rank_correlation(a: Float[np.ndarray, " nodes"], b: Float[np.ndarray, " nodes"]) -> float:
    """Spearman's, over the nodes that have both."""
    from scipy.stats import spearmanr

    both = np.isfinite(a) & np.isfinite(b)
    return float(spearmanr(a[both], b[both]).statistic)


def _rows(found: Found, spread: Found) -> list[Row]:
    empirical = found["connectome"]
    names = {"hierarchical": "degree+levels", "modular": "degree+modules", "degree": "degree"}
    rows = [interval_row("empirical", "Spearman of tau and MEG, connectome", empirical, note="published .444")]
    for name, null in names.items():
        label = f"Spearman, connectome minus {null}, paired"
        rows.append(interval_row(f"over_{name}", label, empirical - found[null]))
    label = "P(spread of tau, L3 > L1), radius 1"
    rows.append(effect_row("spread_l3_over_l1", label, spread["L3"][:, None], spread["L1"][:, None]))
    for name, null in names.items():
        rows.append(interval_row(f"null_{name}", f"Spearman of tau and MEG, {null}", found[null]))
    for level, values in spread.items():
        rows.append(
            Row(f"spread_{level.lower()}", f"median spread of tau, {level}", float(np.median(values)), unit="steps")
        )
    for end, quoted in PUBLISHED.items():
        percentile = "2.5th" if end == "low" else "97.5th"
        label = f"{percentile} percentile of tau over regions"
        rows.append(interval_row(f"tau_{end}", label, found[end], "steps", f"published {quoted}, not claimed"))
    return rows


def _tick(kind: str) -> str:
    return "null:\n" + kind.replace("+", "\n+ ") if kind in NULLS else kind


def _figure(found: Found, spread: Found) -> str:
    with figure(8.0, 3.4) as (fig, ax):
        ax.remove()
        left, right = fig.subplots(1, 2, width_ratios=(4, 3))
        for panel, groups, label in (
            (left, {kind: found[kind] for kind in ("connectome", *NULLS)}, "Spearman correlation with MEG"),
            (right, spread, "standard deviation of tau (steps)"),
        ):
            for x, (kind, values) in enumerate(groups.items()):
                beside = x + np.linspace(-0.2, 0.2, len(values))  # seeds from left to right
                panel.plot(beside, values, "o", color=COLORS[kind], alpha=0.7, markersize=4)
                panel.plot([x - 0.25, x + 0.25], [np.median(values)] * 2, "-", color=COLORS[kind])
            panel.set_xticks(range(len(groups)), [_tick(kind) for kind in groups])
            panel.set_ylabel(label)
        return to_svg(
            fig, label="Agreement of reservoir and brain timescales by network; spread of timescales by level"
        )
