"""Rivals of the Mesa layer's own solvers, re-written: conjugate gradients with a fixed number of steps, twice.

    A_t = H_t + Lambda,    H_t p_t = zeta_tc H_c p_t + sum_{c < i <= t} zeta_ti beta_i k_i (k_i . p_t)

`literal_cg` is what public code does (flash-linear-attention, `ops/mesa_net`): chunks of 64, a start at zero, 1e-5
added to both denominators, and autograd through the unrolled loop.  It is context; no gate is on it.

`best_cg` is the fastest CG with the same number of steps that we could write in torch, and what the gates of the claim
`mesa.speed` are against: no 1e-5, short chunks (an operator product takes 2 D^2 + 4 C D operations a token), blocks of
chunks that stay in the second-level cache for all the steps, buffers made once a block, and an implicit backward (one
more solve).  All of it is torch: no kernel of ours.  Sizes were chosen by measurement; see `TILES`.

For decoding one token, `literal_token_cg` is what public code does and `token_cg` the fastest form.

Mesa and its CG: arXiv 2506.05233, section 2, algorithm 1 and appendix D.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import FunctionCtx

from commissure.core.first_order import first_order_only
from commissure.nn.linear_attention import (
    Segment,
    attend,
    attend_backward,
    chunk_states,
    decays_of,
    from_chunks,
    states_of,
    to_chunks,
)

__all__ = ["best_cg", "best_cg_solve", "literal_cg", "literal_token_cg", "token_cg"]

# Largest head dim -> (chunk, tokens worked on together), the fastest of chunks 8 to 64 and blocks 128 to 4096 on an
# AVX-512 EPYC with 1 MB of second-level cache; the last line holds for everything above.
TILES = {32: (32, 4096), 64: (16, 1024), 128: (16, 512)}
TINY = torch.finfo(torch.float32).tiny  # keeps 0 / 0 of a token that is solved exactly at 0


def literal_cg(
    q: Float[Tensor, "batch time heads dim"],
    k: Float[Tensor, "batch time heads dim"],
    v: Float[Tensor, "batch time heads value_dim"],
    g: Float[Tensor, "batch time heads"],
    beta: Float[Tensor, "batch time heads"],
    lamb: Float[Tensor, "heads dim"],
    *,
    steps: int = 30,
    chunk_size: int = 64,
) -> Float[Tensor, "batch time heads value_dim"]:
    """Outputs by `steps` unrolled CG steps over all chunks at once; `time` must be a multiple of `chunk_size`."""
    queries, keys, values, gates, strength = (
        x.transpose(1, 2).unflatten(2, (-1, chunk_size)) for x in (q, k, v, g, beta)
    )
    sums = gates.cumsum(-1)
    mask = (sums[..., :, None] - sums[..., None, :]).tril().exp().tril() * strength[..., None, :]
    to_start, to_end = sums.exp()[..., None], ((sums[..., -1:] - sums).exp() * strength)[..., None]
    total, penalty = sums[..., -1].exp(), lamb[:, None, None]
    h_kk = _states(total, (keys * to_end).mT @ keys)
    h_kv = _states(total, (keys * to_end).mT @ values)

    def multiply(p: Tensor) -> Tensor:
        return (p * to_start) @ h_kk + ((p @ keys.mT) * mask) @ keys + p * penalty

    x, residual, direction = torch.zeros_like(queries), queries, queries
    squared = (residual * residual).sum(-1, keepdim=True)
    for _ in range(steps):
        product = multiply(direction)
        step = squared / ((direction * product).sum(-1, keepdim=True) + 1e-5)
        x = x + step * direction
        residual = residual - step * product
        following = (residual * residual).sum(-1, keepdim=True)
        direction = residual + following / (squared + 1e-5) * direction
        squared = following
    o = (x * to_start) @ h_kv + ((x @ keys.mT) * mask) @ values
    return o.flatten(2, 3).transpose(1, 2)


def _states(total: Float[Tensor, "batch heads chunks"], added: Tensor) -> Tensor:
    """The state before each chunk."""
    states = [torch.zeros_like(added[:, :, 0])]
    for chunk in range(added.shape[2] - 1):
        states.append(states[-1] * total[:, :, chunk, None, None] + added[:, :, chunk])
    return torch.stack(states, 2)


def best_cg(
    q: Float[Tensor, "batch time heads dim"],
    k: Float[Tensor, "batch time heads dim"],
    v: Float[Tensor, "batch time heads value_dim"],
    g: Float[Tensor, "batch time heads"],
    beta: Float[Tensor, "batch time heads"],
    lamb: Float[Tensor, "heads dim"],
    *,
    steps: int = 30,
) -> Float[Tensor, "batch time heads value_dim"]:
    """Outputs by `steps` CG steps a token, differentiable by one more solve; any `time`, any dims."""
    return _BestCG.apply(q, k, v, g, beta, lamb, steps)


@torch.no_grad()
def best_cg_solve(
    q: Float[Tensor, "batch time heads dim"],
    k: Float[Tensor, "batch time heads dim"],
    g: Float[Tensor, "batch time heads"],
    beta: Float[Tensor, "batch time heads"],
    lamb: Float[Tensor, "heads dim"],
    *,
    steps: int = 30,
    tile: tuple[int, int] | None = None,
) -> Float[Tensor, "batch time heads dim"]:
    """x_t = (H_t + diag lamb)^-1 q_t after `steps` CG steps from zero; `tile` replaces the entry of `TILES`."""
    batch, time, heads, dim = q.shape
    chunk, block = tile or next((t for size, t in TILES.items() if dim <= size), TILES[max(TILES)])
    span = chunk * max(1, block // (chunk * batch * heads))
    whole = time // chunk * chunk
    pieces = [Segment(start, min(start + span, whole), chunk) for start in range(0, whole, span)]
    pieces += [Segment(whole, time, time - whole)] * (whole < time)
    state, x = q.new_zeros(batch * heads, dim, dim), torch.empty_like(q, memory_format=torch.contiguous_format)
    for piece in pieces:
        queries, keys, strength = (to_chunks(tensor, piece, q.dtype) for tensor in (q, k, beta))
        decays = decays_of(g, piece, q.dtype)
        written = keys * strength.mul(decays.end)[:, :, None]
        states = chunk_states(written, keys, decays, state)
        state = states[-1]
        mask = decays.within.mul_(strength[:, None, :])
        penalty = lamb.expand(piece.n_chunks * batch, heads, dim).reshape(-1, 1, dim)
        size = queries.abs().amax(-1, keepdim=True)  # squares of tiny or huge elements would be 0 or infinite
        queries.div_(size.masked_fill_(size == 0, 1.0))
        solved = _steps(queries, keys, mask, decays.start[:, :, None], states[:-1].flatten(0, 1), penalty, steps)
        from_chunks(solved.mul_(size), piece, x)
    return x


def _steps(
    residual: Float[Tensor, "chunks time dim"],
    keys: Float[Tensor, "chunks time dim"],
    mask: Float[Tensor, "chunks time time"],
    to_start: Float[Tensor, "chunks time 1"],
    states: Float[Tensor, "chunks dim dim"],
    penalty: Float[Tensor, "chunks 1 dim"],
    steps: int,
) -> Float[Tensor, "chunks time dim"]:
    """CG on every token of a block; `residual` (the right-hand sides) is overwritten."""
    x, direction = torch.zeros_like(residual), residual.clone()
    product, scratch, scores = torch.empty_like(residual), torch.empty_like(residual), torch.empty_like(mask)
    squared = torch.mul(residual, residual, out=scratch).sum(-1, keepdim=True)
    for step in range(steps):
        torch.bmm(direction, keys.mT, out=scores).mul_(mask)
        torch.bmm(torch.mul(direction, to_start, out=scratch), states, out=product)
        product.baddbmm_(scores, keys).addcmul_(direction, penalty)
        curvature = torch.mul(direction, product, out=scratch).sum(-1, keepdim=True)
        length = squared / curvature.clamp_min_(TINY)
        x.addcmul_(direction, length)
        if step < steps - 1:
            residual.addcmul_(product, length, value=-1)
            following = torch.mul(residual, residual, out=scratch).sum(-1, keepdim=True)
            torch.addcmul(residual, direction, following / squared.clamp_min_(TINY), out=direction)
            squared = following
    return x


@torch.no_grad()
def token_cg(
    q: Float[Tensor, "batch 1 heads dim"],
    k: Float[Tensor, "batch 1 heads dim"],
    v: Float[Tensor, "batch 1 heads value_dim"],
    g: Float[Tensor, "batch 1 heads"],
    beta: Float[Tensor, "batch 1 heads"],
    lamb: Float[Tensor, "heads dim"],
    h_kk: Float[Tensor, "batch heads dim dim"],
    h_kv: Float[Tensor, "batch heads dim value_dim"],
    *,
    steps: int = 30,
) -> tuple[Float[Tensor, "batch 1 heads value_dim"], Tensor, Tensor]:
    """Output and both states after one new token, by `steps` CG steps on the matrix itself.

    Rows times matrices: for one token of a few heads, torch's matrices times columns are up to six times slower.
    """
    gamma, written = g[:, 0, :, None, None].exp(), (beta[:, 0, :, None] * k[:, 0]).unsqueeze(3)
    h_kk = torch.addcmul(written * k[:, 0].unsqueeze(2), h_kk, gamma)
    h_kv = torch.addcmul(written * v[:, 0].unsqueeze(2), h_kv, gamma)
    matrix = h_kk.flatten(0, 1).clone()
    matrix.view(h_kk.shape).diagonal(dim1=2, dim2=3).add_(lamb)
    residual = q[:, 0].flatten(0, 1).unsqueeze(1).clone()
    x, direction = torch.zeros_like(residual), residual.clone()
    product, scratch = torch.empty_like(residual), torch.empty_like(residual)
    squared = torch.mul(residual, residual, out=scratch).sum(2, keepdim=True)
    for _ in range(steps):
        torch.bmm(direction, matrix, out=product)
        length = squared / torch.mul(direction, product, out=scratch).sum(2, keepdim=True).clamp_min_(TINY)
        x.addcmul_(direction, length)
        residual.addcmul_(product, length, value=-1)
        following = torch.mul(residual, residual, out=scratch).sum(2, keepdim=True)
        torch.addcmul(residual, direction, following / squared.clamp_min_(TINY), out=direction)
        squared = following
    o = torch.bmm(x, h_kv.flatten(0, 1)).view(q.shape[0], 1, q.shape[2], -1)
    return o, h_kk, h_kv


@torch.no_grad()
def literal_token_cg(
    q: Float[Tensor, "batch 1 heads dim"],
    k: Float[Tensor, "batch 1 heads dim"],
    v: Float[Tensor, "batch 1 heads value_dim"],
    g: Float[Tensor, "batch 1 heads"],
    beta: Float[Tensor, "batch 1 heads"],
    lamb: Float[Tensor, "heads dim"],
    h_kk: Float[Tensor, "batch heads dim dim"],
    h_kv: Float[Tensor, "batch heads dim value_dim"],
    *,
    steps: int = 30,
) -> tuple[Float[Tensor, "batch 1 heads value_dim"], Tensor, Tensor]:
    """`token_cg` as public code decodes: from q / diag, with products of H as a broadcast product and its sum."""
    gamma, written = g[:, 0, :, None, None].exp(), (beta[:, 0, :, None] * k[:, 0]).unsqueeze(3)
    h_kk = h_kk * gamma + written * k[:, 0].unsqueeze(2)
    h_kv = h_kv * gamma + written * v[:, 0].unsqueeze(2)

    def multiply(p: Tensor) -> Tensor:
        return (p.unsqueeze(3) * h_kk).sum(2) + lamb * p

    x = q[:, 0] / (h_kk.diagonal(dim1=2, dim2=3) + lamb)
    residual = q[:, 0] - multiply(x)
    direction, squared = residual, (residual * residual).sum(2, keepdim=True)
    for _ in range(steps):
        product = multiply(direction)
        length = squared / ((direction * product).sum(2, keepdim=True) + 1e-5)
        x = x + length * direction
        residual = residual - length * product
        following = (residual * residual).sum(2, keepdim=True)
        direction = residual + following / (squared + 1e-5) * direction
        squared = following
    return (x.unsqueeze(3) * h_kv).sum(2)[:, None], h_kk, h_kv


class _BestCG(torch.autograd.Function):
    """Implicit differentiation (appendix D): with e = dL/do and u = h_kv e, one more solve gives y = A^-1 u = dq."""

    CHUNK = 64

    @staticmethod
    def forward(
        ctx: FunctionCtx, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, lamb: Tensor, steps: int
    ) -> Tensor:
        x = best_cg_solve(q, k, g, beta, lamb, steps=steps)
        first = q.new_zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3])
        o, states, _ = attend(x, k, v, g, beta, first, chunk_size=_BestCG.CHUNK, native=False)
        ctx.save_for_backward(x, k, v, g, beta, lamb, states)
        ctx.steps = steps  # type: ignore[attr-defined]
        return o

    @staticmethod
    @first_order_only("best_cg", "mesa_attention_reference")
    def backward(ctx: FunctionCtx, d_o: Tensor) -> tuple[Tensor | None, ...]:
        x, k, v, g, beta, lamb, states = ctx.saved_tensors  # type: ignore[attr-defined]
        batch, _, heads, dim = x.shape
        size = _BestCG.CHUNK
        none = x.new_zeros(batch, heads, dim, v.shape[3])
        out = attend_backward(x, k, v, g, beta, states, d_o, none, chunk_size=size, native=False)
        y = best_cg_solve(out.q, k, g, beta, lamb, steps=ctx.steps)  # type: ignore[attr-defined]
        none = x.new_zeros(batch, heads, dim, dim)
        states = states_of(k, k, g, beta, none, chunk_size=size, native=False)
        inner = attend_backward(x, k, k, g, beta, states, y, none, chunk_size=size, native=False)
        d_lamb = -(y * x).sum((0, 1))
        return y, out.k - inner.k - inner.v, out.v, out.g - inner.g, out.beta - inner.beta, d_lamb, None
