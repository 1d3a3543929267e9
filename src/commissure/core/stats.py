"""Small-sample statistics for comparisons over seeds, sessions and networks.

Intervals: Student-t and the paired bootstrap.  Tests: Wilcoxon's signed ranks, Holm's correction.  Effect size: the
common-language one, P(a > b) + P(a = b) / 2 (McGraw & Wong 1992; Vargha & Delaney 2000).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike
from scipy.special import ndtr, stdtrit

from commissure.core.errors import DegenerateError, InputError
from commissure.core.rng import generator

__all__ = [
    "Interval",
    "SignedRankTest",
    "common_language_effect_size",
    "holm",
    "mean_interval",
    "paired_bootstrap",
    "wilcoxon",
]

_CELLS = 1 << 20  # resampled indices held at once (8 MB)


class Interval(NamedTuple):
    """An estimate and the two ends of its confidence interval."""

    estimate: float
    low: float
    high: float


class SignedRankTest(NamedTuple):
    """Wilcoxon's signed-rank test; `n` counts the differences that are not zero."""

    statistic: float
    p_value: float
    n: int


def mean_interval(values: ArrayLike, *, level: float = 0.95) -> Interval:
    """Student-t confidence interval of the mean of `values` (n,), n >= 2.

    >>> [round(end, 3) for end in mean_interval([1.0, 2.0, 3.0])]
    [2.0, -0.484, 4.484]
    """
    x = _sample("values", values, at_least=2)
    half = _student(x.size - 1, level) * float(x.std(ddof=1)) / math.sqrt(x.size)
    estimate = float(x.mean())
    return Interval(estimate, estimate - half, estimate + half)


