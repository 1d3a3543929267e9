"""The iterative solvers do what they say: steps as a dense loop counts them, residuals reached, errors known."""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor

from commissure.nn import linear_attention, mesa_solvers
from commissure.nn.mesa import MesaConvergenceWarning, MesaLayer, MesaState, mesa_attention
from commissure.nn.mesa_solvers import CGOptions, System, solve_block_rls, solve_cg

spec = importlib.util.spec_from_file_location("mesa_problems", Path(__file__).with_name("mesa_problems.py"))
problems = importlib.util.module_from_spec(spec)
spec.loader.exec_module(problems)
dense, power_law, problem = problems.dense, problems.power_law, problems.problem


def dense_cg(matrix: Tensor, b: Tensor, x: Tensor, max_steps: int, eps: float) -> tuple[Tensor, int]:
    """Algorithm 1 on one dense system."""
    r = b - matrix @ x
    p, delta, first = r.clone(), r @ r, (r @ r).sqrt()
    for step in range(max_steps):
        if first == 0:
            return x, 0
        s = matrix @ p
        alpha = delta / (p @ s)
        x, r = x + alpha * p, r - alpha * s
        before, delta = delta, r @ r
        if delta.sqrt() <= eps * first:
            return x, step + 1
        p = r + delta / before * p
    return x, max_steps


def system(inputs: list[Tensor]) -> System:
    """The systems of `problem` or, from no state, of `power_law`."""
    q, k, _, g, beta, lamb = inputs[:6]
    h_kk = inputs[6] if len(inputs) > 6 else q.new_zeros(q.shape[0], q.shape[2], q.shape[3], q.shape[3])
    return System(q, k, g, beta, lamb, h_kk)


@pytest.mark.parametrize("init", ["diag", "zero", "query"])
@pytest.mark.parametrize("eps", [0.0, 1e-1, 1e-3, 1e-6])
def test_cg_is_the_dense_loop_element_by_element(init, eps):
    """Same solutions and the same counts; where elements stop, whole chunks leave the batch, and others go on."""
    inputs = problem(2, 37, 2, 8, 1, seed=4)
    inputs[0][0, 3] = 0.0  # nothing to solve: no steps
    steps = 6 if eps == 0.0 else 40
    found = solve_cg(system(inputs), CGOptions(5, steps, eps, init))
    matrices = dense(inputs[1], *inputs[3:7])
    q = inputs[0]
    for batch, time, head in torch.cartesian_prod(torch.arange(2), torch.arange(37), torch.arange(2)).tolist():
        matrix, b = matrices[batch, time, head], q[batch, time, head]
        first = {"diag": b / matrix.diagonal(), "zero": torch.zeros_like(b), "query": b}[init]
        x, count = dense_cg(matrix, b, first, steps, eps)
        assert found.steps[batch, time, head] == count
        torch.testing.assert_close(found.x[batch, time, head], x, rtol=1e-9, atol=1e-9)


def test_iterations_grow_with_precision_with_time_and_with_memory():
    """And |q - A x| <= eps |r_0| where it stops (first guess zero: r_0 = q, the residual `info` is relative to)."""
    inputs, last = power_law(300, 32), None
    for eps in (1e-1, 1e-2, 1e-3, 1e-4):
        info = mesa_attention(*inputs, solver="cg", cg_eps=eps, max_cg_steps=200, cg_init="zero", return_info=True).info
        assert (info.residual <= eps * (1 + 1e-6)).all()
        assert last is None or (info.cg_steps >= last).all()
        last = info.cg_steps
    assert last[:, -100:].double().mean() > 1.3 * last[:, :100].double().mean()
    forgetful = mesa_attention(
        *power_law(300, 32, gamma=0.9), solver="cg", cg_eps=1e-4, cg_init="zero", return_info=True
    )
    assert forgetful.info.cg_steps[:, -100:].double().mean() < 0.7 * last[:, -100:].double().mean()


def test_few_steps_are_not_enough_where_the_memory_is_ill_conditioned():
    """Condition number 700: the error of x after 10 and after 30 steps, and of the direct solvers, in float32."""
    inputs = power_law(1024, 64)
    exact = torch.linalg.solve(dense(inputs[1], *inputs[3:6]), inputs[0][..., None])[..., 0]
    single = system([x.float() for x in inputs])

    def error(x: Tensor) -> float:
        return float(((x - exact).norm(dim=-1) / exact.norm(dim=-1)).max())

    assert 3e-2 < error(solve_cg(single, CGOptions(max_steps=10)).x) < 1.0
    assert 3e-4 < error(solve_cg(single, CGOptions(max_steps=30)).x) < 3e-2
    assert error(solve_cg(single, CGOptions(max_steps=100)).x) < 1e-4
    assert error(solve_block_rls(single, CGOptions()).x) < 1e-4
    assert error(mesa_solvers.solve_cholesky(single, CGOptions()).x) < 1e-4


