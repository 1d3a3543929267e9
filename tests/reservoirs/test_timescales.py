"""Timescales of sequences whose autocorrelation is known, streamed in any chunks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.signal import lfilter

from commissure.core.errors import InputError
from commissure.reservoirs.timescales import autocorrelation, lag_products, timescales, timescales_reference


def autoregressive(tau, time, n_units, seed=0):
    noise = np.random.default_rng(seed).normal(size=(time + 500, n_units))
    return lfilter([1.0], [1.0, -np.exp(-1 / tau)], noise, axis=0)[500:]


@pytest.mark.parametrize("method", ["fit", "integrated"])
@pytest.mark.parametrize("tau", [2.0, 5.0, 10.0])
def test_an_autoregressive_unit_has_its_own_timescale(method, tau):
    """tau = -1 / ln phi."""
    x = autoregressive(tau, 50_000, 20)
    found = timescales(x, method=method, n_lags=int(2 * tau) if method == "fit" else int(8 * tau))
    assert found.n_undefined == 0
    assert found.values.mean() == pytest.approx(tau, rel=0.03)
    assert found.values.std() < 0.15 * tau


@pytest.mark.parametrize("method", ["fit", "integrated"])
def test_both_equal_the_reference(method):
    x = np.concatenate([autoregressive(tau, 2000, 5, seed=3) for tau in (0.3, 1.0, 4.0, 60.0)], 1) + 3.0
    x = np.concatenate([x, np.random.default_rng(0).normal(size=(2000, 6)), np.full((2000, 1), 0.1)], 1)
    ours, slow = timescales(x, method=method), timescales_reference(x, method=method)
    np.testing.assert_allclose(ours.values, slow.values, rtol=1e-10)
    assert ours.n_undefined == slow.n_undefined > 1
    assert np.isnan(ours.values[-1])


def test_the_published_number_of_lags_is_33():
    x = autoregressive(60.0, 2000, 4)
    np.testing.assert_array_equal(timescales(x).values, timescales(x, n_lags=33).values)
    assert (timescales(x).values != timescales(x, n_lags=32).values).any()


def test_the_autocorrelation_is_that_of_its_definition():
    x = autoregressive(3.0, 400, 3) + 1e3
    centered = x - x.mean(0)
    expected = [(centered[k:] * centered[: 400 - k]).sum(0) / (centered**2).sum(0) for k in range(21)]
    np.testing.assert_allclose(autocorrelation(lag_products(x, 20)), expected, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(cuts=st.lists(st.integers(1, 299), max_size=6, unique=True), n_lags=st.integers(1, 40), offset=st.floats(-5, 5))
def test_any_chunks_give_the_same(cuts, n_lags, offset):
    x = autoregressive(4.0, 300, 2) + offset
    streamed = None
    for chunk in np.split(x, sorted(cuts)):
        streamed = lag_products(chunk, n_lags, before=streamed)
    np.testing.assert_allclose(autocorrelation(streamed), autocorrelation(lag_products(x, n_lags)), atol=1e-11)
    np.testing.assert_allclose(timescales(streamed).values, timescales(x, n_lags=n_lags).values, rtol=1e-7)


def test_batches_are_rows_alone():
    x = np.stack([autoregressive(tau, 500, 3) for tau in (2.0, 6.0)])
    both = timescales(x).values
    assert both.shape == (2, 3)
    for row, values in zip(x, both, strict=True):
        np.testing.assert_array_equal(timescales(row).values, values)


def test_undefined_units_are_nan_and_counted():
    t = np.arange(400)
    alternating, constant = (-1.0) ** t, np.full(400, 0.1)
    found = timescales(np.stack([alternating, constant, autoregressive(5.0, 400, 1)[:, 0]], 1))
    assert np.isnan(found.values).tolist() == [True, True, False]
    assert found.n_undefined == 2
    assert timescales(np.stack([alternating, constant], 1), method="integrated").n_undefined == 2


def test_a_line_that_rises_gives_no_timescale():
    """Every other step repeats: rho_2 and rho_4 are large, rho_1 and rho_3 are chance, in some units rising."""
    noise = np.random.default_rng(0).normal(size=(2000, 200))
    x = lfilter([1.0], [1.0, 0.0, -0.98], noise, axis=0)
    rho = autocorrelation(lag_products(x, 4))
    lines = [np.polyfit(range(5), np.log(r), 1)[0] if (r > 0).all() else -1.0 for r in rho.T]
    rising = np.array(lines) > 0
    assert rising.any()
    assert np.isnan(timescales(x, n_lags=4).values[rising]).all()


def test_modules_average_their_defined_units():
    x = np.concatenate([autoregressive(2.0, 900, 2), np.zeros((900, 2)), autoregressive(9.0, 900, 2)], 1)
    found = timescales(x)
    means = found.by_module([[0, 1], [1, 2], [2, 3], [4, 5]])
    assert means[0] == pytest.approx(found.values[:2].mean())
    assert means[1] == pytest.approx(found.values[1])
    assert np.isnan(means[2])
    assert means[3] == pytest.approx(found.values[4:].mean())
    with pytest.raises(InputError, match=r"modules\[1\]"):
        found.by_module([[0], [6]])


def test_scale_and_offset_do_not_matter():
    x = autoregressive(5.0, 1000, 3)
    np.testing.assert_allclose(timescales(1e-8 * x + 2.0).values, timescales(x).values, rtol=1e-5)


@pytest.mark.parametrize(
    ("call", "argument"),
    [
        (lambda x: timescales(x, n_lags=0), "n_lags"),
        (lambda x: timescales(x, n_lags=50), "n_lags"),
        (lambda x: timescales(x, method="acf"), "method"),
        (lambda x: timescales(x[:, 0]), "states"),
        (lambda x: timescales(x[:3]), "states"),
        (lambda x: timescales(np.where(x == x.max(), np.nan, x)), "states[49, 1]"),
        (lambda x: lag_products(x, 4, before=lag_products(x, 5)), "before"),
        (lambda x: timescales(lag_products(x, 4), n_lags=4), "n_lags"),
        (lambda x: timescales(x, n_lags=4.0), "n_lags"),
        (lambda x: timescales(x, n_lags=True), "n_lags"),
        (lambda x: timescales(x, method=None), "method"),
        (lambda x: timescales("x"), "states"),
        (lambda x: lag_products(x, 4, before=x), "before"),
        (lambda x: autocorrelation(x), "lags"),
        (lambda x: timescales(x).by_module(None), "modules"),
        (lambda x: timescales(x).by_module([]), "modules"),
        (lambda x: timescales(x).by_module([[0.5]]), "modules[0]"),
        (lambda x: timescales_reference(x[:, 0]), "states"),
    ],
)
def test_bad_input_is_refused_by_name(call, argument):
    with pytest.raises(InputError) as raised:
        call(np.arange(100.0).reshape(50, 2))
    assert raised.value.argument == argument
