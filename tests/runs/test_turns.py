"""Timing in turns: every contender in every round, one round that is not counted."""

from __future__ import annotations

import numpy as np

from commissure.runs.turns import Range, alternate


def test_contenders_take_turns() -> None:
    calls: list[str] = []
    spent = alternate([lambda: calls.append("a"), lambda: calls.append("b")], repeats=2)
    assert "".join(calls) == "ababab"
    assert spent.shape == (2, 2)


def test_the_range_is_of_the_turns() -> None:
    assert Range.of(np.array([4.0, 1.0, 2.0])) == Range(1.0, 2.0, 4.0)
