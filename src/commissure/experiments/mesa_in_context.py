"""Claim `mesa.in_context`: linear regression in context, nothing trained, error at a fresh query after every token.

    v_i = W k_i + .05 noise,  W (32, 32) standard normal, keys of length 1, gamma = beta = 1, D = 32
    error at t = sum |o_t - W q_t|^2 / sum |W q_t|^2  over the sequences, q_t a fresh draw from the keys' distribution

Keys are isotropic, or have standard deviation 1/i along the i-th of random axes (power law) before they are normalized.
Mesa has a fixed Lambda = .01 (.25, the published floor, is a row of its own).  The rivals get more: DeltaNet the beta
that is best at t = 64 on other sequences, linear attention at each t the gain that is best on these very targets.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from commissure.core.rng import spawn, torch_generator
from commissure.experiments.claims import Budget, Context, Outcome, Row
from commissure.experiments.rows import interval_row
from commissure.nn.delta import delta_rule
from commissure.nn.linear_attention import gated_linear_attention
from commissure.nn.mesa import mesa_attention
from commissure.report.style import COLORS, figure, to_svg

__all__ = ["KINDS", "Regression", "errors", "regression", "run"]

KINDS = ("isotropic", "power_law")
DIM, TIME, SEQUENCES, AT = 32, 128, 64, (16, 32, 64, 128)
BETAS = (0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
_KEYS = {"Mesa": "mesa", "Mesa, Λ = .25": "floor", "DeltaNet": "delta_rule", "gated linear attention": "linear_sum"}
_SEEDS: dict[Budget, int] = {"smoke": 1, "quick": 5, "full": 20}


class Regression(NamedTuple):
    """Sequences of a linear map: fresh queries, keys, noisy values, one head; `targets` are the map at the queries."""

    q: Float[Tensor, "sequences time 1 dim"]
    k: Float[Tensor, "sequences time 1 dim"]
    v: Float[Tensor, "sequences time 1 dim"]
    targets: Float[Tensor, "sequences time 1 dim"]

    @property
    def ones(self) -> Float[Tensor, "sequences time 1"]:
        """A gate of 1 a token."""
        return torch.ones_like(self.k[..., 0])


def regression(
    seed: int, *, kind: str, dim: int = DIM, time: int = TIME, sequences: int = SEQUENCES, noise: float = 0.05
) -> Regression:
    """Draw sequences, float64; every sequence has its own map and its own axes."""
    rng = torch_generator(seed, "regression", kind, dim)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    axes = torch.linalg.qr(normal(sequences, dim, dim)).Q
    spread = torch.arange(1, dim + 1, dtype=torch.float64) ** (-1.0 if kind == "power_law" else 0.0)
    q, k = (torch.nn.functional.normalize((normal(sequences, time, dim) * spread) @ axes, dim=-1) for _ in range(2))
    weights = normal(sequences, dim, dim)
    v = k @ weights + noise * normal(sequences, time, dim)
    return Regression(*(x.unsqueeze(2) for x in (q, k, v, q @ weights)))


def errors(o: Tensor, task: Regression) -> Float[np.ndarray, " time"]:
    """Relative squared error after each token, over all sequences."""
    return (((o - task.targets) ** 2).sum((0, 2, 3)) / (task.targets**2).sum((0, 2, 3))).numpy()


def _curves(task: Regression, beta: float) -> dict[str, np.ndarray]:
    """Every contender's error after each token."""
    q, k, v, targets = task
    one = task.ones
    curves = {}
    for name, penalty in (("Mesa", 0.01), ("Mesa, Λ = .25", 0.25)):
        lamb = torch.full((1, q.shape[3]), penalty, dtype=q.dtype)
        curves[name] = errors(mesa_attention(q, k, v, 0 * one, one, lamb).output, task)
    curves["DeltaNet"] = errors(delta_rule(q, k, v, None, beta * one)[0], task)
    summed = gated_linear_attention(q, k, v, 0 * one)[0]
    gain = (summed * targets).sum((0, 2, 3)) / (summed**2).sum((0, 2, 3))
    curves["gated linear attention"] = errors(gain[:, None, None] * summed, task)
    return curves


def _tuned_beta(kind: str) -> float:
    """The write strength with the least error at t = 64, on sequences of its own."""
    task = regression(spawn(0, "tune"), kind=kind)
    found = [errors(delta_rule(task.q, task.k, task.v, None, b * task.ones)[0], task)[63] for b in BETAS]
    return BETAS[int(np.argmin(found))]


def run(ctx: Context) -> Outcome:
    """Measure all curves; intervals over seeds of maps, keys and noise."""
    n_seeds = _SEEDS[ctx.budget]
    betas = {kind: _tuned_beta(kind) for kind in KINDS}
    found: dict[str, list[dict[str, np.ndarray]]] = {kind: [] for kind in KINDS}
    for seed in range(n_seeds):
        for kind in KINDS:
            found[kind].append(_curves(regression(seed, kind=kind), betas[kind]))
        ctx.progress((seed + 1) / n_seeds, f"seed {seed}")
    curves = {kind: {name: np.stack([c[name] for c in found[kind]]) for name in found[kind][0]} for kind in KINDS}
    rows = _rows(curves)
    note = f"DeltaNet's tuned beta: {betas['isotropic']:g} isotropic, {betas['power_law']:g} power law; linear "
    note += "attention has the gain that is best on the test targets at each token"
    data = f"simulated regressions, {SEQUENCES} sequences a seed"
    return Outcome(tuple(rows), ctx.judge(rows, n_seeds), _figure(curves), n_seeds, note, data)


def _rows(curves: dict[str, dict[str, np.ndarray]]) -> list[Row]:
    rows = []
    for kind in KINDS:
        shown = kind.replace("_", " ")
        for key, rival in (("delta", "DeltaNet"), ("linear", "gated linear attention")):
            ratio = curves[kind][rival][:, 63] / curves[kind]["Mesa"][:, 63]
            rows.append(interval_row(f"{key}_{kind}", f"{rival} / Mesa, error at t = 64, {shown} keys", ratio, "x"))
    for kind in KINDS:
        for name, values in curves[kind].items():
            for t in AT:
                label = f"{name}: error at t = {t}, {kind.replace('_', ' ')} keys"
                rows.append(interval_row(f"{_KEYS[name]}_{kind}_{t}", label, values[:, t - 1]))
    return rows


def _figure(curves: dict[str, dict[str, np.ndarray]]) -> str:
    with figure(6.8, 3.6) as (fig, ax):
        ax.remove()
        panels = fig.subplots(1, 2, sharey=True)
        for panel, kind in zip(panels, KINDS, strict=True):
            for name, values in curves[kind].items():
                style = "--" if name not in COLORS else "-"
                color = COLORS.get(name, COLORS["Mesa"])
                panel.loglog(np.arange(1, TIME + 1), values.mean(0), style, color=color, label=name)
            panel.set_title(f"{kind.replace('_', ' ')} keys")
            panel.set_xlabel("tokens seen")
            panel.set_xticks([1, 4, 16, 64], ["1", "4", "16", "64"])
            panel.minorticks_off()
        panels[0].set_ylabel("error at a fresh query (relative)")
        panels[0].legend()
        return to_svg(fig, label="Relative error at a fresh query against tokens seen, four layers, two kinds of keys")
