"""Effective ranks against closed forms, random-matrix theory and each other."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from commissure.core.errors import DegenerateError, InputError
from commissure.core.moments import measure
from commissure.geometry.effective_rank import (
    condition_number,
    explained_directions,
    isotropy,
    matrix_entropy,
    participation_ratio,
    rankme,
    renyi_rank,
    stable_rank,
    top_share,
)
from commissure.geometry.spectra import FewSamplesWarning, Spectrum, spectrum

METRICS = (rankme, participation_ratio, stable_rank, top_share, isotropy)


def normal(n: int, dim: int, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_a_flat_spectrum_has_its_dimension() -> None:
    flat = Spectrum.of(np.full(37, 2.5))
    for metric in (rankme, participation_ratio, stable_rank):
        assert metric(flat) == pytest.approx(37, rel=1e-13)
    assert rankme(flat, weights="singular") == pytest.approx(37, rel=1e-13)
    assert isotropy(flat) == pytest.approx(1, rel=1e-13)
    assert condition_number(flat) == 1
    assert renyi_rank(flat, order=0) == 37


def test_one_direction_has_rank_one() -> None:
    rows = torch.outer(torch.arange(5.0, dtype=torch.float64), torch.tensor([3.0, -4.0], dtype=torch.float64))
    for metric in (rankme, participation_ratio, stable_rank, top_share):
        assert metric(rows) == pytest.approx(1, rel=1e-12)
    assert condition_number(Spectrum.of(np.array([2.0, 0.0]))) == math.inf


def test_two_eigenvalues_by_hand() -> None:
    found = Spectrum.of(np.array([3.0, 1.0]))
    assert rankme(found) == pytest.approx(math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25)), rel=1e-14)
    s = np.sqrt([3.0, 1.0]) / np.sqrt([3.0, 1.0]).sum()
    assert rankme(found, weights="singular") == pytest.approx(math.exp(-(s * np.log(s)).sum()), rel=1e-14)
    assert renyi_rank(found, order=3) == pytest.approx((0.75**3 + 0.25**3) ** -0.5, rel=1e-14)
    assert renyi_rank(found, order=0.5) == pytest.approx((0.75**0.5 + 0.25**0.5) ** 2, rel=1e-14)
    assert (explained_directions(found, share=0.75), explained_directions(found, share=0.76)) == (1, 2)
    assert rankme(Spectrum.of(np.array([9.0, 1.0, 1.0])), drop_top=1) == pytest.approx(2, rel=1e-14)


@settings(max_examples=200)
@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=40), st.integers(0, 5))
def test_ranks_fall_with_their_order(values: list[float], n_zeros: int) -> None:
    found = Spectrum.of(np.array(values + [0.0] * n_zeros))
    ranks = [renyi_rank(found, order=order) for order in (math.inf, 3, 2, 1.5, 1, 0.5)]
    chain = [1.0, *ranks[:5], rankme(found, weights="singular"), float(len(values)), renyi_rank(found, order=0)]
    assert all(a <= b * (1 + 1e-9) for a, b in pairwise(chain))
    assert ranks[4] <= ranks[5] * (1 + 1e-9)


def test_orders_near_one_and_infinity_are_their_limits() -> None:
    found = Spectrum.of(np.arange(1.0, 30.0) ** -1.2)
    assert renyi_rank(found, order=1 + 1e-6) == pytest.approx(rankme(found), rel=1e-5)
    assert renyi_rank(found, order=2000) == pytest.approx(stable_rank(found), rel=2e-3)
    assert renyi_rank(Spectrum.of(np.array([1e-300, 1e-301])), order=2) == pytest.approx(1.1**2 / 1.01, rel=1e-12)


@pytest.mark.parametrize(("n", "dim"), [(1000, 1024), (2000, 256), (400, 400), (300, 1200)])
@pytest.mark.filterwarnings("ignore::commissure.geometry.spectra.FewSamplesWarning")
def test_normal_rows_have_the_rank_of_random_matrix_theory(n: int, dim: int) -> None:
    """Page's mean entropy and the participation ratio of a Wishart matrix."""
    found = [spectrum(normal(n, dim, seed=seed)) for seed in range(4)]
    few, many = sorted((n - 1, dim))
    assert np.mean([rankme(one) for one in found]) == pytest.approx(few * math.exp(-few / (2 * many)), rel=2e-3)
    ratios = [participation_ratio(one) for one in found]
    assert np.mean(ratios) == pytest.approx(dim * (n - 1) / (dim + n - 1), rel=3e-3)


def test_an_unbiased_participation_ratio_needs_few_rows() -> None:
    scales = torch.arange(1, 65, dtype=torch.float64) ** -0.5
    truth = participation_ratio(Spectrum.of((scales**2).numpy()))
    found = [
        (participation_ratio(rows, unbiased=True), participation_ratio(rows))
        for rows in (normal(96, 64, seed=seed) * scales for seed in range(60))
    ]
    unbiased, plug_in = np.mean(found, axis=0)
    assert unbiased == pytest.approx(truth, rel=0.03)
    assert plug_in < 0.9 * truth


