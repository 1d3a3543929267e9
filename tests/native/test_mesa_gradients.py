"""Compiled gradients of the Mesa layer: every clone against recurrences, these against autograd; limits and errors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from commissure.core.errors import InputError
from commissure.native import kernels
from commissure.native import mesa_gradients as door
from commissure.native.linear_attention import linear_attention_kernel_available, linear_attention_reference
from commissure.native.mesa import mesa_solve_reference
from commissure.native.mesa_gradients import mesa_gradients, mesa_gradients_reference

native = kernels() if linear_attention_kernel_available() else None
CLONES = [] if native is None else native.mesa_clones()
needs_kernel = pytest.mark.skipif(native is None, reason="built without the C++ kernels")
NAMES = ["x", "y", "k", "v", "g", "beta", "lamb", "h_kk", "h_kv", "d_o", "d_h_kk", "d_h_kv"]


def layer(batch: int, time: int, heads: int, dim: int, value_dim: int, *, seed: int = 0) -> list[Tensor]:
    """Random q, k, v, g, beta, lamb, h_kk, h_kv and gradients of all results; some tokens forget everything."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    tokens, gram = (batch, time, heads), (batch, heads, dim, dim)
    g = -0.3 * uniform(*tokens)
    g[uniform(*tokens) < 0.03] = -torch.inf
    root = normal(*gram)
    q, k, v = normal(*tokens, dim) / dim**0.5, normal(*tokens, dim) / dim**0.5, normal(*tokens, value_dim)
    states = root @ root.mT / dim, normal(batch, heads, dim, value_dim)
    gradients = normal(*tokens, value_dim), normal(*gram), normal(batch, heads, dim, value_dim)
    return [q, k, v, g, uniform(*tokens), 0.5 + uniform(heads, dim), *states, *gradients]


def problem(*sizes: int, seed: int = 0, log_gate: float | list[float] | None = None) -> list[Tensor]:
    """The operands, with x and y solved for; `log_gate`: of every token, or of each head's."""
    q, k, v, g, beta, lamb, h_kk, h_kv, d_o, d_h_kk, d_h_kv = layer(*sizes, seed=seed)
    g = g if log_gate is None else torch.zeros_like(g) + torch.tensor(log_gate, dtype=g.dtype)
    x = mesa_solve_reference(q, k, g, beta, lamb, h_kk)[0]
    u, _ = linear_attention_reference(d_o, v, k, g, beta, h_kv.mT)
    y = mesa_solve_reference(u, k, g, beta, lamb, h_kk)[0]
    return [x, y, k, v, g, beta, lamb, h_kk, h_kv, d_o, d_h_kk, d_h_kv]


def check_clones(sizes: tuple[int, ...], seed: int = 0, *, single: float, double: float) -> None:
    args = problem(*sizes, seed=seed)
    want = mesa_gradients_reference(*args)
    for dtype, tolerance in ((torch.float32, single), (torch.float64, double)):
        for clone in CLONES:
            found = door._gradients(*(x.to(dtype) for x in args), clone)
            assert [(x.shape, x.dtype) for x in found] == [(x.shape, dtype) for x in want]
            for a, b in zip(found, want, strict=True):
                error = (a.double() - b).abs().max() if b.numel() else 0.0
                assert error <= tolerance * (b.abs().max() if b.numel() else 1.0)


@needs_kernel
@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(
    batch=st.integers(0, 2),
    time=st.sampled_from([0, 1, 2, 15, 16, 17, 63, 64, 65, 100]),
    heads=st.integers(1, 3),
    dim=st.integers(1, 34),
    value_dim=st.integers(1, 34),
    seed=st.integers(0, 2**16),
)
def test_every_clone_equals_the_reference(batch, time, heads, dim, value_dim, seed):
    check_clones((batch, time, heads, dim, value_dim), seed, single=2e-5, double=1e-12)


@needs_kernel
@pytest.mark.parametrize("sizes", [(2, 80, 3, 64, 64), (1, 40, 9, 32, 16), (1, 60, 1, 66, 33), (1, 700, 2, 5, 9)])
def test_large_and_many_heads_and_several_segments_equal_the_reference(sizes):
    check_clones(sizes, single=2e-5, double=1e-12)


