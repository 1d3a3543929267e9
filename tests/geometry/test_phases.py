"""Phases of series whose turning points are known, and of the published curve as read from its figure."""

from __future__ import annotations

import math
from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from commissure.core.errors import DegenerateError, InputError
from commissure.geometry.phases import (
    _scatter,
    isotonic_costs,
    isotonic_costs_reference,
    scatter,
    segment_phases,
)

NAMES = ["warmup", "entropy-seeking", "compression-seeking"]


def turning(*levels: float, n: int = 12) -> np.ndarray:
    """Log-linear between levels, `n` steps each."""
    parts = [np.linspace(math.log(a), math.log(b), n, endpoint=False) for a, b in pairwise(levels)]
    return np.exp(np.r_[np.concatenate(parts), math.log(levels[-1])])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.floats(-2, 2), st.floats(0.1, 5)), min_size=1, max_size=8))
def test_costs_are_those_of_the_min_max_formula(points: list[tuple[float, float]]) -> None:
    y, weights = np.array(points).T
    np.testing.assert_allclose(isotonic_costs(y, weights), isotonic_costs_reference(y, weights), atol=1e-12)


@pytest.mark.parametrize("seed", range(12))
def test_no_other_segmentation_is_better(seed: int) -> None:
    """All cuts and both directions of nine points, counted out."""
    rng = np.random.default_rng(seed)
    y, n, penalty = rng.standard_normal(9), 9, 0.7
    weights = rng.uniform(0.5, 2, n)
    costs = [isotonic_costs_reference(sign * y, weights) for sign in (1, -1)]
    least = math.inf
    for inside, first in product(product([False, True], repeat=n - 1), (0, 1)):
        cuts = [0, *(i + 1 for i, cut in enumerate(inside) if cut), n]
        spans = list(pairwise(cuts))
        total = sum(costs[(first + m) % 2][a, b - 1] for m, (a, b) in enumerate(spans)) + penalty * len(spans)
        if total < least - 1e-12:
            least, best = total, len(spans)
    found = segment_phases(np.arange(n), np.exp(y), stderr=np.exp(y) * weights**-0.5, penalty=penalty)
    assert len(found) == best


@pytest.mark.parametrize("noise", [0.0, 0.03])
def test_a_fall_a_rise_and_a_fall(noise: float) -> None:
    ranks = turning(50, 5, 80, 30)
    rng = np.random.default_rng(0)
    steps = np.r_[0, np.round(10 ** np.linspace(0, 5, len(ranks) - 1), 3)]
    for _ in range(20):
        seen = ranks * np.exp(noise * rng.standard_normal(len(ranks)))
        found = segment_phases(steps, seen, stderr=0.03 * seen)
        assert [phase.kind for phase in found] == NAMES
        assert abs(found[0].last - 12) <= 1
        assert abs(found[1].last - 24) <= 1
        assert [phase.first for phase in found] == [0, found[0].last, found[1].last]
        for phase, change in zip(found, np.log([5 / 50, 80 / 5, 30 / 80]), strict=True):
            assert phase.change == pytest.approx(change, abs=0.15)
            assert phase.begins[0] <= phase.start <= phase.begins[1]
            assert phase.ends[0] <= phase.stop <= phase.ends[1]


def test_errors_are_found_in_the_series_and_intervals_hold_the_turning_points() -> None:
    x, held = np.arange(300.0), []
    for seed in range(40):
        seen = np.exp(np.sin(x / 45) + 0.03 * np.random.default_rng(seed).standard_normal(300))
        found = segment_phases(x, seen)
        assert [phase.kind for phase in found] == ["entropy-seeking", "compression-seeking", "entropy-seeking"]
        for phase, turn in zip(found, (math.pi / 2, 3 * math.pi / 2), strict=False):
            held.append(phase.ends[0] <= 45 * turn <= phase.ends[1])
            assert phase.ends[1] - phase.ends[0] < 60
    assert np.mean(held) >= 0.9


def test_a_line_in_log_step_has_no_error_however_uneven_its_steps() -> None:
    x = np.log1p([0, 1, 2, 10, 11, 500, 4000])
    assert _scatter(x, 3 * x + 1) < 1e-12
    even = np.arange(9.0)
    expected = 1.4826 * 0.1 * (8 / 3) / math.sqrt(1 + 34 / 36)
    assert _scatter(even, 3 * even + 0.1 * (-1.0) ** np.arange(9)) == pytest.approx(expected, rel=1e-12)
    assert _scatter(even[:5], 0.1 * (-1.0) ** np.arange(5)) == pytest.approx(1.4826 * 0.2 / math.sqrt(1.5), rel=1e-12)
    assert _scatter(x, x**3) < 1e-10, "a smooth curve has none"


