"""POSSM's exact streaming step: spikes fold into the open chunk as they arrive, closing it costs the same at any count.

    score = c_i + sum_f A_if cos(w_f d) + B_if sin(w_f d)         one spike of unit i, d seconds from the chunk's center
    o     = sum_n softmax_n R(d_n) v_i(n),  kept as running (max, sum, total)
    h     = backbone(FFN(latent + W o + b), h);   prediction(tau) = readout(attention of session query to k latest h)

c, A, B join the unit's key with the one fixed query, the decoder keeps keys and values in a ring, and what depends only
on the last hidden state (W_hh h) is computed in `idle`, before the next chunk closes.  Times are relative to the chunk
and angles are reduced in float64, so that single precision loses nothing at periods of 0.1 ms or after days of stream.

Source: POSSM, arXiv 2506.05320, section 3; the incremental algebra is our own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Float64, Int64

from commissure.core.errors import InputError
from commissure.native import kernels
from commissure.native.possm_reference import (
    PossmState,
    PossmStepReference,
    check_times,
    spike_arrays,
    spike_error,
)
from commissure.native.possm_weights import (
    FeedForwardWeights,
    GRUWeights,
    LayerWeights,
    MambaWeights,
    PossmWeights,
    S4DWeights,
)

__all__ = [
    "FeedForwardWeights",
    "GRUWeights",
    "LayerWeights",
    "MambaWeights",
    "PossmState",
    "PossmStep",
    "PossmStepReference",
    "PossmWeights",
    "S4DWeights",
]

Array = np.ndarray


class PossmStep:
    """The streaming engine of one session: `fold` spikes, `close` the chunk, `idle` between chunks.

    Parameters: `offsets`, the default output times in seconds from the END of the chunk (negative inside the chunk,
    positive ahead of it); `dtype` of the arithmetic; `clone`, one of `_kernels.clones()`, default the best.
    Safe to call from several threads (calls wait for each other); fold, close and idle release the GIL.
    Without the compiled extension the reference runs instead, in float64.

    Raises InputError for a unit outside the table, a time that is not finite, or arrays of different lengths.
    """

    def __init__(
        self,
        weights: PossmWeights,
        *,
        offsets: Sequence[float],
        dtype: Literal["float32", "float64"] = "float32",
        clone: str = "",
    ) -> None:
        if dtype not in ("float32", "float64"):
            raise InputError("dtype", dtype, "'float32' or 'float64'")
        self.weights = weights
        self.offsets = check_times("offsets", offsets)
        self.dtype = dtype
        native = kernels()
        self._reference: PossmStepReference | None = (
            PossmStepReference(weights, offsets=offsets) if native is None else None
        )
        self._engine: Any = (
            None if native is None else native.PossmStep(weights, self.offsets, dtype == "float32", clone)
        )

    @property
    def backend(self) -> str:
        """'c++' or 'python'."""
        return "python" if self._engine is None else "c++"

    def reset(self) -> None:
        """Forget everything: before the first chunk."""
        (self._engine if self._reference is None else self._reference).reset()

    def fold(self, units: Int64[Array, " n"], offsets: Float64[Array, " n"]) -> None:
        """Add spikes to the open chunk, in any order and any number of calls; O(n).

        `units` are rows of the unit table, `offsets` seconds from the chunk's center.
        """
        if self._reference is not None:
            return self._reference.fold(units, offsets)
        units, offsets = spike_arrays(units, offsets)
        bad = self._engine.fold(units, offsets)
        if bad >= 0:
            raise spike_error(units, offsets, bad, self.weights.n_units)

    def close(self, *, offsets: Sequence[float] | None = None, readout: bool = True) -> Float64[Array, "times outputs"]:
        """Close the open chunk, advance the hidden state and read out.

        `offsets` replaces the default output times for this call; `readout=False` only encodes and returns no rows.
        """
        if self._reference is not None:
            return self._reference.close(offsets=offsets, readout=readout)
        return self._engine.close(None if offsets is None else check_times("offsets", offsets), readout)

    def idle(self) -> None:
        """Do now what the next `close` needs and needs no spikes; called again it does nothing."""
        (self._engine if self._reference is None else self._reference).idle()

    def copy(self) -> PossmStep:
        """An independent engine in the same state, sharing the weights."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other._engine = self._engine and self._engine.copy()
        other._reference = self._reference and self._reference.copy()
        return other

    def state(self) -> PossmState:
        """Everything needed to go on from here, also in the middle of a chunk."""
        if self._reference is not None:
            return self._reference.state()
        w, flat = self.weights, self._engine.save()
        sizes = [w.unit_value.shape[1], w.context * w.head_dim, w.context * w.head_dim]
        total, keys, values, hidden = np.split(flat[5:], np.cumsum(sizes))
        shape = (w.context, w.head_dim)
        n_spikes, n_contexts, is_idle, top, mass = flat[:5].tolist()
        return PossmState(
            int(n_spikes),
            int(n_contexts),
            bool(is_idle),
            top,
            mass,
            total,
            keys.reshape(shape),
            values.reshape(shape),
            hidden,
        )

    def load_state(self, state: PossmState) -> None:
        """Go on from `state`, of this engine or of any other of the same weights."""
        _check_state(self.weights, state)
        if self._reference is not None:
            return self._reference.load_state(state)
        head = [state.n_spikes, state.n_contexts, state.is_idle, state.top, state.mass]
        arrays = (state.total, state.keys, state.values, state.hidden)
        self._engine.load(np.concatenate([np.array(head, dtype=np.float64), *(a.ravel() for a in arrays)]))


