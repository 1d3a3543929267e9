"""What the linear mixers share around their recurrence: heads, queries, keys, values in, one vector out.

    q = l2(silu(conv(W_q x)))    k = l2(silu(conv(W_k x)))    v = W_v x
    y = W_o rms(o)               per head, one set of weights for all heads

Gated linear attention, DeltaNet, Gated DeltaNet and Mesa differ in the recurrence alone: same projections, same
convolution (on queries and keys, not on values), same norms, one scalar gate a head from `gate_projection`.
von Oswald et al., arXiv 2506.05233, appendix E.  Module names are those of flash-linear-attention, so its weights load.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from commissure.core.errors import InputError
from commissure.nn.convolution import ShortConvolution
from commissure.nn.padding import zero_padding

__all__ = ["ConvState", "HeadInputs", "HeadOutput", "gate_projection", "head_sizes", "l2_normalize"]

# Under the root of the L2 norm, as in flash-linear-attention: a zero vector (an element before the first) has a
# gradient, and a normalized vector is never longer than 1.
L2_EPS = 1e-6
FORGET_BIAS = 4.0  # a new forget gate lets 98 % through: sigmoid(4) = .982


class ConvState(NamedTuple):
    """The last conv_size - 1 projected queries and keys before the convolution, newest last, zeros before the first."""

    queries: Float[Tensor, "batch past heads_x_dim"]
    keys: Float[Tensor, "batch past heads_x_dim"]


def head_sizes(dim: int, heads: int | None, head_dim: int | None) -> tuple[int, int]:
    """Heads and their width: `heads` defaults to dim // 64 (at least 1), `head_dim` to dim // heads.

    >>> head_sizes(256, None, None), head_sizes(256, 2, 16)
    ((4, 64), (2, 16))
    """
    if not isinstance(dim, int) or dim < 1:
        raise InputError("dim", dim, "an integer >= 1")
    heads = max(1, dim // 64) if heads is None else heads
    if not isinstance(heads, int) or heads < 1:
        raise InputError("heads", heads, "an integer >= 1")
    head_dim = dim // heads if head_dim is None else head_dim
    if not isinstance(head_dim, int) or head_dim < 1:
        raise InputError("head_dim", head_dim, "an integer >= 1", "pass head_dim, or no more heads than dim")
    return heads, head_dim


def l2_normalize(x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
    """x / sqrt(|x|^2 + 1e-6) over the last axis."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + L2_EPS)


def gate_projection(dim: int, heads: int, *, bias: float = 0.0) -> nn.Linear:
    """The logits of one scalar gate a head: fan-in normal weights, all biases `bias` (`FORGET_BIAS` to remember)."""
    projection = nn.Linear(dim, heads)
    nn.init.normal_(projection.weight, std=dim**-0.5)
    nn.init.constant_(projection.bias, bias)
    return projection


class HeadInputs(nn.Module):
    """Queries and keys (batch, time, heads, head_dim) and values (batch, time, heads, value_dim) from vectors.

    `value_dim` defaults to `head_dim`; `conv_size=1` leaves the convolution out (a state of no columns); `silu` and
    `normalize` turn off the nonlinearity and the L2 norm of queries and keys.  Past a row's length the values are
    zero; queries and keys are not (the convolution reaches there), so the caller's gates must close.

    >>> inputs = HeadInputs(8, heads=2, head_dim=3, value_dim=5)
    >>> q, k, v, state = inputs(torch.zeros(1, 4, 8))
    >>> q.shape, v.shape, state.keys.shape
    (torch.Size([1, 4, 2, 3]), torch.Size([1, 4, 2, 5]), torch.Size([1, 3, 6]))
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int,
        head_dim: int,
        value_dim: int | None = None,
        conv_size: int = 4,
        silu: bool = True,
        normalize: bool = True,
    ) -> None:
        super().__init__()
        heads, head_dim = head_sizes(dim, heads, head_dim)
        value_dim = head_dim if value_dim is None else value_dim
        for name, size in {"value_dim": value_dim, "conv_size": conv_size}.items():
            if size < 1:
                raise InputError(name, size, "an integer >= 1")
        self.dim, self.heads, self.head_dim, self.value_dim = dim, heads, head_dim, value_dim
        self.conv_size, self.silu, self.normalize = conv_size, silu, normalize
        self.q_proj = _fan_in_normal(dim, heads * head_dim)
        self.k_proj = _fan_in_normal(dim, heads * head_dim)
        self.v_proj = _fan_in_normal(dim, heads * value_dim)
        if conv_size > 1:
            self.q_conv1d = ShortConvolution(heads * head_dim, conv_size)
            self.k_conv1d = ShortConvolution(heads * head_dim, conv_size)

    def init_state(
        self, batch_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> ConvState:
        """Nothing seen: zeros."""
        weight = self.q_proj.weight
        shape = (batch_size, self.conv_size - 1, self.heads * self.head_dim)
        past = torch.zeros(shape, device=device or weight.device, dtype=dtype or weight.dtype)
        return ConvState(past, past)

    def forward(
        self,
        x: Float[Tensor, "batch time dim"],
        state: ConvState | None = None,
        *,
        lengths: Int[Tensor, " batch"] | None = None,
    ) -> tuple[
        Float[Tensor, "batch time heads head_dim"],
        Float[Tensor, "batch time heads head_dim"],
        Float[Tensor, "batch time heads value_dim"],
        ConvState,
    ]:
        """Queries, keys, values, and the state at each row's length; one element is a stretch of time 1."""
        state = self.init_state(x.shape[0], device=x.device, dtype=x.dtype) if state is None else state
        x = zero_padding(x, lengths)
        q, k = self.q_proj(x), self.k_proj(x)
        if self.conv_size > 1:
            q, queries = self.q_conv1d(q, state.queries, lengths=lengths)
            k, keys = self.k_conv1d(k, state.keys, lengths=lengths)
            state = ConvState(queries, keys)
        q, k = (self._activate(t.unflatten(-1, (self.heads, self.head_dim))) for t in (q, k))
        return q, k, self.v_proj(x).unflatten(-1, (self.heads, self.value_dim)), state

    def _activate(self, x: Float[Tensor, "batch time heads head_dim"]) -> Float[Tensor, "batch time heads head_dim"]:
        x = F.silu(x) if self.silu else x
        return l2_normalize(x) if self.normalize else x


class HeadOutput(nn.Module):
    """One vector from the heads: RMS norm of each (unless `norm=False`; weights shared by the heads), projection.

    >>> HeadOutput(8, heads=2, value_dim=5)(torch.zeros(1, 4, 2, 5)).shape
    torch.Size([1, 4, 8])
    """

    def __init__(self, dim: int, *, heads: int, value_dim: int, norm: bool = True) -> None:
        super().__init__()
        self.o_norm = nn.RMSNorm(value_dim, eps=1e-5) if norm else nn.Identity()
        self.o_proj = _fan_in_normal(heads * value_dim, dim)

    def forward(self, o: Float[Tensor, "batch time heads value_dim"]) -> Float[Tensor, "batch time dim"]:
        """Merge the heads."""
        return self.o_proj(self.o_norm(o).flatten(-2))


def _fan_in_normal(inputs: int, outputs: int) -> nn.Linear:
    """A projection without bias whose outputs have the inputs' variance."""
    projection = nn.Linear(inputs, outputs, bias=False)
    nn.init.normal_(projection.weight, std=inputs**-0.5)
    return projection
