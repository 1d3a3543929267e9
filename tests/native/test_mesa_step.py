"""One step of decoding with the Mesa layer: every clone against the dense reference, its limits and its errors."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

from commissure.core.errors import DegenerateError, InputError
from commissure.native import kernels, mesa
from commissure.native.mesa import mesa_kernel_available, mesa_solve, mesa_step, mesa_step_reference

native = kernels() if mesa_kernel_available() else None
CLONES = [] if native is None else native.mesa_clones()
needs_kernel = pytest.mark.skipif(native is None, reason="built without the C++ kernels")
DTYPES = [torch.float32, torch.float64]
NAMES = ("q", "k", "v", "g", "beta", "lamb", "h_kk", "h_kv")


def token(
    batch: int, heads: int, dim: int, value_dim: int, *, seed: int = 0, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    """A random token and states; one head in ten forgets everything, one in ten writes nothing."""
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=rng, dtype=torch.float64)

    g, beta = -0.3 * uniform(batch, heads), uniform(batch, heads)
    g[uniform(batch, heads) < 0.1] = -torch.inf
    beta[uniform(batch, heads) < 0.1] = 0.0
    root = normal(batch, heads, dim, dim) / dim**0.5
    h_kk = root @ root.mT
    vectors = (normal(batch, heads, dim), normalize(normal(batch, heads, dim), dim=-1), normal(batch, heads, value_dim))
    states = ((h_kk + h_kk.mT) / 2, normal(batch, heads, dim, value_dim))
    return [x.to(dtype) for x in (*vectors, g, beta, 0.25 + uniform(heads, dim), *states)]


def reference64(args: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    return mesa_step_reference(*(x.double() for x in args))


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(0, 3),
    heads=st.integers(1, 19),
    dim=st.integers(1, 40),
    value_dim=st.integers(1, 40),
    seed=st.integers(0, 2**16),
)
@pytest.mark.parametrize("clone", CLONES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_clone_equals_the_reference(
    dtype: torch.dtype, clone: str, batch: int, heads: int, dim: int, value_dim: int, seed: int
) -> None:
    args = token(batch, heads, dim, value_dim, seed=seed, dtype=dtype)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    found = mesa._step(*args, clone=clone)
    for result, want in zip(found, reference64(args), strict=True):
        torch.testing.assert_close(result.double(), want, rtol=tolerance, atol=tolerance)
    assert torch.equal(found[1], found[1].mT)


@needs_kernel
@pytest.mark.parametrize("clone", CLONES)
@pytest.mark.parametrize("dim", [63, 64, 128, 130])
def test_large_heads_equal_the_reference(dim: int, clone: str) -> None:
    for dtype, tolerance in zip(DTYPES, (1e-5, 1e-10), strict=True):
        args = token(1, 9, dim, dim - 1, seed=dim, dtype=dtype)
        for result, want in zip(mesa._step(*args, clone=clone), reference64(args), strict=True):
            assert (result.double() - want).abs().max() < tolerance * want.abs().max()


@needs_kernel
@pytest.mark.parametrize("clone", CLONES)
def test_hard_systems_are_refined(clone: str) -> None:
    """A key seen 8192 times and never forgotten: condition number 4e4, of which float32 alone keeps three digits."""
    dim, heads = 64, 11
    args = token(1, heads, dim, dim, seed=3, dtype=torch.float32)
    key = normalize(torch.randn(heads, dim, generator=torch.Generator().manual_seed(4)), dim=-1)
    args[3], args[5] = torch.zeros(1, heads), torch.full((heads, dim), 0.25)
    args[4], args[6] = args[3], 8192 * (key[:, :, None] * key[:, None, :])[None]
    # The kernel's state is what it solves with, exactly: nothing is written and nothing decays.
    o, h_kk, _ = mesa._step(*args, clone=clone)
    want = reference64(args)[0]
    assert torch.equal(h_kk, args[6])
    assert (o.double() - want).abs().max() < 1e-5 * want.abs().max()


@pytest.mark.parametrize("dtype", DTYPES)
def test_steps_go_through_a_sequence_as_solves_do(dtype: torch.dtype) -> None:
    time, heads, dim, value_dim = 30, 3, 9, 5
    tokens = [token(2, heads, dim, value_dim, seed=t, dtype=dtype)[:5] for t in range(time)]
    lamb, h_kk, h_kv = token(2, heads, dim, value_dim, dtype=dtype)[5:]
    q, k, v, g, beta = (torch.stack(parts, 1) for parts in zip(*tokens, strict=True))
    x, whole, _ = mesa_solve(q, k, g, beta, lamb, h_kk)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    memory = h_kv
    for t in range(time):
        o, h_kk, h_kv = mesa_step(*tokens[t], lamb, h_kk, h_kv)
        written = beta[:, t, :, None, None] * k[:, t, :, :, None] * v[:, t, :, None, :]
        memory = g[:, t, :, None, None].exp() * memory + written
        want = (memory.mT @ x[:, t, :, :, None])[..., 0]
        torch.testing.assert_close(o, want, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(h_kk, whole, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gate_of_minus_infinity_forgets_everything(dtype: torch.dtype) -> None:
    q, k, v, g, beta, lamb, h_kk, h_kv = token(2, 3, 7, 4, seed=4, dtype=dtype)
    beta = beta + 0.1
    o, h_kk, h_kv = mesa_step(q, k, v, torch.full_like(g, -torch.inf), beta, lamb, 1e6 * h_kk, 1e6 * h_kv)
    # Sherman-Morrison's closed form for one key.
    weighted = k / lamb
    strength = beta * (weighted * q).sum(-1) / (1 + beta * (weighted * k).sum(-1))
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(o, strength[..., None] * v, rtol=tolerance, atol=tolerance)
    written = (beta[..., None] * k)[..., None]
    torch.testing.assert_close(h_kk, written * k[:, :, None, :], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(h_kv, written * v[:, :, None, :], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_written_nothing_forgotten_leaves_the_states(dtype: torch.dtype) -> None:
    args = token(2, 3, 7, 4, seed=5, dtype=dtype)
    args[3], args[4] = 0 * args[3].nan_to_num(), 0 * args[4]
    _, h_kk, h_kv = mesa_step(*args)
    assert torch.equal(h_kk, args[6])
    assert torch.equal(h_kv, args[7])
    assert not mesa_step(*args[:6], 0 * args[6], 0 * args[7])[0].any()


@needs_kernel
@pytest.mark.parametrize("shape", [(3, 9, 40, 33), (2, 24, 96, 96)])
def test_the_number_of_threads_changes_no_bit(shape: tuple[int, int, int, int]) -> None:
    args = token(*shape, seed=6, dtype=torch.float32)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(mesa_step(*args))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_arguments_are_not_changed_and_strides_do_not_matter() -> None:
    args = token(2, 3, 7, 5, seed=7)
    copies = [x.clone() for x in args]
    want = mesa_step(*args)
    strided = [torch.stack([x, x], -1)[..., 0] for x in args]
    assert not any(x.is_contiguous() for x in strided)
    for found, expected in zip(mesa_step(*strided), want, strict=True):
        assert torch.equal(found, expected)
    assert all(torch.equal(x, c) for x, c in zip(args, copies, strict=True))
    for a, b in itertools.product(want, args):
        assert a.data_ptr() != b.data_ptr()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_value_that_is_no_number_spoils_its_own_head_alone(dtype: torch.dtype) -> None:
    args = token(1, 5, 6, 4, seed=8, dtype=dtype)
    args[4][0, 2] = 1.0
    clean = mesa_step(*args)
    args[2][0, 2, 1] = torch.nan
    found = mesa_step(*args)
    assert found[0][0, 2].isnan().tolist() == [False, True, False, False]
    assert torch.equal(found[1], clean[1])
    others = [0, 1, 3, 4]
    assert all(torch.equal(a[:, others], b[:, others]) for a, b in zip(found, clean, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [-2.0, float("nan"), float("inf")], ids=["negative", "nan", "infinite"])
def test_a_system_that_is_not_positive_definite_is_named(value: float, dtype: torch.dtype) -> None:
    args = token(2, 12, 6, 4, seed=9, dtype=dtype)
    args[1][1, 9], args[4][1, 9], args[6] = 1.0, value, 0 * args[6]
    args[4][1, 10] = value
    for step in (mesa_step, mesa_step_reference):
        with pytest.raises(DegenerateError, match="batch 1, time 0, head 9: raise lamb"):
            step(*args)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("q", (2, 1, 3, 5)),
        ("q", (2, 3, 0)),
        ("k", (2, 3, 4)),
        ("v", (2, 4, 4)),
        ("v", (2, 3, 0)),
        ("v", (2, 3)),
        ("g", (2, 1)),
        ("beta", (3, 2)),
        ("lamb", (3, 4)),
        ("h_kk", (2, 3, 5, 4)),
        ("h_kv", (2, 3, 5, 5)),
    ],
)
def test_shapes_that_do_not_fit_are_named(name: str, shape: tuple[int, ...]) -> None:
    args = token(2, 3, 5, 4)
    args[NAMES.index(name)] = torch.ones(shape, dtype=torch.float64)
    with pytest.raises(InputError, match=rf"^{name} = "):
        mesa_step(*args)


@pytest.mark.parametrize("name", NAMES)
def test_other_dtypes_are_named(name: str) -> None:
    args = token(2, 3, 5, 4)
    index = NAMES.index(name)
    args[index] = args[index].half() if name == "q" else args[index].float()
    with pytest.raises(InputError, match=rf"^{name} = .*float"):
        mesa_step(*args)


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (0, 3, 4, 4)])
def test_the_operator_is_well_registered(shape: tuple[int, int, int, int]) -> None:
    args = token(*shape)
    torch.library.opcheck(torch.ops.commissure.mesa_step.default, tuple(args))
    for fake, real in zip(mesa_step(*(x.to("meta") for x in args)), mesa_step(*args), strict=True):
        assert (fake.shape, fake.dtype) == (real.shape, real.dtype)


def test_without_kernels_the_reference_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    args = token(2, 3, 5, 4, seed=10)
    monkeypatch.setattr(mesa, "kernels", lambda: None)
    for found, want in zip(mesa_step(*args), mesa_step_reference(*args), strict=True):
        assert torch.equal(found, want)
