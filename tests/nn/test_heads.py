"""Heads: the shared projections against their equations, the convolution's state, ragged rows, refused sizes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from commissure.core.errors import InputError
from commissure.nn import Stack, mixer
from commissure.nn.convolution import ShortConvolution
from commissure.nn.heads import HeadInputs, HeadOutput, gate_projection, head_sizes, l2_normalize
from commissure.nn.names import MIXERS, MULTI_HEAD, ROTARY


def inputs(dim=6, **options):
    torch.manual_seed(0)
    layer = HeadInputs(dim, **({"heads": 2, "head_dim": 3} | options)).double()
    return layer, torch.randn(2, 9, dim, dtype=torch.float64)


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("width", [1, 2, 4])
def test_convolution_is_torchs_depthwise_conv1d(width, bias):
    torch.manual_seed(width)
    layer, x = ShortConvolution(5, width, bias=bias).double(), torch.randn(2, 7, 5, dtype=torch.float64)
    past = torch.randn(2, width - 1, 5, dtype=torch.float64)
    y, after = layer(x, past)
    history = torch.cat([past, x], 1)
    expected = F.conv1d(history.mT, layer.weight, layer.bias, groups=5).mT
    assert_close(y, expected)
    assert torch.equal(after, history[:, 7:])


def test_convolution_keeps_the_inputs_before_each_rows_length():
    layer, x = ShortConvolution(1, 4), torch.arange(1.0, 6).view(1, 5, 1).expand(3, 5, 1)
    past = torch.tensor([-3.0, -2, -1]).view(1, 3, 1).expand(3, 3, 1)
    _, after = layer(x, past, lengths=torch.tensor([0, 2, 5]))
    assert after[:, :, 0].tolist() == [[-3, -2, -1], [-1, 1, 2], [3, 4, 5]]


def test_queries_keys_and_values_follow_their_equations():
    layer, x = inputs(value_dim=4)
    q, k, v, state = layer(x)
    for actual, projection, convolution in ((q, layer.q_proj, layer.q_conv1d), (k, layer.k_proj, layer.k_conv1d)):
        projected = (x @ projection.weight.T).mT
        z = F.conv1d(F.pad(projected, (3, 0)), convolution.weight, groups=6).mT
        z = (z * torch.sigmoid(z)).view(2, 9, 2, 3)
        assert_close(actual, z / (z.square().sum(-1, keepdim=True) + 1e-6).sqrt())
    assert_close(v.flatten(2), x @ layer.v_proj.weight.T)
    assert_close(state.queries, (x @ layer.q_proj.weight.T)[:, -3:])
    assert_close(state.keys, (x @ layer.k_proj.weight.T)[:, -3:])


def test_plain_heads_are_projections():
    layer, x = inputs(conv_size=1, silu=False, normalize=False)
    q, k, _, state = layer(x)
    assert torch.equal(q.flatten(2), layer.q_proj(x))
    assert torch.equal(k.flatten(2), layer.k_proj(x))
    assert state.queries.shape == (2, 0, 6)
    assert not any("conv" in name for name, _ in layer.named_parameters())


@pytest.mark.parametrize("conv_size", [1, 2, 4])
def test_stretches_and_elements_give_the_same(conv_size):
    layer, x = inputs(conv_size=conv_size)
    whole = layer(x)
    state, pieces = None, []
    for piece in x.split([1, 1, 0, 5, 2], 1):
        *qkv, state = layer(piece, state)
        pieces.append(qkv)
    for actual, expected in zip((torch.cat(t, 1) for t in zip(*pieces, strict=True)), whole[:3], strict=True):
        assert_close(actual, expected)
    assert_close(state.keys, whole[3].keys)


def test_ragged_rows_are_rows_alone():
    layer, x = inputs()
    lengths = torch.tensor([2, 7])
    padded = x.masked_fill(torch.arange(9)[None, :, None] >= lengths[:, None, None], torch.nan)
    q, k, v, state = layer(padded, lengths=lengths)
    assert bool(torch.cat([q, k, v]).isfinite().all())
    for row, length in enumerate(lengths.tolist()):
        alone = layer(x[row : row + 1, :length])
        for actual, expected in zip((q, k, v), alone[:3], strict=True):
            assert_close(actual[row : row + 1, :length], expected)
        assert_close(state.queries[row : row + 1], alone[3].queries)
        assert_close(state.keys[row : row + 1], alone[3].keys)
        assert not bool(v[row, length:].any())


def test_normalized_vectors_are_no_longer_than_one_and_differentiable_at_zero():
    x = torch.randn(50, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 100
    lengths = l2_normalize(x).norm(dim=-1)
    assert float(lengths.max()) <= 1
    assert float(lengths.min()) > 1 - 1e-4
    zero = torch.zeros(3, requires_grad=True)
    l2_normalize(zero).sum().backward()
    torch.testing.assert_close(zero.grad, torch.full((3,), 1e3))


def test_output_norms_each_head_with_shared_weights():
    torch.manual_seed(0)
    layer, o = HeadOutput(6, heads=2, value_dim=4).double(), torch.randn(3, 5, 2, 4, dtype=torch.float64)
    torch.nn.init.normal_(layer.o_norm.weight)
    normed = o / (o.square().mean(-1, keepdim=True) + 1e-5).sqrt() * layer.o_norm.weight
    assert_close(layer(o), normed.flatten(2) @ layer.o_proj.weight.T)
    plain = HeadOutput(6, heads=2, value_dim=4, norm=False).double()
    assert_close(plain(o), o.flatten(2) @ plain.o_proj.weight.T)


def test_projections_keep_the_variance_and_gates_start_at_their_bias():
    torch.manual_seed(0)
    layer = HeadInputs(400, heads=4, head_dim=50)
    for projection in (layer.q_proj, layer.k_proj, layer.v_proj):
        assert float(projection.weight.detach().std()) == pytest.approx(400**-0.5, rel=0.02)
    gate = gate_projection(400, 4, bias=4.0)
    assert gate.bias.tolist() == [4.0] * 4
    assert gate_projection(400, 4).bias.tolist() == [0.0] * 4


def test_default_sizes():
    assert head_sizes(32, None, None) == (1, 32)
    assert head_sizes(640, None, None) == (10, 64)
    assert head_sizes(6, 4, None) == (4, 1)
    assert head_sizes(6, None, 8) == (1, 8)


def test_impossible_sizes_are_refused():
    for sizes, message in (((0, None, None), "dim"), ((4, 0, None), "heads"), ((4, 8, None), "head_dim = 0")):
        with pytest.raises(InputError, match=message):
            head_sizes(*sizes)
    for name in ("heads", "head_dim", "value_dim", "conv_size"):
        with pytest.raises(InputError, match=f"{name}.* = .*0"):
            inputs(**{name: 0})


def head_shape(layer):
    """Heads and head_dim of a mixer, from its state."""
    state = layer.init_state(1)
    if hasattr(state, "keys"):
        return tuple(state.keys.shape[2:])
    return tuple(getattr(state.memory, "cells", getattr(state.memory, "h_kv", state.memory)).shape[1:3])


@pytest.mark.parametrize("name", sorted(MULTI_HEAD))
def test_heads_reach_every_named_mixer_that_has_them(name):
    assert head_shape(mixer(name, 12)) == (1, 12)
    assert head_shape(mixer(name, 12, heads=3)) == (3, 4)
    stack = Stack([name, "gru"], 12, heads=2, head_dim=5)
    assert head_shape(stack.blocks[0].mixer) == (2, 5)


def test_every_other_mixer_has_no_heads():
    for name in MIXERS.keys() - MULTI_HEAD.keys():
        made, plain = mixer(name, 12, heads=5, head_dim=7, rotary=True), mixer(name, 12)
        assert [p.shape for p in made.parameters()] == [p.shape for p in plain.parameters()]


@pytest.mark.parametrize("name", sorted(ROTARY))
def test_rotary_positions_turn_attention(name):
    assert Stack([name], 8, positions="rotary").blocks[0].mixer.rotary
    assert not Stack([name], 8).blocks[0].mixer.rotary


def test_rotary_positions_need_attention():
    with pytest.raises(InputError, match="'attention' or 'sliding_window'"):
        Stack(["gated_linear"], 8, positions="rotary")


def test_sliding_window_is_the_baselines():
    assert mixer("sliding_window", 8).window == 1024
    assert mixer("attention", 8).window is None


@pytest.mark.parametrize("name", sorted(MULTI_HEAD.keys() - ROTARY.keys()))
def test_memory_is_single_precision_where_the_layer_is_half(name):
    torch.manual_seed(0)
    layer, x = mixer(name, 6, heads=2).bfloat16(), torch.randn(2, 5, 6).bfloat16()
    y, state = layer(x)
    y_t, stepped = layer.step(x[:, 0], state)
    assert {y.dtype, y_t.dtype, state.conv.keys.dtype, stepped.conv.keys.dtype} == {torch.bfloat16}
    memories = [m if isinstance(m, tuple) else (m,) for m in (state.memory, stepped.memory)]
    assert {t.dtype for memory in memories for t in memory} == {torch.float32}
