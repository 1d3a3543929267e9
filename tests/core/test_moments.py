"""Streaming moments: any blocks, any order, any process give the two-pass result."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from commissure.core import moments
from commissure.core.errors import DegenerateError, InputError
from commissure.core.moments import Moments


def sample(seed: int, n: int, dim: int, dtype: torch.dtype = torch.float64, mean: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, dim, dtype=torch.float64, generator=generator)
    return (x @ torch.randn(dim, dim, dtype=torch.float64, generator=generator) + mean).to(dtype)


def assert_close(a: Moments, b: Moments, tolerance: float = 1e-12) -> None:
    """Mean and scatter within `tolerance` of b's standard deviations, which are about 1."""
    assert a.n_samples == b.n_samples
    scale = (b.scatter.diagonal() / max(1, b.n_samples)).sqrt() + 1e-3 * (1 + b.mean.abs())
    assert ((a.mean - b.mean) / scale).abs().max() <= tolerance
    assert ((a.scatter - b.scatter) / (torch.outer(scale, scale) * max(1, b.n_samples))).abs().max() <= tolerance


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 20), min_size=1, max_size=6), st.integers(1, 5), st.integers(0, 1000))
def test_any_split_and_order_give_the_two_pass_moments(sizes: list[int], dim: int, seed: int) -> None:
    x = sample(seed, sum(sizes) + 2, dim, mean=3.0)
    blocks = x.split([*sizes, 2])
    reference = moments.measure_reference(x)
    streamed = moments.empty(dim)
    for block in blocks:
        streamed = moments.update(streamed, block)
    parts = [moments.measure(block) for block in blocks]
    tree = moments.merge(moments.merge(*parts[::2]), *parts[1::2]) if len(parts) > 1 else parts[0]
    for result in (streamed, moments.merge(*parts), moments.merge(*reversed(parts)), tree):
        assert_close(result, reference)


def test_covariance_is_numpys() -> None:
    x = sample(0, 50, 4)
    state = moments.measure(x)
    assert torch.allclose(moments.covariance(state), torch.cov(x.T), rtol=1e-13, atol=0)
    assert torch.allclose(moments.covariance(state, ddof=0), torch.cov(x.T, correction=0), rtol=1e-13, atol=0)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 3e-6)])
def test_a_mean_of_1e4_standard_deviations_loses_nothing(dtype: torch.dtype, tolerance: float) -> None:
    """Against two passes in float64 over the very numbers given: the float32 error is that of a centered Gram."""
    x = sample(1, 4000, 6, torch.float64)
    x = ((x - x.mean(0)) / x.std(0) + 1e4).to(dtype)
    x[2000:] += 50.0  # later blocks drift away from the first one's mean
    rows = x.double()
    exact = rows - rows.mean(0)
    streamed = moments.merge(*(moments.measure(block) for block in x.split(300)))
    assert ((streamed.scatter - exact.T @ exact) / (exact.T @ exact).diagonal()).abs().max() <= tolerance
    assert (streamed.mean - rows.mean(0)).abs().max() <= 1e-10
    assert streamed.scatter.dtype == streamed.mean.dtype == torch.float64


def test_float32_blocks_keep_their_gram_in_float32() -> None:
    """The dtype rule: the block product is a float32 one, so its entries are float32 numbers up to the correction."""
    x = torch.tensor([[-1.0], [1.0]]) * (1 + 2.0**-20)
    exact = 2 * (1 + 2.0**-20) ** 2
    assert moments.measure(x).scatter.item() != exact
    assert moments.measure(x.double()).scatter.item() == exact


