"""What networks and reservoirs accept: numbers in a range, arrays of them, names; all else is an InputError."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from commissure.core.errors import InputError

__all__ = ["listed", "named", "numbers", "real", "whole"]


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
    # An integer beyond float64 has no float; a float32 would be compared in float32, where the largest float64 is inf.
    number: Any = float(value) if isinstance(value, np.floating) else value
    if not is_number or not abs(number) <= sys.float_info.max or not at_least <= number <= at_most:
        raise InputError(argument, value, _range(at_least, at_most))
    return float(number)


def numbers(argument: str, values: object) -> Float[np.ndarray, ...]:
    """An array of finite real numbers as float64, uncopied where it is one already; of bools too, not of strings.

    >>> numbers("u", [1.0, float("nan")])
    Traceback (most recent call last):
    commissure.core.errors.InputError: u[1] = nan: expected a finite number
    """
    try:
        array = np.asarray(values)
    except (TypeError, ValueError, RuntimeError) as error:  # ragged; a tensor of a GPU, or one that wants a gradient
        raise InputError(argument, type(values).__name__, "an array of real numbers", str(error)) from None
    if array.dtype.kind not in "biuf":
        raise InputError(argument, values, "an array of real numbers")
    array = array.astype(np.float64, copy=False)
    if not np.isfinite(array).all():
        at = tuple(int(i) for i in np.argwhere(~np.isfinite(array))[0])
        place = f"{argument}[{', '.join(map(str, at))}]" if at else argument
        raise InputError(place, float(array[at]), "a finite number")
    return array


def listed(argument: str, values: object) -> list[Any]:
    """The items of a list, a tuple, a range or an array.

    >>> listed("modules", ([0, 1], [2]))
    [[0, 1], [2]]
    """
    try:
        if not isinstance(values, str | bytes):
            return list(values)  # type: ignore[call-overload]
    except TypeError:
        pass
    raise InputError(argument, values, "a list, a tuple or an array")


def named(argument: str, value: object, allowed: Sequence[str]) -> None:
    """Refuse what is none of the names `allowed`.

    >>> named("method", "acf", ("fit", "integrated"))
    Traceback (most recent call last):
    commissure.core.errors.InputError: method = 'acf': expected one of fit, integrated
    """
    if not isinstance(value, str) or value not in allowed:
        raise InputError(argument, value, f"one of {', '.join(allowed)}")


def _range(at_least: float, at_most: float) -> str:
    if math.isinf(at_most):
        return "a finite number" + ("" if math.isinf(at_least) else f" >= {at_least:g}")
    return f"a number from {at_least:g} to {at_most:g}"
