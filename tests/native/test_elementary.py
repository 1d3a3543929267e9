"""Error bounds of the kernels' vector functions, against scipy in float64."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from scipy.special import erfc, expit

from commissure.native import kernels

native = kernels()
pytestmark = pytest.mark.skipif(native is None, reason="built without a C++ compiler")
CLONES = [] if native is None else native.clones()
WIDE = np.concatenate([np.linspace(-80, 80, 40_001), np.linspace(-1, 1, 20_001), [0.0, 0.625, -0.625, 1e-20]])
TURNS = np.concatenate([np.linspace(-0.5, 0.5, 40_001), [0.125, -0.125, 0.375, -0.375, 0.25, -0.25]])
# name, exact function, domain, bound in units of the type's epsilon; relative, or absolute where there are zeros.
CASES: list[tuple[str, Callable[[np.ndarray], np.ndarray], np.ndarray, float, bool]] = [
    ("exp", np.exp, WIDE, 2.0, True),
    ("expm1", np.expm1, WIDE, 4.0, True),
    ("sin", lambda u: np.sin(2 * np.pi * u), TURNS, 2.0, False),
    ("cos", lambda u: np.cos(2 * np.pi * u), TURNS, 2.0, False),
    ("sigmoid", expit, WIDE, 4.0, True),
    ("tanh", np.tanh, WIDE, 4.0, True),
    ("softplus", lambda x: np.logaddexp(0, x), WIDE, 4.0, True),
    ("gelu", lambda x: 0.5 * x * erfc(-x / np.sqrt(2)), WIDE[np.abs(WIDE) < 9], 8.0, False),
]


@pytest.mark.parametrize("clone", CLONES)
@pytest.mark.parametrize("single", [True, False], ids=["float32", "float64"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0])
def test_elementary_functions_are_accurate(case: tuple, single: bool, clone: str) -> None:
    name, exact, x, bound, is_relative = case
    if single:
        x = x.astype(np.float32).astype(np.float64)
    expected = exact(x)
    found = native.elementary(name, x, single, clone)
    epsilon = np.finfo(np.float32 if single else np.float64).eps
    scale = np.abs(expected) if is_relative else 1.0
    error = np.abs(found - expected) / np.where(scale == 0, 1.0, scale) / epsilon
    assert error.max() <= bound, (name, error.max(), x[error.argmax()])


@pytest.mark.parametrize("single", [True, False])
def test_extreme_arguments_stay_finite(single: bool) -> None:
    x = np.array([-np.inf, -1e30, 1e30, -1e4, 1e4])
    for name in ("exp", "sigmoid", "softplus"):
        assert np.all(np.isfinite(native.elementary(name, x[1:], single, "")))
    assert native.elementary("exp", x[:1], single, "")[0] < 1e-37
