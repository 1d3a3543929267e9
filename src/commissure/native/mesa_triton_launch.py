"""Launches the Mesa layer's Triton kernels on checked, contiguous tensors: block sizes, grids, buffers.

Nothing here reads a value back from the device.  Imports Triton only inside the calls.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from commissure.core.errors import BackendMissing

__all__ = ["Init", "Plan", "outputs", "plan", "solve", "states", "step"]

Init = Literal["diag", "zero", "query"]


class Plan(NamedTuple):
    """What the launches of one call share: [batch, time, heads] sizes and the compile-time choices."""

    batch: int
    time: int
    heads: int
    chunk: int
    precision: str

    @property
    def n_chunks(self) -> int:
        return -(-self.time // self.chunk)

    @property
    def lanes(self) -> int:
        return self.batch * self.heads


def _kernels() -> ModuleType:
    try:
        from commissure.native import mesa_triton_kernels
    except ImportError as error:
        raise BackendMissing("triton", "triton", "the Mesa layer's GPU kernel") from error
    return mesa_triton_kernels


def plan(q: Tensor, chunk_size: int | None) -> Plan:
    """Sizes of a call on q [batch, time, heads, dim]; by default 32 tokens a chunk.

    Compiled for sm_80 at 64 dimensions, a solve of 64 tokens spills 2.6 KB of registers a thread, of 32 tokens 0.5 KB,
    of 16 none; but boundary states take dim^2 / chunk floats a token.  float32 products on tensor cores take three TF32
    products (`tf32x3`, float32 accuracy) from Ampere on; other devices multiply in plain float32.
    """
    batch, time, heads, _ = q.shape
    is_ampere = q.is_cuda and torch.version.hip is None and torch.cuda.get_device_capability(q.device) >= (8, 0)
    return Plan(batch, time, heads, chunk_size or 32, "tf32x3" if is_ampere else "ieee")


def _block(size: int, most: int = 128) -> int:
    return min(most, max(16, 1 << (size - 1).bit_length()))  # 16: the smallest side of a tensor-core product


def _warps(dim: int, precision: str = "tf32x3") -> int:
    return 4 if dim <= 64 and precision == "tf32x3" else 8  # plain products keep whole tiles in registers


def states(
    plan: Plan, a: Tensor, c: Tensor, g: Tensor, beta: Tensor, first: Tensor, *, reverse: bool = False
) -> Tensor:
    """Boundary states [batch, heads, n_chunks + 1, K, N] of sum a c^T, from `first` at one end of the sequence.

    Entry j is the state between chunks j - 1 and j.  Forward, the last entry is the final state; reversed, entry 0 is
    the gradient's share of the initial state.
    """
    k, n = a.shape[-1], c.shape[-1]
    bounds = a.new_empty(plan.batch, plan.heads, plan.n_chunks + 1, k, n, dtype=torch.float32)
    block_k, block_n = _block(k, 32), _block(n, 32)
    grid = (plan.lanes * -(-k // block_k) * -(-n // block_n),)
    if grid[0] == 0:
        return bounds
    with torch.cuda.device_of(a):
        _kernels().chunk_states_kernel[grid](
            a, c, g, beta, first, bounds, plan.time, plan.n_chunks, plan.heads, k, n,
            REVERSE=reverse, BLOCK_T=plan.chunk, BLOCK_K=block_k, BLOCK_N=block_n, PRECISION=plan.precision,
            num_warps=4,
        )  # fmt: skip
    return bounds


def outputs(
    plan: Plan,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    bounds: Tensor,
    *,
    transposed: bool = False,
    reverse: bool = False,
) -> Tensor:
    """Gated linear attention [batch, time, heads, N] in float32 from its boundary states.

    `transposed` reads [N, K] states as [K, N]; `reverse` lets token s read all tokens t >= s, as gradients do.
    """
    dim, n = q.shape[-1], v.shape[-1]
    out = v.new_empty(v.shape, dtype=torch.float32)
    block_n = _block(n, 32)
    grid = (plan.lanes * plan.n_chunks * -(-n // block_n),)
    if grid[0] == 0:
        return out
    strides = (1, dim) if transposed else (n, 1)
    with torch.cuda.device_of(q):
        _kernels().chunk_outputs_kernel[grid](
            q, k, v, g, beta, bounds, out, plan.time, plan.n_chunks, plan.heads, dim, n, *strides,
            REVERSE=reverse, BLOCK_T=plan.chunk, BLOCK_K=_block(dim, 32), BLOCK_N=block_n, PRECISION=plan.precision,
            num_warps=4,
        )  # fmt: skip
    return out


class Solved(NamedTuple):
    """x [batch, time, heads, D] and, with values, out [batch, time, heads, Dv], float32; steps [batch, time, heads]."""

    x: Tensor
    out: Tensor
    steps: Tensor


def _buffers(q: Tensor, v: Tensor | None) -> Solved:
    x = q.new_empty(q.shape, dtype=torch.float32)
    out = x.new_empty(0) if v is None else x.new_empty(v.shape)
    return Solved(x, out, q.new_empty(q.shape[:3], dtype=torch.int32))


def solve(
    plan: Plan,
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    g: Tensor,
    beta: Tensor,
    lamb: Tensor,
    kk: Tensor,
    kv: Tensor | None,
    *,
    eps: float,
    max_steps: int,
    init: Init,
) -> Solved:
    """Conjugate gradients from boundary states `kk`; `v` and its boundary states `kv` ask for the output as well."""
    dim, found = q.shape[-1], _buffers(q, v)
    n = 1 if v is None else v.shape[-1]
    grid = (plan.lanes * plan.n_chunks,)
    if grid[0] == 0:
        return found
    with torch.cuda.device_of(q):
        _kernels().chunk_solve_kernel[grid](
            q, k, k if v is None else v, g, beta, lamb, kk, kk if kv is None else kv, *found,
            plan.time, plan.n_chunks, plan.heads, dim, n, eps, max_steps,
            INIT=init, HAS_VALUES=v is not None, BLOCK_T=plan.chunk, BLOCK_D=_block(dim), BLOCK_N=_block(n, 32),
            PRECISION=plan.precision, num_warps=_warps(dim, plan.precision), num_stages=1,
        )  # fmt: skip
    return found


def step(
    plan: Plan,
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    g: Tensor,
    beta: Tensor,
    lamb: Tensor,
    h_kk: Tensor,
    h_kv: Tensor | None,
    *,
    eps: float,
    max_steps: int,
    init: Init,
) -> tuple[Solved, Tensor, Tensor]:
    """One token from states [batch, heads, D, D] and [batch, heads, D, Dv]: the solution, the new states."""
    dim, found = q.shape[-1], _buffers(q, v)
    n = 1 if v is None else v.shape[-1]
    new_kk = torch.empty_like(h_kk)
    new_kv = new_kk.new_empty(0) if h_kv is None else torch.empty_like(h_kv)
    if plan.lanes == 0:
        return found, new_kk, new_kv
    tensors: tuple[Any, ...] = (q, k, k if v is None else v, g, beta, lamb, h_kk, h_kk if h_kv is None else h_kv)
    with torch.cuda.device_of(q):
        _kernels().decode_kernel[(plan.lanes,)](
            *tensors, new_kk, new_kv, *found, plan.heads, dim, n, eps, max_steps,
            INIT=init, HAS_VALUES=v is not None, BLOCK_D=_block(dim), BLOCK_N=_block(n, 32), num_warps=_warps(dim),
        )  # fmt: skip
    return found, new_kk, new_kv
