"""RG-LRU: the chunked recurrence against the loop, vanishing and complete decays, the Hawk block, initialization."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from commissure.core.errors import InputError
from commissure.core.mixer import scan
from commissure.nn import RGLRU
from commissure.nn.rg_lru import linear_recurrence, linear_recurrence_reference


def arguments(time, batch=2, dim=3):
    generator = torch.Generator().manual_seed(time)
    x = torch.randn(batch, time, dim, generator=generator, dtype=torch.float64)
    a = torch.rand(batch, time, dim, generator=generator, dtype=torch.float64)
    a[:, ::5, 0], a[:, 1::5, 1], a[..., 2] = 0.0, 1.0, 1e-30 * a[..., 2]
    return a, x, torch.randn(batch, dim, generator=generator, dtype=torch.float64)


def gradients(function, inputs):
    inputs = [t.detach().requires_grad_() for t in inputs]
    h, last = function(*inputs)
    weights = torch.linspace(-1, 1, h.numel(), dtype=h.dtype).view_as(h)
    loss = (h * weights).sum() + last.square().sum()
    return torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)


def assert_close(actual, expected, tolerance=1e-12):
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


@pytest.mark.parametrize("time", [0, 1, 2, 3, 4, 5, 16, 17, 130])
def test_chunks_equal_the_recurrence(time):
    inputs = arguments(time)
    kept = [t.clone() for t in inputs]
    assert_close(linear_recurrence(*inputs), linear_recurrence_reference(*inputs))
    assert_close(linear_recurrence(*inputs[:2]), linear_recurrence_reference(*inputs[:2]))
    assert_close(gradients(linear_recurrence, inputs), gradients(linear_recurrence_reference, inputs))
    assert all(torch.equal(a, b) for a, b in zip(inputs, kept, strict=True))


def test_one_element_of_one_row_is_not_overwritten():
    """Where reshaping needs no copy, the work in place must not reach the caller."""
    a, x, state = arguments(1, batch=1)
    kept = x.clone(), a.clone()
    linear_recurrence(a, x, state)
    assert torch.equal(x, kept[0])
    assert torch.equal(a, kept[1])


def test_gradcheck():
    for time in (1, 7):
        a, x, state = arguments(time, batch=1)
        assert torch.autograd.gradcheck(linear_recurrence, [t.requires_grad_() for t in (a, x, state)])


def test_the_sum_of_decayed_inputs():
    """h_t = sum_s a_{s+1} ... a_t x_s, an independent form."""
    a, x, state = arguments(9)
    h, _ = linear_recurrence(a, x, state)
    for t in range(9):
        expected = state * a[:, : t + 1].prod(1)
        for s in range(t + 1):
            expected = expected + a[:, s + 1 : t + 1].prod(1) * x[:, s]
        torch.testing.assert_close(h[:, t], expected, rtol=0, atol=1e-12)


def test_a_stretch_may_be_cut_anywhere():
    a, x, state = arguments(70)
    whole = linear_recurrence(a, x, state)
    outputs = []
    for start, stop in ((0, 1), (1, 1), (1, 40), (40, 70)):
        h, state = linear_recurrence(a[:, start:stop], x[:, start:stop], state)
        outputs.append(h)
    assert_close((torch.cat(outputs, 1), state), whole)


def test_single_precision_stays_near_double():
    inputs = arguments(2000)
    exact = (*linear_recurrence_reference(*inputs), *gradients(linear_recurrence_reference, inputs))
    single = [t.float() for t in inputs]
    for fast, slow in zip((*linear_recurrence(*single), *gradients(linear_recurrence, single)), exact, strict=True):
        assert fast.dtype == torch.float32
        assert float((fast - slow).norm()) <= 2e-6 * float(slow.norm())


def test_block_follows_its_equations():
    """Equations 1-4 for one row, with torch's own depthwise convolution and a loop over time."""
    torch.manual_seed(0)
    layer, u = RGLRU(4).double(), torch.randn(1, 11, 4, dtype=torch.float64)
    x = F.conv1d(F.pad((u @ layer.in_proj.weight.T).mT, (3, 0)), layer.conv1d.weight, groups=5).mT[0]
    r = torch.sigmoid(x @ layer.a_proj.weight.T + layer.a_proj.bias)
    i = torch.sigmoid(x @ layer.b_proj.weight.T + layer.b_proj.bias)
    a = torch.exp(-8 * torch.log1p(layer.decay.exp()) * r)
    h, rows = torch.zeros(5, dtype=torch.float64), []
    for t in range(11):
        h = a[t] * h + torch.sqrt(1 - a[t] ** 2) * i[t] * x[t]
        rows.append(h)
    expected = (F.gelu(u[0] @ layer.gate_proj.weight.T) * torch.stack(rows)) @ layer.out_proj.weight.T
    for y, state in (layer(u), scan(layer, u)):
        torch.testing.assert_close(y[0], expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(state.hidden[0], h, rtol=0, atol=1e-12)


def test_gate_blocks_are_a_dense_matrix_with_zeros_beside_them():
    torch.manual_seed(0)
    blocked, dense = RGLRU(8, gate_blocks=5).double(), RGLRU(8).double()
    weights = blocked.state_dict()
    for name in ("a_proj.weight", "b_proj.weight"):
        assert weights[name].shape == (10, 2)
        weights[name] = torch.block_diag(*weights[name].split(2))
    dense.load_state_dict(weights)
    x = torch.randn(2, 7, 8, dtype=torch.float64)
    for (y, state), (expected, expected_state) in (
        (blocked(x), dense(x)),
        (blocked.step(x[:, 0], blocked.init_state(2)), dense.step(x[:, 0], dense.init_state(2))),
    ):
        torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(state.hidden, expected_state.hidden, rtol=0, atol=1e-12)


def test_weights_of_gate_blocks_are_fan_in_normal():
    torch.manual_seed(0)
    weight = RGLRU(320, gate_blocks=4).a_proj.weight.detach()
    assert float(weight.std()) == pytest.approx(100**-0.5, rel=0.02)


def test_decays_start_uniform():
    torch.manual_seed(0)
    decay = torch.exp(-8 * F.softplus(RGLRU(4000).decay.detach()))
    assert 0.9 <= float(decay.min()) < 0.9002
    assert 0.9988 < float(decay.max()) <= 0.99901
    assert float(decay.mean()) == pytest.approx(0.9495, abs=2e-3)
    assert float(decay.std()) == pytest.approx(0.099 / 12**0.5, rel=0.03)


@pytest.mark.parametrize("logit", [-200.0, 200.0])
def test_shut_and_open_gates_have_finite_gradients(logit):
    """sqrt(1 - a^2) has no finite slope at a = 1, where the recurrence gate has underflown."""
    layer = RGLRU(4)
    torch.nn.init.constant_(layer.a_proj.bias, logit)
    y, _ = layer(torch.randn(2, 7, 4, generator=torch.Generator().manual_seed(0)))
    y.square().sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in layer.parameters())


