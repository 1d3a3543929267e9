"""Attention against a masked softmax written out, rotary positions against rotations, and the cache's size."""

from __future__ import annotations

import math

import pytest
import torch

from commissure.core.errors import InputError
from commissure.core.mixer import nbytes, scan
from commissure.nn import Attention, rotary_angles, rotate


def naive(layer, x):
    """One query, one key, one head at a time; rotations as complex numbers."""
    batch, time, _ = x.shape
    q, k, v = layer.qkv(x).view(batch, time, 3, layer.heads, layer.head_dim).unbind(2)
    out = torch.zeros_like(q)
    for b in range(batch):
        for h in range(layer.heads):
            for t in range(time):
                first = 0 if layer.window is None else max(0, t - layer.window + 1)
                query = turned(q[b, t, h], t) if layer.rotary else q[b, t, h]
                keys = [turned(k[b, s, h], s) if layer.rotary else k[b, s, h] for s in range(first, t + 1)]
                scores = torch.stack([query @ key / math.sqrt(layer.head_dim) for key in keys])
                weights = scores.exp() / scores.exp().sum()
                out[b, t, h] = weights @ v[b, first : t + 1, h]
    return layer.out(out.flatten(2))


def turned(vector, position):
    pairs = torch.view_as_complex(vector.view(-1, 2).contiguous())
    frequencies = 10_000.0 ** (-torch.arange(len(pairs), dtype=torch.float64) / len(pairs))
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(frequencies), frequencies * position)).flatten()


@pytest.mark.parametrize("window", [None, 1, 3, 20])
@pytest.mark.parametrize("rotary", [False, True])
def test_forward_equals_the_naive_masked_softmax(window, rotary):
    torch.manual_seed(0)
    layer = Attention(8, heads=2, window=window, rotary=rotary).double()
    x = torch.randn(2, 7, 8, dtype=torch.float64)
    torch.testing.assert_close(layer(x)[0], naive(layer, x), rtol=0, atol=1e-13)


def test_rotary_products_depend_on_the_difference_of_positions():
    torch.manual_seed(0)
    q, k = torch.randn(2, 12, dtype=torch.float64)
    products = [
        rotate(q, rotary_angles(torch.tensor(p + 5), 6)) @ rotate(k, rotary_angles(torch.tensor(p), 6))
        for p in (0, 3, 10**6)
    ]
    torch.testing.assert_close(products[1], products[0], rtol=0, atol=1e-9)
    torch.testing.assert_close(products[2], products[0], rtol=0, atol=1e-9)


def test_rotation_leaves_the_other_coordinates_and_keeps_the_dtype():
    x = torch.randn(3, 10)
    y = rotate(x, rotary_angles(torch.arange(3), 2))
    assert y.dtype == torch.float32
    assert torch.equal(y[:, 4:], x[:, 4:])
    torch.testing.assert_close(y.norm(dim=1), x.norm(dim=1))


def test_the_windowed_cache_stays_the_same_size_and_the_full_one_grows():
    windowed, full = Attention(8, window=4), Attention(8)
    x = torch.randn(1, 50, 8)
    assert nbytes(scan(windowed, x)[1]) == nbytes(windowed.init_state(1))
    assert scan(full, x)[1].keys.shape[1] == 50


def test_forward_keeps_no_more_columns_than_the_window_needs():
    _, state = Attention(8, window=4)(torch.randn(2, 9, 8))
    assert state.keys.shape[1] == 3
    assert state.seen.tolist() == [9, 9]


@pytest.mark.parametrize(
    "sizes", [{"heads": 0}, {"heads": 9}, {"window": 0}, {"head_dim": 3, "rotary": True}, {"head_dim": 0}]
)
def test_impossible_sizes_are_refused(sizes):
    with pytest.raises(InputError):
        Attention(8, **sizes)
