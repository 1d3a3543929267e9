"""Contenders timed in turns, so that a machine that slows down slows all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

__all__ = ["Range", "alternate"]


@dataclass(frozen=True)
class Range:
    """Smallest, median and largest over the turns."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: Float[np.ndarray, " turns"]) -> Range:
        """Of one value a turn.

        >>> Range.of(np.array([3.0, 1.0, 2.0]))
        Range(low=1.0, median=2.0, high=3.0)
        """
        return cls(float(values.min()), float(np.median(values)), float(values.max()))


def alternate(contenders: Sequence[Callable[[], object]], *, repeats: int) -> Float[np.ndarray, "contenders repeats"]:
    """CPU seconds of each contender, called in turn `repeats` times after one round that is not counted.

    >>> calls: list[str] = []
    >>> alternate([lambda: calls.append("a"), lambda: calls.append("b")], repeats=1).shape, "".join(calls)
    ((2, 1), 'abab')
    """
    spent = np.empty((len(contenders), repeats))
    for turn in range(-1, repeats):
        for number, contender in enumerate(contenders):
            start = time.process_time()
            contender()
            if turn >= 0:
                spent[number, turn] = time.process_time() - start
    return spent
