"""The slow, obviously right POSSM step in numpy float64: rotations, softmax and sums written out, nothing incremental.

The spikes of the open chunk are kept and the chunk is computed from scratch when it closes; keys and values are rotated
whole, one spike at a time.  The only shortcut is a loaded mid-chunk state, which enters as one already averaged token.

Source: POSSM, arXiv 2506.05320, section 3; rotary attention with rotated values as in POYO, arXiv 2310.16046.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int64
from numpy.typing import ArrayLike
from scipy.special import erf, expit

from commissure.core.errors import InputError
from commissure.native.possm_weights import (
    FeedForwardWeights,
    GRUWeights,
    LayerWeights,
    MambaWeights,
    PossmWeights,
    S4DWeights,
)

__all__ = ["PossmState", "PossmStepReference"]

Array = np.ndarray


class PossmState(NamedTuple):
    """The whole state of a step engine between any two calls, exact: C++ and reference read each other's.

    `n_spikes` counts the open chunk; `top`, `mass`, `total` are its running softmax: largest score, sum of
    exp(score - top), sum of exp(score - top) R(d) v (additive: only `total`, the plain sum).
    `keys`, `values` of the `n_contexts` latest hidden states, newest first; `hidden` holds the layers in order
    (GRU h[R]; S4D re[R, N] then im[R, N]; Mamba past inputs[K - 1, E], oldest first, then h[E, N]).
    """

    n_spikes: int
    n_contexts: int
    is_idle: bool
    top: float
    mass: float
    total: Float64[Array, " width"]
    keys: Float64[Array, "context H"]
    values: Float64[Array, "context H"]
    hidden: Float64[Array, " size"]


class PossmStepReference:
    """Reference of `commissure.native.possm.PossmStep`, same signature; `dtype` is accepted and always float64.

    Raises InputError for spikes outside the unit table or not finite.
    """

    def __init__(self, weights: PossmWeights, *, offsets: Sequence[float], dtype: str = "float64") -> None:
        self.weights = weights
        self.offsets = check_times("offsets", offsets)
        self.dtype = dtype
        self.reset()

    def reset(self) -> None:
        """Forget everything: before the first chunk."""
        self._spikes: list[tuple[int, float]] = []
        self._carried: tuple[int, float, float, Array] | None = None
        self._contexts: list[tuple[Array, Array]] = []
        self._layers = [_initial(layer) for layer in self.weights.layers]
        self._is_idle = False

    def fold(self, units: Int64[Array, " n"], offsets: Float64[Array, " n"]) -> None:
        """Add spikes to the open chunk; `offsets` are seconds from the chunk's center."""
        units, offsets = check_spikes(units, offsets, self.weights.n_units)
        self._spikes += zip(units.tolist(), offsets.tolist(), strict=True)

    def close(self, *, offsets: Sequence[float] | None = None, readout: bool = True) -> Float64[Array, "times outputs"]:
        """Encode the open chunk, advance the hidden state, and read out at times relative to the chunk's end."""
        w = self.weights
        x = self._encode()
        if w.in_weight is not None and w.backbone != "gru":
            x = w.in_weight @ x + w.in_bias
        for index, layer in enumerate(w.layers):
            x, self._layers[index] = _step(layer, x, self._layers[index])
        if w.context_norm_weight is not None:
            x = _layer_norm(x, w.context_norm_weight, w.context_norm_bias)
        self._contexts = [(w.key_weight @ x, w.value_weight @ x), *self._contexts][: w.context]
        self._spikes, self._carried, self._is_idle = [], None, False
        times = self.offsets if offsets is None else check_times("offsets", offsets)
        outputs = [self._read(float(time)) for time in times] if readout else []
        return np.array(outputs).reshape(-1, w.n_outputs)

    def idle(self) -> None:
        """Nothing is precomputed here."""
        self._is_idle = True

    def copy(self) -> PossmStepReference:
        """An independent engine in the same state, sharing the weights."""
        other = copy.copy(self)
        other._spikes, other._contexts, other._layers = list(self._spikes), list(self._contexts), list(self._layers)
        return other

    def state(self) -> PossmState:
        """Everything needed to go on from here, also in the middle of a chunk."""
        w = self.weights
        top, mass, total = self._sums()
        keys = np.zeros((w.context, w.head_dim))
        values = np.zeros_like(keys)
        for age, (key, value) in enumerate(self._contexts):
            keys[age], values[age] = key, value
        hidden = np.concatenate([_flatten(layer) for layer in self._layers])
        count = len(self._spikes) + (self._carried[0] if self._carried else 0)
        return PossmState(count, len(self._contexts), self._is_idle, top, mass, total, keys, values, hidden)

    def load_state(self, state: PossmState) -> None:
        """Go on from `state`."""
        self.reset()
        if state.n_spikes:
            self._carried = (state.n_spikes, float(state.top), float(state.mass), state.total.copy())
        self._contexts = [(state.keys[age].copy(), state.values[age].copy()) for age in range(state.n_contexts)]
        self._is_idle = bool(state.is_idle)
        start = 0
        for index, layer in enumerate(self._layers):
            size = _flatten(layer).size
            self._layers[index] = _unflatten(self.weights.layers[index], state.hidden[start : start + size])
            start += size

    def _tokens(self) -> tuple[list[float], list[Array]]:
        """Scores and rotated values of the open chunk's tokens, the null token included where it belongs."""
        w = self.weights
        tokens = []
        if w.encoder == "additive":
            return [], [_rotate(w.unit_value[unit], d, w.periods) for unit, d in self._spikes]
        assert w.unit_key is not None
        assert w.query is not None
        for unit, d in self._spikes:
            tokens.append((w.unit_key[unit], w.unit_value[unit], d))
        if w.null_token == "always" and self._carried is None:
            assert w.null_key is not None
            assert w.null_value is not None
            tokens.append((w.null_key, w.null_value, 0.0))
        scores = [float(w.query @ _rotate(key, d, w.periods)) / np.sqrt(w.head_dim) for key, _, d in tokens]
        return scores, [_rotate(value, d, w.periods) for _, value, d in tokens]

    def _sums(self) -> tuple[float, float, Array]:
        """Largest score, sum of exp(score - largest) and the so weighted sum of values."""
        scores, values = self._tokens()
        width = self.weights.unit_value.shape[1]
        if self.weights.encoder == "additive":
            total = np.zeros(width) if self._carried is None else self._carried[3].copy()
            for value in values:
                total += value
            return -np.inf, 0.0, total
        masses = [1.0] * len(scores)
        if self._carried is not None:
            _, carried_top, carried_mass, carried_total = self._carried
            scores, masses, values = (
                [*scores, carried_top],
                [*masses, carried_mass],
                [*values, carried_total / carried_mass],
            )
        if not scores:
            return -np.inf, 0.0, np.zeros(width)
        top = max(scores)
        weights = [mass * float(np.exp(score - top)) for score, mass in zip(scores, masses, strict=True)]
        total = np.zeros(width)
        for weight, value in zip(weights, values, strict=True):
            total += weight * value
        return top, sum(weights), total

    def _encode(self) -> Array:
        w = self.weights
        _, mass, total = self._sums()
        if w.encoder == "additive":
            return _feed_forward(w.ffn, w.latent + total)
        assert w.out_weight is not None
        assert w.out_bias is not None
        assert w.null_value is not None
        if mass == 0.0:
            mass, total = 1.0, _rotate(w.null_value, -w.chunk_s / 2, w.periods)
        return _feed_forward(w.ffn, w.latent + w.out_weight @ (total / mass) + w.out_bias)

    def _read(self, time: float) -> Array:
        w = self.weights
        scores, values = [], []
        for age, (key, value) in enumerate(self._contexts):
            d = -(age * w.chunk_s) - time
            scores.append(float(w.session_query @ _rotate(key, d, w.periods)) / np.sqrt(w.head_dim))
            values.append(_rotate(value, d, w.periods))
        weights = np.exp(np.array(scores) - max(scores))
        mixed = sum(p * value for p, value in zip(weights / weights.sum(), values, strict=True))
        y = w.session_embedding + w.dec_out_weight @ mixed + w.dec_out_bias
        if w.decoder_ffn is not None:
            y = _feed_forward(w.decoder_ffn, y)
        return (w.readout_weight @ y + w.readout_bias) * w.output_scale + w.output_mean


