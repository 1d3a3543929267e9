"""Rotary positions: each pair of coordinates turned by an angle proportional to its position.

    (a, b) -> (a cos w p - b sin w p, a sin w p + b cos w p),   w_f = base^(-f / F),  f = 0 .. F - 1

so that a product of a query and a key depends on the difference of their positions alone.  Pairs are interleaved
(2f, 2f + 1); coordinates past 2F stay as they are.  Su et al., arXiv 2104.09864, section 3.4.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["rotary_angles", "rotate", "turn_pairs"]


def rotary_angles(
    positions: Int[Tensor, "*shape"], n_frequencies: int, *, base: float = 10_000.0
) -> Float[Tensor, "*shape frequencies"]:
    """Angles in radians, float64: at position 10^6 float32 angles would be wrong by 0.06."""
    exponents = torch.arange(n_frequencies, device=positions.device, dtype=torch.float64) / n_frequencies
    return positions[..., None].double() * base**-exponents


def rotate(x: Float[Tensor, "*shape dim"], angles: Float[Tensor, "*#shape frequencies"]) -> Float[Tensor, "*shape dim"]:
    """`x` with its first 2 * frequencies coordinates turned by `angles`; the result has the dtype of `x`.

    >>> rotate(torch.tensor([1.0, 0.0, 5.0]), torch.tensor([torch.pi / 2])).round().tolist()
    [-0.0, 1.0, 5.0]
    """
    return turn_pairs(x, angles.cos().to(x.dtype), angles.sin().to(x.dtype))


def turn_pairs(
    x: Float[Tensor, "*shape dim"], cos: Float[Tensor, "*#shape frequencies"], sin: Float[Tensor, "*#shape frequencies"]
) -> Float[Tensor, "*shape dim"]:
    """`rotate` from the angles' cosines and sines, for those who need them elsewhere too."""
    turned = 2 * cos.shape[-1]
    a, b = x[..., 0:turned:2], x[..., 1:turned:2]
    pairs = torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)
    return pairs if turned == x.shape[-1] else torch.cat([pairs, x[..., turned:]], -1)
