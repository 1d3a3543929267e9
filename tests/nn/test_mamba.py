"""Mamba: the scan against a loop over numbers, the layer against its equations, safety, published sizes."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from commissure.core.errors import InputError
from commissure.core.mixer import scan
from commissure.nn import Mamba
from commissure.nn.mamba import selective_scan, selective_scan_reference


def arguments(batch, time, inner=3, d_state=2, dtype=torch.float64):
    generator = torch.Generator().manual_seed(time)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype)

    a = -draw(d_state, inner).exp()
    dt = F.softplus(draw(batch, time, inner))
    return (
        draw(batch, time, inner),
        dt,
        a,
        draw(batch, time, d_state),
        draw(batch, time, d_state),
        draw(batch, d_state, inner),
    )


@pytest.mark.parametrize("rows", [1, 4, 32])
@pytest.mark.parametrize("time", [1, 2, 9, 23])
def test_scan_equals_its_reference(time, rows):
    inputs = arguments(2, time)
    for fast, slow in zip(selective_scan(*inputs, rows=rows), selective_scan_reference(*inputs), strict=True):
        torch.testing.assert_close(fast, slow, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rows", [1, 8])
def test_gradients_of_the_scan(rows):
    inputs = [t.requires_grad_() for t in arguments(1, 7)]
    assert torch.autograd.gradcheck(lambda *args: selective_scan(*args, rows=rows), inputs)


def test_scan_is_exact_where_cumulative_decays_vanish():
    """exp(a sum dt) underflows to zero in float32; dividing by it, as prefix-product scans do, would give NaN."""
    u, dt, a, b, c, hidden = arguments(1, 64)
    dt, a = dt + 50, a - 5
    exact = selective_scan_reference(u, dt, a, b, c, hidden)
    for fast, slow in zip(selective_scan(*(t.float() for t in (u, dt, a, b, c, hidden))), exact, strict=True):
        assert bool(fast.isfinite().all())
        torch.testing.assert_close(fast.double(), slow, rtol=1e-5, atol=1e-4)


def test_layer_equals_its_equations():
    """Algorithm 2 for one row, with torch's own depthwise convolution and a loop over time."""
    torch.manual_seed(0)
    layer, x = Mamba(8, d_state=3).double(), torch.randn(1, 11, 8, dtype=torch.float64)
    signal, gate = (x[0] @ layer.in_proj.weight.T).chunk(2, 1)
    convolved = F.conv1d(
        F.pad(signal.T[None], (layer.d_conv - 1, 0)), layer.conv_weight[:, None], layer.conv_bias, groups=layer.inner
    )
    u = F.silu(convolved[0].T)
    delta, b, c = (u @ layer.x_proj.weight.T).split([layer.dt_rank, 3, 3], 1)
    dt = torch.log1p(torch.exp(delta @ layer.dt_proj.weight.T + layer.dt_proj.bias))
    a, h, rows = -layer.log_decay.exp().T, torch.zeros(layer.inner, 3, dtype=torch.float64), []
    for t in range(11):
        h = torch.exp(dt[t][:, None] * a) * h + dt[t][:, None] * u[t][:, None] * b[t]
        rows.append(h @ c[t] + layer.skip * u[t])
    expected = (torch.stack(rows) * gate * torch.sigmoid(gate)) @ layer.out_proj.weight.T
    for y, state in (layer(x), scan(layer, x)):
        torch.testing.assert_close(y[0], expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(state.hidden[0].T, h, rtol=0, atol=1e-12)
        assert torch.equal(state.inputs[0], signal[-3:])


def test_long_sequences_cross_many_chunks():
    torch.manual_seed(0)
    layer, x = Mamba(4).double(), torch.randn(1, 130, 4, dtype=torch.float64)
    torch.testing.assert_close(layer(x)[0], scan(layer, x)[0], rtol=0, atol=1e-10)


def test_initialization_follows_the_paper():
    torch.manual_seed(0)
    layer = Mamba(1000, d_state=16)
    expected = torch.arange(1.0, 17)[:, None].expand(-1, 2000)
    torch.testing.assert_close(layer.log_decay.exp(), expected)
    assert bool((layer.skip == 1).all())
    dt = F.softplus(layer.dt_proj.bias.detach())
    assert float(dt.min()) >= 1e-3 * (1 - 1e-3)
    assert float(dt.max()) <= 1e-1 * (1 + 1e-3)
    assert float(dt.log().mean()) == pytest.approx(math.log(1e-2), abs=0.1)
    assert float(layer.dt_proj.weight.detach().abs().max()) <= layer.dt_rank**-0.5


def test_parameter_count_of_the_published_size():
    assert sum(p.numel() for p in Mamba(256).parameters()) == 437_760


@pytest.mark.parametrize("size", ["expand", "d_state", "d_conv", "dt_rank"])
def test_impossible_sizes_are_refused(size):
    with pytest.raises(InputError, match=size):
        Mamba(4, **{size: 0})
