"""The Mesa layer on a GPU: chunkwise conjugate gradients with a stop per token, its gradient, and one-token decoding.

    h_kk,t = exp(g_t) h_kk,t-1 + beta_t k_t k_t^T,   h_kv,t = exp(g_t) h_kv,t-1 + beta_t k_t v_t^T
    x_t = (h_kk,t + diag(lamb))^-1 q_t,              o_t = h_kv,t^T x_t

Three launches go forward: the two states at chunk boundaries, then one that solves a chunk and applies the solution to
its values.  All tokens of a chunk iterate together; one that has reached |r| <= eps |r_0| is left alone, and the loop
ends with the slowest, so that easy chunks cost few steps.  A single token takes a kernel of its own, which keeps the
matrix in registers.  States and products are float32 whatever the inputs are.

The gradient is by implicit differentiation: a second solve y_t = (h_kk,t + diag(lamb))^-1 u_t of u_t = h_kv,t e_t with
the same kernel, then gated linear attention read backwards in time.  It is exact where x is; memory is O(T D) between
the passes.  Each read is a launch of its own, eleven in all: fusing them is work for someone who can time them.

Not run on a GPU: tested through Triton's interpreter on CPU and compiled for sm_75 and sm_90, never timed.

Source: arXiv 2506.05233, appendix D and algorithm 1; kernels in `mesa_triton_kernels`, Triton is imported by the calls.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from commissure.core.errors import BackendMissing, InputError
from commissure.native import mesa_triton_launch as launch
from commissure.native.mesa_triton_reference import (
    Attended,
    Solved,
    mesa_triton_attention_reference,
    mesa_triton_solve_reference,
)

__all__ = [
    "Attended",
    "Solved",
    "check_triton",
    "mesa_triton_attention",
    "mesa_triton_attention_reference",
    "mesa_triton_available",
    "mesa_triton_solve",
    "mesa_triton_solve_reference",
]

MAX_DIM = 128  # h_kk of one head must stay on the chip: 64 KB in float32


def mesa_triton_available(device: torch.device | str) -> bool:
    """Whether the kernels run on `device`: Triton is installed and it is a GPU, or Triton's interpreter is on.

    >>> mesa_triton_available("meta")
    False
    """
    kind = torch.device(device).type
    is_interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return find_spec("triton") is not None and (kind == "cuda" or (kind == "cpu" and is_interpreted))


def check_triton(argument: str, value: object, device: torch.device) -> None:
    """Raise BackendMissing without Triton, InputError on a device that its kernels do not run on."""
    if find_spec("triton") is None:
        raise BackendMissing("triton", "triton", "the Mesa layer's GPU kernel")
    if device.type != "meta" and not mesa_triton_available(device):
        raise InputError(
            argument, value, f"a GPU, not {device}", "on CPU use another solver, or set TRITON_INTERPRET=1"
        )


def mesa_triton_solve(
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
    """Solve (h_kk,t + diag(lamb)) x_t = q_t for every token; no gradient.

    Any time (0 included), dim <= 128; h_kk in float32, the others in float32, bfloat16 or float16.  `g` are log gates
    <= 0 (-inf forgets everything), `beta` input weights in [0, 1], `lamb` > 0; values are not checked, that would wait
    for the device.  A token stops at |r| <= eps |r_0|; eps = 0 takes `max_steps` steps.
    `chunk_size` is 16, 32 or 64 (default 32).  x and the final h_kk are float32.
    Raises InputError, or BackendMissing without Triton.
    """
    _check(q, k, None, g, beta, lamb, h_kk, None, eps, max_steps, init, chunk_size)
    return Solved(*_solve_op(q, k, g, beta, lamb, h_kk, eps, max_steps, init, chunk_size or 0))


def mesa_triton_attention(
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
    """The whole layer, differentiable in every tensor; arguments as in `mesa_triton_solve`, any value size.

    `initial_state` is (h_kk, h_kv) in float32, by default zero.  The output has v's dtype, the states are float32.
    The backward solve takes the same eps and max_steps, from the diagonal start; the gradient of h_kk is symmetrized.
    """
    batch, _, heads, dim = q.shape
    if initial_state is None:
        zeros = torch.zeros(batch, heads, dim, dim + v.shape[-1], dtype=torch.float32, device=q.device)
        initial_state = (zeros[..., :dim], zeros[..., dim:])
    h_kk, h_kv = initial_state
    _check(q, k, v, g, beta, lamb, h_kk, h_kv, eps, max_steps, init, chunk_size)
    found = _attention_op(q, k, v, g, beta, lamb, h_kk, h_kv, eps, max_steps, init, chunk_size or 0)
    return Attended(*found[:4])


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    g: Tensor,
    beta: Tensor,
    lamb: Tensor,
    h_kk: Tensor,
    h_kv: Tensor | None,
    eps: float,
    max_steps: int,
    init: str,
    chunk_size: int | None,
) -> None:
    if q.ndim != 4 or not 1 <= q.shape[-1] <= MAX_DIM:
        raise InputError("q", tuple(q.shape), f"(batch, time, heads, dim) with dim 1 to {MAX_DIM}", "use more heads")
    batch, time, heads, dim = q.shape
    value = 1 if v is None else v.shape[-1]
    narrow = (torch.float32, torch.bfloat16, torch.float16)
    expected: dict[str, tuple[Tensor | None, tuple[int, ...], tuple[torch.dtype, ...]]] = {
        "q": (q, (batch, time, heads, dim), narrow),
        "k": (k, (batch, time, heads, dim), narrow),
        "v": (v, (batch, time, heads, value), narrow),
        "g": (g, (batch, time, heads), narrow),
        "beta": (beta, (batch, time, heads), narrow),
        "lamb": (lamb, (heads, dim), narrow),
        "h_kk": (h_kk, (batch, heads, dim, dim), narrow[:1]),
        "h_kv": (h_kv, (batch, heads, dim, value), narrow[:1]),
    }
    for name, (tensor, shape, dtypes) in expected.items():
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape:
            raise InputError(name, tuple(tensor.shape), f"shape {shape} to go with q")
        if tensor.dtype not in dtypes:
            allowed = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise InputError(f"{name}.dtype", str(tensor.dtype), allowed, "other solvers take float64")
        if tensor.device != q.device:
            raise InputError(f"{name}.device", str(tensor.device), f"{q.device}, where q is")
    if not eps >= 0:
        raise InputError("eps", eps, "a number >= 0")
    if max_steps < 0:
        raise InputError("max_steps", max_steps, "an integer >= 0")
    if init not in ("diag", "zero", "query"):
        raise InputError("init", init, "'diag', 'zero' or 'query'")
    if chunk_size not in (None, 16, 32, 64):
        raise InputError("chunk_size", chunk_size, "16, 32 or 64")
    check_triton("q.device", str(q.device), q.device)


def _tidy(*tensors: Tensor) -> list[Tensor]:
    return [tensor.contiguous() for tensor in tensors]


@torch.library.custom_op("commissure::mesa_triton_solve", mutates_args=())
def _solve_op(
    q: Tensor, k: Tensor, g: Tensor, beta: Tensor, lamb: Tensor, h_kk: Tensor,
    eps: float, max_steps: int, init: str, chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    plan = launch.plan(q, chunk_size)
    how: dict[str, Any] = {"eps": eps, "max_steps": max_steps, "init": init}
    q, k, g, beta, lamb, h_kk = _tidy(q, k, g, beta, lamb, h_kk)
    if plan.time == 1:
        found, final, _ = launch.step(plan, q, k, None, g, beta, lamb, h_kk, None, **how)
        return found.x, final, found.steps
    kk = launch.states(plan, k, k, g, beta, h_kk)
    found = launch.solve(plan, q, k, None, g, beta, lamb, kk, None, **how)
    return found.x, kk[:, :, -1].clone(), found.steps


@_solve_op.register_fake
def _(q: Tensor, k: Tensor, g: Tensor, beta: Tensor, lamb: Tensor, h_kk: Tensor, *_: Any) -> tuple[Tensor, ...]:
    x = q.new_empty(q.shape, dtype=torch.float32)
    return x, h_kk.new_empty(h_kk.shape), g.new_empty(g.shape, dtype=torch.int32)


@torch.library.custom_op("commissure::mesa_triton_attention", mutates_args=())
def _attention_op(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, lamb: Tensor, h_kk: Tensor, h_kv: Tensor,
    eps: float, max_steps: int, init: str, chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Output, final h_kk, final h_kv, steps, and x for the backward pass."""
    plan = launch.plan(q, chunk_size)
    how: dict[str, Any] = {"eps": eps, "max_steps": max_steps, "init": init}
    dtype = v.dtype
    q, k, v, g, beta, lamb, h_kk, h_kv = _tidy(q, k, v, g, beta, lamb, h_kk, h_kv)
    if plan.time == 1:
        found, h_kk, h_kv = launch.step(plan, q, k, v, g, beta, lamb, h_kk, h_kv, **how)
        return found.out.to(dtype), h_kk, h_kv, found.steps, found.x
    kk = launch.states(plan, k, k, g, beta, h_kk)
    kv = launch.states(plan, k, v, g, beta, h_kv)
    found = launch.solve(plan, q, k, v, g, beta, lamb, kk, kv, **how)
    return found.out.to(dtype), kk[:, :, -1].clone(), kv[:, :, -1].clone(), found.steps, found.x