def test_the_unbiased_sums_are_unbiased_in_three_dimensions() -> None:
    """E of numerator and denominator over many small samples, known covariance, known mean."""
    scales = torch.tensor([2.0, 1.0, 0.5], dtype=torch.float64)
    n, draws = 6, 20000
    rows = normal(n * draws, 3).view(draws, n, 3) * scales
    centered = rows - rows.mean(1, keepdim=True)
    s = centered.mT @ centered / (n - 1)
    a, b, dof = (s @ s).diagonal(dim1=1, dim2=2).sum(1), s.diagonal(dim1=1, dim2=2).sum(1) ** 2, n - 1
    factor = (dof - 1) * (dof + 2)
    assert float((dof * (dof * a - b) / factor).mean()) == pytest.approx(float((scales**4).sum()), rel=0.03)
    squared = float((dof * ((dof + 1) * b - 2 * a) / factor).mean())
    assert squared == pytest.approx(float((scales**2).sum() ** 2), rel=0.03)
    ratios = (dof * (dof + 1) * b - 2 * dof * a) / (dof * (dof * a - b))
    for k in (ratios > 0).nonzero()[:20, 0].tolist():
        assert participation_ratio(rows[k], unbiased=True) == pytest.approx(float(ratios[k]), rel=1e-9)


@pytest.mark.parametrize("metric", METRICS)
def test_what_a_metric_ignores_and_what_it_does_not(metric) -> None:
    rows = normal(300, 12) * torch.arange(1, 13, dtype=torch.float64) ** -0.7
    value = metric(rows)
    turn = torch.linalg.qr(normal(12, 12, seed=1)).Q
    for same in (3.7 * rows, rows @ turn, rows + normal(1, 12, seed=2), rows.flip(0), rows.repeat(3, 1)):
        assert metric(same) == pytest.approx(value, rel=1e-10)
    assert metric(measure(rows)) == pytest.approx(value, rel=1e-10)
    assert abs(metric(rows * torch.linspace(0.1, 3, 12, dtype=torch.float64)) - value) > 0.01


def test_compatibility_with_public_programs() -> None:
    """The two numbers are those in the tests of reptrix 0.1.0."""
    torch.manual_seed(0)
    rows = torch.randn(1000, 1024)
    with pytest.warns(FewSamplesWarning):
        assert rankme(rows, compat="reptrix") == pytest.approx(613.4726, rel=1e-5)
    flat = np.full(2048, 1.0)
    assert rankme(Spectrum.of(flat), compat="reptrix") == pytest.approx(2050.8, abs=0.05)
    many = Spectrum.of(np.r_[np.full(2048, 1.0), np.full(2048, 0.5)])
    assert rankme(many, compat="reptrix") == pytest.approx(2050.8, abs=0.05)  # a tail cut off
    x = normal(50, 6) + 1
    s = np.linalg.svd(x.numpy(), compute_uv=False)
    p = s / s.sum() + 1e-7
    assert rankme(x, compat="garrido") == pytest.approx(math.exp(-(p * np.log(p)).sum()), rel=1e-10)


def test_matrix_entropy_is_that_of_the_gram_matrix() -> None:
    x = normal(9, 5)
    gram = (x @ x.T).numpy()
    p = np.linalg.eigvalsh(gram / np.trace(gram))[-5:]
    assert matrix_entropy(x) == pytest.approx(-(p * np.log(p)).sum(), rel=1e-12)
    assert matrix_entropy(x, order=2) == pytest.approx(-math.log((p**2).sum()), rel=1e-12)


def test_few_rows_are_told() -> None:
    with pytest.warns(FewSamplesWarning, match="10 rows of 20 components"):
        rankme(normal(10, 20))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: rankme(x, weights="squared"), "weights"),
        (lambda x: rankme(x, eps=-1.0), "eps"),
        (lambda x: rankme(x, drop_top=12), "drop_top"),
        (lambda x: rankme(x, drop_top=1.5), "drop_top"),
        (lambda x: rankme(x, compat="other"), "compat"),
        (lambda x: rankme(x, compat="reptrix", drop_top=1), "compat"),
        (lambda x: renyi_rank(x, order=-1), "order"),
        (lambda x: renyi_rank(x, order=math.nan), "order"),
        (lambda x: renyi_rank(x, order=True), "order"),
        (lambda x: top_share(x, k=0), "k"),
        (lambda x: top_share(x, k=13), "k"),
        (lambda x: explained_directions(x, share=0), "share"),
        (lambda x: participation_ratio(x, unbiased=True, drop_top=1), "drop_top"),
    ],
)
def test_bad_input(call, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call(normal(100, 12))


def test_no_variance_has_no_rank() -> None:
    for metric in (*METRICS, condition_number):
        with pytest.raises(DegenerateError):
            metric(torch.ones(5, 3))
    with pytest.raises(DegenerateError, match="largest"):
        rankme(Spectrum.of(np.array([1.0, 0.0])), drop_top=1)
    with pytest.raises(DegenerateError, match="unbiased"):
        participation_ratio(normal(2, 2), unbiased=True)
