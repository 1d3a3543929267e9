"""Noise that depends on where it falls, not on how the sequence was cut: normal numbers by hashing a place.

    n(seed, stream, position, node) = sqrt(-2 ln a) cos(2 pi b),   (a, b) the halves of one 64-bit hash of the place

The hash mixes one coordinate after another with the finalizer of SplitMix64, so that a place needs no generator state:
rows may be selected, sequences cut and padded, and every row keeps its own noise.
Reference: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014; Box and Muller (1958).
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from commissure.core.rng import spawn

__all__ = ["place_noise"]


def _signed(word: int) -> int:
    """A 64-bit word as torch's signed integer."""
    return word - 2**64 if word >= 2**63 else word


_STEP = _signed(0x9E3779B97F4A7C15)  # the golden ratio's, SplitMix64's increment
_MIX = ((30, _signed(0xBF58476D1CE4E5B9)), (27, _signed(0x94D049BB133111EB)))


def place_noise(
    seed: int, stream: Int[Tensor, " batch"], position: Int[Tensor, " batch"], *, time: int, nodes: int
) -> Float[Tensor, "batch time nodes"]:
    """Standard normal numbers (float64) of every row's next `time` positions.

    >>> stream = torch.zeros(1, dtype=torch.int64)
    >>> whole = place_noise(0, stream, stream, time=3, nodes=2)
    >>> bool((whole[:, 1:] == place_noise(0, stream, stream + 1, time=2, nodes=2)).all())
    True
    """
    device = stream.device
    row = _mixed(_mixed(torch.full_like(stream, spawn(seed, "state noise"))) + stream)
    place = _mixed(row[:, None] + position[:, None] + torch.arange(time, device=device))
    word = _mixed(place[:, :, None] + torch.arange(nodes, device=device))
    high, low = (word >> 32) & 0xFFFFFFFF, word & 0xFFFFFFFF
    radius = (-2 * ((high.double() + 0.5) / 2**32).log()).sqrt()
    return radius * (low.double() * (2 * math.pi / 2**32)).cos()


def _mixed(word: Tensor) -> Tensor:
    """SplitMix64's output function at each word; integers wrap around."""
    word = word * _STEP + _STEP
    for shift, factor in _MIX:
        word = (word ^ _shifted(word, shift)) * factor
    return word ^ _shifted(word, 31)


def _shifted(word: Tensor, bits: int) -> Tensor:
    """A logical shift to the right."""
    return (word >> bits) & (2 ** (64 - bits) - 1)
