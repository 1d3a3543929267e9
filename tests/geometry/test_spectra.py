"""Spectra against dense decompositions; frames; what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from commissure.core.errors import DegenerateError, InputError
from commissure.core.moments import Moments, empty, measure
from commissure.geometry.power_law import alpha_req
from commissure.geometry.spectra import Spectrum, spectrum


def normal(n: int, dim: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 40), st.integers(1, 40), st.booleans())
def test_eigenvalues_are_squared_singular_values(n: int, dim: int, center: bool) -> None:
    rows = normal(n, dim, seed=n * 41 + dim) + 3
    around = rows - rows.mean(0) if center else rows
    truth = np.linalg.svd(around.numpy(), compute_uv=False) ** 2 / (n - center)
    found = spectrum(rows, center=center)
    assert (found.n_samples, found.dim, len(found.values)) == (n, dim, min(n, dim))
    np.testing.assert_allclose(found.values, truth, atol=1e-12 * truth[0])


def test_a_large_mean_costs_nothing() -> None:
    rows = (normal(2000, 64) * torch.arange(1, 65, dtype=torch.float64) ** -0.5).float()
    moved = rows.double() + 1e4
    exact = alpha_req(spectrum(rows.double()), fit_range=(2, 60)).alpha
    assert alpha_req(spectrum(moved), fit_range=(2, 60)).alpha == pytest.approx(exact, abs=1e-9)
    # float32 keeps 1e-3 of a value near 1e4: the rounding of the data itself is in both.
    single = moved.float()
    assert alpha_req(spectrum(single), fit_range=(2, 60)).alpha == pytest.approx(
        alpha_req(spectrum(single.double()), fit_range=(2, 60)).alpha, abs=1e-3
    )


def test_a_large_mean_of_few_wide_rows_costs_nothing() -> None:
    single = (normal(40, 300) + 1e4 * normal(1, 300, seed=1)).float()
    exact = spectrum(single.double()).values
    np.testing.assert_allclose(spectrum(single).values[:-1], exact[:-1], rtol=1e-4)


def test_half_precision_is_that_of_its_values() -> None:
    rows = normal(200, 16).bfloat16()
    np.testing.assert_allclose(spectrum(rows).values, spectrum(rows.float()).values, rtol=1e-12)


def test_both_gram_matrices_give_one_spectrum() -> None:
    rows = normal(30, 31)
    wide = spectrum(rows).values
    tall = spectrum(measure(rows)).values
    np.testing.assert_allclose(wide, tall, atol=1e-12 * wide[0])


def test_frames() -> None:
    rows = normal(400, 8) * normal(400, 1, seed=1).exp() + 0.5
    unit = rows / rows.norm(dim=1, keepdim=True)
    np.testing.assert_allclose(spectrum(rows, frame="unit").values, spectrum(unit).values, rtol=1e-12)
    around = rows - rows.mean(0)
    sign = around / around.norm(dim=1, keepdim=True)
    np.testing.assert_allclose(spectrum(rows, frame="sign").values, spectrum(sign).values, rtol=1e-12)
    scaled = rows * normal(400, 1, seed=2).exp()
    np.testing.assert_allclose(spectrum(scaled, frame="unit").values, spectrum(unit).values, rtol=1e-10)


def test_one_long_row_is_a_fact_of_norms() -> None:
    """A sink: one direction has all the variance raw, one row's share of it as a direction."""
    rows = normal(500, 10)
    rows[0] *= 1000
    assert spectrum(rows).shares[0] > 0.99
    assert spectrum(rows, frame="unit").shares[0] < 0.15
    kept = torch.arange(500) > 0
    assert spectrum(rows, mask=kept).shares[0] < 0.15


def test_nothing_given_is_changed() -> None:
    rows = normal(20, 30)
    kept = rows.clone()
    for frame in ("raw", "unit", "sign"):
        spectrum(rows, frame=frame)
    assert torch.equal(rows, kept)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (torch.ones(3), "x"),
        (torch.ones(3, 2, dtype=torch.int64), "x"),
        ([[1.0, 2.0]], "x"),
        (torch.tensor([[1.0, 2.0], [float("nan"), 0.0]]), r"x\[1\]"),
        (torch.tensor([[1.0, 2.0], [float("inf"), 0.0], [1.0, 1.0]]), "1 of 3 rows"),
    ],
)
def test_bad_rows(data, message: str) -> None:
    with pytest.raises(InputError, match=message):
        spectrum(data)


def test_other_bad_input() -> None:
    rows = normal(5, 3)
    with pytest.raises(InputError, match="frame"):
        spectrum(rows, frame="other")
    with pytest.raises(InputError, match="frame"):
        spectrum(measure(rows), frame="unit")
    with pytest.raises(InputError, match="center"):
        spectrum(spectrum(rows), center=False)
    with pytest.raises(InputError, match="eigenvalue below zero"):
        spectrum(Moments(5, torch.zeros(2, dtype=torch.float64), torch.diag(torch.tensor([1.0, -1.0]).double())))
    for values in (np.array([1.0, 2.0]), np.array([1.0, -1.0]), np.array([np.nan]), np.array([])):
        with pytest.raises(InputError, match="values"):
            Spectrum(values, 5, 2)


def test_too_little_is_degenerate() -> None:
    for data in (normal(1, 3), normal(1, 1), empty(3), measure(normal(1, 3))):
        with pytest.raises(DegenerateError):
            spectrum(data)
    with pytest.raises(DegenerateError, match=r"x\[1\] has length zero"):
        spectrum(torch.tensor([[1.0, 0.0], [0.0, 0.0]]), frame="unit")
    assert spectrum(normal(1, 3), center=False).values[0] > 0
