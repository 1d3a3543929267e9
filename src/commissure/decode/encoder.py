"""Spike encoder: a ragged set of spikes per chunk becomes one latent vector per chunk.

Softmax encoder (published layout; one latent, one head, rotated values):

    e_i = unit embedding + token type,  k_i = Wk LN(e_i),  v_i = Wv LN(e_i),  q = Wq LN(z0)
    score_n = q . R(d_n) k_{i_n} / sqrt(64),   o = sum_n softmax_n(score) R(d_n) v_{i_n},   z = z0 + Wo o + b

Additive encoder: z = z0 + sum_n R(d_n) e_{i_n} / c, with c the session's root-mean-square token count: it has no
normalizer, so the number of spikes is carried, and the embedding is the value itself.

Both end with z += FFN(z).  Times are differences d_n = t_n - chunk center, in seconds.  Keys and values are computed
once per unit, not once per spike, and the softmax runs over ragged segments: no padding.  `encode_padded_reference`
is the padded layout of the public code.

| symbol | name |
|---|---|
| i_n, d_n | `unit`, `offset` |
| chunk of spike n (flat over rows and chunks) | `slot` |
| z0 | `latent` |

Source: arXiv 2506.05320, section 3 and appendix.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from commissure.decode.feedforward import FeedForward
from commissure.decode.rotary import RotaryTime
from commissure.nn.rotary import turn_pairs

__all__ = ["EncoderKind", "NullToken", "SpikeEncoder", "SpikeTokens", "UnitTables", "encode_padded_reference"]

EncoderKind = Literal["softmax", "additive"]
NullToken = Literal["empty", "always"]

HEAD_DIM = 64
N_PERIODS = 16  # half of the head's 32 pairs turn, as published


class SpikeTokens(NamedTuple):
    """Spikes of a batch, ragged: row of the unit table, seconds from the chunk's center, flat chunk number."""

    unit: Int[Tensor, " spikes"]
    offset: Float[Tensor, " spikes"]
    slot: Int[Tensor, " spikes"]
    n_slots: int


class UnitTables(NamedTuple):
    """Per unit: the value to turn and add, and (softmax) the two parts of its score."""

    value: Float[Tensor, "units head"]
    still: Float[Tensor, " units"] | None
    waves: Float[Tensor, "units 32"] | None


class SpikeEncoder(nn.Module):
    """Maps `SpikeTokens` to latents (n_slots, dim); unit embeddings are passed in, the model owns them."""

    def __init__(
        self,
        dim: int,
        *,
        chunk_s: float,
        kind: EncoderKind,
        null_token: NullToken,
        t_min: float,
        t_max: float,
        dropout: float,
    ) -> None:
        super().__init__()
        self.kind, self.null_token, self.chunk_s = kind, null_token, chunk_s
        self.latent = nn.Parameter(0.02 * torch.randn(dim))
        self.ffn = FeedForward(dim, dropout=dropout)
        self.turn = RotaryTime(N_PERIODS, t_min=t_min, t_max=t_max)
        if kind == "softmax":
            self.token_type = nn.Parameter(0.02 * torch.randn(dim))
            self.null_embedding = nn.Parameter(0.02 * torch.randn(dim))
            self.query_norm = nn.LayerNorm(dim)
            self.context_norm = nn.LayerNorm(dim)
            self.query = nn.Linear(dim, HEAD_DIM, bias=False)
            self.key_value = nn.Linear(dim, 2 * HEAD_DIM, bias=False)
            self.out = nn.Linear(HEAD_DIM, dim)

    def forward(self, tokens: SpikeTokens, embedding: Float[Tensor, "units dim"]) -> Float[Tensor, "slots dim"]:
        """Latents of all chunks; `embedding` holds the unit rows (already divided by c for the additive encoder)."""
        if self.kind == "additive":
            return self.encode(tokens, self.tables(embedding))
        rows, unit = torch.unique(tokens.unit, return_inverse=True)
        return self.encode(tokens._replace(unit=unit), self.tables(embedding[rows]))

    def tables(self, embedding: Float[Tensor, "units dim"]) -> UnitTables:
        """What a spike contributes besides its time, per unit; the softmax encoder's null token is the last row."""
        if self.kind == "additive":
            return UnitTables(embedding, None, None)
        key, value = self.key_value_table(torch.cat((embedding, self.null_embedding.unsqueeze(0))))
        return UnitTables(value, *_score_tables(self.latent_query(), key))

    def encode(self, tokens: SpikeTokens, tables: UnitTables) -> Float[Tensor, "slots dim"]:
        """Latents of all chunks from tables: a stream computes them once."""
        if tables.waves is not None:
            tokens = self.with_null(tokens, len(tables.value) - 1)
        cos, sin = self.turn(tokens.offset, tables.value.dtype)
        turned = turn_pairs(tables.value.index_select(0, tokens.unit), cos, sin)
        if tables.waves is not None and tables.still is not None:
            waves = tables.waves.index_select(0, tokens.unit)
            score = tables.still.index_select(0, tokens.unit) + (waves * torch.cat((cos, sin), -1)).sum(-1)
            turned = segment_softmax(score, tokens.slot, tokens.n_slots).unsqueeze(-1) * turned
        pooled = turned.new_zeros(tokens.n_slots, turned.shape[1]).index_add(0, tokens.slot, turned)
        z = self.latent + (pooled if tables.waves is None else self.out(pooled))
        return z + self.ffn(z)

    def key_value_table(self, embedding: Float[Tensor, "*shape dim"]) -> tuple[Tensor, Tensor]:
        """Unturned keys and values (..., 64) of unit embeddings (softmax encoder)."""
        key, value = self.key_value(self.context_norm(embedding + self.token_type)).chunk(2, -1)
        return key, value

    def latent_query(self) -> Float[Tensor, " head"]:
        """The latent's query, unturned."""
        return self.query(self.query_norm(self.latent))

    def with_null(self, tokens: SpikeTokens, null_row: int) -> SpikeTokens:
        """Add the null token: in every chunk at its center, or (published) in empty chunks at their start."""
        if self.null_token == "always":
            slot = torch.arange(tokens.n_slots, device=tokens.slot.device)
            time = 0.0
        else:
            slot = (torch.bincount(tokens.slot, minlength=tokens.n_slots) == 0).nonzero().squeeze(1)
            time = -0.5 * self.chunk_s
        return SpikeTokens(
            torch.cat((tokens.unit, torch.full_like(slot, null_row))),
            torch.cat((tokens.offset, torch.full_like(slot, time, dtype=tokens.offset.dtype))),
            torch.cat((tokens.slot, slot)),
            tokens.n_slots,
        )