def test_the_reference_is_the_gradient_of_the_layer():
    q, k, v, g, beta, lamb, h_kk, h_kv, *gradients = layer(2, 21, 2, 5, 3, seed=1)
    leaves = [x.clone().requires_grad_() for x in (k, v, g.clamp(min=-1e3), beta, lamb, h_kk, h_kv)]
    keys, values, gates, strengths, penalties, gram, memory = leaves
    symmetric, outputs = (gram + gram.mT) / 2, []
    for t in range(q.shape[1]):
        gate, strength = gates[:, t, :, None, None].exp(), strengths[:, t, :, None]
        written = strength * keys[:, t]
        symmetric = gate * symmetric + written[..., None] * keys[:, t, :, None]
        memory = gate * memory + written[..., None] * values[:, t, :, None]
        x = torch.linalg.solve(symmetric + torch.diag_embed(penalties), q[:, t])
        outputs.append(torch.einsum("bhd,bhde->bhe", x, memory))
    want = torch.autograd.grad([torch.stack(outputs, 1), symmetric, memory], leaves, [gradients[0], *gradients[1:]])
    for gradients_of in (mesa_gradients, mesa_gradients_reference):
        found = gradients_of(*problem(2, 21, 2, 5, 3, seed=1))
        for a, b in zip(found, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@needs_kernel
@pytest.mark.parametrize("log_gate", [-0.5, -2.0, -4.0, -10.0, -20.0, -60.0])
def test_gradients_of_gates_are_exact_beside_their_own_size(log_gate):
    args = problem(1, 300, 2, 32, 16, seed=4, log_gate=[log_gate, -0.01])
    want = mesa_gradients_reference(*args).g
    for clone in CLONES:
        found = door._gradients(*(x.float() for x in args), clone)[2].double()
        for head in (0, 1):
            error = (found - want)[:, :, head].abs().max() / want[:, :, head].abs().max()
            assert error <= 5e-6, (clone, head)


def test_a_gate_that_forgets_everything_has_no_gradient():
    args = problem(1, 40, 2, 9, 6, seed=2)
    found = mesa_gradients(*args)
    resets = args[4] == -torch.inf
    assert bool(resets.any())
    assert not found.g[resets].any()


@needs_kernel
def test_what_is_no_number_spoils_its_own_head_alone():
    """More heads than are worked on side by side: the last takes the memory of the first."""
    args = problem(1, 40, 9, 5, 3, seed=3)
    clean = mesa_gradients(*args)
    for index in (0, 1, 2, 3, 5, 9):  # tensors [batch, time, heads, ...]
        args[index][0, 30, 0] = torch.nan
    found = mesa_gradients(*args)
    for name, a, b in zip(clean._fields, found, clean, strict=True):
        axis = {"lamb": 0, "h_kk": 1, "h_kv": 1}.get(name, 2)
        assert a.select(axis, 0).isnan().any()
        assert torch.equal(a.narrow(axis, 1, 8), b.narrow(axis, 1, 8))


@needs_kernel
def test_single_precision_over_a_long_sequence():
    """The gates' gradients are sums from token to token, 2048 of them: rounding must not pile up."""
    args = problem(1, 2048, 1, 8, 8, seed=4, log_gate=-0.05)
    found, want = mesa_gradients(*(t.float() for t in args)), mesa_gradients_reference(*args)
    assert (found.g - want.g).abs().max() <= 1e-6 * want.g.abs().max()
    assert (found.lamb - want.lamb).abs().max() <= 1e-6 * want.lamb.abs().max()


@needs_kernel
def test_what_an_inexact_solution_costs_the_gates_is_shared_out():
    """Their gradients are exact where a state is kept, every 256 tokens here, and go from there to there evenly."""
    args = problem(1, 600, 1, 8, 8, seed=5, log_gate=-0.05)
    x, y, lamb, beta = args[0], 1.001 * args[1], args[6], args[5]
    args[1] = y
    found, want = mesa_gradients(*args), mesa_gradients_reference(*args)
    torch.testing.assert_close(found.g[:, ::256], want.g[:, ::256], rtol=1e-10, atol=1e-10)
    conserved = (y * lamb * x).sum(-1) - beta * found.beta
    missing = (found.g[0, :-1, 0] - found.g[0, 1:, 0]) - conserved[0, :-1, 0]
    for share, tokens in zip(missing[[0, 256]], missing[:512].split(256), strict=True):
        assert share.abs() > 1e-6
        torch.testing.assert_close(tokens, share.expand(256), rtol=0, atol=1e-10)
    torch.testing.assert_close(missing[512:], torch.zeros(87, dtype=torch.float64), rtol=0, atol=1e-10)


@needs_kernel
@pytest.mark.parametrize("shape", [(3, 130, 1, 40, 24), (2, 90, 5, 40, 40)])
def test_the_number_of_threads_changes_no_bit(shape):
    args = [x.float() for x in problem(*shape, seed=6)]
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(mesa_gradients(*args))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_arguments_are_not_changed_and_strides_do_not_matter():
    args = problem(2, 20, 3, 16, 16, seed=8)
    copies, want = [x.clone() for x in args], mesa_gradients(*args)
    strided = [torch.stack([x, x], -1)[..., 0] for x in args]
    assert not strided[0].is_contiguous()
    assert all(torch.equal(a, b) for a, b in zip(mesa_gradients(*strided), want, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(args, copies, strict=True))


@pytest.mark.parametrize("index", range(12), ids=NAMES)
def test_what_does_not_fit_is_named(index):
    args = problem(2, 4, 3, 5, 6)
    for change in (lambda x: x[..., :-1] if index else x[0], lambda x: x.half()):
        wrong = list(args)
        wrong[index] = change(wrong[index])
        # The value dimension is v's: with one less there, what is wrong is what belongs to it.
        named = "v|h_kv" if NAMES[index] == "v" else NAMES[index]
        with pytest.raises(InputError, match=rf"^({named}) = "):
            mesa_gradients(*wrong)


@pytest.mark.parametrize("shape", [(2, 20, 3, 4, 5), (2, 1, 3, 4, 4), (0, 5, 3, 4, 4)])
def test_the_operator_is_well_registered(shape):
    torch.library.opcheck(torch.ops.commissure.mesa_gradients.default, tuple(problem(*shape)))


def test_without_kernels_the_reference_runs(monkeypatch):
    args = problem(2, 9, 3, 5, 4, seed=9)
    monkeypatch.setattr(door, "kernels", lambda: None)
    for a, b in zip(mesa_gradients(*args), mesa_gradients_reference(*args), strict=True):
        assert torch.equal(a, b)