def test_the_published_curve_has_the_published_phases() -> None:
    """Read from a figure of arXiv 2509.23024 (OLMo-2-7B), 5 % accurate: tokens in 1e9, and a late rise."""
    tokens = [0.4, 0.65, 2.5, 4, 6, 9, 13, 20, 30, 45, 60, 90, 140, 200, 300, 450, 700, 1000, 1500, 2000, 3000, 3900]
    ranks = [160, 75, 150, 330, 520, 740, 850, 930, 1000, 1035, 1040, 990, 860, 730, 580, 460, 410, 340, 350, 335, 370]
    found = segment_phases(tokens, [*ranks, 430])
    assert [phase.kind for phase in found] == [*NAMES, "entropy-seeking"]
    assert [phase.stop for phase in found] == [0.65, 60, 2000, 3900]


def test_noise_alone_makes_no_phases() -> None:
    rng = np.random.default_rng(2)
    extra = [
        len(segment_phases(np.arange(200), turn * np.exp(0.05 * rng.standard_normal(200)), stderr=0.05 * turn)) - 1
        for turn in (np.linspace(10, 30, 200),) * 20
    ]
    assert np.mean(extra) < 0.2


def test_monotone_constant_and_single_series() -> None:
    (up,) = segment_phases([1, 2, 3], [1, 2, 3])
    (down,) = segment_phases([1, 2, 3], [3, 2, 1])
    (same,) = segment_phases([1, 2, 3], [2, 2, 2])
    (one,) = segment_phases([5], [2])
    assert [up.kind, down.kind, same.kind, one.kind] == ["entropy-seeking", "warmup", "flat", "flat"]
    assert up.change == pytest.approx(math.log(3))
    assert (one.first, one.last, one.start, one.change) == (0, 0, 5.0, 0.0)


def test_missing_checkpoints_are_left_out() -> None:
    ranks = turning(50, 5, 80)
    ranks[[3, 20]] = math.nan
    found = segment_phases(np.arange(25), ranks)
    assert [(phase.first, phase.last) for phase in found] == [(0, 12), (12, 24)]
    with pytest.raises(DegenerateError):
        segment_phases([1, 2], [math.nan, math.nan])


def test_alpha_that_moves_with_the_rank_decides_nothing() -> None:
    ranks = turning(50, 5, 80)
    against = 1 / np.log(ranks + 1)
    steps = np.arange(25)
    kinds = [phase.kind for phase in segment_phases(steps, ranks, alpha=against)]
    assert kinds == NAMES[:2]
    mixed = np.r_[against[:13], 2 * against[12] - against[13:]]
    assert [phase.kind for phase in segment_phases(steps, ranks, alpha=mixed)] == ["warmup", "undetermined"]
    assert [phase.kind for phase in segment_phases(steps, ranks, alpha=np.full(25, np.nan))] == NAMES[:2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1, 2], [1, 2, 3]), "ranks"),
        (([2, 1], [1, 2]), "steps"),
        (([1, 1], [1, 2]), "steps"),
        (([-1, 1], [1, 2]), "steps"),
        (([1, math.nan], [1, 2]), "steps"),
        (([1, 2], [1, 0]), r"ranks\[1\]"),
        (([1, 2], [1, math.inf]), "ranks"),
        (([[1, 2]], [1, 2]), "steps"),
        (([], []), "steps"),
        (("ab", [1, 2]), "steps"),
    ],
)
def test_bad_series(arguments: tuple, message: str) -> None:
    with pytest.raises(InputError, match=message):
        segment_phases(*arguments)


@pytest.mark.parametrize(
    "named",
    [{"stderr": [1]}, {"stderr": [1, -1]}, {"alpha": [1, 2, 3]}, {"penalty": 0}, {"penalty": True}, {"penalty": "a"}],
)
def test_bad_settings(named: dict) -> None:
    with pytest.raises(InputError, match=next(iter(named))):
        segment_phases([1, 2], [1, 2], **named)


def test_alpha_must_move_the_wrong_way_beyond_its_scatter() -> None:
    steps = np.geomspace(1, 1000, 40)
    ranks = np.exp(-0.05 * np.log(steps))
    jitter = 0.05 * (-1.0) ** np.arange(40)
    for slope, kind in ((0.02, "warmup"), (0.0, "warmup"), (-0.005, "warmup"), (-0.1, "undetermined")):
        alpha = 1 + slope * np.log(steps) + jitter
        (phase,) = segment_phases(steps, ranks, stderr=0.001 * ranks, alpha=alpha)
        assert phase.kind == kind, slope


def test_scatter_is_that_of_the_ranks_between_checkpoints() -> None:
    rng = np.random.default_rng(0)
    steps = np.geomspace(1, 1e5, 4000)
    ranks = np.exp(np.sin(np.log(steps)) + 0.03 * rng.standard_normal(4000))
    assert scatter(steps, ranks) == pytest.approx(0.03, rel=0.05)
    assert scatter(steps[:2], ranks[:2]) == 0
    with pytest.raises(InputError, match="ranks"):
        scatter([0, 1], [1, 0])
