"""The Mesa solve: every clone against the dense reference, its limits, its numerics and its errors."""

from __future__ import annotations

import subprocess
import sys
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from commissure.core.errors import CommissureWarning, DegenerateError, InputError
from commissure.native import kernels, mesa
from commissure.native.mesa import mesa_kernel_available, mesa_solve, mesa_solve_reference

STALE = """
import sys, types, warnings
stale = types.ModuleType("commissure.native._kernels")
stale.PossmStep = object
sys.modules["commissure.native._kernels"] = stale
import torch
from commissure.native.mesa import mesa_kernel_available, mesa_solve
from commissure.nn.mesa import solver_for
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    assert not mesa_kernel_available() and not caught
    assert solver_for("auto", torch.device("cpu")) == "block_rls"
    token, gate = torch.ones(1, 1, 1, 2), torch.zeros(1, 1, 1)
    for _ in range(2):
        mesa_solve(token, token, gate, gate, torch.ones(1, 2), torch.zeros(1, 1, 2, 2))
print(len(caught), caught[0].message)
"""

native = kernels() if mesa_kernel_available() else None
CLONES = [] if native is None else native.mesa_clones()
needs_kernel = pytest.mark.skipif(native is None, reason="built without the C++ kernels")
DTYPES = [torch.float32, torch.float64]


