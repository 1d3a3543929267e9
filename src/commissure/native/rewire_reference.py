"""Rewiring in plain Python: the same proposals as the kernel's, judged on whole graphs instead of step by step.

Edges are a set, classes are looked up pair by pair, connectedness is searched for in the whole network, and the change
of energy is that of the residuals before and after.  The proposals come from the same counter-based stream: word i of
`key` is splitmix64 at `key + (i + 1) g` (Steele, Lea & Flood 2014, 10.1145/2660193.2660195).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int64

__all__ = ["AnnealedWeights", "SwappedEdges", "anneal_weights_reference", "random_word", "swap_edges_reference"]

_WORD = (1 << 64) - 1


class SwappedEdges(NamedTuple):
    """Edges (edges, 2), each at its old index, and how many proposals were accepted."""

    ends: Int64[np.ndarray, "edges 2"]
    accepted: int


class AnnealedWeights(NamedTuple):
    """Weights (edges,) and how many exchanges were accepted."""

    weights: Float64[np.ndarray, " edges"]
    accepted: int


def random_word(key: int, i: int) -> int:
    """Word `i` (64 bits) of stream `key`.

    >>> hex(random_word(0, 0))
    '0xe220a8397b1dcdaf'
    """
    z = (key + (i + 1) * 0x9E3779B97F4A7C15) & _WORD
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _WORD
    return z ^ (z >> 31)


def swap_edges_reference(
    ends: Int64[np.ndarray, "edges 2"],
    labels: Int64[np.ndarray, "levels nodes"],
    *,
    n_classes: int,
    undirected: bool,
    keep_connected: bool,
    proposals: int,
    key: int,
) -> SwappedEdges:
    """As the kernel: see `commissure.native.rewire.swap_edges`."""
    edges = [(int(a), int(b)) for a, b in ends]
    classes = [_class_of(labels, n_classes, a, b) for a, b in edges]

    def named(pairs: list[tuple[int, int]]) -> set[tuple[int, int]]:
        return {(min(p), max(p)) if undirected else p for p in pairs}

    accepted = 0
    for t, e, f in _pairs(classes, proposals, key):
        (a, b), (c, d) = edges[e], edges[f]
        if undirected and random_word(key, 3 * t + 2) >> 63:
            c, d = d, c
        changed = list(edges)
        # The edges keep their indices, and the second one the side on which its end was exchanged.
        changed[e], changed[f] = (a, d), ((c, b) if edges[f] == (c, d) else (b, c))
        if any(x == y or _class_of(labels, n_classes, x, y) != classes[e] for x, y in ((a, d), (c, b))):
            continue
        if len(named(changed)) < len(edges) or named([(a, d), (c, b)]) & named(edges):
            continue
        if keep_connected and not _is_connected(changed, labels.shape[1], undirected):
            continue
        edges, accepted = changed, accepted + 1
    return SwappedEdges(np.array(edges, np.int64).reshape(-1, 2), accepted)


def anneal_weights_reference(
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
    """As the kernel: see `commissure.native.rewire.anneal_weights`."""
    nodes = len(strengths) if undirected else len(strengths) // 2
    weights, accepted = weights.copy(), 0

    def excess(values: Float64[np.ndarray, " edges"]) -> Float64[np.ndarray, " sums"]:
        sums = np.zeros_like(strengths)
        np.add.at(sums, ends[:, 0], values)
        np.add.at(sums, ends[:, 1] + (0 if undirected else nodes), values)
        return sums - strengths

    for t, e, f in _pairs(classes.tolist(), stages * proposals, key):
        if weights[e] == weights[f]:
            continue
        changed = weights.copy()
        changed[[e, f]] = weights[[f, e]]
        growth = math.fsum(excess(changed) ** 2) - math.fsum(excess(weights) ** 2)
        chance = (random_word(key, 3 * t + 2) >> 11) * 2.0**-53
        if growth > 0 and chance >= math.exp(-growth / (temperature * cooling ** (t // proposals))):
            continue
        weights, accepted = changed, accepted + 1
    return AnnealedWeights(weights, accepted)


def _pairs(classes: list[int], proposals: int, key: int) -> Iterator[tuple[int, int, int]]:
    """Proposal by proposal: its number, any edge, any edge of the same class."""
    members = {c: [e for e, other in enumerate(classes) if other == c] for c in set(classes)}
    for t in range(proposals if classes else 0):
        e = (random_word(key, 3 * t) * len(classes)) >> 64
        same = members[classes[e]]
        yield t, e, same[(random_word(key, 3 * t + 1) * len(same)) >> 64]


def _class_of(labels: Int64[np.ndarray, "levels nodes"], n_classes: int, a: int, b: int) -> int:
    """The first label both nodes have, else the last class."""
    return next((int(level[a]) for level in labels if level[a] == level[b]), n_classes - 1)


def _is_connected(edges: list[tuple[int, int]], nodes: int, undirected: bool) -> bool:
    """Whether every node is reached from node 0 and, if directed, reaches it."""
    ways = [edges + [(b, a) for a, b in edges]] if undirected else [edges, [(b, a) for a, b in edges]]
    for way in ways:
        reached, grows = {0}, True
        while grows:
            more = {b for a, b in way if a in reached} - reached
            reached, grows = reached | more, bool(more)
        if len(reached) < nodes:
            return False
    return True
