"""Run by `test_mesa_triton.py` in a process of its own: through Triton's interpreter on CPU, or compiled on a GPU."""

from __future__ import annotations

import os
from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from commissure.native.mesa_triton import (
    mesa_triton_attention,
    mesa_triton_attention_reference,
    mesa_triton_available,
    mesa_triton_solve,
    mesa_triton_solve_reference,
)
from commissure.nn.mesa import MesaLayer, MesaState, mesa_attention

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if IS_INTERPRETED else "cuda"
NAMES = ("q", "k", "v", "g", "beta", "lamb", "h_kk", "h_kv")


class Case(NamedTuple):
    """Arguments of the layer; the float64 oracles see the same rounded numbers as the kernels."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    beta: Tensor
    lamb: Tensor
    h_kk: Tensor
    h_kv: Tensor

    def double(self) -> Case:
        return Case(*(tensor.double() for tensor in self))

    def cut(self, start: int, end: int) -> Case:
        return Case(*(tensor[:, start:end] for tensor in self[:5]), *self[5:])

    @property
    def state(self) -> tuple[Tensor, Tensor]:
        return self.h_kk, self.h_kv


def make(time: int, dim: int, value: int, *, batch: int = 1, heads: int = 2, seed: int = 0) -> Case:
    """Benign systems, with gates that forget everything (-inf, and finite ones that do so in float32)."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    q, k = (torch.nn.functional.normalize(normal(batch, time, heads, dim), dim=-1) for _ in range(2))
    g = torch.nn.functional.logsigmoid(2 * normal(batch, time, heads) + 4)
    for t, gate in ((7, -torch.inf), (20, -1e30), (21, -90.0), (35, -torch.inf)):
        if t < time:
            g[:, t, 0] = gate
    factor = 0.3 * normal(batch, heads, dim, dim)
    case = Case(
        q,
        k,
        normal(batch, time, heads, value),
        g,
        torch.sigmoid(normal(batch, time, heads)),
        0.25 + normal(heads, dim).abs(),
        factor @ factor.mT,
        normal(batch, heads, dim, value),
    )
    return Case(*(tensor.to(DEVICE) for tensor in case))


def dense(case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
    """x, output and final states by one dense solve a token, and the largest condition number."""
    q, k, v, g, beta, lamb, h_kk, h_kv = case
    found, outputs, worst = [], [], 1.0
    for t in range(q.shape[1]):
        gate, written = g[:, t].exp()[..., None, None], (beta[:, t, :, None] * k[:, t])[..., None]
        h_kk = gate * h_kk + written * k[:, t, :, None, :]
        h_kv = gate * h_kv + written * v[:, t, :, None, :]
        matrix = h_kk + torch.diag_embed(lamb)
        worst = max(worst, float(torch.linalg.cond(matrix.detach()).max()))
        x = torch.linalg.solve(matrix, q[:, t, :, :, None])
        found.append(x[..., 0])
        outputs.append((h_kv.mT @ x)[..., 0])
    return torch.stack(found, 1), torch.stack(outputs, 1), h_kk, h_kv, worst


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).abs().max() / expected.abs().max())


def solve(case: Case, **how: Any) -> Any:
    return mesa_triton_solve(*case[:2], *case[3:7], **how)


def attend(case: Case, **how: Any) -> Any:
    return mesa_triton_attention(*case[:6], initial_state=case.state, **how)


def test_available_where_it_runs() -> None:
    assert mesa_triton_available(DEVICE)


@pytest.mark.parametrize(
    ("time", "dim", "value", "chunk"), [(37, 16, 24, 16), (33, 33, 5, None), (18, 64, 40, 16), (2, 1, 1, None)]
)
def test_equals_the_dense_solution(time: int, dim: int, value: int, chunk: int | None) -> None:
    case = make(time, dim, value)
    x, output, h_kk, h_kv, condition = dense(case.double())
    limit = 1e-5 * max(1.0, condition / 100)
    found = attend(case, eps=1e-6, max_steps=2 * dim, chunk_size=chunk)
    assert distance(found.output, output) < limit
    assert distance(found.h_kk, h_kk) < 1e-6
    assert distance(found.h_kv, h_kv) < 1e-6
    solved = solve(case, eps=1e-6, max_steps=2 * dim, chunk_size=chunk)
    assert distance(solved.x, x) < limit
    assert torch.equal(solved.h_kk, found.h_kk)
    assert torch.equal(solved.cg_steps, found.cg_steps)


def test_largest_dim() -> None:
    case = make(5, 128, 130, heads=1)
    found, expected = attend(case, eps=1e-6, max_steps=60), dense(case.double())
    assert distance(found.output, expected[1]) < 1e-5 * max(1.0, expected[4] / 100)


