"""Gradients of the Mesa layer on a CPU, both its linear attentions at once, a head after the other in short chunks.

With x_t = (H_t + Lambda)^-1 q_t, e_t the gradient of o_t = G_t x_t, and that of q_t, y_t = (H_t + Lambda)^-1 G_t^T e_t,
the others are those of

    sum_t e_t^T G_t x_t - sum_t y_t^T (H_t + Lambda) x_t + <d_h_kv, G_T^T> + <d_h_kk, H_T>     at x and y held fixed

    paper            here
    q*_t             x
    log gamma_t      g           log of the forget gate, -inf forgets everything
    beta_t           beta        input gate
    Lambda           lamb
    H_t, G_t^T       h_kk, h_kv  states, key-major; h_kk symmetric

Against two backwards of `linear_attention`, one product with a state replaces two, half of the Gram and of its gradient
is enough, and the gates' gradients follow from a conservation law instead of from the states (mesa_gradients.h).  The
law's terms are as large as the outputs', whatever the gate: heads where some gate is below exp(`FAST`) take theirs,
which are proportional to the gate, from the two backwards.
Source: von Oswald et al., arXiv 2506.05233, appendix D.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from commissure.core.errors import InputError
from commissure.native import kernels
from commissure.native.linear_attention import addresses, contiguous, linear_attention_backward, sizes
from commissure.native.linear_attention_reference import linear_attention_backward_reference

__all__ = ["MesaGradients", "mesa_gradients", "mesa_gradients_reference"]

FAST = -1.0  # above it, the law's rounding costs a gate's gradient less than three times its own


class MesaGradients(NamedTuple):
    """Gradients of the layer's arguments but q, of which it is `y`."""

    k: Float[Tensor, "batch time heads dim"]
    v: Float[Tensor, "batch time heads value_dim"]
    g: Float[Tensor, "batch time heads"]
    beta: Float[Tensor, "batch time heads"]
    lamb: Float[Tensor, "heads dim"]
    h_kk: Float[Tensor, "batch heads dim dim"]
    h_kv: Float[Tensor, "batch heads dim value_dim"]


def mesa_gradients(
    x: Float[Tensor, "batch time heads dim"],
    y: Float[Tensor, "batch time heads dim"],
    k: Float[Tensor, "batch time heads dim"],
    v: Float[Tensor, "batch time heads value_dim"],
    g: Float[Tensor, "batch time heads"],
    beta: Float[Tensor, "batch time heads"],
    lamb: Float[Tensor, "heads dim"],
    h_kk: Float[Tensor, "batch heads dim dim"],
    h_kv: Float[Tensor, "batch heads dim value_dim"],
    d_o: Float[Tensor, "batch time heads value_dim"],
    d_h_kk: Float[Tensor, "batch heads dim dim"],
    d_h_kv: Float[Tensor, "batch heads dim value_dim"],
) -> MesaGradients:
    """Gradients from those of the outputs and of the last states; that of h_kk is symmetric.

    `y` must be the solution: the gates' gradients rest on it.  CPU tensors, all float32 or all float64, but
    g may be float64 beside float32; any time >= 0.  Runs on up to `torch.get_num_threads()` threads, with the same
    bits for any number.  Raises InputError for shapes or dtypes that do not fit.

    >>> one = torch.ones(1, 1, 1, 1)  # o = v k q / (k k + 1) = 1 / 2 at k = q = v = 1; x = y = 1 / 2
    >>> gate, state = torch.zeros(1, 1, 1), torch.zeros(1, 1, 1, 1)
    >>> grads = mesa_gradients(one / 2, one / 2, one, one, gate, gate + 1, one[0, 0], state, state, one, state, state)
    >>> [grad.item() for grad in grads]
    [0.0, 0.5, 0.0, 0.25, -0.25, -0.25, 0.5]
    """
    is_float = x.dtype in (torch.float32, torch.float64)
    if x.ndim != 4 or x.shape[3] < 1 or not is_float or x.device.type not in ("cpu", "meta"):
        found = (tuple(x.shape), str(x.dtype), x.device.type)
        raise InputError("x", found, "a float32 or float64 CPU tensor [batch, time, heads, dim], dim >= 1")
    batch, time, heads, dim = x.shape
    if v.ndim != 4 or v.shape[:3] != x.shape[:3] or v.shape[3] < 1:
        raise InputError("v", tuple(v.shape), f"shape ({batch}, {time}, {heads}, value_dim >= 1), to fit x")
    gates, gram, memory = (batch, time, heads), (batch, heads, dim, dim), (batch, heads, dim, v.shape[3])
    _check(x, (gates, torch.float64), g=g)
    _check(x, (x.shape, x.dtype), y=y, k=k)
    _check(x, (gates, x.dtype), beta=beta)
    _check(x, ((heads, dim), x.dtype), lamb=lamb)
    _check(x, (gram, x.dtype), h_kk=h_kk, d_h_kk=d_h_kk)
    _check(x, (memory, x.dtype), h_kv=h_kv, d_h_kv=d_h_kv)
    _check(x, (v.shape, x.dtype), v=v, d_o=d_o)
    operands = (x, y, k, v, g, beta, lamb, h_kk, h_kv, d_o, d_h_kk, d_h_kv)
    return MesaGradients(*torch.ops.commissure.mesa_gradients(*operands))


