"""Gated linear attention: chunks against the recurrence, in values and in every gradient."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from commissure.core.errors import InputError
from commissure.nn import linear_attention
from commissure.nn.linear_attention import gated_linear_attention, gated_linear_attention_reference


@pytest.fixture(autouse=True, scope="module", params=["kernel", "torch"])
def backend(request):
    """Both paths: the compiled kernel where it is built, and torch."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "torch":
            patch.setattr(linear_attention, "linear_attention_kernel_available", lambda: False)
        yield request.param


def problem(
    batch: int, time: int, heads: int, dim: int, value_dim: int, *, seed: int = 0, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    """q, k, v, g, beta, initial state."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, time, heads, width) for width in (dim, dim, value_dim)]
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    gates = [torch.rand(batch, time, heads, generator=generator, dtype=torch.float64) for _ in range(2)]
    state = torch.randn(batch, heads, dim, value_dim, generator=generator, dtype=torch.float64)
    return [x.to(dtype) for x in (*tensors, gates[0].log(), gates[1], state)]


def gradients(operator, inputs: list[Tensor], **options) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs, and gradients of a random functional of outputs and final state."""
    inputs = [x.clone().requires_grad_() for x in inputs]
    o, state = operator(*inputs, **options)
    weight = torch.randn(o.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    loss = (o * weight).sum() + state.square().sum()
    return [o.detach(), state.detach()], list(
        torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)
    )


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(
    sizes=st.tuples(st.integers(0, 2), st.integers(0, 20), st.integers(1, 3), st.integers(1, 5), st.integers(1, 5)),
    chunk_size=st.sampled_from([1, 3, 7, 64]),
    segment=st.sampled_from([1, 64, 2**17]),
    forgotten=st.lists(st.integers(0, 19), max_size=3),
)
def test_chunks_equal_the_recurrence(sizes, chunk_size, segment, forgotten):
    inputs = problem(*sizes)
    for t in forgotten:
        inputs[3][:, t : t + 1, :1] = -torch.inf
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear_attention, "CPU_SEGMENT", segment)
        ours, our_gradients = gradients(gated_linear_attention, inputs, chunk_size=chunk_size)
    theirs, their_gradients = gradients(gated_linear_attention_reference, inputs)
    for a, b in zip(ours + our_gradients, theirs + their_gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_gradcheck():
    inputs = [x.requires_grad_() for x in problem(2, 7, 1, 3, 2)]
    assert torch.autograd.gradcheck(lambda *x: gated_linear_attention(*x, chunk_size=3), inputs)


def test_without_gates_or_state():
    q, k, v, g, _, _ = problem(2, 9, 2, 3, 4)
    ours, our_gradients = gradients(gated_linear_attention, [q, k, v, g], chunk_size=4)
    theirs, their_gradients = gradients(gated_linear_attention_reference, [q, k, v, g])
    for a, b in zip(ours + our_gradients, theirs + their_gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_long_products_keep_their_digits():
    """Gates of 1e-30 beside gates of 1: products of a chunk far outside float32's range, float32 input."""
    exact = problem(1, 300, 2, 8, 8)
    exact[3] = torch.where(
        torch.rand(1, 300, 2, generator=torch.Generator().manual_seed(2)) < 0.3, -69.0, -1e-4
    ).double()
    single = [x.float() for x in exact]
    ours, our_gradients = gradients(gated_linear_attention, single)
    theirs, their_gradients = gradients(gated_linear_attention_reference, [x.double() for x in single])
    for a, b in zip(ours + our_gradients, theirs + their_gradients, strict=True):
        assert a.dtype == torch.float32
        assert (a - b).abs().max() <= 2e-6 * max(1.0, float(b.abs().max()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_half_precision_in_and_out_single_inside(dtype):
    half = problem(1, 70, 2, 8, 4, dtype=dtype)
    half[3] = half[3].clamp(min=-0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (o, state), grads = gradients(gated_linear_attention, half)
    (exact, exact_state), exact_grads = gradients(gated_linear_attention, [x.double() for x in half])
    assert o.dtype == dtype
    assert state.dtype == torch.float32
    assert all(a.dtype == dtype for a in grads)
    assert (state - exact_state).abs().max() <= 1e-6 * exact_state.abs().max()
    for a, b in zip([o, *grads], [exact, *exact_grads], strict=True):
        assert (a - b).abs().max() <= torch.finfo(dtype).eps * b.abs().max()


def test_arguments_and_strides_are_left_alone():
    inputs = problem(2, 10, 3, 4, 5)
    kept = [x.clone() for x in inputs]
    o, state = gated_linear_attention(*inputs, chunk_size=4)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs[:5]]
    again = gated_linear_attention(*strided, inputs[5], chunk_size=4)
    assert torch.equal(o, again[0])
    assert torch.equal(state, again[1])
    assert all(torch.equal(a, b) for a, b in zip(inputs, kept, strict=True))


def test_wrong_shapes_are_named():
    q, k, v, g, beta, state = problem(2, 5, 3, 4, 6)
    for arguments, message in (
        ((q[0], k, v, g, beta, state), r"q = \(5, 3, 4\)"),
        ((q, k[..., :3], v, g, beta, state), r"k = \(2, 5, 3, 3\): expected shape \(2, 5, 3, 4\)"),
        ((q, k, v[:, :4], g, beta, state), r"v = \(2, 4, 3, 6\)"),
        ((q, k, v, g[..., None], beta, state), r"g = \(2, 5, 3, 1\)"),
        ((q, k, v, g, beta[:1], state), r"beta = \(1, 5, 3\)"),
        ((q, k, v, g, beta, state.mT), r"initial_state = \(2, 3, 6, 4\): expected shape \(2, 3, 4, 6\)"),
    ):
        with pytest.raises(InputError, match=message):
            gated_linear_attention(*arguments)
    with pytest.raises(InputError, match="chunk_size = 0"):
        gated_linear_attention(q, k, v, g, chunk_size=0)