@pytest.mark.parametrize("init", ["diag", "zero", "query"])
@pytest.mark.parametrize("max_steps", [0, 1, 4])
def test_fixed_steps_equal_the_reference(init: Any, max_steps: int) -> None:
    case = make(18, 16, 3)
    expected = mesa_triton_attention_reference(
        *case.double()[:6], initial_state=case.double().state, max_steps=max_steps, init=init
    )
    found = attend(case, max_steps=max_steps, init=init, chunk_size=16)
    assert (found.cg_steps == max_steps).all()
    assert distance(found.h_kk, expected.h_kk) < 1e-6
    if init == "zero" and max_steps == 0:
        assert not found.output.any()
    else:
        assert distance(found.output, expected.output) < 1e-5


def test_counts_are_those_of_each_system_alone() -> None:
    case, eps = make(40, 16, 3), 1e-3
    system = (*case.double()[:2], *case.double()[3:7])
    early, late = (mesa_triton_solve_reference(*system, eps=eps * near).cg_steps for near in (1.02, 0.98))
    is_clear = early == late  # rounding cannot move the residual of the last step across the goal
    found = solve(case, eps=eps, chunk_size=16)
    assert is_clear.double().mean() > 0.9
    assert torch.equal(found.cg_steps[is_clear], early[is_clear])
    assert found.cg_steps.unique().numel() > 2
    expected = mesa_triton_solve_reference(*system, eps=eps)
    assert distance(found.x[is_clear], expected.x[is_clear]) < 1e-5
    loose = solve(case, eps=0.1, chunk_size=16).cg_steps
    assert (loose <= found.cg_steps).all()


@pytest.mark.skipif(not IS_INTERPRETED, reason="counts the interpreter's calls")
def test_the_loop_ends_with_the_slowest_token_of_the_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    from commissure.native import mesa_triton_kernels as kernels

    calls, matrix = [], kernels._chunk_matrix

    def counted(*arguments: Any, **named: Any) -> Any:
        calls.append(1)
        return matrix(*arguments, **named)

    monkeypatch.setattr(kernels, "_chunk_matrix", counted)
    steps = solve(make(32, 16, 1, heads=1), eps=1e-2, max_steps=30, chunk_size=16).cg_steps[0, :, 0]
    slowest = [int(steps[:16].max()), int(steps[16:].max())]
    assert max(slowest) < 20
    assert len(calls) == sum(slowest) + 2  # and once a chunk for the first residual


@pytest.mark.parametrize("init", ["diag", "zero"])
def test_any_split_gives_the_same(init: Any) -> None:
    case, how = make(21, 16, 5), {"eps": 1e-3, "max_steps": 6, "init": init, "chunk_size": 16}
    whole, state, outputs, steps = attend(case, **how), case.state, [], []
    for start, end in pairwise((0, 1, 2, 9, 9, 20, 21)):
        part = mesa_triton_attention(*case.cut(start, end)[:6], initial_state=state, **how)
        state = part.h_kk, part.h_kv
        outputs.append(part.output)
        steps.append(part.cg_steps)
    assert distance(torch.cat(outputs, 1), whole.output.double()) < 2e-6
    assert torch.equal(torch.cat(steps, 1), whole.cg_steps)
    assert distance(state[0], whole.h_kk.double()) < 1e-6
    assert distance(state[1], whole.h_kv.double()) < 1e-6


def test_decoding_without_values() -> None:
    case = make(1, 33, 1, batch=3)
    found, expected = solve(case, eps=1e-7, max_steps=60), dense(case.double())
    assert distance(found.x, expected[0]) < 1e-5
    assert distance(found.h_kk, expected[2]) < 1e-6


@pytest.mark.parametrize(("time", "dim", "value"), [(37, 16, 5), (18, 9, 20), (1, 16, 3)])
def test_gradients(time: int, dim: int, value: int) -> None:
    case = Case(*(tensor.requires_grad_() for tensor in make(time, dim, value)))
    exact = Case(*(tensor.detach().double().requires_grad_() for tensor in case))
    found = attend(case, eps=1e-7, max_steps=2 * dim, chunk_size=16)
    _, *expected, condition = dense(exact)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(DEVICE) for t in expected]
    weights[1] = weights[1] + weights[1].mT
    sum((a * w.float()).sum() for a, w in zip(found[:3], weights, strict=True)).backward()
    sum((a * w).sum() for a, w in zip(expected, weights, strict=True)).backward()
    for name, mine, theirs in zip(NAMES, case, exact, strict=True):
        grad = (theirs.grad + theirs.grad.mT) / 2 if name == "h_kk" else theirs.grad
        assert distance(mine.grad, grad) < 1e-5 * max(1.0, condition / 100), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_only_read(dtype: torch.dtype) -> None:
    case = make(17, 16, 5)
    low = Case(*(tensor.to(dtype) for tensor in case[:5]), *case[5:])
    same = Case(*(tensor.float() for tensor in low))
    for time in (17, 1):
        found, expected = (attend(c.cut(0, time), eps=1e-4) for c in (low, same))
        assert found.output.dtype == dtype
        assert found.h_kk.dtype == torch.float32
        assert torch.equal(found.output, expected.output.to(dtype))
        assert torch.equal(found.h_kv, expected.h_kv)


