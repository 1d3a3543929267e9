"""The bench of the sampler measures what it says; it asserts no time."""

from __future__ import annotations

from itertools import count

import numpy as np
import pytest
import torch
from scipy.special import chdtrc

from commissure.core.rng import generator
from commissure.metahmm import MetaHMM, bench


def test_ratios_are_those_of_each_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that advances by 1, 2, 3, ... seconds between its readings."""
    clock = (n * (n + 1) / 2 for n in count())
    monkeypatch.setattr(bench.time, "thread_time", lambda: next(clock))
    fast, choice, bisections = bench.bench_sampler("tiny", batch_size=32, length=5, repeats=2, seed=0)
    assert fast.ratio == bench.Spread(1.0, 1.0, 1.0)
    # turns after the first last 7 and 13, 9 and 15, 11 and 17 seconds; 32 sequences at once, 16 in a loop
    assert (choice.ratio.low, choice.ratio.high) == pytest.approx((2 * 15 / 13, 2 * 9 / 7))
    assert (bisections.ratio.low, bisections.ratio.high) == pytest.approx((2 * 17 / 13, 2 * 11 / 7))
    assert fast.tokens_a_second == pytest.approx(32 * 5 / 10)
    assert choice.tokens_a_second == pytest.approx(16 * 5 / 12)


def test_the_loop_of_bisections_draws_from_the_task() -> None:
    env = MetaHMM.from_preset("tiny", seed=0)
    lists, rng = bench._cumulative_lists(env), generator(0, "test")
    tokens = np.array([bench._bisect(lists, 6, 2, rng) for _ in range(20_000)])
    a, e = env.transition_matrix([6])[0], env.emission_matrix([6])[0]
    joint = torch.einsum("i,ia,ij,jb->ab", env.initial, e, a, e).numpy().reshape(-1) * len(tokens)
    counts = np.bincount(tokens @ (6, 1), minlength=36)
    assert chdtrc(35, ((counts - joint) ** 2 / joint).sum()) > 1e-3
