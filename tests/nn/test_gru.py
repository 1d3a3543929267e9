"""GRU against torch.nn.GRU and against its equations."""

from __future__ import annotations

import pytest
import torch

from commissure.core.errors import InputError
from commissure.core.mixer import scan
from commissure.nn import GRU


def make(dim=5, input_dim=3):
    torch.manual_seed(0)
    return GRU(dim, input_dim=input_dim).double()


def test_forward_and_step_equal_torch():
    layer, x, h = make(), torch.randn(4, 9, 3, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64)
    state = layer.init_state(4)._replace(hidden=h)
    expected, last = layer.gru(x, h[None])
    for y, final in (layer(x, state), scan(layer, x, state)):
        torch.testing.assert_close(y, expected, rtol=0, atol=1e-14)
        torch.testing.assert_close(final.hidden, last[0], rtol=0, atol=1e-14)


def test_step_equals_its_equations():
    layer, x, h = make(), torch.randn(2, 3, dtype=torch.float64), torch.randn(2, 5, dtype=torch.float64)
    weights = layer.gru.state_dict()
    from_x = (x @ weights["weight_ih_l0"].T + weights["bias_ih_l0"]).chunk(3, 1)
    from_h = (h @ weights["weight_hh_l0"].T + weights["bias_hh_l0"]).chunk(3, 1)
    reset, update = torch.sigmoid(from_x[0] + from_h[0]), torch.sigmoid(from_x[1] + from_h[1])
    new = torch.tanh(from_x[2] + reset * from_h[2])
    y, _ = layer.step(x, layer.init_state(2)._replace(hidden=h))
    torch.testing.assert_close(y, (1 - update) * new + update * h, rtol=0, atol=1e-14)


def test_weights_are_interchangeable_with_torch():
    layer, twin = make(), torch.nn.GRU(3, 5, batch_first=True).double()
    twin.load_state_dict(layer.gru.state_dict())
    x = torch.randn(1, 4, 3, dtype=torch.float64)
    assert torch.equal(layer(x)[0], twin(x)[0])


def test_parameter_count_of_the_published_size():
    assert sum(p.numel() for p in GRU(256, input_dim=64).parameters()) == 3 * 256 * (64 + 256) + 6 * 256


def test_sizes_below_one_are_refused():
    with pytest.raises(InputError, match="integers >= 1"):
        GRU(0)
    with pytest.raises(InputError, match="integers >= 1"):
        GRU(4, input_dim=0)
