"""Unit dropout: the published triangular law, and spikes that are all or nothing per unit."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats

from commissure.core.errors import InputError
from commissure.decode.unit_dropout import UnitDropout, UnitDropoutRate
from commissure.decode.windows import Window, collate


def test_kept_counts_follow_the_triangle() -> None:
    dropout, rng = UnitDropout(minimum=60, mode=300, maximum=1000, peak=4), np.random.default_rng(0)
    n_units, draws = 1200, 20_000
    kept = np.array([dropout.keep(n_units, rng).sum() for _ in range(draws)])
    edges = np.array([60, 120, 180, 240, 300, 400, 500, 600, 700, 800, 900, 1001])
    density = np.interp(np.arange(60, 1001), [60, 300, 1000], [1.0, 4.0, 1.0])  # the law, written out again
    expected = [density[a - 60 : b - 60].sum() for a, b in itertools.pairwise(edges)]
    expected = np.array(expected) / sum(expected) * draws
    observed, _ = np.histogram(kept, edges)
    assert observed.sum() == draws
    assert stats.chisquare(observed, expected).pvalue > 0.01


def test_the_peak_is_four_times_the_edge() -> None:
    probability = UnitDropout().kept_probabilities(1500)
    assert probability[300] / probability[60] == pytest.approx(4.0)
    assert probability[300] / probability[1000] == pytest.approx(4.0)
    assert probability.sum() == pytest.approx(1.0)


def test_few_units_are_all_kept_and_many_are_cut_at_the_number_present() -> None:
    rng = np.random.default_rng(0)
    assert UnitDropout().keep(40, rng).all()
    assert UnitDropout().kept_probabilities(174)[:60].sum() == 0
    assert UnitDropout().kept_probabilities(174)[174] > 0


def test_rate_hides_a_uniform_share() -> None:
    dropout, rng = UnitDropoutRate(maximum=0.4), np.random.default_rng(0)
    hidden = np.array([1 - dropout.keep(500, rng).mean() for _ in range(2000)])
    assert hidden.max() < 0.5
    assert hidden.mean() == pytest.approx(0.2, abs=0.01)


@pytest.mark.parametrize("dropout", [UnitDropout(minimum=1, mode=3, maximum=6), UnitDropoutRate(maximum=0.9)])
def test_a_hidden_unit_loses_all_its_spikes_and_the_others_none(dropout: UnitDropout | UnitDropoutRate) -> None:
    rng = np.random.default_rng(0)
    windows = [
        Window(rng.integers(0, 8, 300), np.zeros(300), rng.integers(0, 20, 300), 20, *(np.zeros(0, int),) * 3)
        for _ in range(12)
    ]
    keep = [dropout.keep(8, rng) for _ in windows]
    tokens = collate(windows, [0] * 12, [100] * 12, keep=keep).tokens
    row = tokens.slot.numpy() // 20
    assert not all(mask.all() for mask in keep)
    for i, (window, mask) in enumerate(zip(windows, keep, strict=True)):
        shown = np.bincount(tokens.unit.numpy()[row == i] - 100, minlength=8)
        np.testing.assert_array_equal(shown, np.bincount(window.unit, minlength=8) * mask)


def test_bad_corners_are_refused() -> None:
    with pytest.raises(InputError, match="minimum <= mode <= maximum"):
        UnitDropout(minimum=400)
