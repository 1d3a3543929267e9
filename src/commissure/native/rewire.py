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
    ends, labels = _checked_ends(ends, labels.shape[-1], undirected), np.ascontiguousarray(labels, np.int64)
    if labels.ndim != 2 or (labels.size and not 0 <= labels.min() <= labels.max() < n_classes - 1):
        raise InputError("labels", labels.shape, f"shape (levels, nodes), labels from 0 to {n_classes - 2}")
    if proposals < 0:
        raise InputError("proposals", proposals, "an integer >= 0")
    if keep_connected and not _is_connected(ends, labels.shape[1], undirected):
        kind = "connected" if undirected else "strongly connected"
        raise InputError("ends", f"{len(ends)} edges", f"a {kind} network", "pass keep_connected=False")
    options: dict[str, Any] = {
        "undirected": undirected,
        "keep_connected": keep_connected,
        "proposals": proposals,
        "key": key,
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
    nodes = len(strengths) if undirected else len(strengths) // 2
    ends = _checked_ends(ends, nodes, undirected)
    weights, strengths = np.array(weights, np.float64), np.ascontiguousarray(strengths, np.float64)
    classes = np.ascontiguousarray(classes, np.int64)
    for name, array in (("weights", weights), ("classes", classes)):
        if array.shape != (len(ends),) or not np.isfinite(array).all():
            raise InputError(name, array.shape, f"{len(ends)} finite numbers, one an edge")
    if len(classes) and classes.min() < 0:
        raise InputError("classes", int(classes.min()), "integers >= 0")
    if min(stages, proposals) < 0 or not temperature > 0 or not 0 < cooling <= 1:
        given = (stages, proposals, temperature, cooling)
        raise InputError("stages, proposals, temperature, cooling", given, ">= 0, >= 0, > 0, and 0 < cooling <= 1")
    schedule: dict[str, Any] = {
        "stages": stages,
        "proposals": proposals,
        "temperature": temperature,
        "cooling": cooling,
        "key": key,
    }
    native = kernels()
    if native is None:
        return anneal_weights_reference(ends, weights, classes, strengths, undirected=undirected, **schedule)
    _, classes = np.unique(classes, return_inverse=True)
    n_classes = int(classes.max(initial=0)) + 1
    arguments = (ends, weights, classes.astype(np.int64), n_classes, strengths, nodes, undirected)
    return AnnealedWeights(weights, native.anneal_weights(*arguments, **schedule))


def _checked_ends(ends: Int64[np.ndarray, "edges 2"], nodes: int, undirected: bool) -> Int64[np.ndarray, "edges 2"]:
    """A copy of edges between different nodes, each there once."""
    found = np.array(ends, np.int64, order="C")
    if found.ndim != 2 or found.shape[1] != 2:
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
