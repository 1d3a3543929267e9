"""Random networks with the same degrees: edges exchange their ends, one pair at a time, in C++.

    a -> b, c -> d   becomes   a -> d, c -> b        if neither is there already, and none is a loop
    undirected: with b or with c as the end that a takes over, one in two each

A proposal that cannot be made is a step all the same: only then is every network that can be reached equally likely
(Artzy-Randrup & Stone 2005, 10.1103/PhysRevE.72.056708; Fosdick et al., arXiv 1608.00607).  Classes: both edges and
both new ones belong to one class, so that every node keeps its degree in each class.  After the swaps,
`anneal_weights` can exchange weights between the edges of a class so that the nodes' strengths come back.

    here                meaning
    ends                (edges, 2): source and target of every edge; an undirected edge once, in any order
    labels              (levels, nodes): the class of an edge is the first label that its nodes share, or the last class

Maslov & Sneppen 2002 (10.1126/science.1065103); classes by level: bioRxiv 2025.06.20.660760; weights by annealing:
Milisav et al. 2025 (10.1038/s43588-024-00755-1).
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from jaxtyping import Float64, Int64
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from commissure.core.errors import InputError
from commissure.native import kernels
from commissure.native.rewire_reference import (
    AnnealedWeights,
    SwappedEdges,
    anneal_weights_reference,
    swap_edges_reference,
)

__all__ = [
    "AnnealedWeights",
    "SwappedEdges",
    "anneal_weights",
    "anneal_weights_reference",
    "swap_edges",
    "swap_edges_reference",
]

_MOST_PROPOSALS = 10**15  # years; stages times proposals, three words each, stay within 64 bits
_MOST_STAGES = 1000


def swap_edges(
    ends: Int64[np.ndarray, "edges 2"],
    labels: Int64[np.ndarray, "levels nodes"],
    *,
    n_classes: int,
    undirected: bool,
    keep_connected: bool,
    proposals: int,
    key: int,
) -> SwappedEdges:
    """Propose `proposals` swaps, by the random stream `key` (0 to 2^64 - 1); every edge stays at its index.

    `labels` are from 0 to n_classes - 2; with no levels, shape (0, nodes), all edges are of one class.
    `keep_connected`: (strongly) connected networks stay so; the one given must be.  Not every network of the same
    degrees can be reached: swaps turn no directed triangle round that has no edge to swap with.

    >>> ring = np.array([[0, 1], [1, 2], [2, 3], [3, 0]])
    >>> swapped = swap_edges(
    ...     ring, np.zeros((0, 4), np.int64), n_classes=1, undirected=True, keep_connected=True, proposals=40, key=1
    ... )
    >>> np.bincount(swapped.ends.ravel()).tolist()
    [2, 2, 2, 2]
    """
    labels = _integers("labels", labels, 2)
    _check_choices(undirected=undirected, keep_connected=keep_connected)
    n_classes = _whole("n_classes", n_classes, 1)
    ends = _checked_ends(ends, labels.shape[1], undirected)
    if labels.size and not 0 <= labels.min() <= labels.max() < n_classes - 1:
        raise InputError("labels", (int(labels.min()), int(labels.max())), f"labels from 0 to {n_classes - 2}")
    if keep_connected and not _is_connected(ends, labels.shape[1], undirected):
        kind = "connected" if undirected else "strongly connected"
        raise InputError("ends", f"{len(ends)} edges", f"a {kind} network", "pass keep_connected=False")
    options: dict[str, Any] = {
        "undirected": bool(undirected),
        "keep_connected": bool(keep_connected),
        "proposals": _whole("proposals", proposals, 0),
        "key": _whole("key", key, 0, 2**64 - 1),
    }
    native = kernels()
    if native is None:
        return swap_edges_reference(ends, labels, n_classes=n_classes, **options)
    return SwappedEdges(ends, native.swap_edges(ends, labels, n_classes, **options))


def anneal_weights(
    ends: Int64[np.ndarray, "edges 2"],
    weights: Float64[np.ndarray, " edges"],
    classes: Int64[np.ndarray, " edges"],
    strengths: Float64[np.ndarray, " sums"],
    *,
    undirected: bool,
    stages: int,
    proposals: int,
    temperature: float,
    cooling: float,
    key: int,
) -> AnnealedWeights:
    """Exchange weights within `classes` so that the nodes' strengths come near `strengths`.

    Simulated annealing of the sum of squared deviations: `stages` of `proposals` each, the first at `temperature`,
    each next one at `cooling` times it.  `strengths`: of the nodes as sources, then as targets (2 nodes,), or (nodes,)
    if undirected.

    >>> ends, weights = np.array([[0, 1], [2, 3]]), np.array([1.0, 2.0])
    >>> told = anneal_weights(
    ...     ends, weights, np.zeros(2, np.int64), np.array([2.0, 2.0, 1.0, 1.0]), undirected=True, stages=1,
    ...     proposals=20, temperature=1e-3, cooling=1.0, key=1,
    ... )
    >>> told.weights.tolist()
    [2.0, 1.0]
    """
    _check_choices(undirected=undirected)
    strengths = _numbers("strengths", strengths)
    nodes = len(strengths) if undirected else len(strengths) // 2
    ends = _checked_ends(ends, nodes, undirected)
    weights, classes = _numbers("weights", weights), _integers("classes", classes, 1)
    if not undirected and len(strengths) % 2:
        raise InputError("strengths", strengths.shape, "two for each node: as a source, then as a target")
    for name, array in (("weights", weights), ("classes", classes)):
        if len(array) != len(ends):
            raise InputError(name, array.shape, f"{len(ends)} numbers, one an edge")
    if len(classes) and classes.min() < 0:
        raise InputError("classes", int(classes.min()), "integers >= 0")
    temperature, cooling = _positive("temperature", temperature), _positive("cooling", cooling, 1.0)
    schedule: dict[str, Any] = {
        "stages": _whole("stages", stages, 0, _MOST_STAGES),
        "proposals": _whole("proposals", proposals, 0),
        "temperature": temperature,
        "cooling": cooling,
        "key": _whole("key", key, 0, 2**64 - 1),
    }
    native = kernels()
    if native is None:
        return anneal_weights_reference(ends, weights, classes, strengths, undirected=undirected, **schedule)
    _, classes = np.unique(classes, return_inverse=True)
    n_classes = int(classes.max(initial=0)) + 1
    arguments = (ends, weights, classes.astype(np.int64), n_classes, strengths, nodes, bool(undirected))
    return AnnealedWeights(weights, native.anneal_weights(*arguments, **schedule))


def _checked_ends(ends: Int64[np.ndarray, "edges 2"], nodes: int, undirected: bool) -> Int64[np.ndarray, "edges 2"]:
    """A copy of edges between different nodes, each there once."""
    found = _integers("ends", ends, 2)
    if found.shape[1] != 2:
        raise InputError("ends", found.shape, "shape (edges, 2)")
    outside = ((found < 0) | (found >= nodes)).any(1)
    loops = found[:, 0] == found[:, 1]
    pairs = np.sort(found, 1) if undirected else found
    _, first = np.unique(pairs[:, 0] * max(nodes, 1) + pairs[:, 1], return_index=True)
    repeated = np.ones(len(found), bool)
    repeated[first] = False
    for bad, allowed in ((outside, f"nodes from 0 to {nodes - 1}"), (loops, "no loops"), (repeated, "every edge once")):
        if bad.any():
            at = int(np.flatnonzero(bad)[0])
            raise InputError(f"ends[{at}]", found[at].tolist(), allowed)
    return found


def _is_connected(ends: Int64[np.ndarray, "edges 2"], nodes: int, undirected: bool) -> bool:
    graph = coo_array((np.ones(len(ends), np.int8), (ends[:, 0], ends[:, 1])), shape=(nodes, nodes))
    connection = "weak" if undirected else "strong"
    return int(connected_components(graph, directed=True, connection=connection, return_labels=False)) <= 1


def _integers(name: str, values: object, ndim: int) -> np.ndarray:
    """A contiguous int64 copy."""
    found = _array(name, values, ndim)
    if found.dtype.kind not in "iu" and found.size:
        raise InputError(f"{name}.dtype", str(found.dtype), "integers")
    return np.array(found, np.int64, order="C")


def _numbers(name: str, values: object) -> Float64[np.ndarray, " n"]:
    """A contiguous float64 copy of finite numbers."""
    found = _array(name, values, 1)
    if found.dtype.kind not in "iuf" or not np.isfinite(found).all():
        raise InputError(name, values, "finite real numbers")
    return np.array(found, np.float64, order="C")


def _array(name: str, values: object, ndim: int) -> np.ndarray:
    try:
        found = np.asarray(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(name, type(values).__name__, "an array of numbers", str(error)) from error
    if found.ndim != ndim:
        raise InputError(name, found.shape if found.ndim else values, f"an array with {ndim} axes")
    return found


def _whole(name: str, value: object, least: int, most: int = _MOST_PROPOSALS) -> int:
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or not least <= value <= most:
        raise InputError(name, value, f"an integer from {least} to {most}")
    return int(value)


def _positive(name: str, value: object, most: float = np.inf) -> float:
    is_number = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
    if not is_number or not 0 < value <= min(most, sys.float_info.max):  # type: ignore[operator]
        raise InputError(name, value, "a finite number > 0" if np.isinf(most) else f"a number > 0, at most {most:g}")
    return float(value)  # type: ignore[arg-type]


def _check_choices(**choices: object) -> None:
    for name, choice in choices.items():
        if not isinstance(choice, bool | np.bool_):
            raise InputError(name, choice, "True or False")
