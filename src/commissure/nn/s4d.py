"""S4D, a diagonal linear state-space model with one input and one output a channel.

    h_t = Abar h_{t-1} + u_t,   v_t = 2 Re(Cbar . h_t) + D u_t,   y = GLU(W gelu(v) + b)
    Abar = exp(dt A),   Cbar = C (Abar - 1) / A        (zero-order hold with B = 1, Bbar folded into the readout)

so that the impulse response of a channel is 2 Re(C Bbar Abar^n), plus D at n = 0.  `forward` is exact and parallel:
inside a chunk a Toeplitz product with the impulse response, between chunks the carried state.  `step` is the
recurrence, O(dim * d_state).  Complex numbers are kept as pairs of real ones.

| paper | here |
|---|---|
| A = -exp(.) + i (.) | `log_decay`, `frequency` |
| Delta | `log_dt` |
| C, D | `readout`, `skip` |

Gu et al., arXiv 2206.11893: S4D-Lin initialization (section 4.3), A_n = -1/2 + i pi n; dt log-uniform in
[1e-3, 1e-1].  d_state = 64 real numbers are 32 conjugate pairs.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from commissure.core.errors import InputError
from commissure.nn.padding import check_sequence, check_step, last_elements, zero_padding

__all__ = ["S4D", "S4DState"]

# Toeplitz products cost O(chunk) an element, the chunk-to-chunk part O(d_state): 64 balances them at the default size.
CHUNK = 64


class S4DState(NamedTuple):
    """The modes: [:, :, 0] their real parts, [:, :, 1] their imaginary parts."""

    modes: Float[Tensor, "batch dim 2 modes"]


class Discrete(NamedTuple):
    """The discrete system: Abar as log-magnitude (< 0) and angle and as a complex number, and Cbar."""

    log_magnitude: Float[Tensor, "dim modes"]
    angle: Float[Tensor, "dim modes"]
    decay_real: Float[Tensor, "dim modes"]
    decay_imag: Float[Tensor, "dim modes"]
    readout_real: Float[Tensor, "dim modes"]
    readout_imag: Float[Tensor, "dim modes"]

    def powers(self, exponents: Float[Tensor, "*batch lags"]) -> Float[Tensor, "*batch dim 2 modes lags"]:
        """Abar to the given powers, real and imaginary parts."""
        exponents = exponents[..., None, None, :]
        magnitude = (self.log_magnitude[..., None] * exponents).exp()
        angle = self.angle[..., None] * exponents
        return torch.stack([magnitude * angle.cos(), magnitude * angle.sin()], -3)


class S4D(nn.Module):
    """One S4D layer as a sequence mixer: kernel, exact GELU, Linear(dim, 2 dim), GLU.

    `d_state` is even and >= 2; `chunk` is the length of the parallel form's pieces and changes no result.

    >>> layer = S4D(4, d_state=8)
    >>> y, state = layer(torch.zeros(2, 3, 4))
    >>> y.shape, state.modes.shape
    (torch.Size([2, 3, 4]), torch.Size([2, 4, 2, 4]))
    """

    def __init__(self, dim: int, *, d_state: int = 64, chunk: int = CHUNK) -> None:
        super().__init__()
        if dim < 1 or chunk < 1:
            raise InputError("dim, chunk", (dim, chunk), "integers >= 1")
        if d_state < 2 or d_state % 2:
            raise InputError("d_state", d_state, "an even integer >= 2 (conjugate pairs)")
        self.dim, self.modes, self.chunk = dim, d_state // 2, chunk
        low, high = math.log(1e-3), math.log(1e-1)
        self.log_dt = nn.Parameter(low + (high - low) * torch.rand(dim))
        self.log_decay = nn.Parameter(torch.full((dim, self.modes), math.log(0.5)))
        self.frequency = nn.Parameter(
            math.pi * torch.arange(self.modes, dtype=torch.get_default_dtype()).repeat(dim, 1)
        )
        self.readout = nn.Parameter(math.sqrt(0.5) * torch.randn(dim, self.modes, 2))
        self.skip = nn.Parameter(torch.randn(dim))
        self.out = nn.Linear(dim, 2 * dim)

    def init_state(
        self, batch_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> S4DState:
        """All modes at rest."""
        shape = (batch_size, self.dim, 2, self.modes)
        return S4DState(torch.zeros(shape, device=device or self.skip.device, dtype=dtype or self.skip.dtype))

    def discretize(self) -> Discrete:
        """Zero-order hold: Abar = exp(dt A) and Cbar = C (Abar - 1) / A, |Abar| < 1 for every parameter value."""
        dt = self.log_dt.exp()[:, None]
        real, imag = -self.log_decay.exp(), self.frequency
        log_magnitude, angle = dt * real, dt * imag
        # Abar - 1 without cancellation (|dt A| may be 5e-4): |Abar| cos - 1 = expm1(log|Abar|) cos - 2 sin^2(angle/2).
        fall, sine, cosine = torch.expm1(log_magnitude), (angle / 2).sin(), (angle / 2).cos()
        bend = 2 * sine.square()
        rise_real = fall * (1 - bend) - bend
        rise_imag = (fall + 1) * (2 * sine * cosine)
        norm = real.square() + imag.square()
        b_real, b_imag = (rise_real * real + rise_imag * imag) / norm, (rise_imag * real - rise_real * imag) / norm
        c_real, c_imag = self.readout.unbind(-1)
        readout = c_real * b_real - c_imag * b_imag, c_real * b_imag + c_imag * b_real
        return Discrete(log_magnitude, angle, rise_real + 1, rise_imag, *readout)

    def kernel(self, length: int) -> Float[Tensor, "dim length"]:
        """Impulse response 2 Re(C Bbar Abar^n), n = 0 .. length - 1, without the skip."""
        system = self.discretize()
        return _impulse(system, system.powers(self._lags(length)))

    def step(self, x_t: Float[Tensor, "batch dim"], state: S4DState) -> tuple[Float[Tensor, "batch dim"], S4DState]:
        """One element in, one out: the recurrence."""
        check_step(x_t, self.dim, state)
        system = self.discretize()
        turned = _turn(torch.stack([system.decay_real, system.decay_imag], 1), state.modes)
        modes = torch.stack([turned[:, :, 0] + x_t[:, :, None], turned[:, :, 1]], 2)
        weights = torch.stack([system.readout_real, -system.readout_imag], 1)
        v = 2 * (weights * modes).sum((2, 3)) + self.skip * x_t
        return self._output(v), S4DState(modes)

    def forward(
        self,
        x: Float[Tensor, "batch time dim"],
        state: S4DState | None = None,
        *,
        lengths: Int[Tensor, " batch"] | None = None,
    ) -> tuple[Float[Tensor, "batch time dim"], S4DState]:
        """A whole stretch: whole chunks at once, then the remainder."""
        check_sequence(x, self.dim, state, lengths)
        batch, time = x.shape[:2]
        if x.numel() == 0:
            state = self.init_state(batch, device=x.device, dtype=x.dtype) if state is None else state
            return x.new_zeros(batch, time, self.dim), state
        x = zero_padding(x, lengths)
        system = self.discretize()
        modes = None if state is None else state.modes
        v, last = self._convolve(x, modes, system)
        if lengths is not None:
            last = self._state_at(x, modes, system, lengths)
        return self._output(v), S4DState(last)

    def _output(self, v: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        return F.glu(self.out(F.gelu(v)), -1)

    def _lags(self, length: int) -> Float[Tensor, " length"]:
        return torch.arange(length, device=self.skip.device, dtype=self.skip.dtype)

    def _convolve(
        self, x: Float[Tensor, "batch time dim"], modes: Tensor | None, system: Discrete
    ) -> tuple[Float[Tensor, "batch time dim"], Float[Tensor, "batch dim 2 modes"]]:
        """The linear system: whole chunks side by side, then what is left over."""
        time, chunk = x.shape[1], min(self.chunk, x.shape[1])
        whole = time // chunk * chunk
        powers = system.powers(self._lags(chunk + 1))
        response = _impulse(system, powers[..., :chunk])
        response = torch.cat([response[:, :1] + self.skip[:, None], response[:, 1:]], 1)
        signal = x.permute(2, 0, 1).contiguous()
        v, modes = _chunks(signal[:, :, :whole], chunk, modes, system, powers, response)
        if whole < time:
            rest, modes = _chunks(signal[:, :, whole:], time - whole, modes, system, powers, response)
            v = torch.cat([v, rest], 2)
        return v.permute(1, 2, 0), modes

    def _state_at(
        self, x: Float[Tensor, "batch time dim"], modes: Tensor | None, system: Discrete, lengths: Tensor
    ) -> Float[Tensor, "batch dim 2 modes"]:
        """The state at each row's length: the row pushed to the right end, plus the decayed initial state."""
        _, last = self._convolve(last_elements(x, lengths, x.shape[1]), None, system)
        if modes is None:
            return last
        return last + _turn(system.powers(lengths[:, None].to(x.dtype))[..., 0], modes)