@pytest.mark.parametrize("time", [1, 18])
def test_scale_of_the_query(time: int) -> None:
    case = make(time, 16, 1)
    small = case._replace(q=case.q * 2.0**-80)  # its squares are zero in float32
    found, expected = solve(small, eps=1e-5), solve(case, eps=1e-5)
    assert torch.equal(found.x, expected.x * 2.0**-80)
    assert torch.equal(found.cg_steps, expected.cg_steps)


@pytest.mark.filterwarnings("ignore:All-NaN slice")  # numpy's, in the interpreter
@pytest.mark.parametrize("eps", [0.0, 1e-2])
@pytest.mark.parametrize("time", [1, 18])
def test_nothing_asked_nothing_written_and_not_a_number(time: int, eps: float) -> None:
    case = make(time, 16, 3)
    empty = {name: torch.zeros_like(getattr(case, name)) for name in ("beta", "h_kk", "h_kv")}
    silent = attend(case._replace(**empty), eps=eps, max_steps=5)
    assert not silent.output.any()
    q = case.q.clone()
    q[:, 0, 0] = 0.0
    q[:, 0, 1] = torch.nan
    found, expected = (attend(c, eps=eps, max_steps=5) for c in (case._replace(q=q), case))
    assert not found.output[:, 0, 0].any()
    assert found.output[:, 0, 1].isnan().all()
    assert torch.equal(found.output[:, 1:], expected.output[:, 1:])


@pytest.mark.parametrize("init", ["diag", "query"])
@pytest.mark.parametrize("time", [1, 37])
def test_solver_of_mesa_attention(time: int, init: str) -> None:
    """`solver="triton"` gives outputs, states, steps and gradients of `solver="cg"`."""
    found = {}
    for solver in ("cg", "triton"):
        case = Case(*(tensor.requires_grad_() for tensor in make(time, 16, 5)))
        how = {"solver": solver, "max_cg_steps": 40, "cg_eps": 1e-4, "cg_init": init, "return_info": True}
        output, state, info = mesa_attention(*case[:6], initial_state=MesaState(*case.state), **how)
        (output.sin().sum() + state.h_kk.sin().sum() + state.h_kv.sin().sum()).backward()
        steps = info.cg_steps
        found[solver] = [output.detach(), state.h_kk.detach(), state.h_kv.detach(), *(t.grad for t in case)], steps
    (expected, counted), (actual, steps) = found["cg"], found["triton"]
    assert steps.dtype == counted.dtype
    assert 1 <= int(steps.min()) <= int(steps.max()) <= 17
    assert float((steps != counted).double().mean()) < 0.05  # at the threshold, rounding decides
    for a, b in zip(actual, expected, strict=True):
        assert distance(a, b.double()) < 3e-5


def test_solver_of_the_layer() -> None:
    torch.manual_seed(0)
    layer, x = MesaLayer(16, heads=2).to(DEVICE), torch.randn(2, 21, 16, device=DEVICE)
    with torch.no_grad():
        expected, _ = layer(x)
        layer.solver = "triton"
        first, state = layer(x[:, :20])
        last, _ = layer.step(x[:, 20], state)
    assert distance(torch.cat([first, last[:, None]], 1), expected.double()) < 1e-5


def test_empty_sequence_keeps_the_state() -> None:
    case = make(3, 16, 5).cut(0, 0)
    found = attend(Case(*(tensor.requires_grad_() for tensor in case)))
    assert found.output.shape == (1, 0, 2, 5)
    assert torch.equal(found.h_kk, case.h_kk)
    assert torch.equal(found.h_kv, case.h_kv)
    (found.output.sum() + found.h_kv.sum()).backward()
    assert torch.equal(case.h_kv.grad, torch.ones_like(case.h_kv))


def test_starts_from_nothing_and_takes_views() -> None:
    case = make(5, 16, 5)
    empty = case._replace(h_kk=0 * case.h_kk, h_kv=0 * case.h_kv)
    packed = torch.cat((case.q, case.k, case.v), -1)
    q, k, v = packed.split((16, 16, 5), -1)
    assert torch.equal(mesa_triton_attention(q, k, v, *case[3:6]).output, attend(empty).output)


@pytest.mark.parametrize("time", [1, 5])
def test_operators_keep_torch_rules(time: int) -> None:
    case = Case(*(tensor.mT.contiguous().mT.requires_grad_() for tensor in make(time, 16, 5)))  # strides of a view
    ops, checks = torch.ops.commissure, ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(ops.mesa_triton_attention, (*case, 0.0, 2, "diag", 0), test_utils=checks)
    plain = [tensor.detach() for tensor in case]
    torch.library.opcheck(ops.mesa_triton_solve, (*plain[:2], *plain[3:7], 0.0, 2, "diag", 0), test_utils=checks)
    q, k, v, g, beta, lamb, h_kk, h_kv = plain
    gradients = (v, h_kk, h_kv, k, v, g, beta, lamb, h_kk, h_kv, q, 0.0, 2, 0)
    torch.library.opcheck(ops.mesa_triton_attention_backward, gradients, test_utils=checks)