def problem(
    batch: int, time: int, heads: int, dim: int, *, seed: int = 0, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    """Random q, k, g, beta, lamb and a full-rank initial state; some tokens forget everything."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    q, k = normal(batch, time, heads, dim), torch.nn.functional.normalize(normal(batch, time, heads, dim), dim=-1)
    g, beta = -0.3 * uniform(batch, time, heads), uniform(batch, time, heads)
    g[uniform(batch, time, heads) < 0.05] = -torch.inf
    root = normal(batch, heads, dim, dim) / dim**0.5
    h_kk = root @ root.mT
    return [v.to(dtype) for v in (q, k, g, beta, 0.25 + uniform(heads, dim), (h_kk + h_kk.mT) / 2)]


def repeated_token(time: int, dim: int, dtype: torch.dtype) -> list[Tensor]:
    """The worst input of all: one key for ever, nothing forgotten, a small regularizer; condition number 4 time."""
    generator = torch.Generator().manual_seed(3)
    q = torch.randn(1, time, 1, dim, generator=generator, dtype=torch.float64)
    k = torch.nn.functional.normalize(torch.randn(dim, generator=generator, dtype=torch.float64), dim=0)
    k, ones = k.expand(1, time, 1, dim), torch.ones(1, time, 1, dtype=torch.float64)
    lamb, h_kk = torch.full((1, dim), 0.25, dtype=torch.float64), torch.zeros(1, 1, dim, dim, dtype=torch.float64)
    return [v.to(dtype) for v in (q, k, 0 * ones, ones, lamb, h_kk)]


def slow_forgetting(
    batch: int, time: int, heads: int, dim: int, *, seed: int = 0, forgotten: float = 0.02
) -> list[Tensor]:
    """A float32 problem of well-conditioned systems with gates close to 1, where the kernel shares one inverse."""
    q, k, g, beta, lamb, h_kk = problem(batch, time, heads, dim, seed=seed)
    g = torch.where(g.isinf(), -forgotten, g * forgotten / 0.3)
    return [v.float() for v in (q, k, g, beta, 0.5 + lamb, h_kk / 4)]


def token_errors(found: Tensor, want: Tensor) -> Tensor:
    """|found - want| / |want| of each token."""
    return (found.double() - want).norm(dim=-1) / want.norm(dim=-1)


def test_an_older_build_of_the_kernels_counts_as_none() -> None:
    found = subprocess.run([sys.executable, "-c", STALE], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    start = "1 commissure was built without its C++ kernels (an older build, without "
    absent = found.stdout.removeprefix(start).partition(")")[0].split(", ")
    assert found.stdout.startswith(start)
    assert "mesa_solve" in absent
    assert "PossmStep" not in absent


def relative_error(found: Tensor, want: Tensor) -> float:
    return float((found.double() - want).norm(dim=-1).max() / want.norm(dim=-1).max().clamp(min=1e-30))


def reference64(args: list[Tensor], *, dof: bool = False) -> tuple[Tensor, Tensor, Tensor | None]:
    return mesa_solve_reference(*(v.double() for v in args), dof=dof)


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(0, 3),
    time=st.sampled_from([0, 1, 2, 3, 7, 8, 9, 15, 16, 17, 33]),
    heads=st.integers(1, 5),
    dim=st.integers(1, 40),
    seed=st.integers(0, 2**16),
    with_dof=st.booleans(),
)
@pytest.mark.parametrize("clone", CLONES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_clone_equals_the_reference(
    dtype: torch.dtype, clone: str, batch: int, time: int, heads: int, dim: int, seed: int, with_dof: bool
) -> None:
    args = problem(batch, time, heads, dim, seed=seed, dtype=dtype)
    x, h_kk, dof = mesa._solve(*args, with_dof, clone)
    want_x, want_h, want_dof = reference64(args, dof=with_dof)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(x.double(), want_x, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(h_kk.double(), want_h, rtol=tolerance, atol=tolerance)
    assert torch.equal(h_kk, h_kk.mT)
    if want_dof is None:
        assert dof.numel() == 0
    else:
        torch.testing.assert_close(dof.double(), want_dof, rtol=0, atol=tolerance * dim)


@needs_kernel
@pytest.mark.parametrize("dim", [63, 64, 96, 130])
def test_large_systems_equal_the_reference(dim: int) -> None:
    for dtype, tolerance in zip(DTYPES, (1e-5, 1e-10), strict=True):
        args = problem(1, 20, 3, dim, seed=dim, dtype=dtype)
        for clone in CLONES:
            x, h_kk, dof = mesa._solve(*args, True, clone)
            want_x, want_h, want_dof = reference64(args, dof=True)
            assert want_dof is not None
            assert relative_error(x, want_x) < tolerance
            assert relative_error(h_kk, want_h) < tolerance
            assert relative_error(dof, want_dof) < tolerance


@settings(max_examples=25, deadline=None)
@given(
    time=st.integers(17, 90),
    heads=st.integers(1, 3),
    dim=st.sampled_from([16, 31, 32, 33, 47, 48, 57, 64, 72, 96, 101, 128]),
    forgotten=st.sampled_from([0.0, 1e-4, 0.003, 0.02, 0.06, 0.1, 0.3]),
    seed=st.integers(0, 2**16),
)
@pytest.mark.parametrize("clone", CLONES)
def test_slow_forgetting_equals_the_reference(
    clone: str, time: int, heads: int, dim: int, forgotten: float, seed: int
) -> None:
    args = slow_forgetting(1, time, heads, dim, seed=seed, forgotten=forgotten)
    args[2][:, time // 2, 0] = -torch.inf
    args[3][:, ::3, -1] = 0
    x, h_kk, _ = mesa._solve(*args, False, clone)
    want_x, want_h, _ = reference64(args)
    assert token_errors(x, want_x).max() < 2e-6
    assert relative_error(h_kk, want_h) < 1e-6
    assert torch.equal(h_kk, h_kk.mT)


@needs_kernel
@pytest.mark.parametrize("clone", CLONES)
def test_only_slow_forgetting_shares_an_inverse(clone: str) -> None:
    # With dof every token is factored, so that the bits of x tell which way it went.
    def is_shared(args: list[Tensor]) -> Tensor:
        alone, together = (mesa._solve(*args, with_dof, clone)[0] for with_dof in (True, False))
        return (alone != together).any(-1).any(-1)[0]

    time = 48
    for dim in (48, 64, 101):
        shared = is_shared(slow_forgetting(1, time, 2, dim, forgotten=0.01))
        assert shared[8:36].all()
        assert not shared[:4].any()
        assert not is_shared(slow_forgetting(1, time, 2, dim, forgotten=1.0)).any()
    for index, change in ((1, 100.0), (4, 1e-3)):  # long keys, a small regularizer: ill-conditioned
        args = slow_forgetting(1, time, 2, 64, forgotten=0.01)
        args[index] = args[index] * change
        assert not is_shared(args).any()
    assert not is_shared(slow_forgetting(1, time, 2, 16, forgotten=0.01)).any()


@needs_kernel
@pytest.mark.parametrize("clone", CLONES)
def test_easy_and_hard_stretches_of_one_sequence_follow_one_another(clone: str) -> None:
    args = slow_forgetting(1, 200, 2, 64, seed=4)
    g, beta = args[2], args[3]
    beta[:, 60] = 200.0  # ill-conditioned until it is forgotten
    g[:, 100:103] = -3.0
    g[:, 140:150] = -0.5  # well-conditioned, but too many applications
    x, h_kk, _ = mesa._solve(*args, False, clone)
    want_x, want_h, _ = reference64(args)
    assert token_errors(x, want_x).max() < 2e-6
    assert relative_error(h_kk, want_h) < 1e-6


@needs_kernel
@pytest.mark.parametrize("clone", CLONES)
@pytest.mark.parametrize("dim", [64, 100])
def test_a_query_that_is_not_finite_spoils_its_own_token_alone(dim: int, clone: str) -> None:
    args = slow_forgetting(1, 64, 2, dim, seed=5)
    clean = mesa._solve(*args, False, clone)[0]
    args[0][0, 20, 1, 3], args[0][0, 30, 0, 5] = torch.nan, torch.inf
    x = mesa._solve(*args, False, clone)[0]
    spoiled = torch.zeros(1, 64, 2, dtype=torch.bool)
    spoiled[0, 20, 1] = spoiled[0, 30, 0] = True
    assert torch.equal(x[~spoiled], clean[~spoiled])
    assert not x[spoiled].isfinite().any()


@needs_kernel
@pytest.mark.parametrize("clone", CLONES)
@pytest.mark.parametrize("value", [-100.0, float("nan"), float("inf")], ids=["negative", "nan", "infinite"])
@pytest.mark.parametrize("at", [20, 47])
def test_a_bad_system_under_slow_forgetting_is_named(value: float, at: int, clone: str) -> None:
    args = slow_forgetting(2, 64, 3, 48, seed=6)
    args[3][1, at, 2] = value
    with pytest.raises(DegenerateError, match=f"batch 1, time {at}, head 2"):
        mesa._solve(*args, False, clone)


@needs_kernel
@pytest.mark.parametrize("clone", CLONES)
@pytest.mark.parametrize("dim", [5, 64])
def test_single_precision_survives_a_token_repeated_2048_times(dim: int, clone: str) -> None:
    args = repeated_token(2048, dim, torch.float32)
    x, h_kk, _ = mesa._solve(*args, False, clone)
    want_x, want_h, _ = reference64(args)
    scale = want_x.norm(dim=-1)
    # Oracle: 1e-5 max(1, kappa / 100); refinement makes it 1e-5 outright at every token, kappa = 8193 at the last.
    assert ((x.double() - want_x).norm(dim=-1) / scale).max() < 1e-5
    assert relative_error(h_kk, want_h) < 1e-6
    assert torch.linalg.eigvalsh(h_kk.double()).min() > -1e-4


@needs_kernel
@pytest.mark.parametrize("clone", CLONES)
def test_one_token_of_an_ill_conditioned_state_is_refined_too(clone: str) -> None:
    _, h_kk, _ = reference64(repeated_token(2048, 24, torch.float32))
    args = problem(3, 1, 1, 24, seed=8, dtype=torch.float32)
    args[2], args[5] = 0 * args[2], h_kk.float().expand(3, 1, 24, 24)
    x, state, _ = mesa._solve(*args, False, clone)
    # The state itself is rounded by every call; the solution must be exact for the state that is returned.
    args[3], args[5] = 0 * args[3], state
    assert relative_error(x, reference64(args)[0]) < 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("split", [(0, 50), (1, 49), (7, 43), (8, 42), (1,) * 50])
def test_any_split_goes_on_from_the_state(split: tuple[int, ...], dtype: torch.dtype) -> None:
    args = problem(2, 50, 3, 11, seed=1, dtype=dtype)
    whole, h_whole, dof_whole = mesa_solve(*args, dof=True)
    pieces, state, start = [], args[5], 0
    for length in split:
        part = [v[:, start : start + length] for v in args[:4]]
        x, state, dof = mesa_solve(*part, args[4], state, dof=True)
        pieces.append((x, dof))
        start += length
    tolerance = 1e-12 if dtype == torch.float64 else 3e-6
    torch.testing.assert_close(torch.cat([p[0] for p in pieces], 1), whole, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(torch.cat([p[1] for p in pieces], 1), dof_whole, rtol=tolerance, atol=tolerance * 11)
    torch.testing.assert_close(state, h_whole, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("time", [1, 20])
@pytest.mark.parametrize("dtype", DTYPES)
def test_without_keys_the_solution_is_the_query_over_lamb(dtype: torch.dtype, time: int) -> None:
    q, k, g, beta, lamb, h_kk = problem(2, time, 3, 13, seed=2, dtype=dtype)
    x, state, dof = mesa_solve(q, k, g, 0 * beta, lamb, 0 * h_kk, dof=True)
    assert dof is not None
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(x, q / lamb, rtol=4 * eps, atol=0)
    assert not state.any()
    torch.testing.assert_close(dof, torch.zeros_like(dof), rtol=0, atol=13 * 4 * eps)


@pytest.mark.parametrize("time", [1, 20])
def test_a_gate_of_minus_infinity_forgets_everything(time: int) -> None:
    q, k, g, beta, lamb, h_kk = problem(2, time, 3, 9, seed=4)
    x, h_final, _ = mesa_solve(q, k, torch.full_like(g, -torch.inf), beta, lamb, 1e6 * h_kk)
    # One key and the regularizer only: Sherman-Morrison's closed form.
    weighted = k / lamb
    gain = beta * (weighted * q).sum(-1) / (1 + beta * (weighted * k).sum(-1))
    torch.testing.assert_close(x, q / lamb - weighted * gain[..., None], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(h_final, beta[:, -1, :, None, None] * (k[:, -1, :, :, None] * k[:, -1, :, None]))


@needs_kernel
@pytest.mark.parametrize("shape", [(3, 130, 1, 40), (5, 3, 9, 40), (40, 1, 3, 40)])
def test_the_number_of_threads_changes_no_bit(shape: tuple[int, int, int, int]) -> None:
    args = problem(*shape, seed=5, dtype=torch.float32)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(mesa_solve(*args, dof=True))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_arguments_are_not_changed_and_strides_do_not_matter() -> None:
    args = problem(2, 12, 3, 7, seed=6)
    copies = [v.clone() for v in args]
    want = mesa_solve(*args)
    strided = [torch.stack([v, v], -1)[..., 0] for v in args]
    assert not strided[0].is_contiguous()
    found = mesa_solve(*strided)
    assert torch.equal(found[0], want[0])
    assert torch.equal(found[1], want[1])
    assert all(torch.equal(v, c) for v, c in zip(args, copies, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("time", "at"), [(1, 0), (20, 11)])
@pytest.mark.parametrize("value", [-2.0, float("nan"), float("inf")], ids=["negative", "nan", "infinite"])
def test_a_system_that_is_not_positive_definite_is_named(value: float, time: int, at: int, dtype: torch.dtype) -> None:
    q, k, g, beta, lamb, h_kk = problem(2, time, 3, 6, seed=7, dtype=dtype)
    h_kk = 0 * h_kk
    k[1, at, 2], beta[1, at, 2] = 1.0, value
    for solve in (mesa_solve, mesa_solve_reference):
        with pytest.raises(DegenerateError, match=f"batch 1, time {at}, head 2: raise lamb"):
            solve(q, k, g, beta, lamb, h_kk)


def test_the_first_of_several_bad_systems_is_named() -> None:
    q, k, g, beta, lamb, h_kk = problem(2, 40, 3, 6, seed=7)
    beta[0, 30, 1] = beta[0, 20, 2] = beta[1, 3, 0] = -1e3
    with pytest.raises(DegenerateError, match="batch 0, time 20, head 2"):
        mesa_solve(q, k, g, beta, lamb, h_kk)


@pytest.mark.parametrize("time", [1, 40])
def test_a_bad_system_leaves_its_neighbors_alone(time: int) -> None:
    args = problem(1, time, 40, 6, seed=7)
    args[1][0, -1, 0] = torch.nan
    with pytest.raises(DegenerateError, match=f"batch 0, time {time - 1}, head 0"):
        mesa_solve(*args)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("q", {0: (2, 4, 3)}),
        ("q", {0: (2, 4, 3, 0)}),
        ("k", {1: (2, 4, 3, 4)}),
        ("g", {2: (2, 4, 1)}),
        ("beta", {3: (2, 3, 3)}),
        ("lamb", {4: (3, 4)}),
        ("h_kk", {5: (2, 3, 5, 4)}),
    ],
)
def test_shapes_that_do_not_fit_are_named(name: str, change: dict[int, tuple[int, ...]]) -> None:
    args = problem(2, 4, 3, 5)
    for index, shape in change.items():
        args[index] = torch.ones(shape, dtype=torch.float64)
    with pytest.raises(InputError, match=rf"^{name} = "):
        mesa_solve(*args)


@pytest.mark.parametrize("index", range(6))
def test_other_dtypes_are_named(index: int) -> None:
    args = problem(2, 4, 3, 5)
    args[index] = args[index].half() if index == 0 else args[index].float()
    with pytest.raises(InputError, match=rf"^{['q', 'k', 'g', 'beta', 'lamb', 'h_kk'][index]} = .*float"):
        mesa_solve(*args)


@pytest.mark.parametrize("shape", [(2, 5, 3, 4), (2, 1, 3, 4), (0, 5, 3, 4)])
@pytest.mark.parametrize("with_dof", [False, True])
def test_the_operator_is_well_registered(shape: tuple[int, int, int, int], with_dof: bool) -> None:
    args = problem(*shape)
    torch.library.opcheck(torch.ops.commissure.mesa_solve.default, (*args, with_dof))
    found = mesa_solve(*(v.to("meta") for v in args), dof=with_dof)
    want = mesa_solve(*args, dof=with_dof)
    for fake, real in zip(found, want, strict=True):
        assert (fake is None) == (real is None)
        assert fake is None or real is None or (fake.shape, fake.dtype) == (real.shape, real.dtype)


@needs_kernel
def test_an_unknown_clone_is_refused() -> None:
    with pytest.raises(ValueError, match="no clone 'mmx'"):
        mesa._solve(*problem(1, 1, 1, 2), False, "mmx")


def test_without_kernels_the_reference_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    args = problem(2, 9, 3, 5, seed=9)
    monkeypatch.setattr(mesa, "kernels", lambda: None)
    want = mesa_solve_reference(*args, dof=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", CommissureWarning)
        found = mesa_solve(*args, dof=True)
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))
    empty = mesa_solve(*(v[:, :0] for v in args[:4]), *args[4:])
    assert torch.equal(empty[1], args[5])
