"""Whole and real numbers: what is one, what it becomes, and the ends of ranges."""

from __future__ import annotations

import numpy as np
import pytest

from commissure.core.errors import InputError
from commissure.reservoirs.inputs import real, whole


@pytest.mark.parametrize("value", [3, np.int64(3), np.uint8(3)])
def test_integers_become_int(value: object) -> None:
    found = whole("n", value, 3)
    assert (found, type(found)) == (3, int)


@pytest.mark.parametrize("value", [2, 3.0, np.float64(3), True, np.bool_(True), "3", None, [3], float("nan")])
def test_what_is_no_integer_in_the_range_is_named(value: object) -> None:
    with pytest.raises(InputError, match=r"^n = .*: expected an integer >= 3$"):
        whole("n", value, 3)
    with pytest.raises(InputError, match=r"^n = True"):
        whole("n", True, 0)


@pytest.mark.parametrize("value", [0, 1, 0.5, np.float32(0.5), np.int64(1)])
def test_numbers_become_float(value: float) -> None:
    found = real("x", value, 0, 1)
    assert (found, type(found)) == (value, float)


@pytest.mark.parametrize(
    "value",
    [-0.1, 1.1, True, np.bool_(True), np.nan, np.inf, -np.inf, np.float32(np.inf), 10**400, "0", None, [0.5], 1j],
)
def test_what_is_no_number_in_the_range_is_named(value: object) -> None:
    with pytest.raises(InputError, match=r"^x = .*: expected a number from 0 to 1$"):
        real("x", value, 0, 1)
    if value not in (-0.1, 1.1):
        with pytest.raises(InputError, match=r": expected a finite number$"):
            real("x", value)
