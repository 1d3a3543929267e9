"""Metrics of one sequence at a time: how varied its tokens are, and how it turns.

    prompt entropy = log of the effective rank of the sequence's own token Gram matrix (nats), Skean et al. 2502.02013
    curvature      = mean angle between successive differences h_{t+1} - h_t (radians), Henaff et al. 2019; Hosseini &
                     Fedorenko 2311.04930

Both are means over sequences.  Tokens of the padding are left out; a step without length is skipped.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from commissure.core.errors import DegenerateError, InputError
from commissure.geometry.effective_rank import matrix_entropy
from commissure.geometry.spectra import rows_of, spectrum

__all__ = ["curvature", "prompt_entropy"]


def prompt_entropy(
    states: Float[Tensor, "batch time dim"], *, mask: Bool[Tensor, "batch time"] | None = None, order: float = 1.0
) -> float:
    """Mean over sequences of the matrix-based entropy (nats) of a sequence's tokens, not centered.

    >>> round(prompt_entropy(torch.eye(4)[None]), 4)
    1.3863
    """
    found = [
        matrix_entropy(spectrum(rows, center=False), order=order) for rows in _sequences(states, mask) if len(rows)
    ]
    if not found:
        raise DegenerateError("no sequence has a token")
    return sum(found) / len(found)


def curvature(states: Float[Tensor, "batch time dim"], *, mask: Bool[Tensor, "batch time"] | None = None) -> float:
    """Mean angle (radians, 0 to pi) between successive steps, over sequences of three tokens or more.

    >>> round(curvature(torch.tensor([[[0.0, 0.0], [1.0, 0.0], [1.0, 1.0]]])), 4)
    1.5708
    """
    means = []
    for rows in _sequences(states, mask):
        steps = rows.double().diff(dim=0)
        lengths = torch.linalg.vector_norm(steps, dim=1)
        directions = steps[lengths > 0] / lengths[lengths > 0, None]
        if len(directions) > 1:
            a, b = directions[:-1], directions[1:]
            # 2 atan2(|a - b|, |a + b|): exact for small angles, where an arc cosine is not.
            means.append(2 * torch.atan2((a - b).norm(dim=1), (a + b).norm(dim=1)).mean())
    if not means:
        raise DegenerateError("no sequence has three different tokens in a row")
    return float(torch.stack(means).mean())


def _sequences(states: Tensor, mask: Tensor | None) -> list[Tensor]:
    if not isinstance(states, Tensor) or states.ndim != 3:
        raise InputError("states", tuple(getattr(states, "shape", ())), "shape (batch, time, dim)")
    if mask is not None and (mask.shape != states.shape[:2] or mask.dtype != torch.bool):
        raise InputError("mask", (tuple(mask.shape), str(mask.dtype)), f"bool, shape {tuple(states.shape[:2])}")
    return [rows_of(rows, mask=None if mask is None else mask[i]) for i, rows in enumerate(states)]
