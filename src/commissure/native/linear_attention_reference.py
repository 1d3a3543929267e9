"""Gated linear attention and its gradients, one token after another: slow, and every state kept."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["linear_attention_backward_reference", "linear_attention_reference"]


def linear_attention_reference(
    q: Float[Tensor, "batch time heads dim"],
    k: Float[Tensor, "batch time heads dim"],
    v: Float[Tensor, "batch time heads value_dim"],
    g: Float[Tensor, "batch time heads"],
    beta: Float[Tensor, "batch time heads"] | None,
    initial_state: Float[Tensor, "batch heads dim value_dim"],
) -> tuple[Float[Tensor, "batch time heads value_dim"], Float[Tensor, "batch heads dim value_dim"]]:
    """`linear_attention` written down as its definition.

    >>> one = torch.ones(1, 2, 1, 1)
    >>> o, state = linear_attention_reference(one, one, one, 0 * one[..., 0], None, one[:, 0, :, None])
    >>> o.flatten().tolist(), state.item()
    ([2.0, 3.0], 3.0)
    """
    states = _states(k, v, g, beta, initial_state)
    outputs = [torch.einsum("bhd,bhde->bhe", q[:, t], state) for t, state in enumerate(states[1:])]
    return torch.stack(outputs, 1) if outputs else torch.zeros_like(v), states[-1]


def linear_attention_backward_reference(
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
    """`linear_attention_backward` by the recurrence of the state's gradient.

    >>> one, zero = torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1)
    >>> grads = linear_attention_backward_reference(one, one, 2 * one, zero, None, 3 * one, one, 0 * one)
    >>> [grad.item() for grad in grads]
    [5.0, 2.0, 1.0, 3.0, 2.0, 1.0]
    """
    states = _states(k, v, g, beta, initial_state)
    strength = torch.ones(g.shape, dtype=q.dtype) if beta is None else beta
    grads = [torch.zeros_like(x, dtype=q.dtype) for x in (q, k, v, g, g)]
    d_q, d_k, d_v, d_g, d_beta = grads
    d_state = d_final.clone()
    for t in reversed(range(q.shape[1])):
        d_state = d_state + q[:, t, :, :, None] * d_o[:, t, :, None, :]
        d_q[:, t] = torch.einsum("bhde,bhe->bhd", states[t + 1], d_o[:, t])
        by_value = torch.einsum("bhde,bhe->bhd", d_state, v[:, t])
        d_beta[:, t] = (by_value * k[:, t]).sum(-1)
        d_k[:, t] = strength[:, t, :, None] * by_value
        d_v[:, t] = strength[:, t, :, None] * torch.einsum("bhde,bhd->bhe", d_state, k[:, t])
        d_state = g[:, t, :, None, None].exp().to(k.dtype) * d_state
        d_g[:, t] = (d_state * states[t]).sum((-2, -1))
    return d_q, d_k, d_v, d_g, d_beta, d_state


def _states(k: Tensor, v: Tensor, g: Tensor, beta: Tensor | None, initial_state: Tensor) -> list[Tensor]:
    """The states before each token, and after the last."""
    states = [initial_state]
    for t in range(k.shape[1]):
        written = k[:, t, :, :, None] * v[:, t, :, None, :]
        written = written if beta is None else beta[:, t, :, None, None] * written
        states.append(g[:, t, :, None, None].exp().to(k.dtype) * states[-1] + written)
    return states
