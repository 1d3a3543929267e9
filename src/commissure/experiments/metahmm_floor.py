"""Claim `metahmm.floor`: what sampling alone costs, with the exact task posterior and exact predictions given a task.

p_K = (1/K) sum_k p(x_{t+1} | x_<=t, theta_k),  theta_k ~ p(theta | x_<=t),  at t = 4, 7, 10
E KL[p* || p_K] -> c / K,   c = 1/2 sum_x Var_theta p(x | x_<=t, theta) / p*(x)

small_K            mean Div on "small" (12,288 tasks).  The table it is held to was measured by a prototype on an
                   environment called `fixed`, none of the presets: that "small" has its values is tested too
exponent           of E KL in K, from the second to the last of `LARGE`, "e64" (64 tasks)
over_closed_form   E KL / (c / K) at the last of `LARGE`
bias_z             root of the squared deviation from p* of a mean over repeats, over its variance Var / (K repeats)
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from commissure.core.rng import generator
from commissure.experiments.claims import FLOOR, Budget, Context, Outcome, Row
from commissure.experiments.rows import interval_row
from commissure.metahmm import MetaHMM
from commissure.metahmm.conditional import ExactConditional
from commissure.metahmm.divergence import pointwise_divergence
from commissure.metahmm.monte_carlo import MonteCarloPredictor
from commissure.metahmm.oracle import BayesOracle
from commissure.metahmm.samplers import OraclePosterior, TablePosterior
from commissure.report.style import COLORS, figure, to_svg

__all__ = ["run"]

FORWARD = {1: 2.74, 2: 1.55, 5: 0.60, 10: 0.26, 20: 0.10, 50: 0.030, 200: 0.0055}
LARGE, TIMES, CHUNK = (50, 200, 800, 3200), [4, 7, 10], 20
BIAS_SAMPLES, BIAS_REPEATS = 5, 50
SEEDS = (15, 23, 5345, 0, 1)
_SIZES: dict[Budget, tuple[int, int]] = {"smoke": (1, 20), "quick": (3, 60), "full": (5, 120)}  # seeds, contexts


class Curves(NamedTuple):
    """Of one seed: (Div, forward KL) by K on "small"; forward KL by K and mean c on "e64"; the bias statistic."""

    small: dict[int, tuple[float, float]]
    e64: dict[int, float]
    closed_form: float
    bias_z: float


class Fixed:
    """The exact posteriors of sequences, computed once for every K."""

    def __init__(self, oracle: BayesOracle, tokens: Tensor) -> None:
        self.proposal = OraclePosterior(oracle).propose(tokens)

    def propose(self, tokens: Tensor) -> TablePosterior:
        """Those of the sequences it was made with."""
        return self.proposal


def run(ctx: Context) -> Outcome:
    """Measure every seed: environment, contexts and draws are its own."""
    n_seeds, n_contexts = _SIZES[ctx.budget]
    found = []
    for i, seed in enumerate(SEEDS[:n_seeds]):
        small = _small(seed, n_contexts)
        found.append(Curves(small, *_e64(seed, n_contexts)))
        ctx.progress((i + 1) / n_seeds, f"seed {seed}: {small[1][0]:.2f} nats at K = 1")
    rows = _rows(found)
    note = f"{n_contexts} contexts a seed; the prototype: 60 contexts of one environment"
    return Outcome(tuple(rows), ctx.judge(rows, n_seeds), _figure(found), n_seeds, note, "generated sequences")


def _contexts(env: MetaHMM, seed: int, n: int) -> Tensor:
    tasks = torch.from_numpy(generator(seed, "contexts").integers(env.n_tasks, size=n))
    return env.sample(tasks, TIMES[-1], seed=seed).tokens


def _small(seed: int, n_contexts: int) -> dict[int, tuple[float, float]]:
    env = MetaHMM.from_preset("small", seed=seed)
    oracle, exact = BayesOracle(env), ExactConditional(env)
    sums = {k: np.zeros(2) for k in FLOOR}
    for tokens in _contexts(env, seed, n_contexts).split(CHUNK):
        fixed = Fixed(oracle, tokens)
        for k in FLOOR:
            points = pointwise_divergence(
                MonteCarloPredictor(exact, fixed, n_samples=k, seed=seed), tokens, oracle=oracle
            )
            sums[k] += [float(x[:, TIMES].mean()) * len(tokens) for x in (points.divergence, points.forward)]
    return {k: tuple((total / n_contexts).tolist()) for k, total in sums.items()}


def _e64(seed: int, n_contexts: int) -> tuple[dict[int, float], float, float]:
    env = MetaHMM.from_preset("e64", seed=seed)
    oracle, exact, tokens = BayesOracle(env), ExactConditional(env), _contexts(env, seed, n_contexts)
    falls = {}
    for k in LARGE:
        predictor = MonteCarloPredictor(exact, OraclePosterior(oracle), n_samples=k, seed=seed)
        falls[k] = float(pointwise_divergence(predictor, tokens, oracle=oracle).forward[:, TIMES].mean())
    best = oracle.log_probs(tokens)[:, TIMES].exp()
    codes = torch.arange(env.n_tasks)[:, None].expand(n_contexts, -1, -1)
    given = exact.log_probs(tokens, codes)[:, :, TIMES].exp()
    posterior = OraclePosterior(oracle).propose(tokens).table[:, TIMES].exp()
    variance = torch.einsum("btn,bntv->btv", posterior, (given - best[:, None]).square())
    repeated = tokens.repeat_interleave(BIAS_REPEATS, 0)
    predictor = MonteCarloPredictor(exact, OraclePosterior(oracle), n_samples=BIAS_SAMPLES, seed=seed)
    drawn = predictor.log_probs(repeated)[:, TIMES].exp().unflatten(0, (-1, BIAS_REPEATS)).mean(1)
    expected = variance.sum() / (BIAS_SAMPLES * BIAS_REPEATS)
    bias_z = float(((drawn - best).square().sum() / expected).sqrt())
    return falls, float((variance / best).sum(-1).mean() / 2), bias_z


def _rows(found: list[Curves]) -> list[Row]:
    def row(key: str, label: str, values: list[float], unit: str = "", quoted: float | None = None) -> Row:
        note = "" if quoted is None else f"prototype, another environment: {quoted:g}"
        return interval_row(key, label, np.array(values), unit, note)

    low, high = LARGE[1], LARGE[-1]
    exponents = [float(np.log(f.e64[high] / f.e64[low]) / np.log(high / low)) for f in found]
    ratios = [f.e64[high] * high / f.closed_form for f in found]
    return [
        *(row(f"small_{k}", f"Div on small, K = {k}", [f.small[k][0] for f in found], "nats", FLOOR[k]) for k in FLOOR),
        row("exponent", f"exponent of the forward KL in K, K = {low} to {high}, e64", exponents),
        row("over_closed_form", f"forward KL over c / K, K = {high}, e64", ratios),
        row("bias_z", "deviation of a mean of predictions / its standard error", [f.bias_z for f in found]),
        *(
            row(f"small_forward_{k}", f"forward KL on small, K = {k}", [f.small[k][1] for f in found], "nats", quoted)
            for k, quoted in FORWARD.items()
        ),
        *(row(f"e64_forward_{k}", f"forward KL on e64, K = {k}", [f.e64[k] for f in found], "nats") for k in LARGE),
    ]


def _figure(found: list[Curves]) -> str:
    with figure(6.4, 3.6) as (fig, ax):
        ks = np.array(list(FLOOR))
        for f in found:
            ax.loglog(ks, [f.small[k][0] for k in FLOOR], "-", color=COLORS["Mesa"], alpha=0.5, linewidth=1)
            ax.loglog(LARGE, [f.e64[k] for k in LARGE], "-", color=COLORS["GRU"], alpha=0.5, linewidth=1)
        small = np.mean([[f.small[k][0] for k in FLOOR] for f in found], 0)
        falls = np.mean([list(f.e64.values()) for f in found], 0)
        ax.loglog(ks, small, "o", color=COLORS["Mesa"], markerfacecolor="none", label="small, Div")
        ax.loglog(LARGE, falls, "s", color=COLORS["GRU"], label="e64, forward KL")
        ax.loglog(ks, list(FLOOR.values()), "x", color=COLORS["attention"], label="prototype, Div")
        closed_form = float(np.mean([f.closed_form for f in found]))
        ax.loglog(LARGE, [closed_form / k for k in LARGE], "--", color=COLORS["attention"], label="c / K, e64")
        ax.set_xlabel("tasks sampled at every position, K")
        ax.set_ylabel("distance to the optimum (nats)")
        ax.legend()
        return to_svg(fig, label="Divergence from the optimum against the number of sampled tasks, log scales")