def paired_bootstrap(
    a: ArrayLike,
    b: ArrayLike | None = None,
    *,
    seed: int,
    n_resamples: int = 10_000,
    level: float = 0.95,
    groups: Sequence[int | str] | np.ndarray | None = None,
) -> Interval:
    """Bootstrap confidence interval of the mean of the differences `a - b` (of `a` itself without `b`), each (n,).

    With `groups` (n,) whole groups are drawn: repeated seeds of one session are one observation of that session, not
    many (Davison & Hinkley 1997, 3.8).  The percentiles are widened to the level that makes the interval of a normal
    sample as wide as Student's (the expanded percentile interval of Hesterberg, arXiv 1411.5279): the plain ones are
    too narrow for few groups.  Even so, no percentile interval can leave the range of the group means: below about 6
    groups prefer `mean_interval` of the group means.  Fewer than 2 groups: `DegenerateError`.

    >>> interval = paired_bootstrap([2.0, 3.0, 4.0, 3.0], [1.0, 1.0, 1.0, 1.0], seed=0)
    >>> interval.estimate, 1.0 <= interval.low < interval.high <= 3.0
    (2.0, True)
    """
    differences = _differences(a, b)
    if not (isinstance(n_resamples, (int, np.integer)) and n_resamples >= 100):
        raise InputError("n_resamples", n_resamples, "an integer >= 100")
    if groups is not None and len(groups) != differences.size:
        raise InputError("groups", len(groups), f"one label for each of the {differences.size} differences")
    member = np.arange(differences.size) if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1]
    n_groups = int(member.max()) + 1
    if n_groups < 2:
        raise DegenerateError(f"paired_bootstrap: {n_groups} group of {differences.size} differences; needs at least 2")
    sums, counts = np.bincount(member, weights=differences), np.bincount(member)
    t = _student(n_groups - 1, level)
    tail = 100 * float(ndtr(-math.sqrt(n_groups / (n_groups - 1)) * t))
    rng = generator(seed, "paired_bootstrap")
    step = max(1, _CELLS // n_groups)
    means = np.concatenate(
        [
            sums[drawn].sum(1) / counts[drawn].sum(1)
            for start in range(0, n_resamples, step)
            for drawn in [rng.integers(n_groups, size=(min(step, n_resamples - start), n_groups))]
        ]
    )
    low, high = np.percentile(means, [tail, 100 - tail])
    return Interval(float(differences.mean()), float(low), float(high))


def wilcoxon(
    a: ArrayLike, b: ArrayLike | None = None, *, alternative: Literal["two-sided", "greater", "less"] = "two-sided"
) -> SignedRankTest:
    """Wilcoxon signed-rank test that the differences `a - b` are symmetric around 0; zero differences are dropped.

    `alternative="greater"`: `a` above `b`.  Without ties among 50 differences or fewer the p-value is exact, otherwise
    scipy's choice.  All differences zero: `DegenerateError`.

    >>> wilcoxon([1.0, 2.0, 3.0, 4.0, 5.0], alternative="greater")
    SignedRankTest(statistic=15.0, p_value=0.03125, n=5)
    """
    from scipy.stats import wilcoxon as signed_rank  # slow to import

    differences = _differences(a, b)
    if alternative not in ("two-sided", "greater", "less"):
        raise InputError("alternative", alternative, "'two-sided', 'greater' or 'less'")
    differences = differences[differences != 0]
    if not differences.size:
        raise DegenerateError("wilcoxon: all differences are zero, no rank has a sign")
    result = signed_rank(differences, alternative=alternative)
    return SignedRankTest(float(result.statistic), float(result.pvalue), int(differences.size))


def common_language_effect_size(a: ArrayLike, b: ArrayLike, *, paired: bool = False) -> float:
    """Probability that a value of `a` exceeds one of `b`, ties counting one half; 0.5 means no effect.

    `paired=True` compares `a[i]` with `b[i]` only, otherwise every value of `a` with every value of `b`.

    >>> common_language_effect_size([2.0, 3.0], [1.0, 2.0])
    0.875
    >>> common_language_effect_size([2.0, 3.0], [1.0, 4.0], paired=True)
    0.5
    """
    if paired:
        return float(np.mean((np.sign(_differences(a, b)) + 1) / 2))
    x, y = _sample("a", a, at_least=1), np.sort(_sample("b", b, at_least=1))
    below, not_above = np.searchsorted(y, x, side="left"), np.searchsorted(y, x, side="right")
    return float(np.mean((below + not_above) / (2 * y.size)))


def holm(p_values: ArrayLike) -> Float[np.ndarray, " tests"]:
    """Holm's adjusted p-values, in the order given: reject those <= alpha to keep the family-wise error at alpha.

    >>> holm([0.01, 0.04, 0.03]).round(9).tolist()
    [0.03, 0.06, 0.06]
    """
    p = _sample("p_values", p_values, at_least=1)
    if p.min() < 0 or p.max() > 1:
        index = int(np.flatnonzero((p < 0) | (p > 1))[0])
        raise InputError(f"p_values[{index}]", float(p[index]), "a number from 0 to 1")
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(p[order] * np.arange(p.size, 0, -1)))
    return adjusted


def _student(dof: int, level: float) -> float:
    if not 0 < level < 1:
        raise InputError("level", level, "a number between 0 and 1", "pass for example level=0.95")
    return float(stdtrit(dof, (1 + level) / 2))


def _differences(a: ArrayLike, b: ArrayLike | None) -> Float[np.ndarray, " n"]:
    x = _sample("a", a, at_least=1)
    if b is None:
        return x
    y = _sample("b", b, at_least=1)
    if x.shape != y.shape:
        raise InputError("b", y.shape, f"shape {x.shape}, as a's: pairs")
    return x - y


def _sample(name: str, values: ArrayLike, *, at_least: int) -> Float[np.ndarray, " n"]:
    x = np.asarray(values, np.float64)
    if x.ndim != 1:
        raise InputError(name, x.shape, "an array of 1 dimension")
    if not np.isfinite(x).all():
        index = int(np.flatnonzero(~np.isfinite(x))[0])
        raise InputError(f"{name}[{index}]", float(x[index]), "a finite number")
    if x.size < at_least:
        raise DegenerateError(f"{name} holds {x.size} values; needs at least {at_least}")
    return x
