"""Gated recurrent unit, with the parameters and the numbers of `torch.nn.GRU`.

    r = sigmoid(W_ir x + b_ir + W_hr h + b_hr)          z = sigmoid(W_iz x + b_iz + W_hz h + b_hz)
    n = tanh(W_in x + b_in + r (W_hn h + b_hn))         h' = (1 - z) n + z h,   y = h'

Cho et al., arXiv 1406.1078, in the variant of cuDNN and torch (reset gate after the matrix product).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from commissure.core.errors import InputError
from commissure.nn.padding import check_sequence, check_step, last_elements, zero_padding

__all__ = ["GRU", "GRUState"]


class GRUState(NamedTuple):
    """The hidden vector."""

    hidden: Float[Tensor, "batch dim"]


class GRU(nn.Module):
    """One GRU layer as a sequence mixer: (batch, time, input_dim) to (batch, time, dim).

    `gru` holds the `torch.nn.GRU`; `forward` runs its fused path, `step` its cell.  `input_dim` defaults to `dim`.

    >>> layer = GRU(4)
    >>> y, state = layer(torch.zeros(2, 3, 4))
    >>> y.shape, bool((state.hidden == y[:, -1]).all())
    (torch.Size([2, 3, 4]), True)
    """

    def __init__(self, dim: int, *, input_dim: int | None = None) -> None:
        super().__init__()
        if dim < 1 or (input_dim is not None and input_dim < 1):
            raise InputError("dim, input_dim", (dim, input_dim), "integers >= 1")
        self.dim, self.input_dim = dim, dim if input_dim is None else input_dim
        self.gru = nn.GRU(self.input_dim, dim, batch_first=True)

    def init_state(
        self, batch_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> GRUState:
        """A zero hidden vector for each row."""
        weight = self.gru.all_weights[0][0]
        return GRUState(torch.zeros(batch_size, self.dim, device=device or weight.device, dtype=dtype or weight.dtype))

    def step(
        self, x_t: Float[Tensor, "batch input_dim"], state: GRUState
    ) -> tuple[Float[Tensor, "batch dim"], GRUState]:
        """One element in, one out."""
        check_step(x_t, self.input_dim, state)
        hidden = torch.gru_cell(x_t, state.hidden, *self.gru.all_weights[0])
        return hidden, GRUState(hidden)

    def forward(
        self,
        x: Float[Tensor, "batch time input_dim"],
        state: GRUState | None = None,
        *,
        lengths: Int[Tensor, " batch"] | None = None,
    ) -> tuple[Float[Tensor, "batch time dim"], GRUState]:
        """A whole stretch; the output is the hidden vector, so the state is the output at each row's length."""
        check_sequence(x, self.input_dim, state, lengths)
        state = self.init_state(x.shape[0], device=x.device, dtype=x.dtype) if state is None else state
        if x.shape[0] == 0 or x.shape[1] == 0:
            return x.new_zeros(x.shape[0], x.shape[1], self.dim), state
        y, last = self.gru(zero_padding(x, lengths), state.hidden[None].contiguous())
        if lengths is None:
            return y, GRUState(last[0])
        history = torch.cat([state.hidden[:, None], y], 1)
        return y, GRUState(last_elements(history, lengths + 1, 1)[:, 0])
