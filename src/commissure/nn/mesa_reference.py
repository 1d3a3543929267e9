"""The Mesa layer as it is defined: one element after the other, a dense system each, differentiated by autograd."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from commissure.nn.mesa import MesaOutput, MesaState

__all__ = ["mesa_attention_reference"]


def mesa_attention_reference(
    q: Float[Tensor, "batch time heads dim"],
    k: Float[Tensor, "batch time heads dim"],
    v: Float[Tensor, "batch time heads value_dim"],
    g: Float[Tensor, "batch time heads"],
    beta: Float[Tensor, "batch time heads"],
    lamb: Float[Tensor, "heads dim"],
    *,
    initial_state: MesaState | None = None,
) -> MesaOutput:
    """`mesa_attention` without its solvers: O(T D^3), memory O(T D^2), in the inputs' dtype (take float64).

    >>> one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    >>> gate = torch.zeros(1, 1, 1, dtype=torch.float64)
    >>> mesa_attention_reference(one, one, one, gate, gate + 1, gate[0] + 0.25).output.item()
    0.8
    """
    batch, time, heads, dim = q.shape
    h_kk, h_kv = initial_state or (q.new_zeros(batch, heads, dim, dim), q.new_zeros(batch, heads, dim, v.shape[3]))
    h_kk = (h_kk + h_kk.mT) / 2
    outputs = []
    for t in range(time):
        gamma, strength = (gate[:, t, :, None, None] for gate in (g.exp(), beta))
        key = k[:, t, :, :, None]
        h_kk = gamma * h_kk + strength * key @ key.mT
        h_kv = gamma * h_kv + strength * key @ v[:, t, :, None, :]
        x = torch.linalg.solve(h_kk + torch.diag_embed(lamb), q[:, t, :, :, None])
        outputs.append((h_kv.mT @ x)[..., 0])
    return MesaOutput(torch.stack(outputs, 1) if outputs else torch.zeros_like(v), MesaState(h_kk, h_kv), None)
