"""Claim `mesa.recall`: n random pairs shown once, every key asked again; which stored value is nearest to the answer?

    pairs of random unit vectors, D = 32; one write of each; accuracy = share of queries k_i with argmax_j o_i . v_j = i

Nothing is trained.  Asking is a token with beta = 0, so all n answers come from the memory after n writes.  Mesa has
gamma = beta = 1 and a fixed Lambda = .01.  Each rival has, for each n, the setting of its grid that is best on other
sequences: DeltaNet beta, Gated DeltaNet beta and gamma, gated linear attention gamma; and, which moves no argmax, the
gain with the least squared error.  Softmax attention with a tuned sharpness keeps every pair, in memory that grows with
n: context, not a rival.
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
from commissure.experiments.mesa_in_context import interval_row
from commissure.nn.delta import delta_rule
from commissure.nn.linear_attention import gated_linear_attention
from commissure.nn.mesa import mesa_attention
from commissure.report.style import COLORS, figure, to_svg

__all__ = ["RIVALS", "Pairs", "Scores", "answers", "run", "score"]

DIM, PENALTY = 32, 0.01
COUNTS = (16, 24, 32, 64, 128)
_GAMMAS, _BETAS = (0.95, 0.98, 0.99, 0.995, 1.0), (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
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


class Scores(NamedTuple):
    """Share of queries whose nearest stored value is the right one, and the squared error (values have length 1)."""

    accuracy: float
    error: float


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


def score(o: Float[Tensor, "sequences pairs dim"], pairs: Pairs, *, gain: float = 1.0) -> Scores:
    """Judge the answers; `gain` scales them for the squared error."""
    nearest = (o @ pairs.v.mT).argmax(-1)
    accuracy = (nearest == torch.arange(pairs.v.shape[1])).double().mean()
    return Scores(float(accuracy), float(((gain * o - pairs.v) ** 2).sum(-1).mean()))


def _tuned(name: str, n: int, sequences: int) -> tuple[tuple[float, ...], float]:
    """The setting with the highest accuracy (then the least error) on sequences of its own, and its best gain."""
    pairs = draw(spawn(0, "tune"), n, sequences)
    tried = []
    for setting in RIVALS[name]:
        o = answers(name, pairs, setting)
        gain = float((o * pairs.v).sum() / (o * o).sum())
        scores = score(o, pairs, gain=gain)
        tried.append((-scores.accuracy, scores.error, setting, gain))
    return min(tried)[2:]


def run(ctx: Context) -> Outcome:
    """Tune, then measure on new pairs; intervals over seeds."""
    n_seeds, sequences = _SIZES[ctx.budget]
    found: dict[tuple[str, int], list[Scores]] = {}
    settings: dict[tuple[str, int], tuple[tuple[float, ...], float]] = {}
    for i, n in enumerate(COUNTS):
        settings |= {(name, n): _tuned(name, n, sequences) for name in RIVALS}
        settings["Mesa", n] = ((1.0, 1.0), 1.0)
        for seed in range(n_seeds):
            pairs = draw(seed, n, sequences)
            for name in ("Mesa", *RIVALS):
                setting, gain = settings[name, n]
                found.setdefault((name, n), []).append(score(answers(name, pairs, setting), pairs, gain=gain))
        ctx.progress((i + 1) / len(COUNTS), f"{n} pairs")
    rows = _rows(found)
    tuned = ", ".join(f"{name} {settings[name, 64][0]}" for name in RIVALS)
    note = f"settings at 64 pairs, (gamma, beta) or (sharpness): {tuned}"
    data = f"random unit vectors, {sequences} sequences a seed"
    return Outcome(tuple(rows), ctx.judge(rows, n_seeds), _figure(found), n_seeds, note, data)


def _accuracy(found: dict[tuple[str, int], list[Scores]], name: str, n: int) -> np.ndarray:
    return np.array([scores.accuracy for scores in found[name, n]])


def _rows(found: dict[tuple[str, int], list[Scores]]) -> list[Row]:
    rows = []
    for n in COUNTS:
        rivals = np.stack([_accuracy(found, name, n) for name in RIVALS if name != "attention"])
        lead = _accuracy(found, "Mesa", n) - rivals.max(0)
        rows.append(interval_row(f"lead_{n}", f"Mesa - best rival of each seed, accuracy, {n} pairs", lead))
    for name, n in sorted(found, key=lambda case: case[1]):
        key = f"{name.lower().replace(' ', '_')}_{n}"
        context = "keeps all pairs: context" if name == "attention" else ""
        accuracy = _accuracy(found, name, n)
        rows.append(interval_row(key, f"{name}: accuracy, {n} pairs", accuracy, note=context))
        if n in (DIM, 2 * DIM):
            error = np.array([scores.error for scores in found[name, n]])
            rows.append(interval_row(f"{key}_error", f"{name}: squared error, {n} pairs", error, note=context))
    return rows


def _figure(found: dict[tuple[str, int], list[Scores]]) -> str:
    with figure(6.4, 3.4) as (fig, ax):
        for name, marker in zip(("Mesa", *RIVALS), "o^vsD", strict=True):
            means = [_accuracy(found, name, n).mean() for n in COUNTS]
            style = ":" if name == "attention" else "-"
            ax.plot(COUNTS, means, style, marker=marker, color=COLORS[name], label=name)
        ax.axvline(DIM, color=COLORS["attention"], linewidth=1, linestyle="--")
        ax.set_xscale("log", base=2)
        ax.set_xticks(COUNTS, [str(n) for n in COUNTS])
        ax.minorticks_off()
        ax.set_xlabel(f"pairs shown once (keys have {DIM} dimensions)")
        ax.set_ylabel("recalled (share)")
        ax.legend()
        return to_svg(fig, label="Share of pairs recalled against pairs shown, five layers; Mesa stays highest of the "
                      "recurrent ones")  # fmt: skip
