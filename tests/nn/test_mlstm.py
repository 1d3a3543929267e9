"""mLSTM: the stabilized forms against the definition without a stabilizer, extreme gates, gradients, the layer."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from commissure.core.errors import InputError
from commissure.nn import MLSTM, MLSTMMemory
from commissure.nn.mlstm import matrix_lstm, matrix_lstm_reference

GATES = ("mild", "wide", "extreme")


def draw(generator, *shape):
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def arguments(time, gates="mild", batch=2, heads=2, dim=3, value_dim=4):
    """q, k, v, log_input, log_forget and a memory; "wide": inputs up to exp(+-100); "extreme": gates shut, too."""
    generator = torch.Generator().manual_seed(time)
    q, k = draw(generator, batch, time, heads, dim), draw(generator, batch, time, heads, dim)
    v = draw(generator, batch, time, heads, value_dim)
    log_input, log_forget = draw(generator, batch, time, heads), F.logsigmoid(draw(generator, batch, time, heads))
    if gates != "mild":
        log_input = 40 * log_input
    if gates == "extreme":
        log_forget[:, ::3], log_forget[:, 1::3], log_forget[:, 2::3, 0] = -50.0, 0.0, -torch.inf
        log_input[:, ::2, 1] = -torch.inf
    shapes = (batch, heads, dim, value_dim), (batch, heads, dim), (batch, heads)
    return q, k, v, log_input, log_forget, MLSTMMemory(*(draw(generator, *shape) for shape in shapes))


def definition(q, k, v, log_input, log_forget, memory):
    """h_t = C_t q_t / max(|n_t . q_t|, 1) as it is written, value-major, in numbers as large as they come."""
    scale = memory.stabilizer.exp()
    cells, normalizer = memory.cells.mT * scale[..., None, None], memory.normalizer * scale[..., None]
    outputs = []
    for t in range(q.shape[1]):
        forget, write, query = log_forget[:, t].exp(), log_input[:, t].exp(), q[:, t] / math.sqrt(q.shape[3])
        outer = torch.einsum("bhe,bhd->bhed", v[:, t], k[:, t])
        cells = forget[..., None, None] * cells + write[..., None, None] * outer
        normalizer = forget[..., None] * normalizer + write[..., None] * k[:, t]
        weight = (normalizer * query).sum(-1).abs().clamp(min=1)
        outputs.append((cells @ query[..., None])[..., 0] / weight[..., None])
    return torch.stack(outputs, 1), cells, normalizer


def unscaled(function, *inputs, **options):
    """Outputs, and memory and normalizer without their stabilizer: what the gradients of a loss can depend on."""
    o, memory = function(*inputs, **options)
    scale = memory.stabilizer.exp()
    return o, memory.cells * scale[..., None, None], memory.normalizer * scale[..., None]


def flat(inputs):
    *sequences, memory = inputs
    return [*sequences, *memory]


def gradients(function, inputs, **options):
    roots = [t.detach().requires_grad_() for t in flat(inputs)]
    o, cells, normalizer = unscaled(function, *roots[:5], MLSTMMemory(*roots[5:]), **options)
    weights = torch.linspace(-1, 1, o.numel(), dtype=o.dtype).view_as(o)
    return torch.autograd.grad((o * weights).sum() + cells.square().sum() + normalizer.square().sum(), roots)


def assert_close(actual, expected, tolerance=1e-12):
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize("function", [matrix_lstm, matrix_lstm_reference])
def test_the_stabilizer_changes_no_output(function, gates):
    inputs = arguments(23, gates)
    o, cells, normalizer = definition(*inputs)
    actual = unscaled(function, *inputs)
    assert_close(actual, (o, cells.mT, normalizer), 1e-10)


@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize("chunk_size", [1, 4, 64])
@pytest.mark.parametrize("time", [0, 1, 2, 9, 70])
def test_chunks_equal_the_recurrence(time, chunk_size, gates):
    inputs = arguments(time, gates)
    for given in (inputs, inputs[:5]):
        (o, memory), (expected, last) = matrix_lstm(*given, chunk_size=chunk_size), matrix_lstm_reference(*given)
        assert_close((o, *memory), (expected, *last), 1e-11)


@pytest.mark.parametrize("time", [1, 9, 30])
def test_gradients_equal_those_of_the_definition(time):
    inputs = arguments(time)

    def without_stabilizer(*args):
        o, cells, normalizer = definition(*args)
        return o, MLSTMMemory(cells.mT, normalizer, torch.zeros_like(args[5].stabilizer))

    expected = gradients(without_stabilizer, inputs)
    assert_close(gradients(matrix_lstm, inputs, chunk_size=4), expected, 1e-9)
    assert_close(gradients(matrix_lstm_reference, inputs), expected, 1e-9)


@pytest.mark.parametrize("gates", ["wide", "extreme"])
def test_gradients_equal_those_of_the_recurrence(gates):
    """Of a loss on the outputs: a memory of exp(100) has gradients of its own size."""
    inputs = arguments(30, gates)
    both = []
    for function in (matrix_lstm, matrix_lstm_reference):
        roots = [t.detach().requires_grad_() for t in flat(inputs)]
        o, _ = function(*roots[:5], MLSTMMemory(*roots[5:]))
        weights = torch.linspace(-1, 1, o.numel(), dtype=o.dtype).view_as(o)
        both.append(torch.autograd.grad((o * weights).sum(), roots))
    assert_close(*both, 1e-10)


def test_gradcheck():
    roots = [t.requires_grad_() for t in flat(arguments(6, batch=1, heads=1))]
    assert torch.autograd.gradcheck(
        lambda *args: unscaled(matrix_lstm, *args[:5], MLSTMMemory(*args[5:]), chunk_size=4), roots
    )


@pytest.mark.parametrize("function", [matrix_lstm, matrix_lstm_reference])
def test_exponents_beyond_single_precision(function):
    """exp(1000) is infinite even in double precision; the ratio is not: the newest of such tokens is all there is."""
    q, k, v, log_input, log_forget, _ = (t if isinstance(t, tuple) else t.float() for t in arguments(5))
    o, memory = function(q, k, v, log_input + 1000 * torch.arange(1.0, 6)[:, None], log_forget)
    sign = (q * k).sum(-1, keepdim=True).sign()
    torch.testing.assert_close(o, sign * v, rtol=1e-5, atol=1e-5)
    assert bool(torch.cat([memory.cells.flatten(), memory.normalizer.flatten()]).isfinite().all())
    o, _ = function(q, k, v, log_input - 1000, log_forget)
    assert bool((o == 0).all())
    orthogonal = torch.zeros_like(k)
    o, _ = function(q, orthogonal, v, log_input + 1000, log_forget)
    assert bool((o == 0).all())


def test_a_stretch_may_be_cut_anywhere():
    *sequences, memory = arguments(70, "extreme")
    whole, last = matrix_lstm(*sequences, memory)
    outputs = []
    for start, stop in ((0, 1), (1, 1), (1, 40), (40, 70)):
        o, memory = matrix_lstm(*(t[:, start:stop] for t in sequences), memory, chunk_size=16)
        outputs.append(o)
    assert_close((torch.cat(outputs, 1), *memory), (whole, *last), 1e-11)


def sensitivity(q, k, v, log_input, log_forget):
    """What an error of 1 in every term of C q and n . q, relative to the term, can change in each element of h."""
    o, total, size = (torch.zeros_like(x[:, 0, :, :, None] * k[:, 0, :, None, :]) for x in (v, q[..., :1], q[..., :1]))
    found = []
    for t in range(q.shape[1]):
        forget, write = (gate[:, t].exp()[..., None, None] for gate in (log_forget, log_input))
        query = q[:, t, :, :, None] / math.sqrt(q.shape[3])
        total, size = forget * total + write * k[:, t, :, None], forget * size + write * k[:, t, :, None].abs()
        o = forget * o + write * (v[:, t, :, :, None] * k[:, t, :, None]).abs()
        weight = (total @ query).abs().clamp(min=1)
        found.append(torch.cat([o @ query.abs(), size @ query.abs()], 2)[..., 0] / weight[..., 0])
    return torch.stack(found, 1)


@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize("time", [480, 490, 500])
def test_single_precision_stays_near_double(gates, time):
    """Each element, within what its own terms allow: a small difference of large terms in n . q is less sure."""
    single = [t.float() for t in arguments(time, gates, dim=16)[:5]]
    double = [t.double() for t in single]
    exact, _ = matrix_lstm_reference(*double)
    o, memory = matrix_lstm(*single)
    assert {o.dtype, *(t.dtype for t in memory)} == {torch.float32}
    allowed = sensitivity(*double)
    limit = (
        1e-6 * (allowed[..., :-1] + exact.abs() * allowed[..., -1:]) + 1e-12
    )  # writes of exp(-100) are below float32
    assert bool(((o - exact).abs() <= limit).all())


def test_half_precision_is_computed_in_single():
    halves = [t.bfloat16() for t in arguments(40)[:5]]
    o, memory = matrix_lstm(*halves)
    assert o.dtype == torch.bfloat16
    assert {t.dtype for t in memory} == {torch.float32}
    exact, _ = matrix_lstm_reference(*(t.double() for t in halves))
    torch.testing.assert_close(o.double(), exact, rtol=2**-8, atol=1e-5)


def test_layer_follows_its_equations():
    torch.manual_seed(0)
    layer, x = MLSTM(6, heads=2, value_dim=4).double(), torch.randn(2, 11, 6, dtype=torch.float64)
    q, k, v, _ = layer.inputs(x)
    z = torch.nn.functional.conv1d(
        F.pad((x @ layer.inputs.k_proj.weight.T).mT, (3, 0)), layer.inputs.k_conv1d.weight, groups=6
    ).mT
    torch.testing.assert_close(k.flatten(2), z * z.sigmoid(), rtol=0, atol=1e-12)  # no L2 norm
    log_input = x @ layer.b_proj.weight.T + layer.b_proj.bias
    log_forget = -torch.log1p(torch.exp(-(x @ layer.a_proj.weight.T + layer.a_proj.bias)))
    empty = layer.init_state(2).memory
    o, _, _ = definition(q, k, v, log_input, log_forget, empty)
    y, state = layer(x)
    torch.testing.assert_close(y, layer.output(o), rtol=0, atol=1e-12)
    assert state.memory.cells.shape == (2, 2, 3, 4)
    assert layer.a_proj.bias.tolist() == [4.0, 4.0]


def test_bad_input_is_named():
    q, k, v, log_input, log_forget, memory = arguments(5)
    for change, message in (
        ({"k": k[..., :2]}, r"k = \(2, 5, 2, 2\)"),
        ({"log_input": log_input[:1]}, r"log_input = \(1, 5, 2\)"),
        ({"log_forget": log_forget[..., None]}, r"log_forget = \(2, 5, 2, 1\)"),
        ({"initial_state": memory._replace(cells=memory.cells.mT)}, r"initial_state = \(2, 2, 4, 3\)"),
        ({"q": q[0]}, r"q = \(5, 2, 3\)"),
    ):
        inputs = {"q": q, "k": k, "v": v, "log_input": log_input, "log_forget": log_forget} | change
        for function in (matrix_lstm, matrix_lstm_reference):
            with pytest.raises(InputError, match=message):
                function(**inputs)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("log_input", math.nan),
        ("log_input", math.inf),
        ("log_forget", 0.1),
        ("log_forget", math.nan),
        ("q", math.nan),
        ("k", math.inf),
        ("v", -math.inf),
    ],
)
def test_values_out_of_range_are_refused(name, value):
    q, k, v, log_input, log_forget, memory = arguments(5)
    inputs = {"q": q, "k": k, "v": v, "log_input": log_input, "log_forget": log_forget}
    inputs[name][1, 3, 0] = value
    with pytest.raises(InputError, match=rf"{name}\[1, 3, 0(, 0)?\] = {value}"):
        matrix_lstm(**inputs)
    memory.stabilizer[0, 1] = math.nan
    with pytest.raises(InputError, match=r"initial_state.stabilizer\[0, 1\] = nan"):
        matrix_lstm(*arguments(5)[:5], memory)


def test_impossible_sizes_are_refused():
    for sizes in ({"heads": 0}, {"head_dim": 0}, {"value_dim": 0}, {"conv_size": 0}, {"chunk_size": 0}):
        with pytest.raises(InputError, match=next(iter(sizes))):
            MLSTM(6, **sizes)
