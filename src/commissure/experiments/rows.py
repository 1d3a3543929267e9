"""Rows that several claims measure alike: a mean or a share of seeds, and the effect of one kind of network.

    effect p = P(a > b) + P(a = b) / 2 over all pairs of seeds, at every radius       (McGraw & Wong 1992)
    row      = least (or most) of p over the radii; its interval draws whole seeds, so that what the networks of one
               seed share is drawn together, and takes the least again in every draw

Percentiles of the draws are widened as `core.stats.paired_bootstrap` widens its own.  Where every seed of `a` is above
every one of `b` no draw differs: the interval is then a point and says nothing of networks not drawn.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Float
from scipy.special import betaincinv, ndtr, stdtrit

from commissure.core.rng import generator
from commissure.core.stats import common_language_effect_size, mean_interval
from commissure.report.results import Row

__all__ = ["effect", "effect_row", "interval_row", "share_row"]

_DRAWS = 4000


def interval_row(key: str, label: str, values: Float[np.ndarray, " seeds"], unit: str = "", note: str = "") -> Row:
    """Mean over the seeds and its interval, which one seed does not have."""
    if len(values) < 2:
        return Row(key, label, float(values[0]), unit=unit, note=note)
    interval = mean_interval(values)
    return Row(key, label, interval.estimate, interval.low, interval.high, unit, note=note)


def share_row(key: str, label: str, hits: Bool[np.ndarray, " seeds"], note: str = "") -> Row:
    """Share of seeds, with the exact interval of a binomial proportion (Clopper & Pearson 1934), if there are two.

    >>> share_row("hits", "share", np.array([True] * 9 + [False])).text
    '0.900 [0.555, 0.997]'
    """
    n, k = len(hits), int(np.sum(hits))
    if n < 2:
        return Row(key, label, float(k), note=note)
    low = float(betaincinv(k, n - k + 1, 0.025)) if k else 0.0
    high = float(betaincinv(k + 1, n - k, 0.975)) if k < n else 1.0
    return Row(key, label, k / n, low, high, note=note)


def effect(a: Float[np.ndarray, "seeds radii"], b: Float[np.ndarray, "seeds radii"]) -> Float[np.ndarray, " radii"]:
    """Probability that a network of `a` scores above one of `b`, at every radius.

    >>> effect(np.array([[2.0], [3.0]]), np.array([[1.0], [2.0]])).tolist()
    [0.875]
    """
    return np.array([common_language_effect_size(*pair) for pair in zip(a.T, b.T, strict=True)])


def effect_row(
    key: str,
    label: str,
    a: Float[np.ndarray, "seeds radii"],
    b: Float[np.ndarray, "seeds radii"],
    *,
    over: Callable[..., np.ndarray] = np.min,
) -> Row:
    """`effect`, the least over the radii (the most with `over=np.max`), and its interval over seeds, if there are two.

    >>> row = effect_row("p", "P(a > b)", np.array([[2.0], [3.0], [5.0]]), np.array([[1.0], [4.0], [1.5]]))
    >>> round(row.value, 3), row.low < row.value < row.high
    (0.778, True)
    """
    estimate, n = float(over(effect(a, b))), len(a)
    if n < 2:
        return Row(key, label, estimate)
    above = (np.sign(a[:, None] - b) + 1) / 2  # (seeds of a, seeds of b, radii)
    drawn = generator(0, "effect").multinomial(n, np.full(n, 1 / n), size=_DRAWS) / n
    p = np.einsum("kr,kr...->k...", drawn, np.einsum("kt,str->ksr", drawn, above))
    tail = 100 * float(ndtr(-math.sqrt(n / (n - 1)) * stdtrit(n - 1, 0.975)))
    low, high = np.percentile(over(p, axis=1), [tail, 100 - tail])
    return Row(key, label, estimate, float(low), float(high))
