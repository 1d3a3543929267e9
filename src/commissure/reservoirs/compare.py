"""Two models of a sweep against each other: paired by seed, under every condition, corrected for their number.

| field         | what it is                                                                                  |
|---------------|---------------------------------------------------------------------------------------------|
| `difference`  | mean of a - b over seeds, with its 95 % bootstrap interval over seeds                        |
| `p_value`     | Wilcoxon's signed ranks, two-sided; 1 where a and b are equal at every seed                  |
| `p_holm`      | the same after Holm's correction over all conditions of the comparison                       |
| `cles`        | P(a > b) of any two seeds, ties one half: the effect size of the publication                 |
| `cles_paired` | share of seeds at which a is above b                                                         |

At one seed the models share input and noise.  The publication (bioRxiv 2025.06.20.660760) compares unpaired.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from commissure.core.errors import DegenerateError, InputError
from commissure.core.stats import Interval, common_language_effect_size, holm, paired_bootstrap, wilcoxon
from commissure.reservoirs.cells import SweepRow
from commissure.reservoirs.evaluation import ModuleScore, module_r2
from commissure.reservoirs.inputs import listed, named

__all__ = ["Comparison", "SweepScore", "compare", "sweep_scores"]


@dataclass(frozen=True, kw_only=True)
class SweepScore(ModuleScore):
    """A `ModuleScore` of one model at one seed with weights rounded to `weight_bits`."""

    model: str
    seed: int
    weight_bits: int | None


@dataclass(frozen=True)
class Comparison:
    """`a` against `b` under one condition, over the seeds both have; medians over these seeds."""

    a: str
    b: str
    spectral_radius: float | None
    read_noise: float
    read_bits: int | None
    weight_bits: int | None
    n_pairs: int
    median_a: float
    median_b: float
    difference: Interval
    p_value: float
    p_holm: float
    cles: float
    cles_paired: float


def sweep_scores(rows: Iterable[SweepRow]) -> tuple[SweepScore, ...]:
    """Scores averaged over readouts, then inputs, for every model, seed and condition."""
    cells: dict[tuple[str, int, int | None], list[SweepRow]] = {}
    for row in rows:
        cells.setdefault((row.model, row.seed, row.weight_bits), []).append(row)
    return tuple(
        SweepScore(**vars(score), model=model, seed=seed, weight_bits=bits)
        for (model, seed, bits), found in cells.items()
        for score in module_r2(found)
    )


def compare(
    scores: Sequence[SweepScore], a: str, b: str, *, measure: Literal["score", "capacity"] = "score", seed: int = 0
) -> tuple[Comparison, ...]:
    """One row a condition; `seed` is the bootstrap's.  Fewer than two common seeds: `DegenerateError`.

    >>> def score(model, seed, value):
    ...     about = {"spectral_radius": 0.8, "read_noise": 0.0, "read_bits": None, "capacity": 0.0, "lyapunov": None}
    ...     return SweepScore(**about, score=value, model=model, seed=seed, weight_bits=None)
    >>> scores = [score("L1", s, s) for s in range(5)] + [score("L3", s, s + 3) for s in range(5)]
    >>> (row,) = compare(scores, "L3", "L1")
    >>> row.n_pairs, row.difference.estimate, row.p_value, round(row.cles, 6), row.cles_paired
    (5, 3.0, 0.0625, 0.92, 1.0)
    """
    named("measure", measure, ("score", "capacity"))
    for i, s in enumerate(scores := listed("scores", scores)):
        if not isinstance(s, SweepScore):
            raise InputError(f"scores[{i}]", s, "a SweepScore", "SweepResult.scores() gives them")
    known = sorted({s.model for s in scores})
    for name, model in (("a", a), ("b", b)):
        named(name, model, known)
    if a == b:
        raise InputError("b", b, f"another model than a: one of {', '.join(known)}")
    conditions: dict[tuple, dict[str, dict[int, float]]] = {}
    for s in scores:
        key = (s.spectral_radius, s.read_noise, s.read_bits, s.weight_bits)
        by_seed = conditions.setdefault(key, {a: {}, b: {}}).setdefault(s.model, {})
        if s.seed in by_seed:
            raise InputError("scores", (s.model, s.seed, *key), "one score for each model, seed and condition")
        by_seed[s.seed] = getattr(s, measure)
    rows = [_one(a, b, key, by_model[a], by_model[b], seed) for key, by_model in conditions.items()]
    corrected = holm([row.p_value for row in rows])
    return tuple(replace(row, p_holm=float(p)) for row, p in zip(rows, corrected, strict=True))


def _one(a: str, b: str, key: tuple, of_a: dict[int, float], of_b: dict[int, float], seed: int) -> Comparison:
    common = sorted(set(of_a) & set(of_b))
    if len(common) < 2:
        raise DegenerateError(f"compare: {a!r} and {b!r} have {len(common)} seeds in common; needs at least 2")
    x, y = np.array([of_a[s] for s in common]), np.array([of_b[s] for s in common])
    return Comparison(
        a,
        b,
        *key,
        n_pairs=len(common),
        median_a=float(np.median(x)),
        median_b=float(np.median(y)),
        difference=paired_bootstrap(x, y, seed=seed),
        p_value=wilcoxon(x, y).p_value if (x != y).any() else 1.0,
        p_holm=float("nan"),
        cles=common_language_effect_size(x, y),
        cles_paired=common_language_effect_size(x, y, paired=True),
    )
