"""Comparisons of models: pairs by seed, effect sizes, intervals, correction; against scipy and by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats as scipy_stats

from commissure.core.errors import DegenerateError, InputError
from commissure.reservoirs.compare import SweepScore, compare, sweep_scores
from commissure.reservoirs.sweep import SweepRow

RNG = np.random.default_rng(0)


def score(model: str, seed: int, value: float, radius: float = 0.8, noise: float = 0.0) -> SweepScore:
    return SweepScore(
        spectral_radius=radius, read_noise=noise, read_bits=None, score=value, capacity=-value, lyapunov=None,
        model=model, seed=seed, weight_bits=None,
    )  # fmt: skip


def sample(effects: dict[float, float], n: int = 12) -> list[SweepScore]:
    """L3 above L1 by `effects[radius]`, with a common part of each seed far larger than the effect."""
    rows = []
    for radius, effect in effects.items():
        common = RNG.normal(size=n)
        for seed in range(n):
            rows.append(score("L1", seed, common[seed], radius))
            rows.append(score("L3", seed, common[seed] + effect + 0.01 * RNG.normal(), radius))
    return rows


def test_pairs_are_tested_as_scipy_does() -> None:
    rows = sample({0.6: 0.02, 0.8: 0.0, 1.0: 0.1})
    found = compare(rows, "L3", "L1")
    assert [row.spectral_radius for row in found] == [0.6, 0.8, 1.0]
    for row in found:
        x, y = (
            np.array([s.score for s in rows if (s.model, s.spectral_radius) == (m, row.spectral_radius)])
            for m in ("L3", "L1")
        )
        assert row.n_pairs == 12
        assert row.p_value == pytest.approx(scipy_stats.wilcoxon(x, y).pvalue, rel=1e-12)
        statistic = scipy_stats.mannwhitneyu(x, y).statistic
        assert row.cles == pytest.approx(statistic / 144, rel=1e-12)
        assert row.cles_paired == np.mean(x > y)
        assert row.difference.estimate == pytest.approx(np.mean(x - y))
        assert (row.median_a, row.median_b) == (np.median(x), np.median(y))
        low, high = scipy_stats.bootstrap((x - y,), np.mean, random_state=0).confidence_interval
        assert row.difference.low == pytest.approx(low, abs=0.003)
        assert row.difference.high == pytest.approx(high, abs=0.003)
    assert found[2].difference.low > 0


def test_holm_corrects_over_the_conditions() -> None:
    found = compare(sample({0.6: 0.02, 0.8: 0.003, 1.0: 0.1}), "L3", "L1")
    p = np.array([row.p_value for row in found])
    order = np.argsort(p)
    expected, largest = np.empty(3), 0.0
    for rank, k in enumerate(order):
        largest = max(largest, min(1.0, (3 - rank) * p[k]))
        expected[k] = largest
    assert [row.p_holm for row in found] == pytest.approx(expected.tolist(), rel=1e-12)
    assert (np.array([row.p_holm for row in found]) > p).any()


def test_pairing_is_by_seed_not_by_order() -> None:
    rows = sample({0.8: 0.05})
    (forward,) = compare(rows, "L3", "L1")
    (backward,) = compare(rows[::-1], "L3", "L1")
    assert forward == backward
    assert forward.cles_paired == 1.0
    assert forward.cles < 0.8
    (other,) = compare(rows, "L1", "L3")
    assert other.difference.estimate == pytest.approx(-forward.difference.estimate)
    assert (other.p_value, other.cles) == (forward.p_value, pytest.approx(1 - forward.cles))


def test_only_common_seeds_count() -> None:
    rows = [s for s in sample({0.8: 0.05}) if not (s.model == "L1" and s.seed >= 9)]
    (row,) = compare(rows, "L3", "L1")
    assert row.n_pairs == 9
    with pytest.raises(DegenerateError, match=r"'L3' and 'L1' have 1 seeds in common"):
        compare([s for s in rows if s.seed == 0 or s.model == "L3"], "L3", "L1")


def test_equal_models_have_no_evidence() -> None:
    rows = sample({0.8: 0.0})
    same = [s for s in rows if s.model == "L1"]
    (row,) = compare([*same, *(replace(s, model="L2") for s in same)], "L2", "L1")
    assert (row.p_value, row.p_holm, row.cles_paired) == (1.0, 1.0, 0.5)
    assert row.cles == pytest.approx(0.5, rel=1e-12)


def test_capacity_can_be_compared_instead() -> None:
    (row,) = compare(sample({0.8: 0.05}), "L3", "L1", measure="capacity")
    assert row.cles_paired == 0.0


def test_ties_count_one_half_and_the_test_drops_them() -> None:
    """By hand: of 16 pairs (a, b) 7 are above and 4 tied; of 4 seeds 2 are above and 1 tied."""
    values = {"L3": (1.0, 2.0, 3.0, 4.0), "L1": (1.0, 1.0, 4.0, 2.0)}
    (row,) = compare([score(m, s, v) for m, given in values.items() for s, v in enumerate(given)], "L3", "L1")
    assert (row.cles, row.cles_paired, row.n_pairs) == (10 / 16, 2.5 / 4, 4)
    assert row.p_value == pytest.approx(scipy_stats.wilcoxon([1.0, -1.0, 2.0]).pvalue, rel=1e-12)


def test_every_setting_of_the_reading_is_a_condition_of_its_own() -> None:
    rows = sample({0.8: 0.05})
    variants = ({}, {"read_noise": 0.1}, {"read_bits": 8}, {"weight_bits": 4}, {"weight_bits": 8})
    given = [replace(s, score=s.score * (1 + k * s.seed), **v) for k, v in enumerate(variants) for s in rows]
    found = compare(given, "L3", "L1")
    assert [(r.read_noise, r.read_bits, r.weight_bits) for r in found] == [
        (0.0, None, None), (0.1, None, None), (0.0, 8, None), (0.0, None, 4), (0.0, None, 8)
    ]  # fmt: skip
    for k, (row, variant) in enumerate(zip(found, variants, strict=True)):
        (alone,) = compare([replace(s, score=s.score * (1 + k * s.seed), **variant) for s in rows], "L3", "L1")
        assert replace(row, p_holm=alone.p_holm) == alone
    with pytest.raises(InputError, match=r"^scores = \('L1', 0, 0\.8, 0\.0, None, None\): expected one score for each"):
        compare([*rows, rows[0]], "L3", "L1")


def test_scores_average_readouts_then_inputs_within_a_cell() -> None:
    about = {
        "spectral_radius": 0.8, "read_noise": 0.0, "read_bits": None, "penalty": 1.0, "capacity": 0.0,
        "target_scores": (0.0,), "solver": "moments", "lyapunov": None,
    }  # fmt: skip
    rows = [
        SweepRow(**about, model=model, seed=seed, weight_bits=bits, input=i, output=o, score=value + seed + (bits or 0))
        for model in ("L1", "L3")
        for seed in (0, 1)
        for bits in (None, 4)
        for i, o, value in ((0, 0, 1.0), (0, 1, 2.0), (1, 0, 4.0))
    ]
    found = sweep_scores(rows)
    assert [(s.model, s.seed, s.weight_bits, s.score) for s in found] == [
        (model, seed, bits, 2.75 + seed + (bits or 0))
        for model in ("L1", "L3")
        for seed in (0, 1)
        for bits in (None, 4)
    ]


def test_bad_input() -> None:
    rows = sample({0.8: 0.0})
    with pytest.raises(InputError, match=r"^a = 'L2': expected one of L1, L3"):
        compare(rows, "L2", "L1")
    with pytest.raises(InputError, match=r"^b = 'L1': expected another model"):
        compare(rows, "L1", "L1")
    with pytest.raises(InputError, match=r"^scores = 3"):
        compare(3, "L3", "L1")
    with pytest.raises(InputError, match=r"^scores\[0\] = 'x'"):
        compare(["x"], "L3", "L1")
    with pytest.raises(InputError, match=r"^a = "):
        compare(rows, np.ones(2), "L1")
    with pytest.raises(InputError, match=r"^measure = 'r2'"):
        compare(rows, "L3", "L1", measure="r2")
