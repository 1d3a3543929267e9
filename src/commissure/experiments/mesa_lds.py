"""Claim `mesa.lds`: predict a linear dynamical system that is new in every sequence, with one mixer and nothing else.

    s_{t+1} = W s_t + .05 e_t, W a random rotation of 10 dimensions, 64 steps; 2 heads of width 16, convolution 4

The mixers see the states themselves.  Each has the better of its plain form (no SiLU, no output norm, which a linear
problem does not need) and its usual form, and the best learning rate of a grid that is the same for all, chosen on a
seed of its own (`search`; figures in LOG.md).  Mesa runs with the paper's floor under Lambda, .25, tuned for language,
and with .01.  `ridge` is the regression of s_{i+1} on s_i over the past with its penalty tuned on other sequences:
what can be known without forgetting and without training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from commissure.core.mixer import SequenceMixer
from commissure.core.rng import spawn
from commissure.experiments.claims import Budget, Context, Outcome, Row
from commissure.experiments.rows import interval_row
from commissure.mesa.fit import FitConfig, fit
from commissure.mesa.model import ModelConfig
from commissure.mesa.tasks import LinearSystem
from commissure.nn import GatedDeltaNet, GatedLinearAttention, MesaLayer, mesa_attention
from commissure.report.style import COLORS, figure, to_svg

__all__ = ["run", "search"]

LAYERS: dict[str, Callable[..., Any]] = {
    "Mesa": partial(MesaLayer, lambda_lower_bound=0.01, lambda_init=0.1),
    "Mesa, floor .25": MesaLayer,
    "Gated DeltaNet": GatedDeltaNet,
    "gated linear attention": GatedLinearAttention,
}
GRID = tuple((lr, is_plain) for lr in (3e-3, 1e-2, 3e-2, 1e-1, 2e-1) for is_plain in (True, False))
SEARCH_SEED = 100
CHOSEN: dict[str, tuple[float, bool]] = {
    "Mesa": (2e-1, True),
    "Mesa, floor .25": (2e-1, True),
    "Gated DeltaNet": (1e-1, True),
    "gated linear attention": (3e-2, False),
}
TASK, LATE = LinearSystem(), 16
_SIZES: dict[Budget, tuple[int, int]] = {"smoke": (1, 10), "quick": (1, 10), "full": (5, 300)}  # seeds, steps


def _layer(name: str, is_plain: bool, dim: int) -> SequenceMixer:
    layer = LAYERS[name](dim, heads=2, head_dim=16)
    if is_plain:
        layer.inputs.silu, layer.output.o_norm = False, nn.Identity()
    return layer


def _errors(name: str, setting: tuple[float, bool], *, steps: int, seed: int) -> np.ndarray:
    """Test error at every position after training."""
    lr, is_plain = setting
    config = FitConfig(lr=lr, steps=steps, validate_every=steps, test_size=512)
    fitted = fit(TASK, partial(_layer, name, is_plain), model=ModelConfig(alone=True), config=config, seed=seed)
    return np.array(fitted.final.by_position, dtype=float)


def search() -> Iterator[tuple[str, tuple[float, bool], float]]:
    """Test error of every layer at every setting of the grid: (layer, (rate, plain), error)."""
    for name in LAYERS:
        for setting in GRID:
            errors = _errors(name, setting, steps=_SIZES["full"][1], seed=SEARCH_SEED)
            yield name, setting, float(errors.mean())


def _ridge(seed: int) -> np.ndarray:
    """Test error at every position of ridge regression on the past, its penalty the best on other sequences."""

    def errors(source: int, split: str, penalty: float) -> np.ndarray:
        batch = TASK.batch(source, 512, split=split)  # type: ignore[arg-type]
        states, targets = batch.inputs.double()[:, :, None], batch.targets.double()[:, :, None]
        gate = torch.zeros(states.shape[:3], dtype=torch.float64)
        previous = torch.cat([torch.zeros_like(states[:, :1]), states[:, :-1]], 1)  # the pair (s_{t-1}, s_t) is known
        lamb = torch.full((1, TASK.dim), penalty, dtype=torch.float64)
        predicted = mesa_attention(states, previous, states, gate, gate + 1, lamb).output
        return (predicted - targets).square().mean((0, 2, 3)).numpy()

    penalties = (1e-4, 1e-3, 1e-2, 3e-2, 0.1)
    best = min(penalties, key=lambda penalty: errors(SEARCH_SEED, "train", penalty).mean())
    return errors(spawn(seed, "test"), "test", best)


def run(ctx: Context) -> Outcome:
    """Train every layer; ratios are paired by seed: same batches, same test sequences."""
    n_seeds, steps = _SIZES[ctx.budget]
    found: dict[str, np.ndarray] = {}
    for i, name in enumerate(LAYERS):
        errors = []
        for seed in range(n_seeds):
            errors.append(_errors(name, CHOSEN[name], steps=steps, seed=seed))
            ctx.progress((i + (seed + 1) / n_seeds) / len(LAYERS), f"{name}, seed {seed}: {errors[-1].mean():.3f}")
        found[name] = np.stack(errors)
    found["ridge"] = np.stack([_ridge(seed) for seed in range(n_seeds)])
    rows = _rows(found)
    chosen = ", ".join(f"{name} {lr:g}{'' if plain else ' with SiLU and norm'}" for name, (lr, plain) in CHOSEN.items())
    note = f"settings, the best of {len(GRID)} on another seed: {chosen}; predicting zero has error 1"
    return Outcome(tuple(rows), ctx.judge(rows, n_seeds), _figure(found), n_seeds, note, "generated sequences")


def _rows(found: dict[str, np.ndarray]) -> list[Row]:
    rows = []
    mean, late = ({name: e[:, part].mean(1) for name, e in found.items()} for part in (slice(None), slice(-LATE, None)))
    for rival, key in (("Gated DeltaNet", "gated_deltanet"), ("gated linear attention", "gated_linear")):
        rows.append(interval_row(f"{key}_mean", f"{rival} / Mesa, error", mean[rival] / mean["Mesa"], "x"))
        rows.append(interval_row(f"{key}_late", f"{rival} / Mesa, last {LATE} steps", late[rival] / late["Mesa"], "x"))
    for name in found:
        key = "".join(c if c.isalnum() else "_" for c in name.lower())
        rows.append(interval_row(f"{key}_error", f"{name}: mean squared error", mean[name]))
        rows.append(interval_row(f"{key}_late_error", f"{name}: last {LATE} steps", late[name]))
    return rows


def _figure(found: dict[str, np.ndarray]) -> str:
    with figure(6.4, 3.4) as (fig, ax):
        for name, errors in found.items():
            color, style = COLORS.get(name, COLORS["Mesa"]), {"ridge": ":", "Mesa, floor .25": "--"}.get(name, "-")
            color = COLORS["attention"] if name == "ridge" else color
            ax.plot(np.arange(1, errors.shape[1] + 1), errors.mean(0), style, color=color, label=name)
        ax.set_yscale("log")
        ax.set_xlabel("states seen")
        ax.set_ylabel("mean squared error of the next state")
        ax.legend()
        return to_svg(
            fig, label="Error of the next state against states seen, log scale: four trained layers and ridge"
        )
