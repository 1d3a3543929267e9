"""RG-LRU in the Hawk block: a gated linear recurrence of single numbers, one a channel.

    r_t = sigmoid(W_a x_t + b_a)      i_t = sigmoid(W_x x_t + b_x)      log a_t = -8 softplus(L) r_t
    h_t = a_t h_{t-1} + sqrt(1 - a_t^2) (i_t x_t)
    block: y = W_out (gelu(W_gate u) * h),   x = conv4(W_in u)

L starts so that the decay at r = 1, exp(-8 softplus(L)), is uniform in [.9, .999].  The recurrence runs in chunks of
about sqrt(time): all chunks side by side from rest, then their start states carried in with products of decays, which
are never divided, so that vanishing ones are exact.  The backward, by hand, is the same recurrence from the end.
When to use: width without heads, the smallest state; it cannot look up by key, so it is paired with mixers that can.

| paper | here |
|---|---|
| Lambda, c | `decay` (L), `SHARPNESS` |
| W_a, W_x | `a_proj`, `b_proj` |

De et al., arXiv 2402.19427, section 2.4 (equations 1-4) and figure 2; no reset at the first element; width 1.25 dim as
in the Hawk-Mesa model of arXiv 2506.05233.  `gate_blocks=16` gives the block-diagonal W_a, W_x of that paper's
experiments, with which a Hawk block has as many parameters as attention.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from commissure.core.errors import InputError
from commissure.core.first_order import first_order_only
from commissure.nn.convolution import ShortConvolution
from commissure.nn.linear_attention import compute_dtype
from commissure.nn.padding import check_sequence, check_step, zero_padding

__all__ = ["RGLRU", "RGLRUState", "linear_recurrence", "linear_recurrence_reference"]

SHARPNESS = 8.0  # the paper's c


class RGLRUState(NamedTuple):
    """The last conv_size - 1 inputs of the convolution, oldest first, and the state, never in half precision."""

    inputs: Float[Tensor, "batch past inner"]
    hidden: Float[Tensor, "batch inner"]


class RGLRU(nn.Module):
    """One Hawk block as a sequence mixer; the recurrence has round(width * dim) channels.

    `gate_blocks`: blocks on the diagonal of W_a and W_x, nothing beside them; it divides the channels (1: dense).

    >>> layer = RGLRU(8)
    >>> y, state = layer(torch.zeros(2, 3, 8))
    >>> y.shape, state.hidden.shape
    (torch.Size([2, 3, 8]), torch.Size([2, 10]))
    """

    def __init__(self, dim: int, *, width: float = 1.25, conv_size: int = 4, gate_blocks: int = 1) -> None:
        super().__init__()
        inner = round(width * dim)
        for name, size in {"dim": dim, "width * dim": inner, "conv_size": conv_size}.items():
            if size < 1:
                raise InputError(name, size, "an integer >= 1")
        if gate_blocks < 1 or inner % gate_blocks:
            raise InputError("gate_blocks", gate_blocks, f"a divisor of width * dim = {inner}", "1 is one dense block")
        self.dim, self.inner, self.conv_size = dim, inner, conv_size
        self.in_proj = nn.Linear(dim, inner, bias=False)
        self.gate_proj = nn.Linear(dim, inner, bias=False)
        self.conv1d = ShortConvolution(inner, conv_size)
        self.a_proj, self.b_proj = BlockLinear(inner, gate_blocks), BlockLinear(inner, gate_blocks)
        self.decay = nn.Parameter(torch.empty(inner))
        self.out_proj = nn.Linear(inner, dim, bias=False)
        self._init_weights()

    def init_state(
        self, batch_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> RGLRUState:
        """Nothing seen: zeros."""
        device, dtype = device or self.decay.device, dtype or self.decay.dtype
        inputs = torch.zeros(batch_size, self.conv_size - 1, self.inner, device=device, dtype=dtype)
        return RGLRUState(inputs, inputs.new_zeros(batch_size, self.inner, dtype=compute_dtype(inputs)))

    def step(self, x_t: Float[Tensor, "batch dim"], state: RGLRUState) -> tuple[Float[Tensor, "batch dim"], RGLRUState]:
        """One element in, one out: the recurrence."""
        check_step(x_t, self.dim, state)
        x, inputs = self.conv1d(self.in_proj(x_t[:, None]), state.inputs)
        log_a, gain = self.gates(x[:, 0])
        hidden = log_a.exp() * state.hidden + gain * x[:, 0]
        return self.out_proj(F.gelu(self.gate_proj(x_t)) * hidden.to(x_t.dtype)), RGLRUState(inputs, hidden)

    def forward(
        self,
        x: Float[Tensor, "batch time dim"],
        state: RGLRUState | None = None,
        *,
        lengths: Int[Tensor, " batch"] | None = None,
    ) -> tuple[Float[Tensor, "batch time dim"], RGLRUState]:
        """A whole stretch by chunks."""
        check_sequence(x, self.dim, state, lengths)
        state = self.init_state(x.shape[0], device=x.device, dtype=x.dtype) if state is None else state
        x = zero_padding(x, lengths)
        signal, inputs = self.conv1d(self.in_proj(x), state.inputs, lengths=lengths)
        log_a, gain = self.gates(signal)
        # With a = 1 and nothing added the state stays as it is, so padding needs nothing else.
        a, added = zero_padding(log_a, lengths).exp(), zero_padding(gain * signal, lengths)
        h, hidden = linear_recurrence(a, added, state.hidden)
        return self.out_proj(F.gelu(self.gate_proj(x)) * h.to(x.dtype)), RGLRUState(inputs, hidden)

    def gates(
        self, x: Float[Tensor, "*batch inner"]
    ) -> tuple[Float[Tensor, "*batch inner"], Float[Tensor, "*batch inner"]]:
        """log a <= 0, and sqrt(1 - a^2) times the input gate; never in half precision, where 1 - a^2 has no digits."""
        recurrence, write = (projection(x).to(compute_dtype(x)).sigmoid() for projection in (self.a_proj, self.b_proj))
        log_a = -SHARPNESS * F.softplus(self.decay).to(recurrence.dtype) * recurrence
        # 1 - a^2 without cancellation; at a = 1 the root has no finite slope, the smallest number stands in for 0.
        room = (-torch.expm1(2 * log_a)).clamp(min=torch.finfo(log_a.dtype).tiny)
        return log_a, room.sqrt() * write

    def _init_weights(self) -> None:
        for projection in (self.in_proj, self.gate_proj, self.a_proj, self.b_proj, self.out_proj):
            nn.init.normal_(projection.weight, std=projection.in_features**-0.5)
        for gate in (self.a_proj, self.b_proj):
            nn.init.zeros_(gate.bias)
        with torch.no_grad():
            rate = -self.decay.uniform_(0.9, 0.999).log() / SHARPNESS
            self.decay.copy_(torch.log(torch.expm1(rate)))  # the inverse of softplus


class BlockLinear(nn.Linear):
    """W x + b, W block-diagonal: `weight` is (width, width / blocks), the blocks below each other."""

    def __init__(self, width: int, blocks: int) -> None:
        super().__init__(width // blocks, width)
        self.blocks = blocks

    def forward(self, input: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        """Each block reads its own channels."""
        if self.blocks == 1:
            return super().forward(input)
        weight = self.weight.unflatten(0, (self.blocks, -1))
        read = torch.einsum("...bi,boi->...bo", input.unflatten(-1, (self.blocks, -1)), weight)
        return read.flatten(-2) + self.bias


def linear_recurrence(
    a: Float[Tensor, "batch time dim"],
    x: Float[Tensor, "batch time dim"],
    initial_state: Float[Tensor, "batch dim"] | None = None,
) -> tuple[Float[Tensor, "batch time dim"], Float[Tensor, "batch dim"]]:
    """h_t = a_t h_{t-1} + x_t channel by channel: every h, and the last; 0 <= a <= 1, any length, zero included.

    >>> a, x = torch.full((1, 3, 1), 0.5), torch.ones(1, 3, 1)
    >>> linear_recurrence(a, x)[0].flatten().tolist()
    [1.0, 1.5, 1.75]
    """
    _check(a, x, initial_state)
    first = x.new_zeros(x.shape[0], x.shape[2]) if initial_state is None else initial_state
    h = _LinearRecurrence.apply(a, x, first)
    return h, torch.cat([first[:, None], h], 1)[:, -1]


def linear_recurrence_reference(
    a: Float[Tensor, "batch time dim"],
    x: Float[Tensor, "batch time dim"],
    initial_state: Float[Tensor, "batch dim"] | None = None,
) -> tuple[Float[Tensor, "batch time dim"], Float[Tensor, "batch dim"]]:
    """The recurrence element by element, differentiated by autograd."""
    _check(a, x, initial_state)
    h = x.new_zeros(x.shape[0], x.shape[2]) if initial_state is None else initial_state
    outputs = []
    for a_t, x_t in zip(a.unbind(1), x.unbind(1), strict=True):
        h = a_t * h + x_t
        outputs.append(h)
    return torch.stack(outputs, 1) if outputs else torch.zeros_like(x), h


class _LinearRecurrence(torch.autograd.Function):
    """The adjoint l_t = dL/dh_t + a_{t+1} l_{t+1} is the recurrence from the end; dx = l, da_t = l_t h_{t-1}."""

    @staticmethod
    def forward(ctx: FunctionCtx, a: Tensor, x: Tensor, first: Tensor) -> Tensor:
        h = _recur(a, x, first)
        ctx.save_for_backward(a, h, first)
        return h

    @staticmethod
    @first_order_only("linear_recurrence", "linear_recurrence_reference")
    def backward(ctx: FunctionCtx, d_h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        a, h, first = ctx.saved_tensors  # type: ignore[attr-defined]
        if a.shape[1] == 0:
            return torch.zeros_like(a), torch.zeros_like(a), torch.zeros_like(first)
        following = torch.cat([a[:, 1:], torch.zeros_like(a[:, :1])], 1)
        adjoint = _recur(following.flip(1), d_h.flip(1), torch.zeros_like(first)).flip(1)
        d_a = adjoint * torch.cat([first[:, None], h[:, :-1]], 1)
        return d_a, adjoint, adjoint[:, 0] * a[:, 0]


def _recur(a: Tensor, x: Tensor, first: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch time dim"]:
    """Chunks of about sqrt(time) side by side from rest, then the state each of them starts from."""
    batch, time, dim = x.shape
    if x.numel() == 0:
        return torch.zeros_like(x)
    length = math.isqrt(time - 1) + 1
    n_chunks = -(-time // length)
    fill = (0, 0, 0, n_chunks * length - time)
    # Copies (F.pad makes one even where it adds nothing) with the time within the chunk first: each step of the loops
    # below works on one block of memory.
    a, x = (F.pad(t, fill).view(batch, n_chunks, length, dim).transpose(0, 2).contiguous() for t in (a, x))
    for step in range(1, length):
        x[step].addcmul_(a[step], x[step - 1])
        a[step].mul_(a[step - 1])
    starts = torch.empty_like(x[0])
    starts[0] = first
    for chunk in range(1, n_chunks):
        torch.addcmul(x[-1, chunk - 1], a[-1, chunk - 1], starts[chunk - 1], out=starts[chunk])
    h = x.addcmul_(a, starts)
    return h.transpose(0, 2).reshape(batch, n_chunks * length, dim)[:, :time]


def _check(a: Tensor, x: Tensor, initial_state: Tensor | None) -> None:
    """Raise `InputError` unless the tensors belong together."""
    if x.ndim != 3:
        raise InputError("x", tuple(x.shape), "shape (batch, time, dim)")
    if a.shape != x.shape:
        raise InputError("a", tuple(a.shape), f"shape {tuple(x.shape)}, as x")
    if initial_state is not None and initial_state.shape != (x.shape[0], x.shape[2]):
        raise InputError("initial_state", tuple(initial_state.shape), f"shape {(x.shape[0], x.shape[2])}")