def _impulse(system: Discrete, powers: Float[Tensor, "dim 2 modes lags"]) -> Float[Tensor, "dim lags"]:
    weights = 2 * torch.cat([system.readout_real, -system.readout_imag], -1)
    return torch.bmm(weights[:, None], powers.flatten(1, 2))[:, 0]


def _turn(power: Float[Tensor, "*batch dim 2 modes"], modes: Tensor) -> Float[Tensor, "batch dim 2 modes"]:
    """The complex product of a power of Abar and a state."""
    a_real, a_imag = power.unbind(-2)
    h_real, h_imag = modes.unbind(-2)
    return torch.stack([a_real * h_real - a_imag * h_imag, a_real * h_imag + a_imag * h_real], -2)


def _chunks(
    signal: Float[Tensor, "dim batch time"],
    length: int,
    modes: Tensor | None,
    system: Discrete,
    powers: Float[Tensor, "dim 2 modes lags"],
    response: Float[Tensor, "dim longest"],
) -> tuple[Float[Tensor, "dim batch time"], Float[Tensor, "batch dim 2 modes"]]:
    """Chunks of `length`: outputs inside each, then the states between them, then what those states add."""
    dim, batch, time = signal.shape
    n_chunks, n_modes = time // length, powers.shape[2]
    pieces = signal.reshape(dim, batch * n_chunks, length)
    # Row s of the Toeplitz matrix is the response delayed by s: windows of the zero-padded response, last first.
    toeplitz = F.pad(response[:, :length], (length - 1, 0)).unfold(1, length, 1).flip(1)
    v = torch.bmm(pieces, toeplitz).view(dim, batch, time)
    if v.requires_grad:
        v.register_hook(Tensor.contiguous)  # a permuted gradient would send bmm's backward down its slow path
    arrivals = powers[..., :length].flip(-1).reshape(dim, 2 * n_modes, length).transpose(1, 2)
    gained = torch.bmm(pieces, arrivals).view(dim, batch, n_chunks, 2, n_modes).permute(2, 1, 0, 3, 4)
    if modes is None and n_chunks == 1:
        return v, gained[0]
    starts = [torch.zeros_like(gained[0]) if modes is None else modes]
    for gain in gained:
        starts.append(_turn(powers[..., length], starts[-1]) + gain)
    carried = torch.stack(starts[:-1], 2).transpose(0, 1).reshape(dim, batch * n_chunks, 2 * n_modes)
    v = v + torch.bmm(carried, _readouts(system, powers[..., 1 : length + 1])).view(dim, batch, time)
    return v, starts[-1]


def _readouts(system: Discrete, powers: Float[Tensor, "dim 2 modes lags"]) -> Float[Tensor, "dim parts lags"]:
    """What a state at rest afterwards adds to later outputs: 2 Re(Cbar Abar^n h)."""
    real, imag = powers.unbind(1)
    c_real, c_imag = system.readout_real[..., None], system.readout_imag[..., None]
    return 2 * torch.cat([c_real * real - c_imag * imag, -(c_real * imag + c_imag * real)], 1)
