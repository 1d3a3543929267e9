"""What networks and reservoirs accept: integers and real numbers in a range; everything else is an InputError."""

from __future__ import annotations

import math

import numpy as np

from commissure.core.errors import InputError

__all__ = ["real", "whole"]


def whole(argument: str, value: object, at_least: int) -> int:
    """An integer, numpy's too, not below `at_least`; a bool is none.

    >>> whole("seed", np.int64(3), 0)
    3
    """
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < at_least:
        raise InputError(argument, value, f"an integer >= {at_least}")
    return int(value)


def real(argument: str, value: object, at_least: float = -math.inf, at_most: float = math.inf) -> float:
    """A finite number, numpy's too, from `at_least` to `at_most`; a bool is none.

    >>> real("prune", 1.5, 0, 1)
    Traceback (most recent call last):
    commissure.core.errors.InputError: prune = 1.5: expected a number from 0 to 1
    """
    is_number = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or not at_least <= value <= at_most:  # type: ignore[arg-type,operator]
        raise InputError(argument, value, _range(at_least, at_most))
    return float(value)  # type: ignore[arg-type]


def _range(at_least: float, at_most: float) -> str:
    if math.isinf(at_most):
        return "a finite number" + ("" if math.isinf(at_least) else f" >= {at_least:g}")
    return f"a number from {at_least:g} to {at_most:g}"
