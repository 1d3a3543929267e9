"""The change of log RankMe over one residual block y = x + f, exactly, as the sum of three causes.

    Sigma_y = Sigma_x + Sigma_f + (C + C')           C = cov(x, f)

    T = tr Sigma_x + tr Sigma_f,   w = tr Sigma_x / T,   M = (Sigma_x + Sigma_f) / T = w X + (1 - w) F
    chi  = S(M) - w S(X) - (1 - w) S(F)         Holevo's quantity: 0 (same shape) to H(w) (subspaces apart)
    beta = (1 - w) (S(F) - S(X))                what the block writes is more, or less, varied than the stream
    I    = S(Sigma_y / tr Sigma_y) - S(M)       interference: what x and f have in common
    S(y) - S(x) = chi + beta + I

X and F are covariances over their traces and S the von Neumann entropy, so that S of a stream is log RankMe.  Over the
blocks of a network the changes telescope.  For eigenvalue weights only: singular values have no such sum.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float64
from torch import Tensor

from commissure.core.errors import DegenerateError, InputError
from commissure.core.moments import Moments
from commissure.geometry.similarity import pair_moments
from commissure.geometry.spectra import Rows

__all__ = ["BlockLedger", "block_ledger"]


class BlockLedger(NamedTuple):
    """Nats: log RankMe before and after the block, and the three parts of its change; `weight` of the stream, w."""

    before: float
    after: float
    overlap: float
    block: float
    interference: float
    weight: float

    @property
    def change(self) -> float:
        return self.after - self.before


def block_ledger(x: Rows | Moments, update: Rows | None = None) -> BlockLedger:
    """The ledger of one block from the stream before it and what the block adds, or from their `pair_moments`.

    >>> x = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
    >>> found = block_ledger(x, x[[2, 3, 0, 1]].flip(1))
    >>> round(found.change, 6) == round(found.overlap, 6), found.weight
    (True, 0.5)
    """
    if isinstance(x, Moments):
        if update is not None or len(x.mean) % 2:
            raise InputError("x", len(x.mean), "moments of [x, update], twice as wide as the stream, alone")
        joint = x
    elif update is None:
        raise InputError("update", None, "what the block adds to x")
    else:
        joint = pair_moments(x, update)
    dim = len(joint.mean) // 2
    if not isinstance(x, Moments) and 2 * x.shape[1] != len(joint.mean):
        raise InputError("update", len(joint.mean) - x.shape[1], f"{x.shape[1]} components, as many as x")
    s = joint.scatter
    a, b, cross = s[:dim, :dim], s[dim:, dim:], s[:dim, dim:]
    stream, written = float(a.diagonal().sum()), float(b.diagonal().sum())
    if not (stream > 0 and written > 0):
        raise DegenerateError("the stream or what the block adds has no variance: it has no spectrum")
    w = stream / (stream + written)
    mixed, before, block, after = _entropy(a + b), _entropy(a), _entropy(b), _entropy(a + b + cross + cross.T)
    return BlockLedger(
        before, after, mixed - w * before - (1 - w) * block, (1 - w) * (block - before), after - mixed, w
    )


def _entropy(scatter: Float64[Tensor, "dim dim"]) -> float:
    """Of the eigenvalues over their sum, nats."""
    values = torch.linalg.eigvalsh(scatter).clamp(min=0)
    if not float(values.sum()) > 0:
        raise DegenerateError("the stream has no variance after the block")
    return float(torch.special.entr(values / values.sum()).sum())