@pytest.mark.parametrize("init", ["diag", "zero", "query"])
@pytest.mark.parametrize("eps", [1e-1, 1e-3, 1e-6])
def test_the_residual_at_the_exit_is_below_that_at_the_start(init, eps):
    """|q - A x| <= eps |q - A x_0| from every first guess, and hardly below: no step too many."""
    inputs = power_law(200, 32, gamma=0.99)
    q, matrices = inputs[0], dense(inputs[1], *inputs[3:6])
    guess = {"diag": q / matrices.diagonal(dim1=-2, dim2=-1), "zero": torch.zeros_like(q), "query": q}[init]
    first = torch.linalg.vector_norm(q - (matrices @ guess[..., None])[..., 0], dim=-1)
    found = solve_cg(system(inputs), CGOptions(max_steps=200, eps=eps, init=init))
    last = torch.linalg.vector_norm(q - (matrices @ found.x[..., None])[..., 0], dim=-1)
    assert (last <= eps * first * (1 + 1e-6)).all()
    assert (last / first).median() > eps / 100
    info = mesa_attention(*inputs, solver="cg", cg_eps=eps, max_cg_steps=200, cg_init=init, return_info=True).info
    torch.testing.assert_close(info.residual, last / torch.linalg.vector_norm(q, dim=-1), rtol=1e-5, atol=1e-12)


def test_an_additive_constant_would_stall():
    """No 1e-5 in the denominators: a residual far below it is still reduced."""
    inputs = power_law(64, 8, lamb=1.0)
    inputs[0] = 1e-8 * inputs[0]
    info = mesa_attention(*inputs, solver="cg", max_cg_steps=20, return_info=True).info
    assert info.residual.max() < 1e-10