def mesa_gradients_reference(
    x: Float[Tensor, "batch time heads dim"],
    y: Float[Tensor, "batch time heads dim"],
    k: Float[Tensor, "batch time heads dim"],
    v: Float[Tensor, "batch time heads value_dim"],
    g: Float[Tensor, "batch time heads"],
    beta: Float[Tensor, "batch time heads"],
    lamb: Float[Tensor, "heads dim"],
    h_kk: Float[Tensor, "batch heads dim dim"],
    h_kv: Float[Tensor, "batch heads dim value_dim"],
    d_o: Float[Tensor, "batch time heads value_dim"],
    d_h_kk: Float[Tensor, "batch heads dim dim"],
    d_h_kv: Float[Tensor, "batch heads dim value_dim"],
) -> MesaGradients:
    """`mesa_gradients` as the difference of two linear attentions' gradients, token by token.

    >>> one = torch.ones(1, 1, 1, 1)
    >>> gate, state = torch.zeros(1, 1, 1), torch.zeros(1, 1, 1, 1)
    >>> operands = (one / 2, one / 2, one, one, gate, gate + 1, one[0, 0], state, state, one, state, state)
    >>> [grad.item() for grad in mesa_gradients_reference(*operands)]
    [0.0, 0.5, 0.0, 0.25, -0.25, -0.25, 0.5]
    """
    value = linear_attention_backward_reference(x, k, v, g, beta, h_kv, d_o, d_h_kv)
    gram = linear_attention_backward_reference(x, k, k, g, beta, h_kk, y, -d_h_kk)
    d_gram = (gram[5] + gram[5].mT) / -2
    d_lamb = -(x * y).sum((0, 1))
    return MesaGradients(
        value[1] - gram[1] - gram[2], value[2], value[3] - gram[3], value[4] - gram[4], d_lamb, d_gram, value[5]
    )


def _check(x: Tensor, wanted: tuple[tuple[int, ...], torch.dtype], **tensors: Tensor) -> None:
    """Raise InputError naming the first that has another shape, dtype (x's will always do) or device."""
    shape, dtype = wanted
    for name, value in tensors.items():
        if value.shape != shape or value.dtype not in (x.dtype, dtype) or value.device != x.device:
            found = (tuple(value.shape), str(value.dtype), value.device.type)
            raise InputError(name, found, f"shape {tuple(shape)}, x's dtype and device, {x.dtype}, {x.device}")


_library = torch.library.Library("commissure", "FRAGMENT")
_library.define(
    "mesa_gradients(Tensor x, Tensor y, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor lamb, Tensor h_kk, "
    "Tensor h_kv, Tensor d_o, Tensor d_h_kk, Tensor d_h_kv) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def _gradients(
    x: Tensor,
    y: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    lamb: Tensor,
    h_kk: Tensor,
    h_kv: Tensor,
    d_o: Tensor,
    d_h_kk: Tensor,
    d_h_kv: Tensor,
    clone: str = "",
) -> tuple[Tensor, ...]:
    """The operator on CPU tensors."""
    native = kernels()
    if native is None:
        return tuple(mesa_gradients_reference(x, y, k, v, g, beta, lamb, h_kk, h_kv, d_o, d_h_kk, d_h_kv))
    arrays = contiguous(x, y, k, v, g.double(), beta, lamb, h_kk, h_kv, d_o, d_h_kk, d_h_kv)
    results = _empty(k, v, beta, lamb.expand(len(x), *lamb.shape), h_kk, h_kv)
    native.mesa_gradients(*addresses(arrays), *addresses(results), *sizes(x, v), clone)
    results[4] = results[4].sum(0)
    fast = ((g < FAST) & (g > -math.inf)).any(1).any(0)
    if bool(fast.any()):
        # The kernel sums the gates' gradients from terms of the size of the outputs': far above those of a gate near 0.
        x, y, k, v, g, beta = (part[:, :, fast] for part in (x, y, k, v, g, beta))
        h_kk, h_kv, d_h_kk, d_h_kv = (part[:, fast] for part in (h_kk, h_kv, d_h_kk, d_h_kv))
        value = linear_attention_backward(x, k, v, g, beta, h_kv, d_o[:, :, fast], d_h_kv)
        gram = linear_attention_backward(x, k, k, g, beta, h_kk, y, -d_h_kk)
        results[2][:, :, fast] = value[3] - gram[3]
    return tuple(results)


def _empty(k: Tensor, v: Tensor, beta: Tensor, lamb: Tensor, h_kk: Tensor, h_kv: Tensor) -> list[Tensor]:
    """Memory for all gradients."""
    shaped = (k, v, beta, beta, lamb, h_kk, h_kv)
    return [torch.empty(a.shape, dtype=a.dtype, device=a.device) for a in shaped]


def _fake(
    x: Tensor,
    y: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    lamb: Tensor,
    h_kk: Tensor,
    h_kv: Tensor,
    d_o: Tensor,
    d_h_kk: Tensor,
    d_h_kv: Tensor,
) -> tuple[Tensor, ...]:
    return tuple(_empty(k, v, beta, lamb, h_kk, h_kv))


_library.impl("mesa_gradients", _gradients, "CPU")
torch.library.register_fake("commissure::mesa_gradients", _fake, lib=_library)