def _score_tables(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """q . R(d) k / sqrt(64) = still + waves . (cos, sin): per unit one unturned part and two numbers per period."""
    n = 2 * N_PERIODS
    q_even, q_odd = query[0:n:2], query[1:n:2]
    k_even, k_odd = key[:, 0:n:2], key[:, 1:n:2]
    waves = torch.cat((k_even * q_even + k_odd * q_odd, k_even * q_odd - k_odd * q_even), -1)
    scale = 1 / math.sqrt(HEAD_DIM)
    return scale * (key[:, n:] @ query[n:]), scale * waves


def segment_softmax(score: Float[Tensor, " n"], slot: Int[Tensor, " n"], n_slots: int) -> Float[Tensor, " n"]:
    """Softmax within each segment of a ragged list.

    >>> segment_softmax(torch.zeros(3), torch.tensor([0, 0, 1]), 2)
    tensor([0.5000, 0.5000, 1.0000])
    """
    top = score.detach().new_full((n_slots,), -math.inf).scatter_reduce(0, slot, score.detach(), "amax")
    weight = (score - top.index_select(0, slot)).exp()
    total = weight.new_zeros(n_slots).index_add(0, slot, weight)
    return weight / total.index_select(0, slot)


def encode_padded_reference(
    encoder: SpikeEncoder, tokens: SpikeTokens, embedding: Float[Tensor, "units dim"]
) -> Float[Tensor, "slots dim"]:
    """The softmax encoder in the public code's padded layout: each spike its own key and value, masked softmax."""
    tokens = encoder.with_null(tokens, embedding.shape[0])
    embedding = torch.cat((embedding, encoder.null_embedding.unsqueeze(0)))
    order = torch.argsort(tokens.slot, stable=True)
    counts = torch.bincount(tokens.slot, minlength=tokens.n_slots)
    position = torch.arange(len(order), device=order.device) - (counts.cumsum(0) - counts)[tokens.slot[order]]
    width = int(counts.max())
    unit = tokens.unit.new_full((tokens.n_slots, width), embedding.shape[0] - 1)
    offset = tokens.offset.new_zeros(tokens.n_slots, width)
    unit[tokens.slot[order], position] = tokens.unit[order]
    offset[tokens.slot[order], position] = tokens.offset[order]
    mask = torch.arange(width, device=order.device) < counts.unsqueeze(1)

    key, value = encoder.key_value_table(embedding[unit])
    cos, sin = encoder.turn(offset, embedding.dtype)
    score = turn_pairs(key, cos, sin) @ encoder.latent_query() / math.sqrt(HEAD_DIM)
    weight = torch.softmax(score.masked_fill(~mask, -math.inf), -1)
    pooled = (weight.unsqueeze(-1) * turn_pairs(value, cos, sin)).sum(1)
    z = encoder.latent + encoder.out(pooled)
    return z + encoder.ffn(z)
