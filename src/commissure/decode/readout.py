"""Readout: outputs at any time from the k latest hidden states, by cross-attention.

    q = session embedding,  K_j = Wk LN(h_{b-j}),  V_j = Wv LN(h_{b-j}),  d_j = end of chunk b-j minus tau
    y = q + Wo sum_j softmax_j(Wq LN(q) . R(d_j) K_j / sqrt(64)) R(d_j) V_j + b;   y += FFN(y);   output = W y + b

A hidden state is stamped with the end of its chunk; the output for time tau in chunk b may use spikes up to the end of
chunk b.  In a stream's first chunks there are 1, 2, ... states, not zeros.

Source: arXiv 2506.05320, section 3.  `norm=False, ffn=False` leave out the LayerNorm on hidden states (it removes their
amplitude) and the feed-forward block.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from commissure.decode.encoder import HEAD_DIM, N_PERIODS
from commissure.decode.feedforward import FeedForward
from commissure.decode.rotary import RotaryTime
from commissure.nn.rotary import turn_pairs

__all__ = ["Readout"]


class Readout(nn.Module):
    """Cross-attention from session queries to a ring of hidden states."""

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        *,
        n_outputs: int,
        chunk_s: float,
        context: int,
        norm: bool,
        ffn: bool,
        t_min: float,
        t_max: float,
        dropout: float,
    ) -> None:
        super().__init__()
        self.chunk_s, self.context = chunk_s, context
        self.query_norm = nn.LayerNorm(dim)
        self.context_norm = nn.LayerNorm(hidden_dim) if norm else None
        self.query = nn.Linear(dim, HEAD_DIM, bias=False)
        self.key_value = nn.Linear(hidden_dim, 2 * HEAD_DIM, bias=False)
        self.out = nn.Linear(HEAD_DIM, dim)
        self.ffn = FeedForward(dim, dropout=dropout) if ffn else None
        self.output = nn.Linear(dim, n_outputs)
        self.turn = RotaryTime(N_PERIODS, t_min=t_min, t_max=t_max)

    def forward(
        self,
        hidden: Float[Tensor, "batch chunks hidden"],
        session: Float[Tensor, "batch dim"],
        *,
        row: Int[Tensor, " queries"],
        chunk: Int[Tensor, " queries"],
        offset: Float[Tensor, " queries"],
        n_before: Int[Tensor, " batch"],
    ) -> Float[Tensor, "queries outputs"]:
        """Outputs at queries (`row`, `chunk`, `offset` = tau - end of the chunk, seconds, float64).

        `hidden` starts with context - 1 states from before the first chunk, of which the last `n_before` are real.
        """
        k = self.context
        normed = hidden if self.context_norm is None else self.context_norm(hidden)
        key, value = self.key_value(normed).chunk(2, -1)
        age = torch.arange(k, device=hidden.device)
        place = chunk.unsqueeze(1) + (k - 1) - age
        exists: Bool[Tensor, "queries k"] = age <= chunk.unsqueeze(1) + n_before[row].unsqueeze(1)
        cos, sin = self.turn(-self.chunk_s * age.double() - offset.double().unsqueeze(1), hidden.dtype)
        key = turn_pairs(key[row.unsqueeze(1), place], cos, sin)
        value = turn_pairs(value[row.unsqueeze(1), place], cos, sin)
        query = self.query(self.query_norm(session))[row]
        score = (key @ query.unsqueeze(-1)).squeeze(-1) / math.sqrt(HEAD_DIM)
        weight = torch.softmax(score.masked_fill(~exists, -math.inf), -1)
        y = session[row] + self.out((weight.unsqueeze(1) @ value).squeeze(1))
        if self.ffn is not None:
            y = y + self.ffn(y)
        return self.output(y)
