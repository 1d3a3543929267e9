"""Gated linear attention and its gradients on a CPU, a head after the other in short chunks.

    S_t = exp(g_t) S_{t-1} + beta_t k_t v_t^T            o_t = S_t^T q_t
    R_t = q_t d_o_t^T + exp(g_{t+1}) R_{t+1}             R_T = q_T d_o_T^T + d_final
    dq_t = S_t d_o_t,   dk_t = beta_t R_t v_t,   dv_t = beta_t R_t^T k_t,   dbeta_t = k_t^T R_t v_t
    dg_t = exp(g_t) <R_t, S_{t-1}>                       d_initial = exp(g_1) R_1

    paper            here
    log gamma_t      g           log of the forget gate, -inf forgets everything
    beta_t           beta        input gate, None for ones
    S_t              state       (dim, value_dim), key-major
    R_t                          gradient of the state

Chunks of 16 tokens: 4 D E + 64 max(D, E) operations a token and head forward, about three times as many backward.  The
backward computes the states again, so that nothing but its arguments is kept for it; its scratch is O(time dim) a head.
Source: Yang et al., arXiv 2312.06635, section 4.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from commissure.core.errors import InputError
from commissure.native import backend, kernels
from commissure.native.linear_attention_reference import (
    linear_attention_backward_reference,
    linear_attention_reference,
)

__all__ = [
    "linear_attention",
    "linear_attention_backward",
    "linear_attention_backward_reference",
    "linear_attention_kernel_available",
    "linear_attention_reference",
]

_FLOATS = (torch.float32, torch.float64)


def linear_attention_kernel_available() -> bool:
    """Whether both run in C++; without a compiler at build time they run their references."""
    return backend() == "c++"


def linear_attention(
    q: Float[Tensor, "batch time heads dim"],
    k: Float[Tensor, "batch time heads dim"],
    v: Float[Tensor, "batch time heads value_dim"],
    g: Float[Tensor, "batch time heads"],
    beta: Float[Tensor, "batch time heads"] | None,
    initial_state: Float[Tensor, "batch heads dim value_dim"],
) -> tuple[Float[Tensor, "batch time heads value_dim"], Float[Tensor, "batch heads dim value_dim"]]:
    """The outputs and the state after the last token.

    CPU tensors, all float32 or all float64, but g may be float64 beside float32; any time >= 0.  Runs on
    up to `torch.get_num_threads()` threads, with the same bits for any number.  No gradient: see `nn.linear_attention`.
    Raises InputError for shapes or dtypes that do not fit.

    >>> one = torch.ones(1, 2, 1, 1)
    >>> o, state = linear_attention(one, one, one, torch.full((1, 2, 1), 0.5).log(), None, torch.zeros(1, 1, 1, 1))
    >>> o.flatten().tolist(), state.item()
    ([1.0, 1.5], 1.5)
    """
    _check(q, k=k, v=v, g=g, beta=beta, initial_state=initial_state)
    o, final_state = torch.ops.commissure.linear_attention(q, k, v, g, beta, initial_state)
    return o, final_state


def linear_attention_backward(
    q: Float[Tensor, "batch time heads dim"],
    k: Float[Tensor, "batch time heads dim"],
    v: Float[Tensor, "batch time heads value_dim"],
    g: Float[Tensor, "batch time heads"],
    beta: Float[Tensor, "batch time heads"] | None,
    initial_state: Float[Tensor, "batch heads dim value_dim"],
    d_o: Float[Tensor, "batch time heads value_dim"],
    d_final: Float[Tensor, "batch heads dim value_dim"],
) -> tuple[
    Float[Tensor, "batch time heads dim"],
    Float[Tensor, "batch time heads dim"],
    Float[Tensor, "batch time heads value_dim"],
    Float[Tensor, "batch time heads"],
    Float[Tensor, "batch time heads"],
    Float[Tensor, "batch heads dim value_dim"],
]:
    """Gradients of q, k, v, g, beta and initial_state, from those of the outputs and last state.

    As `linear_attention` in everything else.

    >>> one, zero = torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1)
    >>> grads = linear_attention_backward(one, one, 2 * one, zero, None, 3 * one, one, 0 * one)
    >>> [grad.item() for grad in grads]
    [5.0, 2.0, 1.0, 3.0, 2.0, 1.0]
    """
    _check(q, k=k, v=v, g=g, beta=beta, initial_state=initial_state, d_o=d_o, d_final=d_final)
    return torch.ops.commissure.linear_attention_backward(q, k, v, g, beta, initial_state, d_o, d_final)


def _check(q: Tensor, v: Tensor, **others: Tensor | None) -> None:
    """Raise InputError naming the first argument that does not fit q and v."""
    if q.ndim != 4 or q.shape[3] < 1 or q.dtype not in _FLOATS or q.device.type not in ("cpu", "meta"):
        found = (tuple(q.shape), str(q.dtype), q.device.type)
        raise InputError("q", found, "a float32 or float64 CPU tensor [batch, time, heads, dim], dim >= 1")
    batch, time, heads, dim = q.shape
    if v.ndim != 4 or v.shape[:3] != q.shape[:3] or v.shape[3] < 1:
        raise InputError("v", tuple(v.shape), f"shape ({batch}, {time}, {heads}, value_dim >= 1), to fit q")
    gates, state = (batch, time, heads), (batch, heads, dim, v.shape[3])
    shapes = {"k": q.shape, "g": gates, "beta": gates, "initial_state": state, "d_o": v.shape, "d_final": state}
    for name, value in {"v": v, **others}.items():
        if value is None:
            continue
        if name != "v" and value.shape != shapes[name]:
            raise InputError(name, tuple(value.shape), f"shape {tuple(shapes[name])}, to fit q and v")
        is_fine = value.dtype == q.dtype or (name == "g" and value.dtype == torch.float64)
        if not is_fine or value.device != q.device:
            kind = (str(value.dtype), value.device.type)
            raise InputError(name, kind, f"q's dtype and device, {q.dtype}, {q.device}")


_library = torch.library.Library("commissure", "FRAGMENT")
_OPERANDS = "Tensor q, Tensor k, Tensor v, Tensor g, Tensor? beta, Tensor initial_state"
_library.define(f"linear_attention({_OPERANDS}) -> (Tensor, Tensor)")
_library.define(
    f"linear_attention_backward({_OPERANDS}, Tensor d_o, Tensor d_final)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor | None, initial_state: Tensor, clone: str = ""
) -> tuple[Tensor, Tensor]:
    """The operator on CPU tensors."""
    native = kernels()
    if native is None:
        o, final_state = linear_attention_reference(q, k, v, g, beta, initial_state)
        return o, final_state.clone()
    arrays = contiguous(q, k, v, g.double(), beta, initial_state)
    results = _empty(v, initial_state)
    native.linear_attention(*addresses(arrays), *addresses(results), *sizes(q, v), clone)
    return results[0], results[1]


def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor | None,
    initial_state: Tensor,
    d_o: Tensor,
    d_final: Tensor,
    clone: str = "",
) -> tuple[Tensor, ...]:
    """The operator on CPU tensors."""
    native = kernels()
    if native is None:
        return linear_attention_backward_reference(q, k, v, g, beta, initial_state, d_o, d_final)
    arrays = contiguous(q, k, v, g.double(), beta, initial_state, d_o, d_final)
    results = _gradients(q, k, v, g, initial_state)
    native.linear_attention_backward(*addresses(arrays), *addresses(results), *sizes(q, v), clone)
    return tuple(results)


def contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    """What a kernel reads: row-major arrays."""
    return [None if x is None else x.contiguous() for x in tensors]


def _empty(*tensors: Tensor) -> list[Tensor]:
    """Memory for results shaped like these, not filled."""
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in tensors]


def _gradients(q: Tensor, k: Tensor, v: Tensor, g: Tensor, initial_state: Tensor) -> list[Tensor]:
    """Memory for all gradients, in q's dtype."""
    d_g, d_beta = (torch.empty(g.shape, dtype=q.dtype, device=q.device) for _ in range(2))
    d_q, d_k, d_v, d_initial = _empty(q, k, v, initial_state)
    return [d_q, d_k, d_v, d_g, d_beta, d_initial]


def addresses(tensors: list[Tensor | None] | list[Tensor]) -> list[int]:
    """Where they are; 0 for what is left out."""
    return [0 if x is None else x.data_ptr() for x in tensors]


def sizes(q: Tensor, v: Tensor) -> tuple[int, int, int, int, int, bool, int]:
    """Batch, time, heads, dim, value_dim, whether float32, and threads."""
    return *q.shape, v.shape[3], q.dtype == torch.float32, torch.get_num_threads()


def _fake_forward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor | None, initial_state: Tensor
) -> tuple[Tensor, Tensor]:
    o, final_state = _empty(v, initial_state)
    return o, final_state


def _fake_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor | None,
    initial_state: Tensor,
    d_o: Tensor,
    d_final: Tensor,
) -> tuple[Tensor, ...]:
    return tuple(_gradients(q, k, v, g, initial_state))


_library.impl("linear_attention", _forward, "CPU")
_library.impl("linear_attention_backward", _backward, "CPU")
torch.library.register_fake("commissure::linear_attention", _fake_forward, lib=_library)
torch.library.register_fake("commissure::linear_attention_backward", _fake_backward, lib=_library)