@pytest.mark.parametrize(("n", "dim"), [(2049, 3), (5000, 257), (7, 600)])
def test_moments_of_more_than_one_block(n: int, dim: int) -> None:
    x = torch.randn(n, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 5
    state = moments.measure(x)
    exact = (x - x.mean(0)).T @ (x - x.mean(0))
    assert torch.allclose(state.scatter, exact, rtol=1e-12, atol=1e-11 * n)
    assert torch.allclose(state.mean, x.mean(0), rtol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_blocks_are_computed_in_float32(dtype: torch.dtype) -> None:
    x = sample(2, 3000, 3, dtype)
    assert_close(moments.measure(x), moments.measure_reference(x), 3e-6)


def test_mask_hides_rows_whatever_they_hold() -> None:
    x = sample(3, 24, 3).view(4, 6, 3)
    mask = torch.rand(4, 6, generator=torch.Generator().manual_seed(0)) > 0.4
    dirty = x.masked_fill(~mask[..., None], float("nan"))
    assert_close(moments.measure(dirty, mask=mask), moments.measure_reference(x[mask]))
    assert_close(moments.measure(x, mask=mask), moments.measure_reference(x, mask=mask))
    none = torch.zeros(4, 6, dtype=torch.bool)
    assert_close(moments.update(moments.measure(x), dirty, mask=none), moments.measure(x))


def test_empty_is_neutral() -> None:
    x = moments.measure(sample(4, 9, 2))
    for merged in (moments.merge(moments.empty(2), x), moments.merge(x, moments.empty(2), moments.empty(2))):
        assert_close(merged, x, 0.0)
    assert moments.merge(moments.empty(2), moments.empty(2)).n_samples == 0
    assert moments.measure(torch.ones(0, 2)).scatter.tolist() == [[0.0, 0.0], [0.0, 0.0]]


@settings(deadline=None, max_examples=50)
@given(st.integers(2, 6), st.integers(0, 1000))
def test_folds_leave_one_out(n_folds: int, seed: int) -> None:
    x = sample(seed, 40, 3, mean=1e3)
    fold = torch.randint(n_folds, (40,), generator=torch.Generator().manual_seed(seed))
    folds = [moments.measure(x, mask=fold == k) for k in range(n_folds)]
    assert_close(moments.merge(*folds), moments.measure_reference(x), 1e-10)
    for k, (own, rest) in enumerate(zip(folds, moments.leave_one_out(folds), strict=True)):
        assert_close(own, moments.measure_reference(x[fold == k]), 1e-10)
        assert_close(rest, moments.measure_reference(x[fold != k]), 1e-10)


def test_joint_moments_hold_the_cross_covariance() -> None:
    x, y = sample(7, 60, 3, mean=5.0), sample(8, 60, 2)
    joint = moments.covariance(moments.measure(torch.cat([x, y], -1)))
    expected = (x - x.mean(0)).T @ (y - y.mean(0)) / 59
    assert torch.allclose(joint[:3, 3:], expected, rtol=1e-12, atol=1e-13)


def test_nothing_is_mutated_and_no_graph_is_kept() -> None:
    x = sample(9, 10, 2).requires_grad_()
    state = moments.measure(x)
    copy = Moments(state.n_samples, state.mean.clone(), state.scatter.clone())
    more = moments.update(state, x)
    moments.merge(state, more)
    assert_close(state, copy, 0.0)
    assert not more.scatter.requires_grad
    alone = moments.merge(state)
    alone.scatter.zero_()
    assert_close(state, copy, 0.0)


def test_processes_merge() -> None:
    x = sample(10, 60, 3)
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        remote = moments.merge(*pool.map(moments.measure, x.split(20)))
    assert_close(remote, moments.merge(*(moments.measure(block) for block in x.split(20))))


def test_bad_input() -> None:
    state = moments.empty(3)
    with pytest.raises(InputError, match=r"^x = \(5, 2\): expected shape \(\.\.\., 3\)"):
        moments.update(state, torch.ones(5, 2))
    with pytest.raises(InputError, match=r"floating-point tensor"):
        moments.measure(torch.ones(5, 3, dtype=torch.int64))
    with pytest.raises(InputError, match=r"^mask = "):
        moments.measure(torch.ones(5, 3), mask=torch.ones(4, dtype=torch.bool))
    with pytest.raises(InputError, match=r"^mask = "):
        moments.measure(torch.ones(5, 3), mask=torch.ones(5))
    with pytest.raises(InputError, match=r"one dimension for all"):
        moments.merge(state, moments.empty(2))
    with pytest.raises(InputError, match=r"at least one Moments"):
        moments.merge()
    with pytest.raises(InputError, match=r"^dim = 0"):
        moments.empty(0)
    with pytest.raises(InputError, match=r"at least 2 folds"):
        moments.leave_one_out([state])


def test_the_first_bad_row_is_named() -> None:
    x = torch.ones(2, 4, 3)
    x[1, 2, 0] = float("inf")
    with pytest.raises(InputError, match=r"^x\[1, 2\] = \[inf, 1\.0, 1\.0\]: expected finite numbers; mask the row"):
        moments.measure(x)
    with pytest.raises(InputError, match=r"whose sum fits torch.float32"):
        moments.measure(torch.full((4, 1), 3e38))


def test_too_few_samples_have_no_covariance() -> None:
    with pytest.raises(DegenerateError, match=r"covariance of 1 samples with ddof = 1: needs at least 2"):
        moments.covariance(moments.measure(torch.ones(1, 3)))
