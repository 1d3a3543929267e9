"""Second derivatives of operators whose backward is written by hand are refused; their references have them."""

from __future__ import annotations

import pytest
import torch

from commissure.core.errors import InputError
from commissure.mesa.rivals import best_cg
from commissure.nn.delta import delta_rule, delta_rule_reference
from commissure.nn.linear_attention import gated_linear_attention, gated_linear_attention_reference
from commissure.nn.mesa import mesa_attention
from commissure.nn.mesa_reference import mesa_attention_reference
from commissure.nn.rg_lru import linear_recurrence, linear_recurrence_reference

TIME = 20


def operands(generator: torch.Generator) -> list[torch.Tensor]:
    """q, k, v, g, beta, lamb."""
    vectors = [torch.randn(1, TIME, 2, 3, generator=generator, dtype=torch.float64) for _ in range(3)]
    gates = [torch.rand(1, TIME, 2, generator=generator, dtype=torch.float64) for _ in range(2)]
    q, k, v = (torch.nn.functional.normalize(x, dim=-1) for x in vectors)
    return [q, k, v, -gates[0], gates[1], torch.ones(2, 3, dtype=torch.float64)]


def attention(operator):
    return lambda q, k, v, g, beta, lamb: operator(q, k, v, g, beta)[0]


def mesa(operator):
    return lambda *inputs: operator(*inputs).output


def recurrence(operator):
    return lambda q, k, v, g, beta, lamb: operator(q.flatten(2).sigmoid(), k.flatten(2))[0]


@pytest.mark.parametrize(
    ("fast", "reference"),
    [
        pytest.param(mesa(mesa_attention), mesa(mesa_attention_reference), id="mesa_attention"),
        pytest.param(
            attention(gated_linear_attention), attention(gated_linear_attention_reference), id="gated_linear_attention"
        ),
        pytest.param(attention(delta_rule), attention(delta_rule_reference), id="delta_rule"),
        pytest.param(recurrence(linear_recurrence), recurrence(linear_recurrence_reference), id="linear_recurrence"),
        pytest.param(best_cg, mesa(mesa_attention_reference), id="best_cg"),
    ],
)
def test_a_graph_of_the_gradient_is_refused(fast, reference):
    """As a penalty of the gradient of q would need it: the cotangent depends on nothing, so autograd sees no error."""
    inputs = [x.requires_grad_() for x in operands(torch.Generator().manual_seed(0))]
    first, other = inputs[:2]
    (gradient,) = torch.autograd.grad(fast(*inputs).sum(), first)
    (expected,) = torch.autograd.grad(reference(*inputs).sum(), first, create_graph=True)
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-9)
    (second,) = torch.autograd.grad(expected.square().sum(), other)
    assert second.abs().max() > 1e-3  # what would be missing
    with pytest.raises(InputError, match=r"create_graph = True: expected False.*; take second derivatives of \w+"):
        torch.autograd.grad(fast(*inputs).sum(), first, create_graph=True)
