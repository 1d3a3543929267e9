"""Spiking reservoirs to and from NIR, the neuromorphic intermediate representation: a graph of continuous-time units.

    input -> w_in -> lif -> output          tau dv/dt = v_leak - v + r I   (LIF; LI the same without spikes)
    lif -> w -> synapse -> synapse_rise -> lif      LI, LI: unit area, a double exponential, dh/dt of `spiking`
    lif -> trace -> trace_rise -> output            the same filter, where the output is traces

Two leaky integrators in series are the double-exponential synapse, exactly; one is the single exponential.  What NIR
1.0 has no unit for is refused: the refractory period, and rate neurons (tanh), so every echo state network.  NIR has
no time step either: it is written as metadata, and asked for where a file has none.

Pedersen et al. 2024 (10.1038/s41467-024-52259-9).
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from os import PathLike
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from scipy.sparse import csr_array

from commissure.core.errors import BackendMissing, InputError
from commissure.core.files import replacing
from commissure.reservoirs.spiking import LIFReservoir

__all__ = ["from_nir", "to_nir"]

_LARGEST = 1 << 32  # bytes of a file's arrays, unpacked: 23,000 neurons in float64, W being dense


def to_nir(reservoir: LIFReservoir, path: str | PathLike[str]) -> None:
    """Write a spiking reservoir without refractory period; `from_nir` gives it back to the last bit.

    W is dense in NIR: 8 bytes times the square of the neurons before compression.  Anything else than a LIFReservoir,
    and a refractory period: `InputError`.  Needs the extra `nir`.
    """
    nir = _nir("writing NIR files")
    if not isinstance(reservoir, LIFReservoir):
        fix = "NIR has no rate neuron (tanh or other), so an echo state network cannot be written; see LIFReservoir"
        raise InputError("reservoir", type(reservoir).__name__, "a LIFReservoir", fix)
    if reservoir.refractory_period:
        fix = "NIR's LIF has no refractory period; make the reservoir with refractory_period=0"
        raise InputError("reservoir.refractory_period", reservoir.refractory_period, "0", fix)
    n = reservoir.n_nodes
    arrays = [x.numpy(force=True) for x in (reservoir.values, reservoir.targets, reservoir.starts)]
    weights = csr_array(tuple(arrays), shape=(n, n)).toarray()
    bias, decay = reservoir.bias.numpy(force=True), reservoir.synaptic_decay.numpy(force=True)

    def every(value: float) -> Float[np.ndarray, " neurons"]:
        return np.full(n, value)

    nodes = {
        "input": nir.Input(np.array([reservoir.n_inputs])),
        "w_in": nir.Linear(reservoir.input_weights.numpy(force=True).T.copy()),
        "lif": nir.LIF(
            tau=every(reservoir.membrane_time),
            r=every(1.0),
            v_leak=bias,
            v_threshold=every(reservoir.peak_potential),
            v_reset=every(reservoir.reset_potential),
        ),
        "w": nir.Linear(weights.T.copy()),
        "output": nir.Output(np.array([n])),
    }
    paths = [["input", "w_in", "lif"], ["lif", "w", "synapse", "lif"], ["lif", "output"]]
    if reservoir.output == "trace":
        paths[2].insert(1, "trace")
    for i, name in enumerate(("synapse", "trace"), start=1):
        if name in paths[i]:
            nodes[name] = nir.LI(tau=decay, r=every(1.0), v_leak=every(0.0))
            if reservoir.synaptic_rise:
                nodes[f"{name}_rise"] = nir.LI(tau=every(reservoir.synaptic_rise), r=every(1.0), v_leak=every(0.0))
                paths[i].insert(paths[i].index(name) + 1, f"{name}_rise")
    edges = [pair for stops in paths for pair in pairwise(stops)]
    with replacing(_path(path)) as partial:
        nir.write(partial, nir.NIRGraph(nodes, edges, metadata={"time_step": reservoir.time_step}))


def from_nir(path: str | PathLike[str], *, time_step: float | None = None) -> LIFReservoir:
    """The spiking reservoir of a NIR file: the graph that `to_nir` writes, under any names.

    `time_step` in seconds, by default the file's.  Not such a graph, parameters that differ where they must not, arrays
    of wrong sizes or of more than 4 GiB: `InputError`.  Needs the extra `nir`.
    """
    nir = _nir("reading NIR files")
    graph = _read(nir, _path(path))
    step = graph.metadata.get("time_step") if time_step is None else time_step
    if step is None:
        raise InputError("time_step", None, "seconds: the file does not say", "pass for example time_step=5e-5")
    lif, inward, recurrent, outward = _parts(nir, graph)
    if lif.v_leak.ndim != 1:
        raise InputError("lif.v_leak", lif.v_leak.shape, "shape (neurons,)")
    size = len(lif.v_leak)
    w_in, (w, *synapse) = inward[0].weight, recurrent
    if w.weight.shape != (size, size) or w_in.ndim != 2 or len(w_in) != size:
        found = (w_in.shape, w.weight.shape)
        raise InputError("shapes of input and recurrent weights", found, f"({size}, inputs) and ({size}, {size})")
    filters = [_filter(part) for part in (synapse, outward) if part]
    if len(filters) == 2 and not all(np.array_equal(a, b) for a, b in zip(*filters, strict=True)):
        raise InputError("time constants to the output", filters[1], f"those of the synapses, {filters[0]}")
    decay, rise = filters[0]
    _constant("lif.r", lif.r, 1.0)
    return LIFReservoir(
        w.weight.T,
        inputs=w_in.T,
        time_step=step,
        membrane_time=_constant("lif.tau", lif.tau),
        refractory_period=0.0,
        synaptic_rise=rise,
        synaptic_decay=decay,
        reset_potential=_constant("lif.v_reset", lif.v_reset),
        peak_potential=_constant("lif.v_threshold", lif.v_threshold),
        bias=lif.v_leak,
        output="trace" if outward else "spikes",
        dtype=torch.float32 if w.weight.dtype == np.float32 else torch.float64,
    )


def _nir(purpose: str) -> ModuleType:
    try:
        import nir
    except ImportError as error:
        raise BackendMissing("nir", "nir", purpose) from error
    return nir


def _path(path: object) -> Path:
    if not isinstance(path, str | PathLike):
        raise InputError("path", path, "a path")
    return Path(path)


def _read(nir: ModuleType, path: Path) -> Any:
    """The graph of a file, once the sizes of its arrays are known to be fine."""
    import h5py

    if not path.is_file():
        raise InputError("path", str(path), "a NIR file")
    try:
        with h5py.File(path, "r") as file:
            size = sum(item.nbytes for item in _datasets(h5py, file))
        if size > _LARGEST:
            raise InputError("path", str(path), f"at most {_LARGEST:,} bytes of arrays, it has {size:,}")
        graph = nir.read(path)
    except InputError:
        raise
    except (OSError, KeyError, ValueError, TypeError, AttributeError, AssertionError, RuntimeError) as error:
        raise InputError("path", str(path), f"a NIR file that the package nir can read ({error})") from error
    if not isinstance(graph, nir.NIRGraph):
        raise InputError("path", str(path), f"a graph, its root is a {type(graph).__name__}")
    return graph


def _datasets(h5py: ModuleType, group: Any) -> Iterator[Any]:
    """The arrays of a file; links to other files are not followed."""
    for name in group:
        if not isinstance(group.get(name, getlink=True), h5py.HardLink):
            raise InputError(f"{group.name}/{name}", "a link", "arrays of the file's own")
        item = group[name]
        if isinstance(item, h5py.Group):
            yield from _datasets(h5py, item)
        else:
            yield item


def _parts(nir: ModuleType, graph: Any) -> tuple[Any, list[Any], list[Any], list[Any]]:
    """The LIF node, and the nodes on the way from the input to it, from it to itself, and from it to the output."""
    wanted = "a graph input -> Linear -> LIF -> output, LIF -> Linear -> LI -> LIF, with one or two LI in a row"
    lifs = [name for name, node in graph.nodes.items() if isinstance(node, nir.LIF)]
    refused = {type(n).__name__ for n in graph.nodes.values() if type(n) not in _kinds(nir)}
    if refused or len(lifs) != 1 or len(graph.inputs) != 1 or len(graph.outputs) != 1:
        raise InputError("nodes", sorted(type(n).__name__ for n in graph.nodes.values()), wanted)
    ways: list[tuple[tuple[str, ...], list[Any]]] = []
    visited = 0
    for start in (*graph.inputs, *lifs):
        for _, first in (edge for edge in graph.edges if edge[0] == start):
            way: list[Any] = []
            stop, kinds = first, ["Input" if start in graph.inputs else "LIF"]
            while isinstance(graph.nodes[stop], (nir.Linear, nir.LI)) and len(way) <= 3:
                following = [b for a, b in graph.edges if a == stop]
                if len(following) != 1:
                    raise InputError(f"edges from {stop}", following, "one edge", wanted)
                way.append(graph.nodes[stop])
                stop = following[0]
            visited += len(way) + 1
            kinds += [type(node).__name__ for node in (*way, graph.nodes[stop])]
            ways.append((tuple(kinds), way))
    found = [
        [way for kinds, way in ways if kinds in allowed]
        for allowed in (
            [("Input", "Linear", "LIF")],
            [("LIF", "Linear", "LI", "LIF"), ("LIF", "Linear", "LI", "LI", "LIF")],
            [("LIF", "Output"), ("LIF", "LI", "Output"), ("LIF", "LI", "LI", "Output")],
        )
    ]
    if len(ways) != 3 or visited != len(graph.edges) or any(len(way) != 1 for way in found):
        raise InputError("edges", [tuple(edge) for edge in graph.edges], wanted)
    return graph.nodes[lifs[0]], found[0][0], found[1][0], found[2][0]


def _kinds(nir: ModuleType) -> tuple[type, ...]:
    return nir.Input, nir.Output, nir.Linear, nir.LIF, nir.LI


def _filter(stages: list[Any]) -> tuple[Float[np.ndarray, " neurons"], float]:
    """Decay times and rise time of one or two leaky integrators."""
    for stage in stages:
        _constant("LI.r", stage.r, 1.0)
        _constant("LI.v_leak", stage.v_leak, 0.0)
    return stages[0].tau, _constant("LI.tau of the second stage", stages[1].tau) if stages[1:] else 0.0


def _constant(name: str, values: Float[np.ndarray, " neurons"], wanted: float | None = None) -> float:
    """The one value of all neurons."""
    found = np.unique(values)
    if len(found) != 1 or (wanted is not None and found[0] != wanted):
        allowed = "one value for all neurons" if wanted is None else f"{wanted:g} for all neurons"
        raise InputError(name, found[:5].tolist(), allowed, "fold it into the weights" if name.endswith(".r") else "")
    return float(found[0])