def check_times(name: str, times: ArrayLike) -> Float64[Array, " times"]:
    """Finite float64 times; raises InputError with the first bad index."""
    array = np.array(times, dtype=np.float64, ndmin=1)
    if array.ndim != 1:
        raise InputError(name, array.shape, "a sequence of seconds")
    bad = np.flatnonzero(~np.isfinite(array))
    if bad.size:
        raise InputError(f"{name}[{bad[0]}]", float(array[bad[0]]), "finite seconds")
    return array


def spike_arrays(units: Array, offsets: Array) -> tuple[Int64[Array, " n"], Float64[Array, " n"]]:
    """The two arrays as contiguous int64 and float64 of one length; raises InputError."""
    units, offsets = np.asarray(units), np.ascontiguousarray(offsets, dtype=np.float64)
    if units.dtype.kind not in "iu" and units.size:
        raise InputError("units", units.dtype, "integers (rows of the unit table)")
    if units.ndim != 1 or units.shape != offsets.shape:
        raise InputError("units", units.shape, f"one unit per time, shape {offsets.shape}")
    return np.ascontiguousarray(units, dtype=np.int64), offsets


def spike_error(units: Array, offsets: Array, index: int, n_units: int) -> InputError:
    """What is wrong with spike `index`."""
    if not 0 <= units[index] < n_units:
        return InputError(f"units[{index}]", int(units[index]), f"0 to {n_units - 1}", "map unit ids to rows first")
    return InputError(f"offsets[{index}]", float(offsets[index]), "finite seconds, below 1e9 in size")


