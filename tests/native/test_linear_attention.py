"""Compiled gated linear attention: every clone against the recurrence and autograd, its limits, errors and numerics."""

from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from commissure.core.errors import CommissureWarning, InputError
from commissure.native import kernels, linear_attention
from commissure.native.linear_attention import (
    linear_attention_backward,
    linear_attention_backward_reference,
    linear_attention_kernel_available,
    linear_attention_reference,
)

native = kernels() if linear_attention_kernel_available() else None
CLONES = [] if native is None else native.mesa_clones()
needs_kernel = pytest.mark.skipif(native is None, reason="built without the C++ kernels")
DTYPES = [torch.float32, torch.float64]
NAMES = ["q", "k", "v", "g", "beta", "initial_state", "d_o", "d_final"]


def problem(
    batch: int, time: int, heads: int, dim: int, value_dim: int, *, seed: int = 0, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    """Random q, k, v, g, beta, initial state and gradients of both results; some tokens forget everything."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    tokens, state = (batch, time, heads), (batch, heads, dim, value_dim)
    q, k, v = normal(*tokens, dim) / dim**0.5, normal(*tokens, dim) / dim**0.5, normal(*tokens, value_dim)
    g = -0.3 * uniform(*tokens)
    g[uniform(*tokens) < 0.03] = -torch.inf
    tensors = (q, k, v, g, uniform(*tokens), normal(*state), normal(*tokens, value_dim), normal(*state))
    return [x.to(dtype) for x in tensors]


def everything(args: list[Tensor], clone: str = "") -> list[Tensor]:
    """Outputs, last state and all gradients."""
    return [*linear_attention._forward(*args[:6], clone), *linear_attention._backward(*args, clone)]


def reference64(args: list[Tensor]) -> list[Tensor]:
    exact = [x.double() for x in args]
    return [*linear_attention_reference(*exact[:6]), *linear_attention_backward_reference(*exact)]  # type: ignore[list-item]


def errors(found: list[Tensor], want: list[Tensor]) -> list[float]:
    """Largest deviation of each tensor, relative to its largest entry."""
    pairs = [(a.double(), b) for a, b in zip(found, want, strict=True) if b.numel()]
    return [float((a - b).abs().max() / b.abs().max().clamp(min=1e-30)) for a, b in pairs]


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(
    batch=st.integers(0, 2),
    time=st.sampled_from([0, 1, 2, 15, 16, 17, 63, 64, 65, 100]),
    heads=st.integers(1, 3),
    dim=st.integers(1, 40),
    value_dim=st.integers(1, 40),
    seed=st.integers(0, 2**16),
)
@pytest.mark.parametrize("clone", CLONES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_clone_equals_the_reference(dtype, clone, batch, time, heads, dim, value_dim, seed):
    args = problem(batch, time, heads, dim, value_dim, seed=seed, dtype=dtype)
    found, want = everything(args, clone), reference64(args)
    assert [x.shape for x in found] == [x.shape for x in want]
    assert all(x.dtype == dtype for x in found)
    assert all(error < (1e-12 if dtype == torch.float64 else 1e-5) for error in errors(found, want))


@needs_kernel
@pytest.mark.parametrize("sizes", [(1, 150, 2, 64, 64), (1, 150, 1, 130, 33), (1, 150, 1, 33, 130)])
def test_large_heads_equal_the_reference(sizes):
    for dtype, tolerance in zip(DTYPES, (3e-6, 1e-13), strict=True):
        args = problem(*sizes, dtype=dtype)
        want = reference64(args)
        for clone in CLONES:
            assert all(error < tolerance for error in errors(everything(args, clone), want))


@pytest.mark.parametrize("with_beta", [True, False], ids=["beta", "no_beta"])
def test_the_backward_is_the_gradient_of_the_recurrence(with_beta):
    args = problem(2, 70, 2, 5, 3, seed=1)
    args[4] = args[4] if with_beta else None
    leaves = [None if x is None else x.clone().requires_grad_() for x in args[:6]]
    o, last = linear_attention_reference(*leaves)
    wanted = [x for x in leaves if x is not None]
    want = torch.autograd.grad([o, last], wanted, [args[6], args[7]])
    for backward in (linear_attention_backward, linear_attention_backward_reference):
        found = list(backward(*args))
        if not with_beta:
            del found[4]
        for a, b in zip(found, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gate_of_minus_infinity_cuts_the_sequence(dtype):
    args = problem(1, 40, 2, 9, 6, seed=2, dtype=dtype)
    args[3][:, 21] = -torch.inf
    tail = [x[:, 21:] for x in args[:5]] + [torch.full_like(args[5], 1e30)] + [args[6][:, 21:], args[7]]
    whole, cut = everything(args), everything(tail)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(whole[0][:, 21:], cut[0], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(whole[1], cut[1], rtol=tolerance, atol=tolerance)
    assert not cut[7].any()  # of the state before
    assert not whole[5][:, 21].any()  # of the gate itself


@needs_kernel
@pytest.mark.parametrize("clone", CLONES)
def test_products_that_underflow_lose_no_digits(clone):
    """Gates of 1e-30 beside gates of 1: a chunk's product is far outside float32's range."""
    args = problem(1, 300, 2, 8, 8, seed=3, dtype=torch.float32)
    rare = torch.rand(1, 300, 2, generator=torch.Generator().manual_seed(2)) < 0.3
    args[3] = torch.where(rare, -69.0, -1e-4)
    assert all(error < 2e-6 for error in errors(everything(args, clone), reference64(args)))


@needs_kernel
@pytest.mark.parametrize("clone", CLONES)
def test_single_precision_over_a_long_sequence(clone):
    """Nothing forgotten, 2048 tokens: rounding must not pile up."""
    args = problem(1, 2048, 1, 16, 16, seed=4, dtype=torch.float32)
    args[3] = torch.full_like(args[3], -1e-4)
    assert all(error < 5e-6 for error in errors(everything(args, clone), reference64(args)))


def test_any_split_goes_on_from_the_state():
    args = problem(2, 50, 3, 11, 7, seed=5)
    whole, last = linear_attention.linear_attention(*args[:6])
    for split in ((0, 50), (1, 49), (16, 34), (17, 33), (1,) * 50):
        pieces, state, start = [], args[5], 0
        for length in split:
            o, state = linear_attention.linear_attention(*(x[:, start : start + length] for x in args[:5]), state)
            pieces.append(o)
            start += length
        torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(state, last, rtol=1e-12, atol=1e-12)


@needs_kernel
@pytest.mark.parametrize("shape", [(3, 130, 1, 40, 24), (2, 90, 5, 40, 40)])
def test_the_number_of_threads_changes_no_bit(shape):
    args = problem(*shape, seed=6, dtype=torch.float32)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(everything(args))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("with_kernel", [True, False], ids=["kernel", "reference"])
def test_gates_may_keep_double_digits(with_kernel, monkeypatch):
    """exp(g) of g = -60 rounded to float32 is off by 2e-6."""
    args = problem(1, 20, 2, 4, 3, seed=10, dtype=torch.float32)
    if not with_kernel:
        monkeypatch.setattr(linear_attention, "kernels", lambda: None)
    args[3] = torch.full((1, 20, 2), -60.0 - 1e-6, dtype=torch.float64)
    args[5] = args[5] * 1e30
    found = everything(args)
    assert all(x.dtype == torch.float32 for x in found)
    first = found[0][:, 0].double()
    tokens, state = [x[:, :1].double() for x in args[:5]], args[5].double()
    exact = linear_attention_reference(*tokens, state)[0][:, 0]
    torch.testing.assert_close(first, exact, rtol=5e-7, atol=1e-9 * float(exact.abs().max()))


def test_arguments_are_not_changed_and_strides_do_not_matter():
    args = problem(2, 20, 3, 7, 5, seed=8)
    copies = [x.clone() for x in args]
    want = everything(args)
    strided = [torch.stack([x, x], -1)[..., 0] for x in args]
    assert not strided[0].is_contiguous()
    assert all(torch.equal(a, b) for a, b in zip(everything(strided), want, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(args, copies, strict=True))


@pytest.mark.parametrize("index", range(8), ids=NAMES)
def test_what_does_not_fit_is_named(index):
    args = problem(2, 4, 3, 5, 6)
    for change in (lambda x: x[:, :, :2] if index < 5 or index == 6 else x[:, :2], lambda x: x.half()):
        wrong = list(args)
        wrong[index] = change(wrong[index])
        # All other tensors are named against q and v.
        with pytest.raises(InputError, match=r"^\w+ = " if index == 0 else rf"^{NAMES[index]} = "):
            linear_attention_backward(*wrong)


@pytest.mark.parametrize("shape", [(2, 20, 3, 4, 5), (2, 1, 3, 4, 4), (0, 5, 3, 4, 4)])
@pytest.mark.parametrize("with_beta", [True, False], ids=["beta", "no_beta"])
def test_the_operators_are_well_registered(shape, with_beta):
    args = problem(*shape)
    args[4] = args[4] if with_beta else None
    torch.library.opcheck(torch.ops.commissure.linear_attention.default, tuple(args[:6]))
    torch.library.opcheck(torch.ops.commissure.linear_attention_backward.default, tuple(args))


@needs_kernel
def test_an_unknown_clone_is_refused():
    with pytest.raises(ValueError, match="no clone 'mmx'"):
        everything(problem(1, 1, 1, 2, 2), "mmx")


def test_without_kernels_the_references_run(monkeypatch):
    args = problem(2, 9, 3, 5, 4, seed=9)
    monkeypatch.setattr(linear_attention, "kernels", lambda: None)
    with warnings.catch_warnings():
        warnings.simplefilter("error", CommissureWarning)
        found = everything(args)
    assert all(torch.equal(a, b) for a, b in zip(found, reference64(args), strict=True))
