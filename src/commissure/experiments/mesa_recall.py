"""Claim `mesa.recall`: n random pairs shown once, every key asked again; which stored value is nearest to the answer?

    pairs of random unit vectors, D = 32; one write of each; accuracy = share of queries k_i with argmax_j o_i . v_j = i

Nothing is trained.  Asking is a token with beta = 0, so all n answers come from the memory after n writes.  Mesa has
gamma = beta = 1 and a fixed Lambda = .01.  Each rival has, for each n, the setting of its grid that is best on other
sequences: DeltaNet beta, Gated DeltaNet beta and gamma, gated linear attention gamma (a gain moves no argmax).  Softmax
attention with a tuned sharpness keeps every pair, in memory that grows with n: context, not a rival.
"""

from __future__ import annotations

import math
from itertools import product
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from commissure.core.rng import spawn, torch_generator
from commissure.experiments.claims import Budget, Context, Outcome, Row
from commissure.experiments.rows import interval_row
from commissure.nn.delta import delta_rule
from commissure.nn.linear_attention import gated_linear_attention
from commissure.nn.mesa import mesa_attention
from commissure.report.style import COLORS, figure, to_svg

__all__ = ["RIVALS", "Pairs", "accuracy", "answers", "draw", "run", "tuned"]

DIM, PENALTY = 32, 0.01
COUNTS = (16, 24, 32, 64, 128)
_GAMMAS, _BETAS = (0.98, 0.99, 0.995, 1.0), (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)
RIVALS: dict[str, tuple[tuple[float, ...], ...]] = {  # name -> settings (gamma, beta) or (sharpness,)
    "DeltaNet": tuple(product((1.0,), _BETAS)),
    "Gated DeltaNet": tuple(product(_GAMMAS, _BETAS)),
    "gated linear attention": tuple(product(_GAMMAS, (1.0,))),
    "attention": tuple((sharpness,) for sharpness in (4.0, 8.0, 16.0, 32.0, 64.0)),
}
_SIZES: dict[Budget, tuple[int, int]] = {"smoke": (1, 16), "quick": (5, 64), "full": (20, 64)}  # seeds, sequences


class Pairs(NamedTuple):
    """Keys and values of each sequence, in the order they are shown."""

    k: Float[Tensor, "sequences pairs dim"]
    v: Float[Tensor, "sequences pairs dim"]


def draw(seed: int, n: int, sequences: int) -> Pairs:
    """Random unit vectors, float64."""
    rng = torch_generator(seed, "pairs", n)
    k, v = (torch.randn(sequences, n, DIM, generator=rng, dtype=torch.float64) for _ in range(2))
    return Pairs(normalize(k, dim=-1), normalize(v, dim=-1))


def answers(name: str, pairs: Pairs, setting: tuple[float, ...]) -> Float[Tensor, "sequences pairs dim"]:
    """What the layer `name` answers to every key after all writes."""
    k, v = pairs
    if name == "attention":
        return torch.softmax(setting[0] * k @ k.mT, -1) @ v
    n = k.shape[1]
    keys = torch.cat([k, k], 1).unsqueeze(2)
    values = torch.cat([v, torch.zeros_like(v)], 1).unsqueeze(2)
    writes = (torch.arange(2 * n) < n).to(k.dtype).expand(len(k), -1).unsqueeze(2)
    gamma, beta = setting
    g, beta_t = math.log(gamma) * writes, beta * writes
    if name == "Mesa":
        lamb = torch.full((1, DIM), PENALTY, dtype=k.dtype)
        o = mesa_attention(keys, keys, values, g, beta_t, lamb).output
    elif name == "gated linear attention":
        o = gated_linear_attention(keys, keys, values, g, beta_t)[0]
    else:
        o = delta_rule(keys, keys, values, g, beta_t)[0]
    return o[:, n:, 0]


def accuracy(o: Float[Tensor, "sequences pairs dim"], pairs: Pairs) -> float:
    """Share of the answers whose nearest stored value is the right one."""
    nearest = (o @ pairs.v.mT).argmax(-1)
    return float((nearest == torch.arange(pairs.v.shape[1])).double().mean())


def tuned(name: str, n: int, sequences: int) -> tuple[float, ...]:
    """The setting of the grid with the highest accuracy on sequences of its own."""
    pairs = draw(spawn(0, "tune"), n, sequences)
    return max(RIVALS[name], key=lambda setting: accuracy(answers(name, pairs, setting), pairs))


def run(ctx: Context) -> Outcome:
    """Tune, then measure on new pairs; intervals over seeds."""
    n_seeds, sequences = _SIZES[ctx.budget]
    found: dict[tuple[str, int], list[float]] = {}
    settings: dict[tuple[str, int], tuple[float, ...]] = {}
    for i, n in enumerate(COUNTS):
        settings |= {(name, n): tuned(name, n, sequences) for name in RIVALS} | {("Mesa", n): (1.0, 1.0)}
        for seed in range(n_seeds):
            pairs = draw(seed, n, sequences)
            for name in ("Mesa", *RIVALS):
                found.setdefault((name, n), []).append(accuracy(answers(name, pairs, settings[name, n]), pairs))
        ctx.progress((i + 1) / len(COUNTS), f"{n} pairs")
    rows = _rows(found)
    best = ", ".join(f"{name} {settings[name, 64]}" for name in RIVALS)
    note = f"settings at 64 pairs, (gamma, beta) or (sharpness): {best}"
    data = f"random unit vectors, {sequences} sequences a seed"
    return Outcome(tuple(rows), ctx.judge(rows, n_seeds), _figure(found), n_seeds, note, data)


def _rows(found: dict[tuple[str, int], list[float]]) -> list[Row]:
    rows = []
    for n in COUNTS:
        rivals = np.array([found[name, n] for name in RIVALS if name != "attention"])
        lead = np.array(found["Mesa", n]) - rivals.max(0)
        rows.append(interval_row(f"lead_{n}", f"Mesa - best rival of each seed, accuracy, {n} pairs", lead))
    for (name, n), values in found.items():
        key, context = name.lower().replace(" ", "_"), "keeps all pairs: context" if name == "attention" else ""
        rows.append(interval_row(f"{key}_{n}", f"{name}: accuracy, {n} pairs", np.array(values), note=context))
    return rows


def _figure(found: dict[tuple[str, int], list[float]]) -> str:
    with figure(6.4, 3.4) as (fig, ax):
        for name, marker in zip(("Mesa", *RIVALS), "o^vsD", strict=True):
            means = [np.mean(found[name, n]) for n in COUNTS]
            style = ":" if name == "attention" else "-"
            ax.plot(COUNTS, means, style, marker=marker, color=COLORS[name], label=name)
        ax.axvline(DIM, color=COLORS["attention"], linewidth=1, linestyle="--")
        ax.set_xscale("log", base=2)
        ax.set_xticks(COUNTS, [str(n) for n in COUNTS])
        ax.minorticks_off()
        ax.set_xlabel(f"pairs shown once (keys have {DIM} dimensions)")
        ax.set_ylabel("recalled (share)")
        ax.legend()
        return to_svg(fig, label="Share of pairs recalled against pairs shown, five layers")
