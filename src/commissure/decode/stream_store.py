"""A stream's state as arrays, and its safetensors file.

The file holds the arrays of `StreamState` by name, `engine.*` the engine's own, and in its metadata the format and a
SHA-256 digest of the weights, so that a state cannot go on in another model.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from commissure.core.errors import InputError
from commissure.core.files import replacing
from commissure.decode.torch_step import TorchStep, TorchStepState
from commissure.native.possm import PossmState, PossmStep

__all__ = ["StreamState", "model_digest", "read_state", "write_state"]

FORMAT = "commissure.StreamState/1"


class StreamState(NamedTuple):
    """A stream between any two calls: clock, engine, queued spikes (seconds from t0), pairs seen, counters."""

    t0: float
    chunk: int
    engine: PossmState | TorchStepState
    queue_units: Int[np.ndarray, " queued"]
    queue_chunks: Int[np.ndarray, " queued"]
    queue_times: Float[np.ndarray, " queued"]
    seen: Float[np.ndarray, "pairs 3"]
    counters: Int[np.ndarray, " counters"]
    latencies: Int[np.ndarray, " bins"]
    largest_us: float


def model_digest(engine: PossmStep | TorchStep) -> str:
    """SHA-256 of everything the engine computes with."""
    digest = hashlib.sha256()
    if isinstance(engine, TorchStep):
        parts: Iterator[tuple[str, Any]] = iter(sorted(engine.model.state_dict().items()))
        digest.update(f"{engine.session} {engine.model.config.model_dump_json()}".encode())
        for name, tensor in parts:
            digest.update(name.encode() + tensor.cpu().numpy().tobytes())
    else:
        for name, value in _leaves(engine.weights):
            digest.update(name.encode() + (value.tobytes() if isinstance(value, np.ndarray) else repr(value).encode()))
    return digest.hexdigest()


def write_state(path: str | os.PathLike[str], state: StreamState, digest: str) -> None:
    """Write the state; an existing file is replaced in one step."""
    arrays = {name: np.asarray(value) for name, value in state._asdict().items() if name != "engine"}
    for name, value in state.engine._asdict().items():
        if isinstance(value, tuple):
            arrays |= {f"engine.{name}.{i}": array for i, array in enumerate(value)}
        else:
            arrays[f"engine.{name}"] = np.asarray(value)
    metadata = {"format": FORMAT, "engine": type(state.engine).__name__, "digest": digest}
    with replacing(path) as partial:
        save_file({name: np.array(a, order="C") for name, a in arrays.items()}, partial, metadata=metadata)


def read_state(path: str | os.PathLike[str], digest: str) -> StreamState:
    """Read a file of `write_state`; InputError for another format, another model, or fields missing or unknown.

    The values are checked by `StreamingDecoder.load_state`.
    """
    try:
        with safe_open(str(path), "np") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, TypeError, AttributeError) as error:
        raise InputError("path", str(path), "a readable safetensors file", str(error)) from None
    if metadata.get("format") != FORMAT:
        raise InputError("path", str(path), f"a file written by StreamingDecoder.save ({FORMAT})")
    if metadata.get("digest") != digest:
        raise InputError(
            "path", str(path), "a state of this model, session and kind of engine", "load it where it was saved"
        )
    own = {name: arrays.pop(name) for name in sorted(arrays) if name.startswith("engine.")}
    engine = _engine_state(metadata.get("engine", ""), {name.removeprefix("engine."): a for name, a in own.items()})
    _check_names("state.", arrays, set(StreamState._fields) - {"engine"})
    return StreamState(engine=engine, **{name: _scalar(a) for name, a in arrays.items()})


def _engine_state(kind: str, own: dict[str, np.ndarray]) -> PossmState | TorchStepState:
    if kind == "PossmState":
        _check_names("state.engine.", own, set(PossmState._fields))
        return PossmState(**{name: _scalar(a) for name, a in own.items()})
    if kind == "TorchStepState":
        names = [f"tensors.{i}" for i in range(len(own) - 2)]
        _check_names("state.engine.", own, {"units", "offsets", *names})
        return TorchStepState(own["units"], own["offsets"], tuple(own[name] for name in names))
    raise InputError("state.engine", kind, "PossmState or TorchStepState", "the file is damaged")


def _check_names(prefix: str, found: Mapping[str, np.ndarray], wanted: set[str]) -> None:
    for name in sorted(wanted ^ set(found)):
        fault = "a known field" if name in found else "an array"
        raise InputError(prefix + name, "unknown" if name in found else "missing", fault, "the file is damaged")


def _scalar(array: np.ndarray) -> Any:
    return array.item() if array.ndim == 0 else array


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if is_dataclass(value):
        for field in fields(value):
            yield from _leaves(getattr(value, field.name), f"{name}.{field.name}")
    elif isinstance(value, tuple):
        for i, part in enumerate(value):
            yield from _leaves(part, f"{name}.{i}")
    else:
        yield name, value
