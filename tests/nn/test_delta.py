"""The delta rule: chunks against the recurrence and the recurrence against matrices, gates, memory, the layers."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from commissure.core.errors import InputError
from commissure.nn import DeltaNet, GatedDeltaNet, linear_attention
from commissure.nn.delta import delta_rule, delta_rule_reference

GATES = ("none", "mild", "strong", "extreme")


def draw(generator, *shape):
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def arguments(time, gates="mild", batch=2, heads=2, dim=3, value_dim=4):
    """q, k, v, g, beta and a state; "strong": products of gates underflow; "extreme": -inf, -50 and 0 take turns."""
    generator = torch.Generator().manual_seed(time)
    q, k = draw(generator, batch, time, heads, dim), draw(generator, batch, time, heads, dim)
    v, beta = draw(generator, batch, time, heads, value_dim), draw(generator, batch, time, heads).sigmoid()
    g = F.logsigmoid(draw(generator, batch, time, heads))
    if gates == "strong":
        g = 60 * g
    if gates == "extreme":
        g[:, ::3], g[:, 1::3], g[:, 2::3, 0] = -50.0, 0.0, -torch.inf
        beta[:, ::4], beta[:, 1::4] = 0.0, 1.0
    state = draw(generator, batch, heads, dim, value_dim)
    return q, F.normalize(k, dim=-1), v, None if gates == "none" else g, beta, state


def gradients(function, inputs, **options):
    inputs = [t if t is None else t.detach().requires_grad_() for t in inputs]
    o, state = function(*inputs, **options)
    weights = torch.linspace(-1, 1, o.numel(), dtype=o.dtype).view_as(o)
    return torch.autograd.grad((o * weights).sum() + state.square().sum(), [t for t in inputs if t is not None])


def assert_close(actual, expected, tolerance=1e-12):
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize("chunk_size", [1, 4, 64])
@pytest.mark.parametrize("time", [0, 1, 2, 9, 70])
def test_chunks_equal_the_recurrence(time, chunk_size, gates):
    inputs = arguments(time, gates)
    assert_close(delta_rule(*inputs, chunk_size=chunk_size), delta_rule_reference(*inputs))
    assert_close(delta_rule(*inputs[:5], chunk_size=chunk_size), delta_rule_reference(*inputs[:5]))


@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize("segment", [1, 2**16])
@pytest.mark.parametrize("time", [1, 9, 30])
def test_gradients_equal_those_of_the_recurrence(monkeypatch, time, segment, gates):
    """Also where a segment is one chunk, so that its state and gradient are handed on."""
    monkeypatch.setattr(linear_attention, "CPU_SEGMENT", segment)
    inputs = arguments(time, gates)
    assert_close(gradients(delta_rule, inputs, chunk_size=4), gradients(delta_rule_reference, inputs), 1e-11)


@pytest.mark.parametrize("gates", ["none", "mild", "extreme"])
def test_gradcheck(gates):
    inputs = arguments(7, gates, batch=1)
    if inputs[3] is not None:
        inputs[3].clamp_(min=-50, max=-1e-3)  # finite differences of -inf mean nothing, and above 0 there is no gate
    beta = inputs[4].clamp(0.01, 0.99)
    roots = [t if t is None else t.requires_grad_() for t in (*inputs[:4], beta, inputs[5])]
    assert torch.autograd.gradcheck(lambda *args: delta_rule(*args, chunk_size=3), roots)


@pytest.mark.parametrize("function", [delta_rule, delta_rule_reference])
def test_the_recurrence_is_the_papers(function):
    """S_t = gamma S_{t-1} (I - beta k k^T) + beta v k^T, o_t = S_t q_t: value-major, a matrix a step."""
    inputs = arguments(9)
    o, last = function(*inputs)
    for row in range(2):
        for head in range(2):
            q, k, v, g, beta = (t[row, :, head] for t in inputs[:5])
            memory = inputs[5][row, head].T
            for t in range(9):
                erase = torch.eye(3, dtype=torch.float64) - beta[t] * torch.outer(k[t], k[t])
                memory = g[t].exp() * memory @ erase + beta[t] * torch.outer(v[t], k[t])
                torch.testing.assert_close(o[row, t, head], memory @ q[t], rtol=0, atol=1e-12)
            torch.testing.assert_close(last[row, head], memory.T, rtol=0, atol=1e-12)


def test_reading_back_what_was_written_last():
    """With beta = 1 a key holds its newest value exactly, where an additive memory would hold the sum."""
    key, other = torch.eye(2, dtype=torch.float64)
    k = torch.stack([key, other, key])[None, :, None]
    v = torch.tensor([[1.0, 2], [3, 4], [5, 6]], dtype=torch.float64)[None, :, None]
    one = torch.ones(1, 3, 1, dtype=torch.float64)
    o, _ = delta_rule(key.expand(1, 3, 1, 2), k, v, None, one)
    assert o[0, :, 0].tolist() == [[1, 2], [1, 2], [5, 6]]


def test_forgetting_all_leaves_the_newest_token():
    q, k, v, g, beta, state = arguments(6)
    o, _ = delta_rule(q, k, v, torch.full_like(g, -torch.inf), beta, state)
    torch.testing.assert_close(o, (beta * (q * k).sum(-1))[..., None] * v, rtol=0, atol=1e-12)


def test_closed_gates_keep_the_memory():
    q, k, v, g, beta, state = arguments(6)
    o, last = delta_rule(q, k, v, torch.zeros_like(g), torch.zeros_like(beta), state)
    torch.testing.assert_close(last, state, rtol=0, atol=0)
    torch.testing.assert_close(o, torch.einsum("bthd,bhde->bthe", q, state), rtol=0, atol=1e-12)


def test_no_gate_is_a_gate_of_one():
    q, k, v, g, beta, state = arguments(9)
    assert_close(delta_rule(q, k, v, None, beta, state), delta_rule(q, k, v, torch.zeros_like(g), beta, state))


@pytest.mark.parametrize("gates", ["none", "mild"])
def test_a_stretch_may_be_cut_anywhere(gates):
    q, k, v, g, beta, state = arguments(70, gates)
    whole = delta_rule(q, k, v, g, beta, state)
    outputs = []
    for start, stop in ((0, 1), (1, 1), (1, 40), (40, 70)):
        gate = None if g is None else g[:, start:stop]
        pieces = (t[:, start:stop] for t in (q, k, v))
        o, state = delta_rule(*pieces, gate, beta[:, start:stop], state, chunk_size=16)
        outputs.append(o)
    assert_close((torch.cat(outputs, 1), state), whole)


@pytest.mark.parametrize("gates", GATES)
def test_single_precision_stays_near_double(gates):
    inputs = arguments(500, gates, dim=16, value_dim=8)
    exact = (*delta_rule_reference(*inputs), *gradients(delta_rule_reference, inputs))
    single = [t if t is None else t.float() for t in inputs]
    for fast, slow in zip((*delta_rule(*single), *gradients(delta_rule, single)), exact, strict=True):
        assert fast.dtype == torch.float32
        assert float((fast - slow).norm()) <= 2e-6 * float(slow.norm()) + 1e-12


def test_the_same_key_again_and_again_is_harmless():
    """The worst case of the triangular system, every entry of L is beta: chunks lose no more than ten times as much
    as the recurrence in the same precision.
    """
    q, k, v, _, beta, state = arguments(1024, "none", batch=1, heads=1, dim=8)
    inputs = (q, k[:, :1].expand_as(k), v, None, torch.full_like(beta, 0.99), state)
    single = [t if t is None else t.float() for t in inputs]
    exact, _ = delta_rule_reference(*(t if t is None else t.double() for t in single))
    lost, floor = (float((f(*single)[0] - exact).abs().max()) for f in (delta_rule, delta_rule_reference))
    assert lost < 10 * floor


def test_half_precision_is_computed_in_single():
    inputs = [t.bfloat16() for t in arguments(40)]
    o, state = delta_rule(*inputs)
    assert (o.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    exact, last = delta_rule_reference(*(t.double() for t in inputs))
    torch.testing.assert_close(o.double(), exact, rtol=2**-8, atol=1e-5)
    torch.testing.assert_close(state.double(), last, rtol=0, atol=1e-5)
    assert all(gradient.isfinite().all() for gradient in gradients(delta_rule, inputs))


def test_memory_is_linear_in_time_and_head_dim():
    """Nothing of size time x chunk or time x dim x dim is kept for the backward."""
    inputs = [t.requires_grad_() for t in arguments(512, batch=1, heads=1, dim=16, value_dim=16)]
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        delta_rule(*inputs)
    assert 0 < sum(sizes) <= sum(t.numel() for t in inputs) + 4 * 16 * 16


def test_bad_input_is_named():
    q, k, v, g, beta, state = arguments(5)
    for change, message in (
        ({"k": k[..., :2]}, r"k = \(2, 5, 2, 2\)"),
        ({"v": v[:, :4]}, r"v = \(2, 4, 2, 4\)"),
        ({"g": g[..., None]}, r"g = \(2, 5, 2, 1\)"),
        ({"beta": beta[:1]}, r"beta = \(1, 5, 2\)"),
        ({"g": None, "beta": beta[:1]}, r"beta = \(1, 5, 2\)"),
        ({"initial_state": state.mT}, r"initial_state = \(2, 2, 4, 3\)"),
        ({"q": q[0]}, r"q = \(5, 2, 3\)"),
    ):
        inputs = {"q": q, "k": k, "v": v, "g": g, "beta": beta, "initial_state": state} | change
        for function in (delta_rule, delta_rule_reference):
            with pytest.raises(InputError, match=message):
                function(**inputs)
    with pytest.raises(InputError, match="chunk_size = 0"):
        delta_rule(q, k, v, g, beta, chunk_size=0)


@pytest.mark.parametrize("name", ["q", "k", "v", "initial_state"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_not_finite_are_refused(name, value):
    inputs = dict(zip(("q", "k", "v", "g", "beta", "initial_state"), arguments(5), strict=True))
    inputs[name][1, 1, 0, 2] = value
    with pytest.raises(InputError, match=rf"{name}\[1, 1, 0, 2\] = {value}: expected finite"):
        delta_rule(**inputs)


@pytest.mark.parametrize(
    ("name", "value"), [("g", 0.1), ("g", math.nan), ("beta", -0.1), ("beta", 1.5), ("beta", math.nan)]
)
def test_gates_out_of_range_are_refused(name, value):
    inputs = dict(zip(("q", "k", "v", "g", "beta", "initial_state"), arguments(5), strict=True))
    inputs[name][1, 3, 0] = value
    with pytest.raises(InputError, match=rf"{name}\[1, 3, 0\] = {value}"):
        delta_rule(**inputs)


@pytest.mark.parametrize("layer_type", [DeltaNet, GatedDeltaNet])
def test_layers_follow_their_equations(layer_type):
    torch.manual_seed(0)
    layer, x = layer_type(6, heads=2, value_dim=4).double(), torch.randn(2, 11, 6, dtype=torch.float64)
    q, k, v, _ = layer.inputs(x)
    beta = torch.sigmoid(x @ layer.b_proj.weight.T + layer.b_proj.bias)
    gamma = torch.ones_like(beta)
    if layer_type is GatedDeltaNet:
        gamma = torch.sigmoid(x @ layer.a_proj.weight.T + layer.a_proj.bias)
        assert layer.a_proj.bias.tolist() == [4.0, 4.0]
    o, _ = delta_rule_reference(q, k, v, gamma.log(), beta)
    y, state = layer(x)
    assert_close([y], [layer.output(o)])
    assert state.memory.shape == (2, 2, 3, 4)


def test_impossible_sizes_are_refused():
    for layer_type in (DeltaNet, GatedDeltaNet):
        for sizes in ({"heads": 0}, {"head_dim": 0}, {"value_dim": 0}, {"conv_size": 0}, {"chunk_size": 0}):
            with pytest.raises(InputError, match=next(iter(sizes))):
                layer_type(6, **sizes)
