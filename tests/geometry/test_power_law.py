"""alpha-ReQ against exact power laws, numpy's weighted fit and a public program's number."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from commissure.core.errors import DegenerateError, InputError
from commissure.geometry.power_law import alpha_req
from commissure.geometry.spectra import Spectrum


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0, 2.7])
@pytest.mark.parametrize("window", [(1, 2), (11, 100), (12, 100), (150, 400)])
@pytest.mark.parametrize("weights", ["1/rank", "uniform"])
def test_a_power_law_is_found_on_any_window(alpha: float, window: tuple[int, int], weights) -> None:
    found = alpha_req(Spectrum.of(3.0 * np.arange(1.0, 401.0) ** -alpha), fit_range=window, weights=weights)
    assert found.alpha == pytest.approx(alpha, abs=1e-11)
    assert found.intercept == pytest.approx(np.log(3.0), abs=1e-10)
    assert found.window == window


def test_the_fit_is_numpys() -> None:
    rng = np.random.default_rng(0)
    values = np.sort(rng.gamma(2.0, size=200))[::-1]
    ranks = np.arange(11.0, 101.0)
    y = np.log(values[10:100])
    for weights, root in (("1/rank", ranks**-0.5), ("uniform", np.ones(90))):
        (slope, intercept), covariance = np.polyfit(np.log(ranks), y, 1, w=root, cov=True)
        found = alpha_req(Spectrum.of(values), weights=weights)
        assert found.alpha == pytest.approx(-slope, rel=1e-10)
        assert found.intercept == pytest.approx(intercept, rel=1e-9)
        assert found.stderr == pytest.approx(covariance[0, 0] ** 0.5, rel=1e-8)
        residuals = root**2 * (y - intercept - slope * np.log(ranks)) ** 2
        total = root**2 * (y - np.average(y, weights=root**2)) ** 2
        assert found.r2 == pytest.approx(1 - residuals.sum() / total.sum(), rel=1e-9)


def test_the_number_of_a_public_program() -> None:
    """.148936: in the tests of reptrix 0.1.0, ranks 11 to 100; the paper's program fits 12 to 100."""
    torch.manual_seed(0)
    rows = torch.randn(1000, 1024)
    found = alpha_req(rows, fit_range=(11, 100))
    assert found.alpha == pytest.approx(0.148936, rel=1e-5)
    assert alpha_req(rows, fit_range=(11, 100)) == found
    assert abs(alpha_req(rows, fit_range=(12, 100)).alpha - found.alpha) > 1e-4


@pytest.mark.parametrize("window", [(11, 100), (0, 5), (5, 5), (6, 2), (1, 2, 3), "ab", (1.0, 5.0), (True, 5), None])
def test_a_window_outside_the_spectrum_is_refused(window) -> None:
    with pytest.raises(InputError, match="fit_range"):
        alpha_req(Spectrum.of(np.r_[np.ones(50), 0.0]), fit_range=window)


def test_other_bad_input() -> None:
    with pytest.raises(InputError, match="weights"):
        alpha_req(Spectrum.of(np.ones(200)), weights="rank")
    with pytest.raises(DegenerateError):
        alpha_req(Spectrum.of(np.array([1.0, 0.0])))
