"""Claim `reservoirs.noise`: where the memory that a hierarchy of modules adds survives noise and coarse states.

    read state = x + sigma * normal, or x rounded to 2^8 levels from -1 to 1        (training and test series alike)

Five networks a seed, equal in their expected number of edges: random, the three-level network rewired with its degrees
kept, one level of modules, two, three.  States in float32, Gram matrices in float64.  The penalty is the published one
where states are clean, else by generalized cross-validation for every readout, over ten values from 1e-8 to 10.
Effects: P(a network of one kind scores above one of another), all pairs of seeds.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch

from commissure.experiments.claims import Budget, Context, Outcome, Row
from commissure.experiments.reservoirs_scores import FIRST_SEED, RADII, SETTINGS, block_model, memory
from commissure.experiments.rows import effect_row
from commissure.report.style import COLORS, figure, to_svg
from commissure.reservoirs.connectome import Connectome
from commissure.reservoirs.nulls import rewire

__all__ = ["run"]

PENALTIES = tuple(np.logspace(-8, 1, 10).tolist())
CONDITIONS = {"clean": (0.0, None), "noise 1e-3": (1e-3, None), "noise 1e-2": (1e-2, None), "8-bit": (0.0, 8)}
NETWORKS = ("random", "rewired", "L1", "L2", "L3")
_SEEDS: dict[Budget, int] = {"smoke": 2, "quick": 12, "full": 24}

Scores = dict[str, dict[str, np.ndarray]]  # condition, network: (seeds, radii)


def run(ctx: Context) -> Outcome:
    """Score the five networks of every seed under the four conditions; judge the effects that the statement names."""
    n_seeds = _SEEDS[ctx.budget]
    scores: Scores = {name: {kind: np.empty((n_seeds, len(RADII))) for kind in NETWORKS} for name in CONDITIONS}
    for i in range(n_seeds):
        for kind, network in _networks(FIRST_SEED + i):
            for name, values in _scores(network, FIRST_SEED + i):
                scores[name][kind][i] = values
        ctx.progress((i + 1) / n_seeds, f"seed {FIRST_SEED + i}")
    rows = _rows(scores)
    return Outcome(tuple(rows), ctx.judge(rows, n_seeds), _figure(scores), n_seeds, data="sampled networks")


def _networks(seed: int) -> Iterable[tuple[str, Connectome]]:
    prune = SETTINGS["inferred"].prune
    for level, kind in enumerate(("random", "L1", "L2", "L3")):
        network = block_model(level, prune=prune).sample(seed)
        yield kind, network
    yield "rewired", rewire(network, preserve="degree", swaps_per_edge=10, keep_connected=True, seed=seed).connectome


def _scores(network: Connectome, seed: int) -> Iterable[tuple[str, np.ndarray]]:
    gain, published, _ = SETTINGS["inferred"]
    noises = tuple(noise for noise, _ in CONDITIONS.values() if noise)
    for read_noise, read_bits, penalties in (
        ((0.0,), None, published),
        (noises, None, PENALTIES),
        ((0.0,), 8, PENALTIES),
    ):
        told = memory(
            network,
            seed,
            input_gain=gain,
            penalties=penalties,
            read_noise=read_noise,
            read_bits=(read_bits,),
            dtype=torch.float32,
        )
        yield from ((name, told[condition]) for name, condition in CONDITIONS.items() if condition in told)


def _rows(scores: Scores) -> list[Row]:
    def pair(a: str, b: str, *conditions: str, radii: tuple[float, ...] = RADII) -> tuple[np.ndarray, np.ndarray]:
        at = [RADII.index(radius) for radius in radii]
        x, y = (np.concatenate([scores[name][kind][:, at] for name in conditions], axis=1) for kind in (a, b))
        return x, y

    fine, bits = (pair("L3", "random", name, radii=(0.8, 1.0)) for name in ("noise 1e-3", "8-bit"))
    at_1, above = (pair("L3", "random", "noise 1e-2", radii=radii) for radii in ((1.0,), (1.2, 1.4)))
    noisy = pair("L1", "random", "noise 1e-3", "noise 1e-2")
    most = "P(L3 > random), noise 1e-2, most of 1.2, 1.4"
    rows = [
        effect_row("clean_l3_over_l1", "P(L3 > L1), clean, least over radii", *pair("L3", "L1", "clean")),
        effect_row("clean_l3_over_random", "P(L3 > random), clean, least over radii", *pair("L3", "random", "clean")),
        effect_row(
            "clean_l3_over_rewired", "P(L3 > rewired), clean, least over radii", *pair("L3", "rewired", "clean")
        ),
        effect_row("fine_l3_over_random", "P(L3 > random), noise 1e-3, least of .8, 1", *fine),
        effect_row("bits_l3_over_random", "P(L3 > random), 8-bit, least of .8, 1", *bits),
        effect_row("coarse_l3_over_random_10", "P(L3 > random), noise 1e-2, radius 1", *at_1),
        effect_row("coarse_l3_over_random_above", most, *above, over=np.max),
        effect_row("noisy_l1_over_random", "P(L1 > random), noise 1e-3 and 1e-2, most over radii", *noisy, over=np.max),
    ]
    for name in CONDITIONS:
        for radius in RADII:
            key, label = f"l3_over_random_{name.replace(' ', '_')}_{radius:g}", f"{name}, radius {radius:g}"
            rows.append(effect_row(key, f"P(L3 > random), {label}", *pair("L3", "random", name, radii=(radius,))))
    return rows


def _figure(scores: Scores) -> str:
    with figure(10.0, 3.2) as (fig, ax):
        ax.remove()
        panels = fig.subplots(1, len(CONDITIONS), sharex=True)  # each its own scale: noise takes most of the memory
        for panel, (name, by_network) in zip(panels, scores.items(), strict=True):
            for kind, values in by_network.items():
                panel.plot(RADII, np.median(values, 0), "o-", color=COLORS[kind], label=kind, markersize=3)
            panel.set_title(name)
            panel.set_xticks(RADII)
            panel.set_xlabel("spectral radius")
        panels[0].set_ylabel("mean R² of the delays, median")
        panels[-1].legend(fontsize=9)
        return to_svg(fig, label="Memory against spectral radius for five kinds of networks, under four conditions")
