"""Gated linear attention as a layer: a memory of outer products that fades.

    S_t = gamma_t S_{t-1} + beta_t k_t v_t^T,    o_t = S_t^T q_t
    gamma_t = sigmoid(a_proj x_t),    beta_t = sigmoid(b_proj x_t), or 1 with `input_gate=False`

| arXiv 2506.05233 | here |
|---|---|
| GLA (forget and input gate) | `GatedLinearAttention(dim)` |
| Mamba2 (forget gate only) | `GatedLinearAttention(dim, input_gate=False)` |

When to use: the cheapest of the linear mixers; keys that resemble each other blur into a sum, which DeltaNet and Mesa
avoid.  The operator is `commissure.nn.linear_attention`.
Yang et al., arXiv 2312.06635 (gates), Dao & Gu, arXiv 2405.21060 (one scalar a head); projections, convolution and
norms as in arXiv 2506.05233, appendix E.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from commissure.core.errors import InputError
from commissure.nn.heads import FORGET_BIAS, ConvState, HeadInputs, HeadOutput, gate_projection, head_sizes
from commissure.nn.linear_attention import compute_dtype, gated_linear_attention, gated_linear_attention_reference
from commissure.nn.padding import check_sequence, check_step, zero_padding

__all__ = ["GatedLinearAttention", "GatedLinearState"]


class GatedLinearState(NamedTuple):
    """The convolution's last inputs and the memory, keys by values, never in half precision."""

    conv: ConvState
    memory: Float[Tensor, "batch heads head_dim value_dim"]


class GatedLinearAttention(nn.Module):
    """One layer of gated linear attention as a sequence mixer.

    `heads` defaults to dim // 64 (at least 1), `head_dim` to dim // heads, `value_dim` to `head_dim`; `chunk_size` is
    the length of the parallel form's pieces and changes no result.

    >>> layer = GatedLinearAttention(8, heads=2, value_dim=3)
    >>> y, state = layer(torch.zeros(1, 5, 8))
    >>> y.shape, state.memory.shape
    (torch.Size([1, 5, 8]), torch.Size([1, 2, 4, 3]))
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int | None = None,
        head_dim: int | None = None,
        value_dim: int | None = None,
        conv_size: int = 4,
        input_gate: bool = True,
        chunk_size: int = 64,
    ) -> None:
        super().__init__()
        heads, head_dim = head_sizes(dim, heads, head_dim)
        if chunk_size < 1:
            raise InputError("chunk_size", chunk_size, "an integer >= 1")
        self.dim, self.input_gate, self.chunk_size = dim, input_gate, chunk_size
        self.inputs = HeadInputs(dim, heads=heads, head_dim=head_dim, value_dim=value_dim, conv_size=conv_size)
        self.a_proj = gate_projection(dim, heads, bias=FORGET_BIAS)
        if input_gate:
            self.b_proj = gate_projection(dim, heads)
        self.output = HeadOutput(dim, heads=heads, value_dim=self.inputs.value_dim)

    def init_state(
        self, batch_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> GatedLinearState:
        """Nothing seen: zeros."""
        conv = self.inputs.init_state(batch_size, device=device, dtype=dtype)
        shape = (batch_size, self.inputs.heads, self.inputs.head_dim, self.inputs.value_dim)
        return GatedLinearState(conv, conv.keys.new_zeros(shape, dtype=compute_dtype(conv.keys)))

    def step(
        self, x_t: Float[Tensor, "batch dim"], state: GatedLinearState
    ) -> tuple[Float[Tensor, "batch dim"], GatedLinearState]:
        """One element in, one out: the recurrence."""
        check_step(x_t, self.dim, state)
        x = x_t[:, None]
        *inputs, conv = self.inputs(x, state.conv)
        q, k, v = (t.to(state.memory.dtype) for t in inputs)
        o, memory = gated_linear_attention_reference(q, k, v, *self.gates(x, None), state.memory)
        return self.output(o.to(x.dtype))[:, 0], GatedLinearState(conv, memory)

    def forward(
        self,
        x: Float[Tensor, "batch time dim"],
        state: GatedLinearState | None = None,
        *,
        lengths: Int[Tensor, " batch"] | None = None,
    ) -> tuple[Float[Tensor, "batch time dim"], GatedLinearState]:
        """A whole stretch by chunks."""
        check_sequence(x, self.dim, state, lengths)
        state = self.init_state(x.shape[0], device=x.device, dtype=x.dtype) if state is None else state
        x = zero_padding(x, lengths)
        q, k, v, conv = self.inputs(x, state.conv, lengths=lengths)
        g, beta = self.gates(x, lengths)
        o, memory = gated_linear_attention(q, k, v, g, beta, state.memory, chunk_size=self.chunk_size)
        return self.output(o), GatedLinearState(conv, memory)

    def gates(
        self, x: Float[Tensor, "batch time dim"], lengths: Int[Tensor, " batch"] | None
    ) -> tuple[Float[Tensor, "batch time heads"], Float[Tensor, "batch time heads"] | None]:
        """log gamma and beta (None without an input gate).

        Padding keeps the memory: gamma = 1 there, and its values are zero.
        """
        beta = self.b_proj(x).sigmoid() if self.input_gate else None
        return zero_padding(F.logsigmoid(self.a_proj(x)), lengths), beta