def _check_state(weights: PossmWeights, state: PossmState) -> None:
    """Raise InputError naming the first field that no engine of these weights can have."""
    shape = (weights.context, weights.head_dim)
    hidden = sum(_hidden_size(layer) for layer in weights.layers)
    arrays = {"total": (weights.unit_value.shape[1],), "keys": shape, "values": shape, "hidden": (hidden,)}
    integers, floats = ("iu", "integers"), ("f", "floats")
    scalars = {"n_spikes": integers, "n_contexts": integers, "is_idle": ("b", "bool"), "top": floats, "mass": floats}
    fix = "load a state saved with the same model and session"
    for name in PossmState._fields:
        value, want = np.asarray(getattr(state, name)), arrays.get(name, ())
        kind, title = scalars.get(name, floats)
        if value.shape != want:
            raise InputError(f"state.{name}", value.shape, f"shape {want}", fix)
        if value.dtype.kind not in kind:
            raise InputError(f"state.{name}", str(value.dtype), title, fix)
        if name in arrays and not np.isfinite(value).all():
            where = tuple(np.argwhere(~np.isfinite(value))[0].tolist())
            raise InputError(f"state.{name}[{', '.join(map(str, where))}]", float(value[where]), "a finite number", fix)
    if state.n_spikes < 0:
        raise InputError("state.n_spikes", state.n_spikes, "an integer >= 0", fix)
    if not 0 <= state.n_contexts <= weights.context:
        raise InputError("state.n_contexts", state.n_contexts, f"0 to {weights.context}", fix)
    is_started = weights.encoder == "softmax" and state.n_spikes > 0
    if not (0 <= state.mass < np.inf and (state.mass > 0 or not is_started)):
        raise InputError("state.mass", state.mass, "a finite number >= 0, > 0 once there are spikes", fix)
    if not (np.isfinite(state.top) or (state.top == -np.inf and not is_started)):
        raise InputError("state.top", state.top, "a finite number, or -inf before the first spike", fix)


def _hidden_size(layer: LayerWeights) -> int:
    if isinstance(layer, GRUWeights):
        return layer.weight_hh.shape[1]
    if isinstance(layer, S4DWeights):
        return 2 * layer.a_re.size
    return (layer.conv_weight.shape[1] - 1) * layer.a.shape[0] + layer.a.size
