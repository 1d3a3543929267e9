"""Rows that several claims measure alike."""

from __future__ import annotations

import numpy as np
import pytest

from commissure.experiments.rows import effect, effect_row, interval_row


def test_one_seed_has_no_interval() -> None:
    assert interval_row("a", "a", np.array([2.0])).low is None
    assert effect_row("a", "a", np.array([[2.0]]), np.array([[1.0]])).low is None
    row = interval_row("a", "a", np.array([1.0, 3.0]))
    assert row.value == 2.0
    assert row.low is not None
    assert row.low < 1.0


def test_an_effect_is_the_share_of_pairs() -> None:
    a, b = np.array([[1.0, 5.0], [2.0, 5.0]]), np.array([[0.0, 5.0], [1.5, 6.0]])
    assert effect(a, b).tolist() == [0.75, 0.25]
    assert (effect_row("a", "a", a, b).value, effect_row("a", "a", a, b, over=np.max).value) == (0.25, 0.75)


@pytest.mark.parametrize("over", [np.min, np.max])
def test_the_interval_of_an_effect_draws_whole_seeds(over: np.ufunc) -> None:
    rng = np.random.default_rng(0)
    b = rng.standard_normal((12, 3))
    a = b + [0.3, 0.6, 0.9] + 0.5 * rng.standard_normal((12, 3))
    row = effect_row("a", "a", a, b, over=over)
    drawn = [rng.integers(12, size=12) for _ in range(4000)]
    literal = [over(effect(a[seeds], b[seeds])) for seeds in drawn]
    assert row.low is not None
    assert row.high is not None
    # 1.96 of a normal sample becomes Student's 2.20 with 11 degrees of freedom, times sqrt(12 / 11).
    low, high = np.percentile(literal, [1.08, 98.92])
    assert abs(row.low - low) < 0.02
    assert abs(row.high - high) < 0.02


def test_unrelated_networks_have_an_effect_of_one_half_within_the_interval() -> None:
    rng = np.random.default_rng(1)
    pairs = [rng.standard_normal((2, 20, 1)) for _ in range(200)]
    rows = [effect_row("a", "a", a, b) for a, b in pairs]
    covered = np.mean([row.low <= 0.5 <= row.high for row in rows if row.low is not None and row.high is not None])
    assert 0.90 <= covered <= 0.99
