"""Decoding a token without a gradient takes one compiled step: results, errors and refusals of the general way."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd.forward_ad import dual_level, make_dual
from torch.nn.functional import normalize

from commissure.core.errors import DegenerateError
from commissure.native.mesa import mesa_kernel_available, mesa_step
from commissure.nn import mesa
from commissure.nn.mesa import MesaLayer, MesaOutput, MesaState, mesa_attention

needs_kernel = pytest.mark.skipif(not mesa_kernel_available(), reason="built without the C++ kernels")
DTYPES = [torch.float32, torch.float64]


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Grows by one with each compiled step."""
    taken: list[Tensor] = []

    def counted(*args: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        taken.append(args[0])
        return mesa_step(*args)

    monkeypatch.setattr(mesa, "mesa_step", counted)
    return taken


def problem(time: int = 1, *, batch: int = 2, dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], MesaState]:
    """The six operands of the layer and a state; heads that remember, forget everything, write nothing."""
    rng = torch.Generator().manual_seed(time)
    heads, dim, value_dim = 3, 7, 5
    q, k = (torch.randn(batch, time, heads, dim, generator=rng, dtype=dtype) for _ in range(2))
    v = torch.randn(batch, time, heads, value_dim, generator=rng, dtype=dtype)
    g = torch.tensor([-0.1, -torch.inf, -0.2], dtype=dtype).repeat(batch, time, 1)
    beta = torch.tensor([0.7, 0.4, 0.0], dtype=dtype).repeat(batch, time, 1)
    lamb = 0.25 + torch.rand(heads, dim, generator=rng, dtype=dtype)
    root = torch.randn(batch, heads, dim, dim, generator=rng, dtype=dtype)
    h_kv = torch.randn(batch, heads, dim, value_dim, generator=rng, dtype=dtype)
    return [q, normalize(k, dim=-1), v, g, beta, lamb], MesaState(root @ root.mT, h_kv)


def generally(operands: list[Tensor], state: MesaState | None) -> MesaOutput:
    """What is computed where a gradient is needed."""
    q, *others = operands
    o, state, _ = mesa_attention(q.clone().requires_grad_(), *others, initial_state=state, solver="cholesky")
    assert o.requires_grad
    return MesaOutput(o.detach(), MesaState(*(x.detach() for x in state)), None)


def assert_same(found: MesaOutput, want: MesaOutput, tolerance: float) -> None:
    for a, b in zip((found.output, *found.state), (want.output, *want.state), strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_step_is_the_general_way_to_rounding(
    dtype: torch.dtype, context: Callable[[], torch.no_grad], steps: list[Tensor]
) -> None:
    operands, state = problem(dtype=dtype)
    for start in (state, None):
        with context():
            found = mesa_attention(*operands, initial_state=start, solver="cholesky")
        assert_same(found, generally(operands, start), 1e-12 if dtype == torch.float64 else 2e-5)
    assert len(steps) == 2


def test_dtypes_are_those_of_the_general_way(steps: list[Tensor]) -> None:
    for changed in ((0, 1, 2), (2,), (3, 4), (5,), (0,)):
        for other in (torch.bfloat16, torch.float64):
            operands, state = problem(dtype=torch.float32)
            operands = [x.to(other) if i in changed else x for i, x in enumerate(operands)]
            with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
                found = mesa_attention(*operands, initial_state=state, solver="cholesky")
            want = generally(operands, state)
            assert_same(found, want, 1e-2 if found.output.dtype == torch.bfloat16 else 2e-5)
    assert len(steps) == 10


@needs_kernel
def test_no_step_is_taken_where_it_cannot_serve(steps: list[Tensor]) -> None:
    operands, state = problem()
    two, _ = problem(2)
    with torch.no_grad():
        mesa_attention(*two, initial_state=state)
        mesa_attention(*operands, initial_state=state, solver="block_rls")
        mesa_attention(*operands, initial_state=state, solver="cg")
        assert mesa_attention(*operands, initial_state=state, return_info=True).info is not None
    leaf = state.h_kv.clone().requires_grad_()
    assert mesa_attention(*operands, initial_state=MesaState(state.h_kk, leaf)).output.requires_grad
    assert not steps
    mesa_attention(*operands, initial_state=state)
    with torch.no_grad():
        mesa_attention(*operands, initial_state=MesaState(state.h_kk, leaf))
    assert len(steps) == 2


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch's own, on first use
def test_forward_mode_is_refused_and_not_forgotten() -> None:
    operands, state = problem()
    with torch.no_grad(), dual_level(), pytest.raises(NotImplementedError, match="forward mode"):
        mesa_attention(make_dual(operands[0], operands[0]), *operands[1:], initial_state=state, solver="cholesky")


def test_states_given_are_values(steps: list[Tensor]) -> None:
    operands, state = problem()
    layer_state = MesaState(*(x.clone() for x in state))
    options = mesa.Options("cholesky", "cholesky", mesa.CGOptions())
    with torch.inference_mode():
        found = mesa.attend_mesa(*operands, layer_state, options)
    for given, copy, new in zip(layer_state, state, found.state, strict=True):
        assert torch.equal(given, copy)
        assert given.data_ptr() != new.data_ptr()
    assert len(steps) == 1


def test_errors_are_those_of_the_general_way() -> None:
    (q, k, v, g, beta, lamb), _ = problem()
    messages = []
    for leaf in (q, q.clone().requires_grad_()):
        with pytest.raises(DegenerateError) as caught:
            mesa_attention(leaf, k, v, g, beta, 1e-300 * lamb, solver="cholesky")
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    assert "batch 0, time 0, head 0" in messages[0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_layer_decodes_what_it_computes_for_training(dtype: torch.dtype, steps: list[Tensor]) -> None:
    layer = MesaLayer(24, heads=3, value_dim=5, solver="cholesky").to(dtype)
    x = torch.randn(2, 6, 24, generator=torch.Generator().manual_seed(0), dtype=dtype)
    whole, last = layer(x)
    assert not steps
    state, outputs = layer.init_state(2), []
    with torch.inference_mode():
        for t in range(6):
            y, state = layer.step(x[:, t], state)
            outputs.append(y)
    assert len(steps) == 6
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5
    torch.testing.assert_close(torch.stack(outputs, 1), whole.detach(), rtol=tolerance, atol=tolerance)
    for a, b in zip(state.memory, last.memory, strict=True):
        torch.testing.assert_close(a, b.detach(), rtol=tolerance, atol=tolerance)
