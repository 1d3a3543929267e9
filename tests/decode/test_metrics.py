"""R2: the closed form, sklearn's value, and the inputs it refuses."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from commissure.core.errors import DegenerateError, InputError
from commissure.decode.metrics import r2_per_output, r2_score


def _pair(seed: int, n: int = 50, d: int = 3) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    y = rng.normal(size=(n, d)) * rng.uniform(0.1, 30, size=d) + rng.normal(size=d) * 10
    return y, y + rng.normal(size=(n, d))


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10_000), n=st.integers(2, 40), d=st.integers(1, 4))
def test_equals_sklearn(seed: int, n: int, d: int) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    y, p = _pair(seed, n, d)
    assert r2_score(y, p) == pytest.approx(metrics.r2_score(y, p, multioutput="uniform_average"), abs=1e-12, rel=1e-12)
    np.testing.assert_allclose(r2_per_output(y, p), metrics.r2_score(y, p, multioutput="raw_values"), rtol=1e-12)


def test_mean_scores_zero_and_perfect_scores_one() -> None:
    y, _ = _pair(0)
    assert r2_score(y, np.broadcast_to(y.mean(0), y.shape)) == pytest.approx(0.0, abs=1e-14)
    assert r2_score(y, y) == 1.0


def test_invariant_to_offset_and_scale() -> None:
    y, p = _pair(1)
    assert r2_score(1e4 + 3 * y, 1e4 + 3 * p) == pytest.approx(r2_score(y, p), abs=1e-9)


def test_float32_inputs_are_summed_in_float64() -> None:
    y, p = (a.astype(np.float32) for a in _pair(2))
    assert r2_score(y, p) == r2_score(y.astype(np.float64), p.astype(np.float64))


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("argument", ["target", "prediction"])
def test_values_that_are_not_finite_are_refused_by_row(value: float, argument: str) -> None:
    y, p = _pair(3)
    (y if argument == "target" else p)[7, 1] = value
    with pytest.raises(InputError, match=f"{argument} = 'row 7"):
        r2_score(y, p)


def test_shapes_that_differ_are_refused() -> None:
    y, p = _pair(4)
    with pytest.raises(InputError, match="prediction"):
        r2_score(y, p[:-1])
    with pytest.raises(InputError, match="target"):
        r2_score(np.zeros((2, 2, 2)), np.zeros((2, 2, 2)))
    with pytest.raises(InputError, match="at least 2 rows"):
        r2_score(y[:1], p[:1])


def test_constant_target_is_degenerate() -> None:
    y, p = _pair(5)
    y[:, 1] = 0.1
    with pytest.raises(DegenerateError, match=r"output\(s\) \[1\]"):
        r2_score(y, p)