def test_missing_the_residual_warns_and_says_where():
    inputs = power_law(50, 16)
    with pytest.warns(MesaConvergenceWarning, match=r"cg_eps=1e-06 in max_cg_steps=3 .*\(batch, time, head\)"):
        mesa_attention(*inputs, solver="cg", cg_eps=1e-6, max_cg_steps=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mesa_attention(*inputs, solver="cg", cg_eps=0.0, max_cg_steps=3)
        mesa_attention(*inputs, solver="cg", cg_eps=1e-6, max_cg_steps=100)


def test_the_warning_points_at_the_callers_line():
    """Also from packed sequences, the backward, and a layer."""
    inputs = [x.float() for x in power_law(50, 16)]
    leaves = [inputs[0].requires_grad_(), *inputs[1:]]
    options = {"solver": "cg", "cg_eps": 1e-6, "max_cg_steps": 3}
    layer = MesaLayer(16, heads=1, **options)
    out = mesa_attention(*leaves, backward_solver="cg", solver="cholesky", cg_eps=1e-6, max_cg_steps=3).output.sum()
    for call in (
        lambda: mesa_attention(*inputs, **options),
        lambda: mesa_attention(*inputs, cu_seqlens=torch.tensor([0, 20, 50]), **options),
        lambda: layer(inputs[2][:, :, 0]),
        out.backward,
    ):
        with pytest.warns(MesaConvergenceWarning) as caught:
            call()
        assert {warning.filename for warning in caught} == {__file__}


def test_zero_steps_from_the_query_is_linear_attention():
    inputs = problem(1, 9, 2, 4, 3)
    q, k, v, g, beta, lamb, _, h_kv = inputs
    o = mesa_attention(
        q, k, v, g, beta, lamb, initial_state=MesaState(*inputs[6:]), solver="cg", max_cg_steps=0, cg_init="query"
    ).output
    linear, _ = linear_attention.gated_linear_attention_reference(q, k, v, g, beta, h_kv)
    torch.testing.assert_close(o, linear, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("gamma", [1.0, 0.9975, 0.95, 0.9, 0.7, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_the_gates_alone_say_how_many_steps_block_rls_needs(gamma, dtype):
    """None without forgetting; the count promised is enough, and too few of them are not."""
    inputs = [x.to(dtype) for x in power_law(96, 32, gamma=gamma)]
    found = solve_block_rls(system(inputs), CGOptions())
    exact = torch.linalg.solve(dense(*(x.double() for x in (inputs[1], *inputs[3:6]))), inputs[0].double()[..., None])[
        ..., 0
    ]
    error = (found.x - exact).norm(dim=-1) / exact.norm(dim=-1)
    assert error.max() <= 400 * torch.finfo(dtype).eps
    assert not found.unconverged.any()
    if gamma == 1.0:
        assert (found.steps == 0).all()
    else:
        assert (found.steps > 0).any()


def test_fewer_steps_than_promised_are_seen(monkeypatch):
    """The bound is not idle: half of its steps leave an error above rounding."""
    promised = mesa_solvers._iterations
    monkeypatch.setattr(mesa_solvers, "_iterations", lambda product, dtype: (promised(product, dtype) / 2).long())
    inputs = power_law(96, 32, gamma=0.95)
    exact = torch.linalg.solve(dense(inputs[1], *inputs[3:6]), inputs[0][..., None])[..., 0]
    error = (solve_block_rls(system(inputs), CGOptions()).x - exact).norm(dim=-1) / exact.norm(dim=-1)
    assert error.max() > 1e-12


def test_each_head_and_chunk_gets_its_own_method(monkeypatch):
    """Gates near 1 in one head, far in another, a reset in the middle: all three paths, one answer."""
    inputs = problem(1, 128, 3, 6, 1, seed=5)
    inputs[3][..., 0], inputs[3][..., 1], inputs[3][..., 2] = 0.0, -0.03, -1.0
    inputs[3][:, 70, 0] = -torch.inf
    counts = []
    promised = mesa_solvers._iterations

    def spy(product: Tensor, dtype: torch.dtype) -> Tensor:
        counts.append(promised(product, dtype))
        return counts[-1]

    monkeypatch.setattr(mesa_solvers, "_iterations", spy)
    found = solve_block_rls(system(inputs), CGOptions())
    table = torch.cat(counts).view(4, 3)  # chunks of 32 by heads
    assert table[:, 0].tolist() == [1, 1, 0, 1]
    assert (table[:, 1] > 1).all()
    assert (table[:, 2] == 0).all()
    exact = torch.linalg.solve(dense(inputs[1], *inputs[3:7]), inputs[0][..., None])[..., 0]
    torch.testing.assert_close(found.x, exact, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("rows", [[3], [0, 1, 2], [1, 5, 9], [9, 5, 1], [4, 4], [0, 2, 3], [2, 0, 3, 1], [5, 6, 2]])
def test_rows_at_equal_distances_are_a_slice(rows):
    """And the same rows, in the same order, however they come."""
    x, index = torch.arange(12), torch.tensor(rows)
    where = mesa_solvers._slice(index)
    assert x[where].tolist() == rows
    assert isinstance(where, slice) == (rows in ([3], [0, 1, 2], [1, 5, 9]))


@pytest.mark.parametrize("together", [32 * 6, 3 * 32 * 6, 2**17])
@pytest.mark.parametrize("similar", [0.0, 0.75, 2.0])
def test_groups_of_chunks_give_every_chunk_its_own_answer(monkeypatch, together, similar):
    """Gates that get closer to 1 and farther from it with time, resets, two segments: many counts, out of order."""
    monkeypatch.setattr(mesa_solvers, "TOGETHER", together)
    monkeypatch.setattr(mesa_solvers, "SIMILAR", similar)
    monkeypatch.setattr(linear_attention, "CPU_SEGMENT", 2 * 3 * 32 * 6 * 3)
    inputs = problem(2, 300, 3, 6, 1, seed=6)
    time = torch.arange(300.0, dtype=torch.float64)
    inputs[3][..., 0], inputs[3][..., 1] = -0.05 * torch.exp(-time / 60), -0.002 * torch.exp(time / 60)
    inputs[3][..., 2] = -0.02
    inputs[3][0, [64, 100], 2] = -torch.inf  # the first element of a chunk, and one inside
    found = solve_block_rls(system(inputs), CGOptions())
    exact = torch.linalg.solve(dense(inputs[1], *inputs[3:7]), inputs[0][..., None])[..., 0]
    torch.testing.assert_close(found.x, exact, rtol=1e-11, atol=1e-11)
    assert not found.unconverged.any()
    assert len(found.steps.unique()) > 4


@pytest.mark.parametrize("power", [-30, -20, -17, -14, 14, 20, 30])
@pytest.mark.parametrize("solver", problems.SOLVERS)
def test_solutions_and_gradients_scale_with_the_right_hand_side(solver, power):
    """q -> s q makes o -> s o; a loss s times as large makes gradients s times as large: no square is lost."""
    scale = 10.0**power
    inputs = [x.float() for x in problem(1, 70, 2, 16, 16, seed=3)]
    inputs[3][..., 0] *= 0.01  # one head that hardly forgets, one that does: both parts of the hybrid

    def outcome(q: Tensor, weight: float) -> tuple[Tensor, Tensor, Tensor]:
        q = q.clone().requires_grad_()
        state = MesaState(*inputs[6:])
        o, _, info = mesa_attention(
            q, *inputs[1:6], initial_state=state, solver=solver, max_cg_steps=60, return_info=True
        )
        (o.sum() * weight).backward()
        return o.detach(), q.grad, info.residual

    (o, grad, residual), (scaled, same_grad, small) = outcome(inputs[0], 1.0), outcome(scale * inputs[0], 1.0)
    _, scaled_grad, _ = outcome(inputs[0], scale)
    assert (scaled / scale - o).abs().max() <= 1e-5 * o.abs().max()
    assert (same_grad - grad).abs().max() <= 1e-5 * grad.abs().max()
    assert (scaled_grad / scale - grad).abs().max() <= 1e-5 * grad.abs().max()
    assert small.max() <= 1e-4
    assert residual.max() <= 1e-4
