"""mesa_attention: every solver against the dense definition and against the closed forms it must reproduce."""

from __future__ import annotations

import importlib.util
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from commissure.nn.linear_attention import gated_linear_attention_reference
from commissure.nn.mesa import MesaInfo, MesaOutput, MesaState, mesa_attention
from commissure.nn.mesa_reference import mesa_attention_reference

spec = importlib.util.spec_from_file_location("mesa_problems", Path(__file__).with_name("mesa_problems.py"))
problems = importlib.util.module_from_spec(spec)
spec.loader.exec_module(problems)
SOLVERS, dense, power_law, problem = problems.SOLVERS, problems.dense, problems.power_law, problems.problem

TOLERANCE = 1e-10
each_solver = pytest.mark.parametrize("solver", SOLVERS)


def run(inputs: list[Tensor], operator=mesa_attention, **options) -> MesaOutput:
    """The operator on `problem`'s tensors."""
    state = MesaState(*inputs[6:]) if len(inputs) > 6 else None
    if operator is mesa_attention:
        options = {"max_cg_steps": 60, **options}
    return operator(*inputs[:6], initial_state=state, **options)


def gradients(inputs: list[Tensor], operator=mesa_attention, **options) -> list[Tensor]:
    """Outputs, states, and gradients of a random functional of all of them."""
    inputs = [x.clone().requires_grad_() for x in inputs]
    out = run(inputs, operator, **options)
    found = [out.output, *out.state]
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in found]
    loss = sum((x * weight).sum() for x, weight in zip(found, weights, strict=True)) + 0 * inputs[5].sum()
    grads = torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)
    return [x.detach() for x in (*found, *grads)]


