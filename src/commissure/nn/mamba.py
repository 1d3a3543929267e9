"""Mamba, the selective state-space layer (Mamba-1), with a scan that never divides by a vanishing decay.

    x, z = W_in u                          x = silu(causal depthwise conv(x))
    delta, B, C = W_x x                    dt = softplus(W_dt delta + b)
    h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t,    y_t = C_t . h_t + D x_t
    out = W_out (y silu(z))

| paper | here | shape |
|---|---|---|
| E, N | `inner`, `d_state` | expand * dim, 16 |
| A = -exp(A_log) | `log_decay` | (d_state, inner), the published layout transposed: the long axis comes last |
| Delta | `dt` | (batch, time, inner) |

Gu & Dao, arXiv 2312.00752: algorithm 2, section 3.6 (A_n = -n, dt log-uniform in [1e-3, 1e-1]); no bias in W_in, W_x,
W_out.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from commissure.core.errors import InputError
from commissure.nn.convolution import causal_convolution
from commissure.nn.padding import check_sequence, check_step, last_elements, zero_padding

__all__ = ["Mamba", "MambaState", "selective_scan", "selective_scan_reference"]

# Rows (batch * chunks) the scan works on at once: enough to hide the cost of a torch call (about 5 us) at inner = 512.
ROWS = 32


class MambaState(NamedTuple):
    """The last d_conv - 1 inputs of the convolution, oldest first, and the state-space state."""

    inputs: Float[Tensor, "batch past inner"]
    hidden: Float[Tensor, "batch d_state inner"]


class Mamba(nn.Module):
    """One Mamba-1 layer as a sequence mixer; `dt_rank` defaults to dim / 16, rounded up.

    >>> layer = Mamba(8, d_state=4)
    >>> y, state = layer(torch.zeros(2, 3, 8))
    >>> y.shape, state.inputs.shape, state.hidden.shape
    (torch.Size([2, 3, 8]), torch.Size([2, 3, 16]), torch.Size([2, 4, 16]))
    """

    def __init__(
        self, dim: int, *, expand: int = 2, d_state: int = 16, d_conv: int = 4, dt_rank: int | None = None
    ) -> None:
        super().__init__()
        dt_rank = math.ceil(dim / 16) if dt_rank is None else dt_rank
        sizes = {"dim": dim, "expand": expand, "d_state": d_state, "d_conv": d_conv, "dt_rank": dt_rank}
        for name, size in sizes.items():
            if size < 1:
                raise InputError(name, size, "an integer >= 1")
        self.dim, self.inner, self.d_state, self.d_conv, self.dt_rank = dim, expand * dim, d_state, d_conv, dt_rank
        inner = self.inner
        self.in_proj = nn.Linear(dim, 2 * inner, bias=False)
        bound = d_conv**-0.5  # the default of a depthwise torch.nn.Conv1d
        self.conv_weight = nn.Parameter(torch.empty(inner, d_conv).uniform_(-bound, bound))
        self.conv_bias = nn.Parameter(torch.empty(inner).uniform_(-bound, bound))
        self.x_proj = nn.Linear(inner, dt_rank + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(dt_rank, inner)
        self.log_decay = nn.Parameter(torch.arange(1.0, d_state + 1).log()[:, None].repeat(1, inner))
        self.skip = nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(inner, dim, bias=False)
        self._init_dt()

    def init_state(
        self, batch_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> MambaState:
        """Nothing seen: zeros."""
        device, dtype = device or self.skip.device, dtype or self.skip.dtype
        inputs = torch.zeros(batch_size, self.d_conv - 1, self.inner, device=device, dtype=dtype)
        return MambaState(inputs, torch.zeros(batch_size, self.d_state, self.inner, device=device, dtype=dtype))

    def step(self, x_t: Float[Tensor, "batch dim"], state: MambaState) -> tuple[Float[Tensor, "batch dim"], MambaState]:
        """One element in, one out: the recurrence."""
        check_step(x_t, self.dim, state)
        signal, gate = self.in_proj(x_t).chunk(2, -1)
        window = torch.cat([state.inputs, signal[:, None]], 1)
        u = F.silu(causal_convolution(window, self.conv_weight, self.conv_bias)[:, 0])
        dt, b, c = self._select(u)
        decay = torch.exp(dt[:, None] * -self.log_decay.exp())
        hidden = decay * state.hidden + b[:, :, None] * (dt * u)[:, None]
        y = (c[:, :, None] * hidden).sum(1) + self.skip * u
        return self.out_proj(y * F.silu(gate)), MambaState(window[:, 1:], hidden)

    def forward(
        self,
        x: Float[Tensor, "batch time dim"],
        state: MambaState | None = None,
        *,
        lengths: Int[Tensor, " batch"] | None = None,
    ) -> tuple[Float[Tensor, "batch time dim"], MambaState]:
        """A whole stretch: one pass of matrix products, one scan."""
        check_sequence(x, self.dim, state, lengths)
        batch, time = x.shape[:2]
        state = self.init_state(batch, device=x.device, dtype=x.dtype) if state is None else state
        if x.numel() == 0:
            return x.new_zeros(batch, time, self.dim), state
        signal, gate = self.in_proj(zero_padding(x, lengths)).chunk(2, -1)
        history = torch.cat([state.inputs, signal], 1)
        u = F.silu(causal_convolution(history, self.conv_weight, self.conv_bias))
        dt, b, c = self._select(u)
        # A step with dt = 0 keeps the state, so padding needs nothing else.
        dt = zero_padding(dt, lengths)
        y, hidden = selective_scan(u, dt, -self.log_decay.exp(), b, c, state.hidden)
        y = (y + self.skip * u) * F.silu(gate)
        past = self.d_conv - 1
        inputs = history[:, time:] if lengths is None else last_elements(history, lengths + past, past)
        return self.out_proj(y), MambaState(inputs, hidden)

    def _select(self, u: Float[Tensor, "*batch inner"]) -> tuple[Tensor, Tensor, Tensor]:
        """Step size, input and output vectors chosen by the element itself."""
        delta, b, c = self.x_proj(u).split([self.dt_rank, self.d_state, self.d_state], -1)
        return F.softplus(self.dt_proj(delta)), b, c

    def _init_dt(self) -> None:
        """dt log-uniform in [1e-3, 1e-1] at zero input (section 3.6), floored at 1e-4 as in the published code."""
        bound = self.dt_rank**-0.5
        low, high = math.log(1e-3), math.log(1e-1)
        with torch.no_grad():
            self.dt_proj.weight.uniform_(-bound, bound)
            dt = torch.exp(low + (high - low) * torch.rand(self.inner)).clamp(min=1e-4)
            self.dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus


def selective_scan(
    u: Float[Tensor, "batch time inner"],
    dt: Float[Tensor, "batch time inner"],
    a: Float[Tensor, "d_state inner"],
    b: Float[Tensor, "batch time d_state"],
    c: Float[Tensor, "batch time d_state"],
    hidden: Float[Tensor, "batch d_state inner"],
    *,
    rows: int = ROWS,
) -> tuple[Float[Tensor, "batch time inner"], Float[Tensor, "batch d_state inner"]]:
    """h_t = exp(dt_t a) h_{t-1} + dt_t b_t u_t, y_t = c_t . h_t for dt >= 0, a < 0; outputs and the last state.

    Long sequences are cut into chunks that are scanned side by side (`rows` rows of batch * chunk at once) from rest;
    then each chunk's start state is carried in with the decay exp(a * sum dt), whose exponent is never positive.
    """
    batch, time, inner = u.shape
    n_chunks = min(max(1, rows // max(batch, 1)), math.isqrt(time)) or 1
    if n_chunks == 1:
        return _scan(u, dt, a, b, c, hidden)
    length = math.ceil(time / n_chunks)
    n_chunks = math.ceil(time / length)
    # dt = 0 keeps the state: the last chunk is filled up with it.
    padded = [F.pad(t, (0, 0, 0, n_chunks * length - time)) for t in (u, dt, b, c)]
    u, dt, b, c = (t.reshape(batch * n_chunks, length, -1) for t in padded)
    y, ends = _scan(u, dt, a, b, c, hidden.new_zeros(batch * n_chunks, *hidden.shape[1:]))
    elapsed = dt.cumsum(1)
    decay = torch.exp(a * elapsed[:, -1, None]).view(batch, n_chunks, *a.shape)
    ends = ends.view(batch, n_chunks, *a.shape)
    starts = []
    for k in range(n_chunks):
        starts.append(hidden)
        hidden = decay[:, k] * hidden + ends[:, k]
    y = y + _carry(torch.stack(starts, 1).flatten(0, 1), elapsed, a, c)
    return y.reshape(batch, n_chunks * length, inner)[:, :time], hidden


def selective_scan_reference(
    u: Float[Tensor, "batch time inner"],
    dt: Float[Tensor, "batch time inner"],
    a: Float[Tensor, "d_state inner"],
    b: Float[Tensor, "batch time d_state"],
    c: Float[Tensor, "batch time d_state"],
    hidden: Float[Tensor, "batch d_state inner"],
) -> tuple[Float[Tensor, "batch time inner"], Float[Tensor, "batch d_state inner"]]:
    """`selective_scan` number by number, as the recurrence is written."""
    batch, time, inner = u.shape
    y, h = torch.zeros_like(u), hidden.clone()
    for row in range(batch):
        for e in range(inner):
            for t in range(time):
                for n in range(a.shape[0]):
                    decay = math.exp(float(dt[row, t, e] * a[n, e]))
                    h[row, n, e] = decay * h[row, n, e] + dt[row, t, e] * b[row, t, n] * u[row, t, e]
                    y[row, t, e] += c[row, t, n] * h[row, n, e]
    return y, h


def _scan(
    u: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, hidden: Float[Tensor, "rows d_state inner"]
) -> tuple[Float[Tensor, "rows time inner"], Float[Tensor, "rows d_state inner"]]:
    """The recurrence over time, all rows at once."""
    outputs = []
    for dt_t, gain_t, b_t, c_t in zip(dt.unbind(1), (dt * u).unbind(1), b.unbind(1), c.unbind(1), strict=True):
        decay = (dt_t[:, None] * a).exp_()
        hidden = torch.addcmul(decay * hidden, b_t[:, :, None], gain_t[:, None])
        outputs.append(torch.bmm(c_t[:, None], hidden))
    return torch.cat(outputs, 1), hidden


def _carry(
    starts: Float[Tensor, "rows d_state inner"], elapsed: Float[Tensor, "rows time inner"], a: Tensor, c: Tensor
) -> Float[Tensor, "rows time inner"]:
    """What each chunk's start state adds to its outputs."""
    added = [
        torch.bmm(c_t[:, None], (a * elapsed_t[:, None]).exp_() * starts)
        for elapsed_t, c_t in zip(elapsed.unbind(1), c.unbind(1), strict=True)
    ]
    return torch.cat(added, 1)
