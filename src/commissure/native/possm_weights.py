"""The numbers one POSSM streaming engine needs for one session, already projected: plain float64 arrays.

Symbols (D `latent`, R hidden width, H head width, F rotating frequencies, U units, P outputs, E and N Mamba's inner
width and state): the shape of each array is its annotation; matrices are (output, input) as in `torch.nn.Linear`.
V is H, or D where the encoder is additive; a factor follows its letter (M2 is 2 M, QN2 is Q + 2 N).  Rotated pairs are
interleaved, (2f, 2f + 1), on the first 2F dimensions; the angle at time d is 2 pi d / period_f.

Source: POSSM, arXiv 2506.05320, section 3; the projections per unit are exact algebra (one latent, fixed query time).
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

import numpy as np
from jaxtyping import Float64

from commissure.core.errors import InputError

__all__ = ["FeedForwardWeights", "GRUWeights", "LayerWeights", "MambaWeights", "PossmWeights", "S4DWeights"]

Array = np.ndarray


@dataclass(frozen=True, eq=False, kw_only=True)
class FeedForwardWeights:
    """z <- z + W2 (u * gelu(g)) + b2 with (u, g) = split(W1 LayerNorm(z) + b1); exact GELU, LayerNorm eps 1e-5."""

    norm_weight: Float64[Array, " D"]
    norm_bias: Float64[Array, " D"]
    in_weight: Float64[Array, "M2 D"]
    in_bias: Float64[Array, " M2"]
    out_weight: Float64[Array, "D M"]
    out_bias: Float64[Array, " D"]

    def __post_init__(self) -> None:
        _freeze(self)
        dim, inner = self.out_weight.shape if self.out_weight.ndim == 2 else (0, 0)
        _expect(self, "norm_weight norm_bias out_bias", (dim,))
        _expect(self, "in_weight", (2 * inner, dim))
        _expect(self, "in_bias", (2 * inner,))
        _expect(self, "out_weight", (dim, inner))


@dataclass(frozen=True, eq=False, kw_only=True)
class GRUWeights:
    """One layer of `torch.nn.GRU`: gate order reset, update, new."""

    weight_ih: Float64[Array, "R3 I"]
    weight_hh: Float64[Array, "R3 R"]
    bias_ih: Float64[Array, " R3"]
    bias_hh: Float64[Array, " R3"]

    def __post_init__(self) -> None:
        _freeze(self)
        width = self.weight_hh.shape[-1]
        _expect(self, "weight_ih", (3 * width, self.weight_ih.shape[-1]))
        _expect(self, "weight_hh", (3 * width, width))
        _expect(self, "bias_ih bias_hh", (3 * width,))


@dataclass(frozen=True, eq=False, kw_only=True)
class S4DWeights:
    """One diagonal state-space layer, N complex modes a channel, then Linear R -> 2R and GLU.

    h <- a h + x;   y = 2 Re(sum_n c_n h_n) + skip x;   output (l1, l2) = split(W gelu(y) + b), l1 sigmoid(l2)
    """

    a_re: Float64[Array, "R N"]
    a_im: Float64[Array, "R N"]
    c_re: Float64[Array, "R N"]
    c_im: Float64[Array, "R N"]
    skip: Float64[Array, " R"]
    out_weight: Float64[Array, "R2 R"]
    out_bias: Float64[Array, " R2"]

    def __post_init__(self) -> None:
        _freeze(self)
        width, modes = self.a_re.shape if self.a_re.ndim == 2 else (0, 0)
        _expect(self, "a_re a_im c_re c_im", (width, modes))
        _expect(self, "skip", (width,))
        _expect(self, "out_weight", (2 * width, width))
        _expect(self, "out_bias", (2 * width,))


@dataclass(frozen=True, eq=False, kw_only=True)
class MambaWeights:
    """One Mamba-1 block (arXiv 2312.00752, algorithm 2), E = inner width, K = convolution taps, Q = rank of dt.

    (x, z) = split(W_in u);  x <- silu(conv(x) + b);  (q, B, C) = split(W_x x);  dt = softplus(W_dt q + b_dt)
    h <- exp(dt a) h + dt B x;   output W_out ((C h + skip x) silu(z))
    `conv_weight[:, K - 1]` multiplies the newest input.
    """

    in_weight: Float64[Array, "E2 R"]
    conv_weight: Float64[Array, "E K"]
    conv_bias: Float64[Array, " E"]
    x_weight: Float64[Array, "QN2 E"]
    dt_weight: Float64[Array, "E Q"]
    dt_bias: Float64[Array, " E"]
    a: Float64[Array, "E N"]
    skip: Float64[Array, " E"]
    out_weight: Float64[Array, "R E"]

    def __post_init__(self) -> None:
        _freeze(self)
        inner, modes = self.a.shape if self.a.ndim == 2 else (0, 0)
        width, rank = self.out_weight.shape[0], self.dt_weight.shape[-1]
        _expect(self, "in_weight", (2 * inner, width))
        _expect(self, "conv_weight", (inner, max(1, self.conv_weight.shape[-1])))
        _expect(self, "conv_bias dt_bias skip", (inner,))
        _expect(self, "x_weight", (rank + 2 * modes, inner))
        _expect(self, "dt_weight", (inner, rank))
        _expect(self, "out_weight", (width, inner))


LayerWeights = GRUWeights | S4DWeights | MambaWeights


@dataclass(frozen=True, eq=False, kw_only=True)
class PossmWeights:
    """Everything `PossmStep` needs; shapes are checked once, here.

    encoder        "softmax": z = latent + out_weight o + out_bias, o = sum_n softmax_n(s) R(d_n) v_n,
                   s_n = q R(d_n) k_n / sqrt(H)
                   "additive": z = latent + sum_n R(d_n) v_n, with `unit_value` (U, D) and no other encoder array
    null_token     "empty": only a chunk without spikes holds a null token, at its start; "always": each, at its center
    unit_key, unit_value, null_key, null_value     projected keys and values, not rotated
    query          W_q LayerNorm(latent query); session_query the decoder's, W_q LayerNorm(session embedding)
    periods        seconds, one per rotated pair
    in_weight      Linear D -> R before S4D and Mamba layers; None for the GRU
    context_norm_* LayerNorm of hidden states before keys and values, or None
    output_*       prediction = (readout_weight y + readout_bias) * output_scale + output_mean
    """

    encoder: Literal["softmax", "additive"]
    null_token: Literal["empty", "always"]
    backbone: Literal["gru", "s4d", "mamba"]
    chunk_s: float
    context: int
    periods: Float64[Array, " F"]
    unit_value: Float64[Array, "U V"]
    latent: Float64[Array, " D"]
    ffn: FeedForwardWeights
    layers: tuple[LayerWeights, ...]
    key_weight: Float64[Array, "H R"]
    value_weight: Float64[Array, "H R"]
    session_query: Float64[Array, " H"]
    session_embedding: Float64[Array, " D"]
    dec_out_weight: Float64[Array, "D H"]
    dec_out_bias: Float64[Array, " D"]
    readout_weight: Float64[Array, "P D"]
    readout_bias: Float64[Array, " P"]
    output_scale: Float64[Array, " P"]
    output_mean: Float64[Array, " P"]
    unit_key: Float64[Array, "U H"] | None = None
    null_key: Float64[Array, " H"] | None = None
    null_value: Float64[Array, " H"] | None = None
    query: Float64[Array, " H"] | None = None
    out_weight: Float64[Array, "D H"] | None = None
    out_bias: Float64[Array, " D"] | None = None
    in_weight: Float64[Array, "R D"] | None = None
    in_bias: Float64[Array, " R"] | None = None
    context_norm_weight: Float64[Array, " R"] | None = None
    context_norm_bias: Float64[Array, " R"] | None = None
    decoder_ffn: FeedForwardWeights | None = None

    def __post_init__(self) -> None:
        _choice("encoder", self.encoder, ("softmax", "additive"))
        _choice("null_token", self.null_token, ("empty", "always"))
        kinds = {"gru": GRUWeights, "s4d": S4DWeights, "mamba": MambaWeights}
        _choice("backbone", self.backbone, tuple(kinds))
        if not (np.isfinite(self.chunk_s) and self.chunk_s > 0):
            raise InputError("chunk_s", self.chunk_s, "a number > 0 (seconds)")
        if self.context < 1:
            raise InputError("context", self.context, "an integer >= 1 (hidden states the decoder sees)")
        if not self.layers or not all(isinstance(layer, kinds[self.backbone]) for layer in self.layers):
            raise InputError("layers", self.layers, f"one {kinds[self.backbone].__name__} or more")
        _freeze(self)
        if not np.all(self.periods > 0):
            raise InputError("periods", self.periods, "seconds > 0")
        self._check_encoder()
        self._check_backbone()
        self._check_decoder()

    n_units = property(lambda self: int(self.unit_value.shape[0]))
    n_outputs = property(lambda self: int(self.readout_weight.shape[0]))
    dim = property(lambda self: int(self.latent.shape[0]))
    hidden_dim = property(lambda self: int(self.key_weight.shape[1]))
    head_dim = property(lambda self: int(self.key_weight.shape[0]))

    def _check_encoder(self) -> None:
        dim, head = self.dim, self.head_dim
        _expect(self, "latent", (dim,))
        _expect(self.ffn, "norm_weight", (dim,))
        if self.encoder == "additive":
            _expect(self, "unit_value", (self.n_units, dim))
        else:
            _expect(self, "unit_key unit_value", (self.n_units, head))
            _expect(self, "null_key null_value query", (head,))
            _expect(self, "out_weight", (dim, head))
            _expect(self, "out_bias", (dim,))
        rotated = 2 * self.periods.size
        if self.periods.ndim != 1 or not 0 < rotated <= min(head, self.unit_value.shape[1]):
            raise InputError("periods", self.periods.shape, "1 to head_dim / 2 periods (and dim / 2 for additive)")

    def _check_backbone(self) -> None:
        width = self.hidden_dim
        if self.backbone != "gru":
            _expect(self, "in_weight", (width, self.dim))
            _expect(self, "in_bias", (width,))
        for index, layer in enumerate(self.layers):
            if isinstance(layer, GRUWeights):
                _expect(layer, "weight_ih", (3 * width, self.dim if index == 0 else width))
                _expect(layer, "weight_hh", (3 * width, width))
            elif isinstance(layer, S4DWeights):
                _expect(layer, "skip", (width,))
            else:
                _expect(layer, "out_weight", (width, layer.a.shape[0]))

    def _check_decoder(self) -> None:
        dim, head, width, outputs = self.dim, self.head_dim, self.hidden_dim, self.n_outputs
        _expect(self, "key_weight value_weight", (head, width))
        _expect(self, "session_query", (head,))
        _expect(self, "session_embedding dec_out_bias", (dim,))
        _expect(self, "dec_out_weight", (dim, head))
        _expect(self, "readout_weight", (outputs, dim))
        _expect(self, "readout_bias output_scale output_mean", (outputs,))
        if self.context_norm_weight is not None:
            _expect(self, "context_norm_weight context_norm_bias", (width,))
        if self.decoder_ffn is not None:
            _expect(self.decoder_ffn, "norm_weight", (dim,))


def _choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise InputError(name, value, f"one of {allowed}")


def _freeze(weights: object) -> None:
    """Replace each array by a contiguous, finite, read-only float64 copy."""
    for field in fields(weights):  # type: ignore[arg-type]
        value = getattr(weights, field.name)
        if isinstance(value, np.ndarray):
            array = np.array(value, dtype=np.float64, order="C")
            if not np.all(np.isfinite(array)):
                raise InputError(field.name, array.shape, "finite numbers", "the model's parameters hold NaN or inf")
            array.flags.writeable = False
            object.__setattr__(weights, field.name, array)


def _expect(weights: object, names: str, shape: tuple[int, ...]) -> None:
    for name in names.split():
        value = getattr(weights, name)
        found = None if value is None else value.shape
        if found != shape or 0 in shape:
            raise InputError(f"{type(weights).__name__}.{name}", found, f"an array of shape {shape}")