def assert_same(actual: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    assert actual.shape == expected.shape
    if expected.numel():
        assert (actual - expected).abs().max() <= tolerance * expected.abs().max().clamp(min=1.0)


@each_solver
@settings(max_examples=15, deadline=None, derandomize=True, database=None)
@given(
    sizes=st.tuples(st.integers(1, 2), st.integers(0, 19), st.integers(1, 3), st.integers(1, 5), st.integers(1, 5)),
    chunk_size=st.sampled_from([1, 4, 7, 64]),
    resets=st.lists(st.integers(0, 18), max_size=2),
    has_state=st.booleans(),
    seed=st.integers(0, 99),
)
def test_values_and_gradients_equal_the_definition(solver, sizes, chunk_size, resets, has_state, seed):
    """Any length, D != Dv, gates of zero; also through the final state and to the initial one."""
    inputs = problem(*sizes, seed=seed)[: 8 if has_state else 6]
    for t in resets:
        inputs[3][:, t : t + 1, :1] = -torch.inf
    ours = gradients(inputs, solver=solver, chunk_size=chunk_size)
    for a, b in zip(ours, gradients(inputs, mesa_attention_reference), strict=True):
        assert_same(a, b)


@each_solver
def test_gradcheck(solver):
    inputs = [x.requires_grad_() for x in problem(1, 7, 1, 3, 2)]

    def function(*leaves: Tensor) -> tuple[Tensor, ...]:
        out = run(list(leaves), solver=solver, chunk_size=3, max_cg_steps=12)
        return out.output, *out.state

    assert torch.autograd.gradcheck(function, inputs)


@each_solver
@pytest.mark.parametrize(("gamma", "dim"), [(1.0, 8), (0.9975, 32), (0.95, 16), (0.5, 32)])
def test_single_precision(solver, gamma, dim):
    """Output error against float64 below 1e-5 max(1, condition number / 100)."""
    inputs = [x.float() for x in power_law(200, dim, gamma=gamma)]
    exact = [x.double() for x in inputs]
    expected = run(exact, mesa_attention_reference).output
    spectrum = torch.linalg.eigvalsh(dense(*exact[1:2], *exact[3:6]))
    kappa = float((spectrum[..., -1] / spectrum[..., 0]).max())
    actual = run(inputs, solver=solver, max_cg_steps=100)
    assert actual.output.dtype == actual.state.h_kk.dtype == torch.float32
    error = (actual.output - expected).norm(dim=-1) / expected.norm(dim=-1).clamp(min=0.1)
    assert error.max() <= 1e-5 * max(1.0, kappa / 100)


def test_ridge_with_sample_weights():
    """o_t is scikit-learn's prediction at q_t from the first t pairs, weighted by zeta beta."""
    linear_model = pytest.importorskip("sklearn.linear_model")
    q, k, v, g, beta, _ = problem(1, 12, 1, 4, 3, seed=3)[:6]
    lamb = torch.full((1, 4), 0.7, dtype=torch.float64)
    outputs = run([q, k, v, g, beta, lamb]).output
    for t in range(12):
        zeta = torch.stack([g[0, i + 1 : t + 1, 0].sum().exp() for i in range(t + 1)])
        ridge = linear_model.Ridge(alpha=0.7, fit_intercept=False, solver="cholesky")
        ridge.fit(
            k[0, : t + 1, 0].numpy(), v[0, : t + 1, 0].numpy(), sample_weight=(zeta * beta[0, : t + 1, 0]).numpy()
        )
        predicted = ridge.predict(q[0, t].numpy())
        assert np.abs(predicted - outputs[0, t].numpy()).max() <= TOLERANCE


@each_solver
def test_scale_laws(solver):
    inputs = problem(1, 11, 2, 4, 3)[:6]
    q, k, v, g, beta, lamb = inputs
    o = run(inputs, solver=solver).output
    rotation = torch.linalg.qr(problem(1, 1, 1, 4, 4)[6][0, 0])[0]
    flat = torch.full_like(lamb, 0.6)
    isotropic = run([q, k, v, g, beta, flat], solver=solver).output
    root = lamb.sqrt()
    for other, expected in (
        (run([q, k, v, g, 0.3 * beta, 0.3 * lamb], solver=solver).output, o),
        (run([q, k, -3 * v, g, beta, lamb], solver=solver).output, -3 * o),
        (run([7 * q, k, v, g, beta, lamb], solver=solver).output, 7 * o),
        (run([q @ rotation, k @ rotation, v, g, beta, flat], solver=solver).output, isotropic),
        (run([q / root, k / root, v, g, beta, torch.ones_like(lamb)], solver=solver).output, o),
    ):
        assert_same(other, expected)


def recursive_least_squares(inputs: list[Tensor]) -> Tensor:
    """Sherman-Morrison updates of P = (H + Lambda)^-1, with forgetting as in RLS: P decays whole, Lambda with it."""
    q, k, v, g, beta, lamb = inputs
    p, phi = torch.diag_embed(1 / lamb)[None], q.new_zeros(1, q.shape[2], q.shape[3], v.shape[3])
    outputs = []
    for t in range(q.shape[1]):
        p = p / g[:, t].exp()[..., None, None]
        key, value, strength = k[:, t, :, :, None], v[:, t, :, None, :], beta[:, t, :, None, None]
        gain = strength * p @ key / (1 + strength * key.mT @ p @ key)
        phi = phi + gain @ (value - key.mT @ phi)
        p = p - gain @ key.mT @ p
        outputs.append((phi.mT @ q[:, t, :, :, None])[..., 0])
    return torch.stack(outputs, 1)


@each_solver
def test_without_forgetting_it_is_recursive_least_squares(solver):
    inputs = problem(1, 30, 1, 4, 3)[:6]
    inputs[3] = torch.zeros_like(inputs[3])
    o = run(inputs, solver=solver).output
    assert_same(o, recursive_least_squares(inputs))
    order = torch.cat([torch.randperm(29, generator=torch.Generator().manual_seed(0)), torch.tensor([29])])
    shuffled = [x[:, order] for x in inputs[:5]]
    assert_same(run([*shuffled, inputs[5]], solver=solver).output[:, -1], o[:, -1])


@pytest.mark.parametrize(("gamma", "least"), [(0.9975, 0.05), (0.95, 1.0)])
def test_with_forgetting_it_is_not(gamma, least):
    """A rank-one recursion lets Lambda decay and solves another problem: the negative control."""
    inputs = power_law(400, 16, gamma=gamma)
    o = run(inputs).output[:, -100:]
    error = (recursive_least_squares(inputs)[:, -100:] - o).norm(dim=-1) / o.norm(dim=-1)
    assert error.max() > least


@each_solver
def test_orthonormal_keys_are_recalled(solver):
    dim = 6
    keys = torch.linalg.qr(problem(1, 1, 1, dim, dim)[6][0, 0])[0][None, :, None]
    v, gate = torch.randn(1, dim, 1, 3, generator=torch.Generator().manual_seed(0)).double(), keys.new_zeros(1, dim, 1)
    beta, lamb = 0.5 + 0.1 * torch.arange(5, dim + 5).view(1, dim, 1) / 5, keys.new_full((1, dim), 0.3)
    beta = beta.double().clamp(max=1.0)
    state = run([keys, keys, v, gate, beta, lamb], solver=solver).state
    silent = gate - 0.0
    again = mesa_attention(keys, keys, v, silent, silent, lamb, initial_state=state, solver=solver).output
    assert_same(again, v * (beta / (beta + 0.3))[..., None])
    # Any n <= D keys, as Lambda vanishes: exact recall.
    q, k, v, _, _, _ = problem(1, 4, 1, dim, 3)[:6]
    gate, tiny = k.new_zeros(1, 4, 1), k.new_full((1, dim), 1e-8)
    state = mesa_attention(q, k, v, gate, gate + 1, tiny, solver="sequential").state
    recalled = mesa_attention(k, k, v, gate, gate, tiny, initial_state=state, solver=solver, max_cg_steps=200).output
    assert_same(recalled, v, 1e-6)


@each_solver
def test_limits(solver):
    q, k, v, g, beta, lamb = problem(2, 13, 2, 4, 3)[:6]
    large = 1e9 * torch.ones_like(lamb)
    linear = gated_linear_attention_reference(q, k, v, g, beta)[0]
    assert_same(1e9 * run([q, k, v, g, beta, large], solver=solver).output, linear, 1e-6)
    silent = run([q, k, v, g, 0 * beta, lamb], solver=solver)
    assert torch.equal(silent.output, torch.zeros_like(v))
    alone = run([q, k, v, torch.full_like(g, -torch.inf), beta, lamb], solver=solver).output
    gain = beta * (k / lamb * q).sum(-1) / (1 + beta * (k.square() / lamb).sum(-1))
    assert_same(alone, v * gain[..., None])


@each_solver
@settings(max_examples=10, deadline=None, derandomize=True, database=None)
@given(cuts=st.lists(st.integers(0, 23), max_size=3).map(sorted), chunk_size=st.sampled_from([4, 64]))
def test_any_cut_with_the_state_passed_on(solver, cuts, chunk_size):
    inputs = problem()
    whole = run(inputs, solver=solver, chunk_size=chunk_size)
    state, outputs = MesaState(*inputs[6:]), []
    for start, stop in zip((0, *cuts), (*cuts, 23), strict=True):
        piece = [x[:, start:stop] for x in inputs[:5]]
        out = run([*piece, inputs[5], *state], solver=solver, chunk_size=chunk_size)
        outputs.append(out.output)
        state = out.state
    for a, b in ((torch.cat(outputs, 1), whole.output), *zip(state, whole.state, strict=True)):
        assert_same(a, b)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("init", ["diag", "zero", "query"])
def test_decoding_equals_prefill_also_before_convergence(solver, init):
    """Same solver, same first guess, same number of steps: the same numbers, one element at a time."""
    inputs = problem(2, 9, 2, 6, 3)
    options = {"solver": solver, "cg_init": init, "max_cg_steps": 3}
    whole, state = run(inputs, **options), MesaState(*inputs[6:])
    for t in range(9):
        out = run([*(x[:, t : t + 1] for x in inputs[:5]), inputs[5], *state], **options)
        state = out.state
        assert_same(out.output[:, 0], whole.output[:, t])


@pytest.mark.parametrize("lengths", [(5,), (0, 7, 1, 9, 0, 3), (5, 8, 1, 7, 6)])
@each_solver
def test_packed_sequences_equal_separate_runs(solver, lengths):
    inputs = problem(1, sum(lengths), 2, 4, 3, sequences=len(lengths))
    bounds = [0, *np.cumsum(lengths).tolist()]

    def packed(*tensors: Tensor, **options) -> MesaOutput:
        return run(list(tensors), solver=solver, cu_seqlens=torch.tensor(bounds), **options)

    def separate(*tensors: Tensor, **options) -> MesaOutput:
        outs = [
            run(
                [*(x[:, a:b] for x in tensors[:5]), tensors[5], *(x[n : n + 1] for x in tensors[6:])],
                solver=solver,
                **options,
            )
            for n, (a, b) in enumerate(itertools.pairwise(bounds))
        ]
        state = MesaState(*(torch.cat(parts) for parts in zip(*(out.state for out in outs), strict=True)))
        infos = zip(*(out.info for out in outs), strict=True) if options else ()
        info = MesaInfo(*(torch.cat(parts, 1) for parts in infos)) if options else None
        return MesaOutput(torch.cat([out.output for out in outs], 1), state, info)

    results = []
    for operator in (packed, separate):
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = operator(*leaves)
        loss = (
            out.output * torch.arange(out.output.numel()).view(out.output.shape)
        ).sum() + out.state.h_kv.square().sum()
        results.append([out.output, *out.state, *torch.autograd.grad(loss, leaves)])
    for a, b in zip(*results, strict=True):
        assert_same(a.detach(), b.detach())
    info, apart = (operator(*inputs, return_info=True).info for operator in (packed, separate))
    assert info.residual.max() <= 1e-12
    assert info.cg_steps.shape == (1, sum(lengths), 2)
    assert_same(info.dof, apart.dof)


@each_solver
def test_padding_changes_nothing(solver):
    """Elements with beta = 0 and gamma = 1, anywhere."""
    inputs = problem(1, 12, 2, 4, 3)
    kept = torch.tensor([0, 1, 4, 5, 6, 9, 11])
    out = [x.clone() for x in inputs]
    hole = torch.ones(12, dtype=torch.bool)
    hole[kept] = False
    out[3][:, hole], out[4][:, hole] = 0.0, 0.0
    padded = run(out, solver=solver)
    short = run([*(x[:, kept] for x in inputs[:5]), *inputs[5:]], solver=solver)
    assert_same(padded.output[:, kept], short.output)
    for a, b in zip(padded.state, short.state, strict=True):
        assert_same(a, b)


@each_solver
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("gamma", [1.0, 0.9975])
def test_one_key_two_thousand_times(solver, dtype, gamma):
    """The worst conditioned memory there is: finite everywhere, H stays positive semidefinite."""
    q, k, v, g, beta, lamb = power_law(1, 16, gamma=gamma)
    q, k, v, g, beta = (x.expand(1, 2048, *x.shape[2:]).to(dtype).requires_grad_() for x in (q, k, v, g, beta))
    lamb = lamb.to(dtype).requires_grad_()
    out = mesa_attention(q, k, v, g, beta, lamb, solver=solver)
    leaves = (q, k, v, g, beta, lamb)
    grads = torch.autograd.grad(out.output.float().sum(), leaves)
    assert out.output.dtype == dtype
    assert out.state.h_kk.dtype == torch.float32
    assert all(x.isfinite().all() for x in (out.output, *out.state, *grads))
    # The true eigenvalues but one are zero.  Each rounding of the running H moves them by at most half an eps of the
    # largest (Weyl); it is rounded once a chunk, or once where it is summed in float64.
    rounding = {"cholesky": 1, "block_rls": 4, "cg": 4, "sequential": 1}[solver] * torch.finfo(torch.float32).eps
    h_kk = out.state.h_kk.detach().double()
    spectrum = torch.linalg.eigvalsh((h_kk + h_kk.mT) / 2)
    assert spectrum.min() >= -rounding * spectrum.max()
    exact = mesa_attention(*(x.detach().double() for x in leaves), solver="sequential")
    # x is q / lamb but along k, where it is smaller by the condition number: o = G x cancels, and can be no better
    # than G times the rounding of x.
    limit = 4 * torch.finfo(torch.float32).eps * torch.linalg.matrix_norm(exact.state.h_kv).max() / 0.25
    limit = limit + (torch.finfo(dtype).eps * exact.output.abs().max() if dtype == torch.bfloat16 else 0)
    assert (out.output - exact.output).abs().max() <= limit


@pytest.mark.parametrize("solver", ["cholesky", "block_rls", "cg"])
def test_backward_needs_memory_linear_in_time(solver):
    """What autograd keeps, and the most that is allocated at once: below an eighth of T D^2 floats a head."""
    time, heads, dim = 4096, 4, 64
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.nn.functional.normalize(torch.randn(1, time, heads, dim, generator=generator), dim=-1) for _ in range(3)
    )
    g, beta = torch.full((1, time, heads), -1e-3), torch.full((1, time, heads), 0.5)
    leaves = [x.requires_grad_() for x in (q, k, v, g, beta, torch.full((heads, dim), 1.0))]
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = mesa_attention(*leaves, solver=solver, max_cg_steps=2)
    own = sum(x.untyped_storage().nbytes() for x in leaves)
    assert sum(kept.values()) - own <= 4 * heads * (time * dim + 2 * dim * dim)  # x and the zero states
    with problems.peak_memory() as peak:
        out.output.sum().backward()
    assert 4 * heads * time * dim <= peak() <= heads * time * dim**2 * 4 / 8


def test_arguments_are_left_alone():
    inputs = problem()
    kept = [x.clone() for x in inputs]
    for solver in SOLVERS:
        run(inputs, solver=solver)
    assert all(torch.equal(a, b) for a, b in zip(inputs, kept, strict=True))


def test_results_are_the_same_for_any_number_of_calls():
    inputs = problem()
    for solver in SOLVERS:
        assert torch.equal(run(inputs, solver=solver).output, run(inputs, solver=solver).output)


def test_info_tells_residual_and_degrees_of_freedom():
    inputs = problem(1, 12, 2, 4, 3)
    k, g, beta, lamb, h_kk = (inputs[n] for n in (1, 3, 4, 5, 6))
    systems = dense(k, g, beta, lamb, h_kk)
    expected = 4 - (torch.linalg.inv(systems).diagonal(dim1=-2, dim2=-1) * lamb).sum(-1)
    for solver in SOLVERS:
        info = run(inputs, solver=solver, return_info=True).info
        assert_same(info.dof, expected)
        assert info.residual.max() <= 1e-12
    loose = run(inputs, solver="cg", max_cg_steps=2, return_info=True)
    assert loose.info.residual.max() > 1e-3
