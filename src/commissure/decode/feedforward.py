"""GEGLU feed-forward block: Linear D -> 8D, split into (u, g), u * gelu(g) with the exact erf, Linear 4D -> D.

Source: arXiv 2002.05202 for the gate, arXiv 2506.05320 for the sizes; pre-normalized, the caller adds the residual.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["FeedForward"]


class FeedForward(nn.Module):
    """`W2 dropout(u * gelu(g)) + b2` with (u, g) = W1 LayerNorm(x) + b1; x (..., dim)."""

    def __init__(self, dim: int, *, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.wide = nn.Linear(dim, 8 * dim)
        self.narrow = nn.Linear(4 * dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Float[Tensor, "*shape dim"]) -> Float[Tensor, "*shape dim"]:
        """The block's increment to x."""
        value, gate = self.wide(self.norm(x)).chunk(2, -1)
        return self.narrow(self.dropout(value * functional.gelu(gate)))
