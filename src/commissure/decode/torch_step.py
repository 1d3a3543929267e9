"""The streaming step by the model's own torch modules: any backbone, any device, same calls as the C++ engine.

Spikes are kept until their chunk closes; then the model runs on a batch of one row and one chunk.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from commissure.core.errors import InputError
from commissure.core.mixer import State
from commissure.decode.encoder import SpikeTokens
from commissure.native.possm_reference import check_spikes, check_times

if TYPE_CHECKING:
    from commissure.decode.possm import POSSM

__all__ = ["TorchStep", "TorchStepState"]


class TorchStepState(NamedTuple):
    """State between any two calls: the open chunk's spikes and the model's state, tensor by tensor."""

    units: Int[np.ndarray, " spikes"]
    offsets: Float[np.ndarray, " spikes"]
    tensors: tuple[np.ndarray, ...]


class TorchStep:
    """The engine of `StreamingDecoder(engine="torch")`; signatures of `commissure.native.possm.PossmStep`.

    It holds a copy of the model in evaluation mode: training it further does not change a running stream.
    """

    backend = "torch"

    def __init__(self, model: POSSM, *, session: str, offsets: Sequence[float]) -> None:
        self.model = copy.deepcopy(model).eval()
        self.offsets = check_times("offsets", offsets)
        self.session, first = model.session_row(session), model.unit_start(session)
        self.n_units = len(model.sessions[session])
        with torch.inference_mode():
            self._tables = self.model.encoder.tables(self.model.unit_table()[first : first + self.n_units])
        self.reset()

    def reset(self) -> None:
        """Forget everything: before the first chunk."""
        self._state = self.model.init_state(1)
        self._units: list[np.ndarray] = []
        self._offsets: list[np.ndarray] = []

    def fold(self, units: Int[np.ndarray, " n"], offsets: Float[np.ndarray, " n"]) -> None:
        """Add spikes to the open chunk; `offsets` are seconds from the chunk's center."""
        units, offsets = check_spikes(units, offsets, self.n_units)
        self._units.append(units.copy())
        self._offsets.append(offsets.copy())

    @torch.inference_mode()
    def close(
        self, *, offsets: Sequence[float] | None = None, readout: bool = True
    ) -> Float[np.ndarray, "times outputs"]:
        """Run the model on the open chunk and read out at times relative to the chunk's end."""
        times = self.offsets if offsets is None else check_times("offsets", offsets)
        device = self.model.unit_embedding.device
        unit = torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *self._units])).to(device)
        offset = torch.from_numpy(np.concatenate([np.zeros(0), *self._offsets])).to(device)
        outputs, self._state = self.model.step(
            SpikeTokens(unit, offset, torch.zeros_like(unit), 1),
            self._state,
            tables=self._tables,
            session_row=self.session,
            offset=torch.from_numpy(times if readout else times[:0]).to(device),
        )
        self._units, self._offsets = [], []
        return self.model.denormalize(outputs)[:, : self.model.config.out_dim].double().cpu().numpy()

    def idle(self) -> None:
        """Nothing can be prepared here."""

    def copy(self) -> TorchStep:
        """An independent engine in the same state, sharing the model."""
        other = copy.copy(self)
        other._units, other._offsets = list(self._units), list(self._offsets)
        return other

    def state(self) -> TorchStepState:
        """Everything needed to go on from here, also in the middle of a chunk."""
        tensors = tuple(t.cpu().numpy().copy() for t in _leaves(self._state))
        units, offsets = np.concatenate([np.zeros(0, np.int64), *self._units]), np.concatenate([[], *self._offsets])
        return TorchStepState(units, offsets, tensors)

    def load_state(self, state: TorchStepState) -> None:
        """Go on from `state`, of an engine with the same model."""
        like = self.model.init_state(1)
        initial, fix = _leaves(like), "load a state saved with the same model"
        shapes, found = [tuple(t.shape) for t in initial], [tuple(t.shape) for t in state.tensors]
        if len(shapes) != len(found) or not all(map(_fits, found, shapes)):
            raise InputError("state.tensors", found, f"shapes {shapes}", fix)
        for i, (array, first) in enumerate(zip(state.tensors, initial, strict=True)):
            if array.dtype != (dtype := first.cpu().numpy().dtype):
                raise InputError(f"state.tensors[{i}]", str(array.dtype), str(dtype), fix)
            if not np.isfinite(array).all():
                raise InputError(f"state.tensors[{i}]", "nan or inf", "finite numbers", fix)
        n_chunks = state.tensors[-1]  # the last field of POSSMState
        if (n_chunks < 0).any():
            raise InputError(f"state.tensors[{len(initial) - 1}] (n_chunks)", n_chunks.tolist(), "integers >= 0", fix)
        if state.offsets.dtype.kind != "f":
            raise InputError("state.offsets", str(state.offsets.dtype), "floats", fix)
        units, offsets = check_spikes(state.units, state.offsets, self.n_units)
        self._state = _filled(like, iter(state.tensors))
        self._units, self._offsets = [units.copy()], [offsets.copy()]


def _fits(found: tuple[int, ...], initial: tuple[int, ...]) -> bool:
    """Whether a tensor can have grown from `initial`: an axis that starts empty is a cache of any length."""
    return len(found) == len(initial) and all(n in (0, m) for m, n in zip(found, initial, strict=True))


def _leaves(state: State) -> list[Tensor]:
    """The tensors of a State, in order."""
    if isinstance(state, Tensor):
        return [state]
    return [tensor for part in state for tensor in _leaves(part)]


def _filled(like: State, arrays: Iterator[np.ndarray]) -> State:
    """A State of the shape of `like` with tensors from `arrays`; layers are plain tuples, the rest NamedTuples."""
    if isinstance(like, Tensor):
        return torch.from_numpy(next(arrays).copy()).to(like)
    parts = [_filled(part, arrays) for part in like]
    return tuple(parts) if type(like) is tuple else type(like)(*parts)
