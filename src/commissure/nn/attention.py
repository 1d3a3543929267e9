"""Causal multi-head self-attention whose state is its cache of keys and values.

    o_t = W_o sum_{s in (t - window, t]} softmax_s(q_t . k_s / sqrt(head_dim)) v_s

The cache is right-aligned: the newest key is its last column, columns older than a row's `seen` are zeros and masked,
so rows of different lengths share one batch and `core.mixer.select` works.  Without a window the cache grows by one
column an element (exact attention needs them all); with `window=w` it has w - 1 columns for ever.
Vaswani et al., arXiv 1706.03762, section 3.2; sliding window: arXiv 2004.05150, section 3.1.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from commissure.core.errors import InputError
from commissure.nn.heads import head_sizes
from commissure.nn.padding import check_sequence, check_step, last_elements, zero_padding
from commissure.nn.rotary import rotary_angles, rotate

__all__ = ["Attention", "AttentionState"]


class AttentionState(NamedTuple):
    """Keys (rotated, where positions are rotary) and values, newest last, and how many elements each row has seen."""

    keys: Float[Tensor, "batch cached heads head_dim"]
    values: Float[Tensor, "batch cached heads head_dim"]
    seen: Int[Tensor, " batch"]


class Attention(nn.Module):
    """Causal self-attention as a sequence mixer; projections without bias.

    `heads` defaults to dim // 64 (at least 1), `head_dim` to dim // heads; `window=None` attends to everything seen;
    `rotary=True` turns queries and keys by their positions (head_dim must be even).

    >>> layer = Attention(8, heads=2)
    >>> y, state = layer(torch.zeros(1, 3, 8))
    >>> y.shape, state.keys.shape, state.seen.tolist()
    (torch.Size([1, 3, 8]), torch.Size([1, 3, 2, 4]), [3])
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int | None = None,
        head_dim: int | None = None,
        window: int | None = None,
        rotary: bool = False,
    ) -> None:
        super().__init__()
        heads, head_dim = head_sizes(dim, heads, head_dim)
        if rotary and head_dim % 2:
            raise InputError("head_dim", head_dim, "an even integer with rotary positions")
        if window is not None and window < 1:
            raise InputError("window", window, "an integer >= 1, or None to attend to everything seen")
        self.dim, self.heads, self.head_dim, self.window, self.rotary = dim, heads, head_dim, window, rotary
        self.qkv = nn.Linear(dim, 3 * heads * head_dim, bias=False)
        self.out = nn.Linear(heads * head_dim, dim, bias=False)

    def init_state(
        self, batch_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> AttentionState:
        """An empty cache: no column without a window, window - 1 masked ones with it."""
        device, dtype = device or self.out.weight.device, dtype or self.out.weight.dtype
        columns = 0 if self.window is None else self.window - 1
        empty = torch.zeros(batch_size, columns, self.heads, self.head_dim, device=device, dtype=dtype)
        return AttentionState(empty, empty, torch.zeros(batch_size, device=device, dtype=torch.int64))

    def step(
        self, x_t: Float[Tensor, "batch dim"], state: AttentionState
    ) -> tuple[Float[Tensor, "batch dim"], AttentionState]:
        """One element in, one out: attention of one query to the cache."""
        check_step(x_t, self.dim, state)
        y, state = self.forward(x_t[:, None], state)
        return y[:, 0], state

    def forward(
        self,
        x: Float[Tensor, "batch time dim"],
        state: AttentionState | None = None,
        *,
        lengths: Int[Tensor, " batch"] | None = None,
    ) -> tuple[Float[Tensor, "batch time dim"], AttentionState]:
        """A whole stretch by torch's scaled dot product attention."""
        check_sequence(x, self.dim, state, lengths)
        state = self.init_state(x.shape[0], device=x.device, dtype=x.dtype) if state is None else state
        batch, time = x.shape[:2]
        queries, new_keys, new_values = (
            self.qkv(zero_padding(x, lengths)).view(batch, time, 3, self.heads, self.head_dim).unbind(2)
        )
        if self.rotary:
            positions = state.seen[:, None] + torch.arange(time, device=x.device)
            angles = rotary_angles(positions, self.head_dim // 2)[:, :, None]
            queries, new_keys = rotate(queries, angles), rotate(new_keys, angles)
        keys, values = torch.cat([state.keys, new_keys], 1), torch.cat([state.values, new_values], 1)
        mixed = self.attend(queries, keys, values, state.seen)
        return self.out(mixed.flatten(2)), self.remember(keys, values, state, time, lengths)

    def attend(
        self,
        queries: Float[Tensor, "batch time heads head_dim"],
        keys: Float[Tensor, "batch columns heads head_dim"],
        values: Float[Tensor, "batch columns heads head_dim"],
        seen: Int[Tensor, " batch"],
    ) -> Float[Tensor, "batch time heads head_dim"]:
        """Attention of the last `time` columns to all columns they may see."""
        time, columns = queries.shape[1], keys.shape[1]
        if queries.numel() == 0:
            return queries
        is_plain = time == columns and self.window is None
        mask = None if is_plain else self.visible(seen, time, columns)[:, None]
        mixed = F.scaled_dot_product_attention(
            queries.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2), attn_mask=mask, is_causal=is_plain
        )
        return mixed.transpose(1, 2)

    def visible(self, seen: Int[Tensor, " batch"], time: int, columns: int) -> Bool[Tensor, "batch time columns"]:
        """Which columns each query may see: the causal mask is aligned at the bottom right, behind the cache."""
        cached = columns - time
        column = torch.arange(columns, device=seen.device)
        query = cached + torch.arange(time, device=seen.device)[:, None]
        mask = column <= query
        if self.window is not None:
            mask = mask & (column > query - self.window)
        return mask & (column >= (cached - seen)[:, None, None])

    def remember(
        self,
        keys: Float[Tensor, "batch columns heads head_dim"],
        values: Float[Tensor, "batch columns heads head_dim"],
        state: AttentionState,
        time: int,
        lengths: Int[Tensor, " batch"] | None,
    ) -> AttentionState:
        """The cache after each row's last element."""
        columns = keys.shape[1]
        kept = columns if self.window is None else self.window - 1
        if lengths is None:
            return AttentionState(keys[:, columns - kept :], values[:, columns - kept :], state.seen + time)
        end = columns - time + lengths
        return AttentionState(last_elements(keys, end, kept), last_elements(values, end, kept), state.seen + lengths)