@_attention_op.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, lamb: Tensor, h_kk: Tensor, h_kv: Tensor, *_: Any
) -> tuple[Tensor, ...]:
    output, final_kk, final_kv = (tensor.new_empty(tensor.shape) for tensor in (v, h_kk, h_kv))
    steps = g.new_empty(g.shape, dtype=torch.int32)
    return output, final_kk, final_kv, steps, q.new_empty(q.shape, dtype=torch.float32)


@torch.library.custom_op("commissure::mesa_triton_attention_backward", mutates_args=())
def _backward_op(
    d_out: Tensor, d_kk: Tensor, d_kv: Tensor,
    k: Tensor, v: Tensor, g: Tensor, beta: Tensor, lamb: Tensor, h_kk: Tensor, h_kv: Tensor, x: Tensor,
    eps: float, max_steps: int, chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v, g, beta, lamb, h_kk, h_kv in float32; e is the output's cotangent, y the second solve."""
    plan = launch.plan(k, chunk_size)
    k, v, g, beta, lamb, h_kk, h_kv, e, d_kv = _tidy(k, v, g, beta, lamb, h_kk, h_kv, d_out.float(), d_kv)
    kk = launch.states(plan, k, k, g, beta, h_kk)
    kv = launch.states(plan, k, v, g, beta, h_kv)
    u = launch.outputs(plan, e, v, k, g, beta, kv, transposed=True)
    y = launch.solve(plan, u, k, None, g, beta, lamb, kk, None, eps=eps, max_steps=max_steps, init="diag").x
    hx = launch.outputs(plan, x, k, k, g, beta, kk)

    # Adjoint states: of h_kv is bar_kv = sum zeta x e^T, of h_kk is -bar_kk^T with bar_kk = sum zeta x y^T.
    bar_kv = launch.states(plan, x, e, g, beta, d_kv, reverse=True)
    bar_kk = launch.states(plan, x, y, g, beta, -d_kk.mT.contiguous(), reverse=True)
    from_v = launch.outputs(plan, v, e, x, g, beta, bar_kv, transposed=True, reverse=True)
    from_x = launch.outputs(plan, k, x, y, g, beta, bar_kk, reverse=True)
    from_y = launch.outputs(plan, k, y, x, g, beta, bar_kk, transposed=True, reverse=True)
    dv = launch.outputs(plan, k, x, e, g, beta, bar_kv, reverse=True)
    d_beta = (v * dv).sum(-1) - (k * from_x).sum(-1)

    # A log gate scales every pair (reader t >= s, source i < s): readers minus sources inside the chunk, plus what
    # crosses its end, where forward and adjoint states meet.
    crossing = (kv * bar_kv).sum((-1, -2)) - (kk * bar_kk).sum((-1, -2))
    readers = (x * u).sum(-1) - (y * hx).sum(-1)
    dg = _sums_to_chunk_end(readers - beta * d_beta, plan.chunk)
    dg = dg + crossing[:, :, 1:].mT.repeat_interleave(plan.chunk, 1)[:, : plan.time]
    dg = dg.masked_fill(g.float().exp() == 0, 0.0)
    weight = beta.float()[..., None]
    d_lamb, first = -(y * x).sum((0, 1)), bar_kk[:, :, 0]
    dk = weight * (from_v - from_x - from_y)
    return y, dk, weight * dv, dg, d_beta, d_lamb, -(first + first.mT) / 2, bar_kv[:, :, 0].clone()


@_backward_op.register_fake
def _(
    d_out: Tensor, d_kk: Tensor, d_kv: Tensor,
    k: Tensor, v: Tensor, g: Tensor, beta: Tensor, lamb: Tensor, h_kk: Tensor, h_kv: Tensor, x: Tensor, *_: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    like = (x, k, v, g, beta, lamb, h_kk, h_kv)
    return tuple(tensor.new_empty(tensor.shape, dtype=torch.float32) for tensor in like)


def _sums_to_chunk_end(a: Tensor, chunk: int) -> Tensor:
    """[batch, time, heads]: the sum from each token to the end of its chunk."""
    batch, time, heads = a.shape
    padded = torch.nn.functional.pad(a, (0, 0, 0, -time % chunk)).reshape(batch, -1, chunk, heads)
    return padded.flip(2).cumsum(2).flip(2).reshape(batch, -1, heads)[:, :time]


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.eps, ctx.max_steps, _, ctx.chunk_size = inputs[8:]
    ctx.dtypes = [tensor.dtype for tensor in inputs[:8]]
    ctx.save_for_backward(*inputs[1:8], output[4])


def _backward(ctx: Any, d_out: Tensor, d_kk: Tensor, d_kv: Tensor, *_: Any) -> tuple[Any, ...]:
    found = _backward_op(d_out, d_kk, d_kv, *ctx.saved_tensors, ctx.eps, ctx.max_steps, ctx.chunk_size)
    return *(grad.to(dtype) for grad, dtype in zip(found, ctx.dtypes, strict=True)), None, None, None, None


_attention_op.register_autograd(_backward, setup_context=_remember)