def test_the_state_keeps_the_scale_of_its_input():
    """sqrt(1 - a^2) makes a white input's variance that of the state, whatever a."""
    a = torch.full((1, 40_000, 2), 0.9, dtype=torch.float64)
    a[..., 1] = 0.99
    x = torch.randn(a.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    h, _ = linear_recurrence(a, (1 - a.square()).sqrt() * x)
    torch.testing.assert_close(h.std(1), torch.ones(1, 2, dtype=torch.float64), rtol=0, atol=0.06)


def test_state_is_single_precision_where_the_layer_is_half():
    torch.manual_seed(0)
    layer, x = RGLRU(6).bfloat16(), torch.randn(2, 50, 6).bfloat16()
    y, state = layer(x)
    y_t, stepped = layer.step(x[:, 0], state)
    assert {t.dtype for t in (y, y_t, state.inputs, stepped.inputs)} == {torch.bfloat16}
    assert {state.hidden.dtype, stepped.hidden.dtype, layer.init_state(1).hidden.dtype} == {torch.float32}
    exact, _ = layer.double()(x.double())
    torch.testing.assert_close(y.double(), exact, rtol=0, atol=0.05 * float(exact.detach().std()))


def test_bad_input_is_named():
    a, x, state = arguments(5)
    for change, message in (
        ({"a": a[:, :4]}, r"a = \(2, 4, 3\)"),
        ({"x": x[0]}, r"x = \(5, 3\)"),
        ({"initial_state": state[:, :2]}, r"initial_state = \(2, 2\)"),
    ):
        inputs = {"a": a, "x": x, "initial_state": state} | change
        for function in (linear_recurrence, linear_recurrence_reference):
            with pytest.raises(InputError, match=message):
                function(**inputs)


def test_impossible_sizes_are_refused():
    for sizes in ({"width": 0.0}, {"width": -1.0}, {"conv_size": 0}, {"gate_blocks": 0}, {"gate_blocks": 3}):
        with pytest.raises(InputError, match=next(iter(sizes))):
            RGLRU(6, **sizes)
    with pytest.raises(InputError, match="dim = 0"):
        RGLRU(0)
