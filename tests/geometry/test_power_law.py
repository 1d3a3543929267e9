"""alpha-ReQ against exact power laws, numpy's weighted fit and a public program's number."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.integrate import quad

from commissure.core.errors import DegenerateError, InputError
from commissure.geometry.power_law import _marchenko_pastur_median, alpha_req, noise_edge
from commissure.geometry.spectra import Spectrum, spectrum


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


@pytest.mark.parametrize("ratio", [1.0, 0.5, 0.1, 1e-3])
def test_the_median_of_noise_is_that_of_its_density(ratio: float) -> None:
    low, high = (1 - ratio**0.5) ** 2, (1 + ratio**0.5) ** 2
    density = lambda x: np.sqrt((high - x) * (x - low)) / (2 * np.pi * ratio * x)  # noqa: E731
    below = quad(density, low, _marchenko_pastur_median(ratio), limit=500)[0]
    assert below == pytest.approx(0.5, abs=1e-6)


def spiked(n: int, dim: int, n_spikes: int) -> torch.Tensor:
    """Normal rows: eigenvalues 400 i^-1 for the first ranks, all others 1."""
    scales = np.ones(dim)
    scales[:n_spikes] = 20 * np.arange(1.0, n_spikes + 1) ** -0.5
    rows = torch.randn(n, dim, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    return rows * torch.from_numpy(scales)


@pytest.mark.parametrize(
    ("n", "dim", "n_spikes", "window"),
    [(2000, 300, 20, (11, 20)), (1000, 100, 8, (1, 8)), (250, 1000, 18, (11, 18)), (300, 199, 7, (1, 7))],
)
def test_an_automatic_window_ends_where_noise_begins(n: int, dim: int, n_spikes: int, window) -> None:
    found = spectrum(spiked(n, dim, n_spikes))
    fit = alpha_req(found, fit_range="auto")
    assert fit == alpha_req(found, fit_range=window)
    edge = (1 + (dim / (n - 1)) ** 0.5) ** 2  # of noise of variance 1
    assert noise_edge(found) == pytest.approx(edge, rel=0.06)


def test_an_automatic_window_of_a_population_ends_at_the_median() -> None:
    for dim, window in ((100, (1, 50)), (210, (11, 100)), (400, (11, 100))):
        fit = alpha_req(Spectrum.of(np.arange(1.0, dim + 1) ** -0.8), fit_range="auto")
        assert fit.window == window
        assert fit.alpha == pytest.approx(0.8, abs=1e-11)


def test_dead_directions_are_no_signal() -> None:
    values = np.r_[np.arange(1.0, 31.0) ** -1.0, np.geomspace(1e-17, 1e-19, 70)]
    assert alpha_req(Spectrum.of(values), fit_range="auto").window == (1, 30)


def test_noise_alone_has_no_automatic_window() -> None:
    for data in (spiked(2000, 300, 0), spiked(1000, 100, 4), spiked(2000, 300, 14), Spectrum.of(np.ones(50))):
        with pytest.raises(DegenerateError, match="noise edge"):
            alpha_req(data, fit_range="auto")
    with pytest.raises(DegenerateError, match="covariance is zero"):
        alpha_req(Spectrum.of(np.zeros(50)), fit_range="auto")
    with pytest.raises(DegenerateError, match="1 rows"):
        noise_edge(Spectrum.of(np.ones(5), n_samples=1))
