"""Statistics against enumeration, closed forms and simulated coverage."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from commissure.core import stats
from commissure.core.errors import DegenerateError, InputError
from commissure.core.stats import common_language_effect_size, holm, mean_interval, paired_bootstrap, wilcoxon

VALUES = st.lists(st.integers(-5, 5).map(float), min_size=1, max_size=12)


def test_mean_interval_is_students() -> None:
    """t(0.975, 4 degrees of freedom) = 2.776445105, from a table."""
    values = np.array([1.0, 4.0, 2.0, 8.0, 5.0])
    interval = mean_interval(values)
    half = 2.776445105 * math.sqrt(7.5) / math.sqrt(5)
    assert interval == pytest.approx((4.0, 4.0 - half, 4.0 + half), rel=1e-9)
    assert mean_interval([2.0, 2.0]) == (2.0, 2.0, 2.0)
    wide, narrow = mean_interval(values, level=0.99), mean_interval(values, level=0.5)
    assert wide.low < interval.low < narrow.low < narrow.high < interval.high < wide.high


def test_bootstrap_means_have_the_moments_of_resampling() -> None:
    """Large n: the interval is estimate +- 1.96 s / sqrt(n) (the widening vanishes)."""
    differences = np.random.default_rng(0).normal(2.0, 3.0, 2000)
    interval = paired_bootstrap(differences, seed=0, n_resamples=20_000)
    half = 1.96 * differences.std() / math.sqrt(2000)
    assert interval.estimate == pytest.approx(differences.mean(), rel=1e-12)
    assert interval.low == pytest.approx(interval.estimate - half, abs=0.05 * half)
    assert interval.high == pytest.approx(interval.estimate + half, abs=0.05 * half)


def test_bootstrap_percentiles_are_those_of_the_enumerated_resamples() -> None:
    """Four differences: all 4^4 resamples, at the widened percentiles of the normal sample."""
    differences = np.array([0.0, 1.0, 3.0, 10.0])
    means = np.array([np.mean(draw) for draw in itertools.product(differences, repeat=4)])
    level = 0.5
    t = 0.764892328  # Student's t(0.75, 3 degrees of freedom), from a table
    tail = 50 * math.erfc(math.sqrt(4 / 3) * t / math.sqrt(2))
    interval = paired_bootstrap(differences, seed=1, n_resamples=200_000, level=level)
    assert interval.low == pytest.approx(np.percentile(means, tail), abs=0.26)
    assert interval.high == pytest.approx(np.percentile(means, 100 - tail), abs=0.26)


def test_bootstrap_pairs_and_repeats() -> None:
    rng = np.random.default_rng(1)
    b = rng.normal(size=30) * 100
    a = b + 1.0 + rng.normal(size=30) * 0.1
    paired = paired_bootstrap(a, b, seed=3)
    assert paired == paired_bootstrap(a, b, seed=3) == paired_bootstrap(a - b, seed=3)
    assert paired != paired_bootstrap(a, b, seed=4)
    assert 0.8 < paired.low < paired.estimate < paired.high < 1.2


def test_bootstrap_does_not_depend_on_the_batch_of_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    differences = np.random.default_rng(2).normal(size=10)
    whole = paired_bootstrap(differences, seed=0, n_resamples=2000)
    monkeypatch.setattr(stats, "_CELLS", 1000)
    batched = paired_bootstrap(differences, seed=0, n_resamples=2000)
    assert batched == pytest.approx(whole, abs=0.1)


def test_groups_are_drawn_whole() -> None:
    """Ten copies of each of 12 session effects carry the information of 12 numbers."""
    effects = np.random.default_rng(3).normal(size=12)
    copies, labels = np.repeat(effects, 10), np.repeat([f"session-{k}" for k in range(12)], 10)
    grouped = paired_bootstrap(copies, seed=0, groups=labels)
    alone = paired_bootstrap(effects, seed=0)
    naive = paired_bootstrap(copies, seed=0)
    assert grouped.high - grouped.low == pytest.approx(alone.high - alone.low, rel=0.05)
    assert naive.high - naive.low < 0.5 * (grouped.high - grouped.low)


def test_groups_of_unequal_size_are_weighted_by_size() -> None:
    """Resamples of two groups: (a, a), (a, b), (b, a), (b, b); the mixed mean counts members, not groups."""
    interval = paired_bootstrap([0.0, 0.0, 0.0, 4.0], seed=0, groups=[0, 0, 0, 1], level=0.1)
    assert interval.estimate == 1.0
    assert interval.low == interval.high == 1.0


@pytest.mark.parametrize("n", [8, 20])
def test_bootstrap_covers_the_truth_as_often_as_it_says(n: int) -> None:
    """400 normal samples: nominal .95; the plain percentile interval covers about .90 at n = 8."""
    rng = np.random.default_rng(n)
    covered = 0
    for trial in range(400):
        interval = paired_bootstrap(rng.normal(size=n), seed=trial, n_resamples=1000)
        covered += interval.low <= 0 <= interval.high
    assert 0.925 <= covered / 400 <= 0.985


@settings(deadline=None, max_examples=30)
@given(st.lists(st.floats(-10, 10).filter(bool), min_size=1, max_size=9, unique_by=abs))
def test_wilcoxon_is_the_enumeration_of_signs(differences: list[float]) -> None:
    ranks = np.argsort(np.argsort(np.abs(differences))) + 1.0
    observed = ranks[np.array(differences) > 0].sum()
    null = np.array([np.dot(ranks, signs) for signs in itertools.product([0, 1], repeat=len(ranks))])
    greater, less = np.mean(null >= observed), np.mean(null <= observed)
    assert wilcoxon(differences, alternative="greater").p_value == pytest.approx(greater)
    assert wilcoxon(differences, alternative="less").p_value == pytest.approx(less)
    assert wilcoxon(differences).p_value == pytest.approx(min(1.0, 2 * min(greater, less)))


def test_wilcoxon_drops_zeros_and_takes_pairs() -> None:
    assert wilcoxon([1.0, 2.0, 3.0, 9.0], [0.0, 0.0, 0.0, 9.0]) == wilcoxon([1.0, 2.0, 3.0])
    assert wilcoxon([1.0, 2.0, 3.0, 0.0]).n == 3
    with pytest.raises(DegenerateError, match=r"all differences are zero"):
        wilcoxon([1.0, 2.0], [1.0, 2.0])
    with pytest.raises(InputError, match=r"^alternative = 'bigger'"):
        wilcoxon([1.0], alternative="bigger")  # type: ignore[arg-type]


@settings(deadline=None)
@given(VALUES, VALUES)
def test_effect_size_counts_all_pairs(a: list[float], b: list[float]) -> None:
    pairs = [(x > y) + (x == y) / 2 for x in a for y in b]
    assert common_language_effect_size(a, b) == pytest.approx(np.mean(pairs), abs=1e-12)
    assert common_language_effect_size(b, a) == pytest.approx(1 - np.mean(pairs), abs=1e-12)
    n = min(len(a), len(b))
    own = [(x > y) + (x == y) / 2 for x, y in zip(a, b, strict=False)]
    assert common_language_effect_size(a[:n], b[:n], paired=True) == pytest.approx(np.mean(own), abs=1e-12)


@settings(deadline=None)
@given(
    st.lists(st.sampled_from([0.0, 0.006, 0.01, 0.014, 0.02, 0.024, 0.03, 0.04, 0.06, 1.0]), min_size=1, max_size=6),
    st.sampled_from([0.01, 0.05, 0.3]),
)
def test_holm_is_the_step_down_procedure(p: list[float], alpha: float) -> None:
    """Reject in order of p while p_(k) <= alpha / (m - k), stop at the first that fails."""
    rejected = set()
    for k, index in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        if p[index] * (len(p) - k) > alpha:
            break
        rejected.add(index)
    adjusted = holm(p)
    assert {i for i in range(len(p)) if adjusted[i] <= alpha} == rejected
    assert (adjusted >= p).all()
    assert adjusted.max() <= 1


NAN = [1.0, 2.0, float("nan")]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: mean_interval(NAN), InputError, r"^values\[2\] = nan: expected a finite number"),
        (lambda: mean_interval([1.0]), DegenerateError, "values holds 1 values; needs at least 2"),
        (lambda: mean_interval([[1.0], [2.0]]), InputError, r"^values = \(2, 1\)"),
        (lambda: mean_interval([1.0, 2.0], level=95.0), InputError, "^level = 95.0: .*pass for example level=0.95"),
        (lambda: paired_bootstrap(NAN, seed=0), InputError, r"^a\[2\] = nan"),
        (lambda: paired_bootstrap([1.0, 2.0], NAN[1:], seed=0), InputError, r"^b\[1\] = nan"),
        (lambda: paired_bootstrap([1.0, 2.0], [1.0], seed=0), InputError, r"^b = \(1,\): expected shape \(2,\)"),
        (lambda: paired_bootstrap([], seed=0), DegenerateError, "a holds 0 values"),
        (lambda: paired_bootstrap([1.0], seed=0), DegenerateError, "1 group"),
        (lambda: paired_bootstrap([1.0, 2.0], seed=0, groups=[7, 7]), DegenerateError, "1 group of 2 differences"),
        (lambda: paired_bootstrap([1.0, 2.0], seed=0, groups=[7]), InputError, "^groups = 1"),
        (lambda: paired_bootstrap([1.0, 2.0], seed=0, n_resamples=10), InputError, "^n_resamples = 10"),
        (lambda: paired_bootstrap([1.0, 2.0], seed=0, level=1.0), InputError, "^level = 1.0"),
        (lambda: paired_bootstrap([1.0, 2.0], seed=-1), InputError, "^seed = -1"),
        (lambda: common_language_effect_size([], [1.0]), DegenerateError, "a holds 0 values"),
        (lambda: common_language_effect_size([1.0], [1.0, 2.0], paired=True), InputError, "pairs"),
        (lambda: holm([0.5, 1.5]), InputError, r"^p_values\[1\] = 1\.5: expected a number from 0 to 1"),
        (lambda: holm([]), DegenerateError, "p_values holds 0 values"),
    ],
)
def test_bad_input(call, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
