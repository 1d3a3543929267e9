"""The layer of gated linear attention against its equations; its operator has tests of its own."""

from __future__ import annotations

import pytest
import torch

from commissure.core.errors import InputError
from commissure.core.mixer import scan
from commissure.nn import GatedLinearAttention


def layer_and_input(**options):
    torch.manual_seed(0)
    layer = GatedLinearAttention(6, **({"heads": 2, "value_dim": 4, "chunk_size": 4} | options)).double()
    return layer, torch.randn(2, 11, 6, dtype=torch.float64)


@pytest.mark.parametrize("input_gate", [True, False])
def test_layer_follows_its_equations(input_gate):
    layer, x = layer_and_input(input_gate=input_gate)
    q, k, v, _ = layer.inputs(x)
    gamma = torch.sigmoid(x @ layer.a_proj.weight.T + layer.a_proj.bias)
    beta = torch.sigmoid(x @ layer.b_proj.weight.T + layer.b_proj.bias) if input_gate else torch.ones_like(gamma)
    memory, rows = torch.zeros(2, 2, 4, 3, dtype=torch.float64), []
    for t in range(11):
        write = torch.einsum("bhe,bhd->bhed", v[:, t], k[:, t])
        memory = gamma[:, t, :, None, None] * memory + beta[:, t, :, None, None] * write
        rows.append(torch.einsum("bhed,bhd->bhe", memory, q[:, t]))
    expected = layer.output(torch.stack(rows, 1))
    for y, state in (layer(x), scan(layer, x)):
        torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(state.memory.mT, memory, rtol=0, atol=1e-12)


def test_forget_only_has_no_input_gate():
    layer, _ = layer_and_input(input_gate=False)
    gated, _ = layer_and_input()
    names = dict(layer.named_parameters()).keys()
    assert dict(gated.named_parameters()).keys() - names == {"b_proj.weight", "b_proj.bias"}


def test_gates_start_open_and_half_open():
    layer, _ = layer_and_input()
    g, beta = layer.gates(torch.zeros(1, 1, 6, dtype=torch.float64), None)
    torch.testing.assert_close(g.exp(), torch.full_like(g, 0.9820137900379085))
    torch.testing.assert_close(beta, torch.full_like(beta, 0.5))


def test_impossible_sizes_are_refused():
    for sizes in ({"heads": 0}, {"head_dim": 0}, {"value_dim": 0}, {"conv_size": 0}, {"chunk_size": 0}):
        with pytest.raises(InputError, match=next(iter(sizes))):
            layer_and_input(**sizes)
