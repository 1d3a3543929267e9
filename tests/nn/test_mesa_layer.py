"""MesaLayer, and what mesa_attention refuses at its boundary.  The eight laws are in `tests/laws`."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from commissure.core.errors import CommissureWarning, InputError
from commissure.nn import mesa, mesa_checks
from commissure.nn.mesa import MesaLayer, MesaState, mesa_attention

spec = importlib.util.spec_from_file_location("mesa_problems", Path(__file__).with_name("mesa_problems.py"))
problems = importlib.util.module_from_spec(spec)
spec.loader.exec_module(problems)
problem = problems.problem


def put(x: torch.Tensor, index: tuple[int, ...], value: float) -> torch.Tensor:
    x = x.clone()
    x[index] = value
    return x


@pytest.mark.parametrize(
    ("argument", "index", "value", "message"),
    [
        ("q", (0, 1, 1, 2), torch.nan, r"q\[0, 1, 1, 2\] = nan: expected finite"),
        ("k", (1, 0, 0, 0), torch.inf, r"k\[1, 0, 0, 0\] = inf"),
        ("v", (0, 2, 0, 1), -torch.inf, r"v\[0, 2, 0, 1\] = -inf"),
        ("g", (1, 2, 1), 0.5, r"g\[1, 2, 1\] = 0.5: expected log gamma <= 0"),
        ("g", (0, 0, 0), torch.nan, r"g\[0, 0, 0\] = nan"),
        ("beta", (0, 2, 1), -0.25, r"beta\[0, 2, 1\] = -0.25: expected a number in \[0, 1\]"),
        ("beta", (0, 2, 1), 1.5, r"beta\[0, 2, 1\] = 1.5"),
        ("beta", (1, 1, 0), torch.nan, r"beta\[1, 1, 0\] = nan"),
        ("lamb", (1, 3), 0.0, r"lamb\[1, 3\] = 0.0: expected a finite number > 0"),
        ("lamb", (0, 0), torch.inf, r"lamb\[0, 0\] = inf"),
    ],
)
def test_the_first_bad_value_is_named(argument, index, value, message):
    names = ("q", "k", "v", "g", "beta", "lamb")
    operands = dict(zip(names, problem(2, 3, 2, 4, 3)[:6], strict=True))
    operands[argument] = put(operands[argument], index, value)
    with pytest.raises(InputError, match=message):
        mesa_attention(*operands.values())


def test_wrong_shapes_and_options_are_named():
    q, k, v, g, beta, lamb, h_kk, h_kv = problem(2, 3, 2, 4, 5)
    good = (q, k, v, g, beta, lamb)
    for operands, options, message in (
        ((q, k, v, g, beta, lamb[:, :3]), {}, r"lamb = \(2, 3\): expected shape \(2, 4\)"),
        ((q, k[..., :3], v, g, beta, lamb), {}, r"k = "),
        ((q.long(), k, v, g, beta, lamb), {}, r"q = 'torch.int64 on cpu'"),
        (good, {"solver": "qr"}, r"solver = 'qr': expected one of auto, block_rls, cg, cholesky, sequential"),
        (good, {"backward_solver": "lu"}, r"solver = 'lu'"),
        ((q.numpy(), k, v, g, beta, lamb), {}, r"q = 'ndarray': expected a tensor"),
        ((q, k, v, g, beta, 1.0), {}, r"lamb = 'float': expected a tensor"),
        (good, {"cu_seqlens": [0, 3]}, r"cu_seqlens = 'list': expected a tensor"),
        (good, {"max_cg_steps": 2.5}, r"max_cg_steps = 2.5: expected an integer"),
        (good, {"max_cg_steps": -1}, r"max_cg_steps = -1"),
        (good, {"cg_eps": -1e-3}, r"cg_eps = -0.001"),
        (good, {"cg_init": "ones"}, r"cg_init = 'ones': expected one of diag, zero, query"),
        (good, {"chunk_size": 0}, r"chunk_size = 0"),
        (good, {"initial_state": MesaState(h_kk[:1], h_kv)}, r"initial_state.h_kk = \(1, 2, 4, 4\)"),
        (good, {"initial_state": MesaState(h_kk, h_kv.mT)}, r"initial_state.h_kv = \(2, 2, 5, 4\)"),
        (good, {"initial_state": MesaState(put(h_kk, (1, 0, 2, 2), torch.nan), h_kv)}, r"h_kk\[1, 0, 2, 2\] = nan"),
        (good, {"initial_state": MesaState(put(h_kk, (1, 0, 2, 3), 9.0), h_kv)}, r"h_kk\[1, 0, 2, 3\] = 9.0: .*symm"),
        (
            good,
            {"initial_state": MesaState(h_kk - 9 * torch.eye(4), h_kv)},
            r"\[0, 0\] = 'least eigenvalue -.*positive",
        ),
        (good, {"cu_seqlens": torch.tensor([0, 3])}, r"cu_seqlens = 'given with batch = 2'"),
    ):
        with pytest.raises(InputError, match=message):
            mesa_attention(*operands, **options)
    one = [x[:1] for x in good[:5]]
    for bounds, message in (
        ([0, 2], "grow from 0 to time = 3"),
        ([1, 3], "grow from 0"),
        ([0, 2, 1, 3], r"cu_seqlens\[2\] = 1"),
        ([0], "integers, shape"),
    ):
        with pytest.raises(InputError, match=message):
            mesa_attention(*one, lamb, cu_seqlens=torch.tensor(bounds))
    with pytest.raises(InputError, match=r"initial_state.h_kk = \(1, .*a row for each sequence"):
        mesa_attention(*one, lamb, cu_seqlens=torch.tensor([0, 1, 3]), initial_state=MesaState(h_kk[:1], h_kv[:1]))


def test_a_sum_that_overflows_is_no_nan():
    q, k, v, g, beta, lamb = (x.float() for x in problem(1, 5, 1, 2, 2)[:6])
    out = mesa_attention(q, k, torch.full_like(v, 3e38), g, 0 * beta, lamb)
    assert not out.output.any()


def test_rounding_in_a_state_is_forgiven_and_symmetrized():
    inputs = problem(1, 5, 1, 4, 3)
    twisted = inputs[6] + 1e-8 * torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    flat = torch.zeros_like(inputs[6])
    flat[..., 0, 0], flat[..., 1, 1] = 5.0, -1e-9
    for h_kk in (twisted, flat):
        out = mesa_attention(*inputs[:6], initial_state=MesaState(h_kk, inputs[7]), solver="sequential")
        mirrored = mesa_attention(*inputs[:6], initial_state=MesaState(h_kk.mT, inputs[7]), solver="sequential")
        assert torch.equal(out.output, mirrored.output)


def test_half_precision_states_are_raised_to_single_with_one_warning():
    inputs = [x.bfloat16() for x in problem(1, 4, 2, 4, 3)]
    state = MesaState(*(x.abs().sum() * torch.eye(4)[..., : x.shape[3]].expand_as(x).bfloat16() for x in inputs[6:]))
    mesa_checks._warn_half_precision.cache_clear()
    with pytest.warns(CommissureWarning, match="half precision"):
        out = mesa_attention(*inputs[:6], initial_state=state)
    mesa_attention(*inputs[:6], initial_state=state)  # a second warning would be an error here
    assert out.output.dtype == torch.bfloat16
    assert {x.dtype for x in out.state} == {torch.float32}


@pytest.mark.filterwarnings("ignore:a Mesa state in half precision")
@pytest.mark.parametrize(("dtype", "gap"), [(torch.bfloat16, 0.25), (torch.float16, 1e-3)], ids=["bfloat16", "float16"])
def test_states_of_a_layer_survive_half_precision(dtype, gap):
    """Rounding leaves them indefinite (bfloat16: beyond Lambda's floor): none is refused, every solver stays finite."""
    layer = MesaLayer(32, heads=2, forget_bias=9.0, forget_cap=None, lambda_init=0.26)
    worst = 0.0
    for seed in range(60):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for weight in layer.parameters():
                if weight.ndim == 2:
                    weight.copy_(torch.randn(weight.shape, generator=generator) / 4)
            # A slow signal: its keys are nearly one.
            x = torch.randn(1, 900, 32, generator=generator) / 10 + 2 * torch.randn(1, 1, 32, generator=generator)
            _, state = layer(x)
            stored = MesaState(*(part.to(dtype) for part in state.memory))
            least = torch.linalg.eigvalsh(stored.h_kk.double()).amin()
            worst = min(worst, float(least))
            operands = layer.project(x[:, :20], state)[:6]
            for solver in problems.SOLVERS:
                out = mesa_attention(*operands, initial_state=stored, solver=solver)
                assert out.output.isfinite().all()
                assert torch.linalg.eigvalsh(out.state.h_kk.double()).min() >= -1e-5 * out.state.h_kk.abs().max()
            y, last = layer(x[:, :20], state._replace(memory=stored))
            assert torch.equal(last.memory.h_kk, mesa_attention(*operands, initial_state=stored).state.h_kk)
            assert y.isfinite().all()
    assert worst < -gap  # the stored states were what they are said to be


def test_half_precision_forgives_its_rounding_and_no_more():
    inputs = problem(1, 4, 1, 4, 3)
    h_kk = torch.diag(torch.tensor([8.0, 4.0, 2.0, -0.05])).expand_as(inputs[6]).bfloat16()
    mesa_checks._warn_half_precision.cache_clear()
    with pytest.warns(CommissureWarning, match="half precision"):
        forgiven = mesa_attention(*inputs[:6], initial_state=MesaState(h_kk, inputs[7]))
    lifted = h_kk.double() + 0.05 * torch.eye(4)  # to the last positive semidefinite matrix, and no further
    again = mesa_attention(*inputs[:6], initial_state=MesaState(lifted, inputs[7]))
    torch.testing.assert_close(forgiven.output, again.output, rtol=1e-3, atol=1e-3)
    with pytest.raises(InputError, match=r"h_kk\[0, 0\] = 'least eigenvalue -0.05"):
        mesa_attention(*inputs[:6], initial_state=MesaState(h_kk.double(), inputs[7]))
    h_kk = torch.diag(torch.tensor([8.0, 4.0, 2.0, -0.2])).expand_as(inputs[6]).bfloat16()
    with pytest.raises(InputError, match=r"h_kk\[0, 0\] = 'least eigenvalue -0.2"):
        mesa_attention(*inputs[:6], initial_state=MesaState(h_kk, inputs[7]))


@pytest.mark.parametrize("solver", problems.SOLVERS)
def test_autocast_does_not_reach_the_solver(solver):
    inputs = [x.float().requires_grad_() for x in problem(1, 40, 2, 8, 3)[:6]]
    grads = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            out = mesa_attention(*inputs, solver=solver)
            loss = out.output.square().sum()
            grads.append(torch.autograd.grad(loss, inputs))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    half = [x.detach().bfloat16() for x in inputs]
    out = mesa_attention(*half, solver=solver)
    exact = mesa_attention(*(x.double() for x in half), solver="sequential")
    assert out.output.dtype == torch.bfloat16
    assert (out.output - exact.output).abs().max() <= torch.finfo(torch.bfloat16).eps * exact.output.abs().max()
    assert (out.state.h_kk - exact.state.h_kk).abs().max() <= 1e-6 * exact.state.h_kk.abs().max()


def test_auto_falls_back_to_block_rls_without_the_kernel(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(mesa, "mesa_kernel_available", lambda: True)
    assert mesa.solver_for("auto", cpu) == "cholesky"
    monkeypatch.setattr(mesa, "mesa_kernel_available", lambda: False)
    assert mesa.solver_for("auto", cpu) == "block_rls"
    with pytest.raises(InputError, match="runs on the CPU"):
        mesa.solver_for("cholesky", torch.device("cuda"))


def test_lambda_begins_at_lambda_init_and_above_its_floor():
    layer = MesaLayer(8, heads=2, lambda_init=0.7, lambda_lower_bound=0.1).double()
    lamb = layer.project(torch.zeros(1, 1, 8).double())[5]
    assert lamb.shape == (2, 4)
    torch.testing.assert_close(lamb, torch.full_like(lamb, 0.7), rtol=0, atol=1e-7)
    with torch.no_grad():
        layer.lambda_params.fill_(-1e3)
    assert (layer.project(torch.zeros(1, 1, 8).double())[5] == 0.1).all()
    assert layer.lambda_params._no_weight_decay
    assert (MesaLayer(8).project(torch.zeros(1, 1, 8))[5] == 1.0).all()


def test_the_forget_cap_is_the_papers():
    torch.manual_seed(0)
    capped, plain = MesaLayer(6, heads=2, forget_cap=0.9), MesaLayer(6, heads=2, forget_cap=None)
    plain.load_state_dict(capped.state_dict())
    x = 3 * torch.randn(2, 50, 6)
    (_, _, _, g, beta, _, _), (_, _, _, g_plain, beta_plain, _, _) = capped.project(x), plain.project(x)
    assert torch.equal(beta, beta_plain)
    torch.testing.assert_close(g.exp(), g_plain.exp() * (1 - 0.1 * beta**2))
    torch.testing.assert_close(g_plain, F.logsigmoid(plain.a_proj(x)))
    assert (g.exp() <= 1 - 0.1 * beta**2 + 1e-6).all()


def test_the_layer_is_its_projections_around_mesa_attention():
    torch.manual_seed(0)
    layer = MesaLayer(8, heads=2, value_dim=3)
    x = torch.randn(2, 9, 8)
    *operands, conv = layer.project(x)
    out = mesa_attention(*operands)
    y, state = layer(x)
    torch.testing.assert_close(y, layer.output(out.output))
    torch.testing.assert_close(state.memory, out.state)
    torch.testing.assert_close(state.conv, conv)


def test_the_gradient_of_the_memory_is_symmetric_as_the_memory_is():
    torch.manual_seed(0)
    layer = MesaLayer(8, heads=2).double()
    _, state = layer(torch.randn(1, 5, 8).double())
    h_kk = state.memory.h_kk.detach().requires_grad_()
    y, _ = layer(torch.randn(1, 5, 8).double(), state._replace(memory=state.memory._replace(h_kk=h_kk)))
    (grad,) = torch.autograd.grad((y * torch.randn(1, 5, 8).double()).sum(), [h_kk])
    assert grad.abs().max() > 0
    torch.testing.assert_close(grad, grad.mT, rtol=0, atol=1e-15)


def test_test_time_compute_may_be_set_at_any_time():
    torch.manual_seed(0)
    layer = MesaLayer(16, heads=2).double()
    x = torch.randn(1, 60, 16).double()
    exact, _ = layer(x)
    layer.solver, layer.max_cg_steps = "cg", 1
    coarse, _ = layer(x)
    layer.max_cg_steps = 40
    fine, _ = layer(x)
    assert (coarse - exact).abs().max() > 1e-3
    torch.testing.assert_close(fine, exact, rtol=1e-10, atol=1e-10)
    layer.max_cg_steps, layer.cg_init = 0, "zero"
    assert layer(x)[1].memory.h_kk.any()
    assert not layer(x)[0].any()  # no step from zero: nothing
    layer.max_cg_steps, layer.cg_eps = 40, 1e-2
    assert 1e-9 < (layer(x)[0] - exact).abs().max() < 1e-1


@pytest.mark.parametrize("solver", problems.SOLVERS)
def test_nan_in_one_row_stays_there(solver):
    torch.manual_seed(0)
    layer = MesaLayer(8, heads=2, solver=solver)
    x = torch.randn(2, 10, 8)
    x[0, 4] = torch.nan
    y, state = layer(x)
    expected, expected_state = layer(x[1:])
    torch.testing.assert_close(y[1:], expected)
    torch.testing.assert_close(state.memory.h_kv[1:], expected_state.memory.h_kv)
    assert y[0, 4:].isnan().all()


def test_a_half_precision_layer_keeps_its_memory_in_single():
    layer = MesaLayer(8, heads=2).bfloat16()
    assert layer.init_state(1).memory.h_kk.dtype == torch.float32
    assert layer.init_state(1).conv.keys.dtype == torch.bfloat16
    y, state = layer(torch.randn(1, 5, 8).bfloat16())
    y, state = layer(torch.randn(1, 5, 8).bfloat16(), state)
    assert y.dtype == torch.bfloat16
    assert state.memory.h_kk.dtype == torch.float32


def test_wrong_sizes_are_named():
    for options, message in (
        ({"lambda_init": 0.2}, r"lambda_init = 0.2: expected a finite number > lambda_lower_bound = 0.25"),
        ({"lambda_lower_bound": -1.0}, "lambda_lower_bound = -1.0"),
        ({"forget_cap": 0.0}, "forget_cap = 0.0"),
        ({"forget_cap": 1.5}, "forget_cap = 1.5"),
        ({"solver": "lu"}, "solver = 'lu'"),
        ({"max_cg_steps": -2}, "max_cg_steps = -2"),
        ({"heads": 0}, "heads"),
        ({"heads": 4.0}, "heads = 4.0: expected an integer"),
        ({"head_dim": 2.0}, "head_dim = 2.0: expected an integer"),
        ({"conv_size": 0}, "conv_size = 0"),
    ):
        with pytest.raises(InputError, match=message):
            MesaLayer(8, **options)
