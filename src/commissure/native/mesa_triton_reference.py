"""Token-by-token twin of the Triton Mesa kernels: dense matrices, plain torch, any device and any float dtype.

    A_t = h_kk,t + diag(lamb);   conjugate gradients on A_t x_t = q_t, one system at a time in the sense of every count

Source: arXiv 2506.05233, equation 8 and algorithm 1 (with the relative stop of section 5).
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["Attended", "Solved", "mesa_triton_attention_reference", "mesa_triton_solve_reference"]


class Solved(NamedTuple):
    """Solutions, the state after the last token, and how many steps each token took."""

    x: Float[Tensor, "batch time heads dim"]
    h_kk: Float[Tensor, "batch heads dim dim"]
    cg_steps: Int[Tensor, "batch time heads"]


class Attended(NamedTuple):
    """Outputs, the states after the last token, and how many steps each token took."""

    output: Float[Tensor, "batch time heads value"]
    h_kk: Float[Tensor, "batch heads dim dim"]
    h_kv: Float[Tensor, "batch heads dim value"]
    cg_steps: Int[Tensor, "batch time heads"]


def _conjugate_gradients(
    matrix: Tensor, target: Tensor, *, eps: float, max_steps: int, init: str
) -> tuple[Tensor, Tensor]:
    """Solve [..., D, D] x = [..., D]; a system stops at |r| <= eps |r_0| and is not touched again."""

    def apply(p: Tensor) -> Tensor:
        return (matrix @ p[..., None])[..., 0]

    starts = {"zero": torch.zeros_like(target), "query": target, "diag": target / matrix.diagonal(dim1=-2, dim2=-1)}
    x = starts[init]
    r = target - apply(x)
    p, delta = r, r.square().sum(-1)
    first, steps = delta, torch.zeros_like(delta, dtype=torch.int32)
    for _ in range(max_steps):
        is_open = ~(delta.sqrt() <= eps * first.sqrt()) | (eps == 0)
        if not is_open.any():
            break
        s = apply(p)
        curvature = (p * s).sum(-1)
        alpha = torch.where(is_open & (curvature != 0), delta / curvature, 0.0)[..., None]
        x, r = x + alpha * p, r - alpha * s
        new = r.square().sum(-1)
        p = r + torch.where(is_open & (delta != 0), new / delta, 0.0)[..., None] * p
        delta, steps = new, steps + is_open.int()
    return x, steps


def mesa_triton_solve_reference(
    q: Float[Tensor, "batch time heads dim"],
    k: Float[Tensor, "batch time heads dim"],
    g: Float[Tensor, "batch time heads"],
    beta: Float[Tensor, "batch time heads"],
    lamb: Float[Tensor, "heads dim"],
    h_kk: Float[Tensor, "batch heads dim dim"],
    *,
    eps: float = 0.0,
    max_steps: int = 30,
    init: Literal["diag", "zero", "query"] = "diag",
    chunk_size: int | None = None,
) -> Solved:
    """What `mesa_triton_solve` computes, one dense system per token (`chunk_size` changes nothing)."""
    x, steps = torch.empty_like(q), torch.empty(q.shape[:3], dtype=torch.int32, device=q.device)
    for t in range(q.shape[1]):
        keys = k[:, t]
        h_kk = g[:, t].exp()[..., None, None] * h_kk + (beta[:, t, :, None] * keys)[..., None] * keys[..., None, :]
        x[:, t], steps[:, t] = _conjugate_gradients(
            h_kk + torch.diag_embed(lamb), q[:, t], eps=eps, max_steps=max_steps, init=init
        )
    return Solved(x, h_kk, steps)


def mesa_triton_attention_reference(
    q: Float[Tensor, "batch time heads dim"],
    k: Float[Tensor, "batch time heads dim"],
    v: Float[Tensor, "batch time heads value"],
    g: Float[Tensor, "batch time heads"],
    beta: Float[Tensor, "batch time heads"],
    lamb: Float[Tensor, "heads dim"],
    *,
    initial_state: tuple[Float[Tensor, "batch heads dim dim"], Float[Tensor, "batch heads dim value"]] | None = None,
    eps: float = 0.0,
    max_steps: int = 30,
    init: Literal["diag", "zero", "query"] = "diag",
    chunk_size: int | None = None,
) -> Attended:
    """What `mesa_triton_attention` computes, one token at a time."""
    batch, time, heads, dim = q.shape
    if initial_state is None:
        initial_state = (q.new_zeros(batch, heads, dim, dim), q.new_zeros(batch, heads, dim, v.shape[-1]))
    solved = mesa_triton_solve_reference(
        q, k, g, beta, lamb, initial_state[0], eps=eps, max_steps=max_steps, init=init, chunk_size=chunk_size
    )
    h_kv, output = initial_state[1], torch.empty_like(v)
    for t in range(time):
        h_kv = g[:, t].exp()[..., None, None] * h_kv + (beta[:, t, :, None] * k[:, t])[..., None] * v[:, t, :, None, :]
        output[:, t] = (solved.x[:, t, :, None, :] @ h_kv)[..., 0, :]
    return Attended(output, solved.h_kk, h_kv, solved.cg_steps)
