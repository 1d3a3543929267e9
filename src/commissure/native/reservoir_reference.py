"""The scan of a reservoir written down as its definition: a dense matrix, one step after another, on any device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["ACTIVATIONS", "Activation", "ReservoirMatrix", "ReservoirScan", "reservoir_scan_reference"]

Activation = Literal["tanh", "linear", "relu", "leaky_relu", "elu", "sigmoid", "step"]

# f(p), and f'(p) from p and f(p).  The slopes of leaky_relu and elu for p < 0 and the threshold of step, all 1/2, are
# those of the public code of the method's authors (conn2res).
ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "tanh": (torch.tanh, lambda p, f: 1 - f * f),
    "linear": (lambda p: p, lambda p, f: torch.ones_like(p)),
    "relu": (torch.relu, lambda p, f: (p > 0).to(p.dtype)),
    "leaky_relu": (lambda p: torch.where(p > 0, p, 0.5 * p), lambda p, f: torch.where(p > 0, 1.0, 0.5).to(p.dtype)),
    "elu": (
        lambda p: torch.where(p > 0, p, 0.5 * torch.expm1(p.clamp(max=0))),
        lambda p, f: torch.where(p > 0, torch.ones_like(p), f + 0.5),
    ),
    "sigmoid": (torch.sigmoid, lambda p, f: f * (1 - f)),
    "step": (lambda p: (p >= 0.5).to(p.dtype), lambda p, f: torch.zeros_like(p)),
}


class ReservoirMatrix(NamedTuple):
    """Weights by target: node j is driven by sources[starts[j]:starts[j + 1]] with the weights beside them.

    Rows are filled up to a multiple of four entries with weight zero at the row's last source.
    """

    starts: Int[Tensor, " nodes_and_one"]
    sources: Tensor  # uint16 where there are at most 65,536 nodes, else int32
    values: Float[Tensor, " entries"]


class ReservoirScan(NamedTuple):
    """The states after every step, and the tangents after the last."""

    states: Float[Tensor, "batch time nodes"]
    tangents: Float[Tensor, "batch tangents nodes"] | None


def reservoir_scan_reference(
    matrix: ReservoirMatrix,
    x: Float[Tensor, "batch time inputs"],
    state: Float[Tensor, "batch nodes"],
    input_weights: Float[Tensor, "inputs nodes"] | Float[Tensor, "batch inputs nodes"],
    *,
    scale: Float[Tensor, " batch"] | None = None,
    leak: Float[Tensor, " nodes"] | None = None,
    bias: Float[Tensor, " nodes"] | None = None,
    activation: Activation = "tanh",
    noise: Float[Tensor, "batch time nodes"] | None = None,
    state_bits: int | None = None,
    tangents: Float[Tensor, "batch tangents nodes"] | None = None,
) -> ReservoirScan:
    """`reservoir_scan` in plain torch, differentiable in every tensor.

    >>> matrix = ReservoirMatrix(torch.tensor([0, 0]), torch.tensor([]).int(), torch.tensor([]))
    >>> reservoir_scan_reference(matrix, torch.ones(1, 1, 1), torch.zeros(1, 1), torch.ones(1, 1)).states.item()
    0.7615941762924194
    """
    nodes = state.shape[1]
    target = torch.repeat_interleave(torch.arange(nodes, device=state.device), matrix.starts.diff().long())
    index = (matrix.sources.long(), target)
    weights = matrix.values.new_zeros(nodes, nodes).index_put(index, matrix.values, accumulate=True)
    gain = state.new_ones(len(state)) if scale is None else scale
    rate = state.new_ones(nodes) if leak is None else leak
    drive = x @ input_weights + (0 if bias is None else bias)
    function, slope = ACTIVATIONS[activation]
    states = []
    for t in range(x.shape[1]):
        before = gain[:, None] * (state @ weights) + drive[:, t]
        value = function(before)
        state = (1 - rate) * state + rate * value
        if tangents is not None:
            turned = slope(before, value)[:, None] * (gain[:, None, None] * (tangents @ weights))
            tangents = (1 - rate) * tangents + rate * turned
        state = state if noise is None else state + noise[:, t]
        state = state if state_bits is None else quantized(state, state_bits)
        states.append(state)
    return ReservoirScan(torch.stack(states, 1) if states else torch.zeros_like(drive), tangents)


def quantized(state: Tensor, bits: int) -> Tensor:
    """The nearest of 2^bits equally spaced levels from -1 to 1."""
    half, steps = 2 ** (bits - 1), 2**bits - 1
    return (torch.floor(state * (steps / 2)).clamp(-half, half - 1) + 0.5) * (2 / steps)
