"""Claim `reservoirs.timescales`: slow units of a connectome lie where magnetoencephalograms are slow.

    tau_i = timescale of unit i, from 33 lags of its autocorrelation, mean over the inputs that do not drive it
    empirical = Spearman's correlation of tau with the timescales measured, over 400 regions, at radius .8

The same for the three rewirings of `reservoirs.connectome`, paired by seed.  `spread`: the standard deviation of tau
over the units not driven of sampled networks of eight modules, at radius 1.  The published range of tau on the
connectome, 4.59 to 5.49 steps, is printed beside ours and not claimed.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float

from commissure.core.errors import InputError
from commissure.core.rng import generator
from commissure.experiments.claims import Budget, Context, Outcome, Row
from commissure.experiments.mesa_in_context import interval_row
from commissure.experiments.reservoirs_connectome import KINDS, connectome, networks
from commissure.experiments.reservoirs_scores import FIRST_SEED, SETTINGS, TASK, block_model, effect
from commissure.report.style import COLORS, figure, to_svg
from commissure.reservoirs.connectome import Connectome
from commissure.reservoirs.datasets import meg_timescales
from commissure.reservoirs.reservoir import Reservoir
from commissure.reservoirs.timescales import timescales

__all__ = ["run"]

LEVELS = (0, 1, 2, 3)
PUBLISHED = (4.59, 5.49)  # steps, the 2.5th and 97.5th percentile
_SIZES: dict[Budget, tuple[int, int]] = {
    "smoke": (1, 1),
    "quick": (3, 6),
    "full": (8, 24),
}  # seeds: connectome, sampled


def run(ctx: Context) -> Outcome:
    """Compare maps of timescales with magnetoencephalography, and spreads between levels of modules."""
    from scipy.stats import spearmanr

    n_seeds, n_sampled = _SIZES[ctx.budget]
    try:
        base, measured = connectome(), meg_timescales()
    except InputError as error:
        return Outcome((), "NOT RUN", note=f"the connectome could not be had ({error})")
    correlations: dict[str, list[float]] = {kind: [] for kind in KINDS}
    maps = []
    for i in range(n_seeds):
        for kind, network in networks(base, FIRST_SEED + i):
            tau = _timescales(network, base.modules(), radius=0.8, seed=FIRST_SEED + i)
            correlations[kind].append(float(spearmanr(tau, measured).statistic))
            maps += [tau] if kind == "connectome" else []
        ctx.progress((i + 1) / (n_seeds + 1), f"seed {FIRST_SEED + i}")
    spreads = np.array([[_spread(level, FIRST_SEED + i) for i in range(n_sampled)] for level in LEVELS])
    rows = _rows({kind: np.array(values) for kind, values in correlations.items()}, np.array(maps), spreads)
    drawn = _figure(np.mean(maps, 0), measured, correlations)
    data = "real: HCP group consensus and MEG timescales, 400 parcels; sampled networks"
    return Outcome(tuple(rows), ctx.judge(rows, n_seeds), drawn, n_seeds, data=data)


def _timescales(
    network: Connectome, driven: Sequence[np.ndarray], *, radius: float, seed: int
) -> Float[np.ndarray, " nodes"]:
    """tau of every unit, mean over the runs in which it is not driven; run i drives the nodes `driven[i]`."""
    weights = np.zeros((len(driven), network.n_nodes))
    for i, nodes in enumerate(driven):
        weights[i, nodes] = 1.0
    gain = SETTINGS["inferred"].input_gain
    reservoir = Reservoir(network, inputs=weights, spectral_radius=radius, input_gain=gain, dtype=torch.float64)
    series = torch.from_numpy(TASK.data(seed, "train").inputs[:, 0])
    inputs = torch.eye(len(driven), dtype=torch.float64)[:, None, :] * series[:, None]  # run i feeds channel i alone
    with torch.no_grad():
        states, _ = reservoir(inputs)
    tau = timescales(states[:, TASK.warmup :].numpy()).values
    tau = np.ma.masked_invalid(np.where(weights > 0, np.nan, tau))
    return tau.mean(0).filled(np.nan)


def _spread(level: int, seed: int) -> float:
    network = block_model(level, prune=SETTINGS["inferred"].prune).sample(seed)
    modules = network.modules()
    driven = modules[int(generator(seed, "driven module").integers(len(modules)))]
    free = np.setdiff1d(np.arange(network.n_nodes), driven)
    return float(np.nanstd(_timescales(network, [driven], radius=1.0, seed=seed)[free]))


def _rows(correlations: dict[str, np.ndarray], maps: np.ndarray, spreads: np.ndarray) -> list[Row]:
    own = correlations["connectome"]
    names = {"degree+levels": "over_hierarchical", "degree+modules": "over_modular", "degree": "over_degree"}
    low, high = np.percentile(maps, [2.5, 97.5], axis=1).mean(1)
    note = f"published: {PUBLISHED[0]} to {PUBLISHED[1]}, not claimed"
    return [
        interval_row("empirical", "Spearman with MEG, connectome, radius .8", own, note="published: .444"),
        *(
            interval_row(key, f"connectome minus {kind}, Spearman", own - correlations[kind])
            for kind, key in names.items()
        ),
        *(
            Row(f"spread_l3_over_l{level}", f"P(L3 > L{level}), spread of timescales, radius 1", float(p))
            for level in (1, 2)
            for p in effect(spreads[3][:, None], spreads[level][:, None])
        ),
        *(
            Row(f"spread_{level}", f"median spread, level {level}", float(np.median(row)), unit="steps")
            for level, row in zip(LEVELS, spreads, strict=True)
        ),
        *(interval_row(f"{kind}_correlation", f"Spearman with MEG, {kind}", correlations[kind]) for kind in KINDS[1:]),
        Row("tau_low", "2.5th percentile of tau on the connectome", float(low), unit="steps", note=note),
        Row("tau_high", "97.5th percentile of tau on the connectome", float(high), unit="steps"),
    ]


def _figure(tau: np.ndarray, measured: np.ndarray, correlations: dict[str, list[float]]) -> str:
    with figure(8.0, 3.4) as (fig, ax):
        ax.remove()
        left, right = fig.subplots(1, 2)
        left.plot(tau, measured, "o", color=COLORS["connectome"], markersize=3, alpha=0.6)
        left.set_xlabel("timescale of the unit (steps)")
        left.set_ylabel("timescale of the region, MEG (ms)")
        for at, (kind, values) in enumerate(correlations.items()):
            right.plot(np.full(len(values), at), values, "o", color=COLORS[kind], markersize=5)
        right.set_xticks(range(len(correlations)), [kind.replace("+", "+\n") for kind in correlations])
        right.set_ylabel("Spearman with MEG")
        return to_svg(fig, label="Timescales of reservoir units against those of brain regions; correlation by network")