def check_spikes(units: Array, offsets: Array, n_units: int) -> tuple[Int64[Array, " n"], Float64[Array, " n"]]:
    """Checked and converted spikes; raises InputError with the first bad index."""
    units, offsets = spike_arrays(units, offsets)
    bad = np.flatnonzero((units < 0) | (units >= n_units) | ~(np.abs(offsets) < 1e9))
    if bad.size:
        raise spike_error(units, offsets, int(bad[0]), n_units)
    return units, offsets


def _rotate(x: Array, d: float, periods: Array) -> Array:
    """R(d) x: pair (2f, 2f + 1) turned by 2 pi d / period_f."""
    out = x.copy()
    for f, period in enumerate(periods):
        angle = 2 * np.pi * (d / period)
        a, b = x[2 * f], x[2 * f + 1]
        out[2 * f] = a * np.cos(angle) - b * np.sin(angle)
        out[2 * f + 1] = a * np.sin(angle) + b * np.cos(angle)
    return out


def _layer_norm(x: Array, weight: Array | None, bias: Array | None) -> Array:
    return (x - x.mean()) / np.sqrt(x.var() + 1e-5) * weight + bias


def _gelu(x: Array) -> Array:
    return 0.5 * x * (1 + erf(x / np.sqrt(2)))


def _feed_forward(w: FeedForwardWeights, z: Array) -> Array:
    u, g = np.split(w.in_weight @ _layer_norm(z, w.norm_weight, w.norm_bias) + w.in_bias, 2)
    return z + w.out_weight @ (u * _gelu(g)) + w.out_bias


def _initial(layer: LayerWeights) -> tuple[Array, ...]:
    if isinstance(layer, GRUWeights):
        return (np.zeros(layer.weight_hh.shape[1]),)
    if isinstance(layer, S4DWeights):
        return (np.zeros(layer.a_re.shape), np.zeros(layer.a_re.shape))
    return (np.zeros((layer.conv_weight.shape[1] - 1, layer.a.shape[0])), np.zeros(layer.a.shape))


def _flatten(state: tuple[Array, ...]) -> Array:
    return np.concatenate([part.ravel() for part in state])


def _unflatten(layer: LayerWeights, flat: Array) -> tuple[Array, ...]:
    parts, start = [], 0
    for like in _initial(layer):
        parts.append(flat[start : start + like.size].reshape(like.shape).copy())
        start += like.size
    return tuple(parts)


def _step(layer: LayerWeights, x: Array, state: tuple[Array, ...]) -> tuple[Array, tuple[Array, ...]]:
    if isinstance(layer, GRUWeights):
        return _step_gru(layer, x, state[0])
    if isinstance(layer, S4DWeights):
        return _step_s4d(layer, x, state[0] + 1j * state[1])
    return _step_mamba(layer, x, *state)


def _step_gru(w: GRUWeights, x: Array, h: Array) -> tuple[Array, tuple[Array, ...]]:
    input_reset, input_update, input_new = np.split(w.weight_ih @ x + w.bias_ih, 3)
    hidden_reset, hidden_update, hidden_new = np.split(w.weight_hh @ h + w.bias_hh, 3)
    reset, update = expit(input_reset + hidden_reset), expit(input_update + hidden_update)
    h = (1 - update) * np.tanh(input_new + reset * hidden_new) + update * h
    return h, (h,)


def _step_s4d(w: S4DWeights, x: Array, h: Array) -> tuple[Array, tuple[Array, ...]]:
    h = (w.a_re + 1j * w.a_im) * h + x[:, None]
    y = 2 * ((w.c_re + 1j * w.c_im) * h).sum(1).real + w.skip * x
    value, gate = np.split(w.out_weight @ _gelu(y) + w.out_bias, 2)
    return value * expit(gate), (h.real, h.imag)


def _step_mamba(w: MambaWeights, u: Array, past: Array, h: Array) -> tuple[Array, tuple[Array, ...]]:
    x, z = np.split(w.in_weight @ u, 2)
    window = np.vstack([past, x])
    x = (w.conv_weight.T * window).sum(0) + w.conv_bias
    x = x * expit(x)
    rank, modes = w.dt_weight.shape[1], w.a.shape[1]
    mixed = w.x_weight @ x
    dt = np.logaddexp(0.0, w.dt_weight @ mixed[:rank] + w.dt_bias)
    b, c = mixed[rank : rank + modes], mixed[rank + modes :]
    h = np.exp(dt[:, None] * w.a) * h + (dt * x)[:, None] * b
    y = (h @ c + w.skip * x) * (z * expit(z))
    return w.out_weight @ y, (window[1:], h)
