"""Modules of a network at several levels: Louvain's hierarchy, the most typical of many runs.

    Q = 1/2m sum_ij (w_ij - gamma k_i k_j / 2m) [i and j in one module]

Louvain merges nodes, then modules, as long as Q grows; every round of merging is a level (Blondel et al. 2008).  Runs
differ by the order of the nodes, so the run is kept whose finest partition agrees best with those of all others, by
the adjusted Rand index (Hubert & Arabie 1985).

| bioRxiv 2025.06.20.660760 | name |
|---|---|
| gamma | `gamma` |
| consensus: largest summed z-Rand score | `louvain_hierarchy`: largest mean adjusted Rand index |
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Int, Real

from commissure.core.errors import DegenerateError, InputError
from commissure.core.rng import spawn
from commissure.reservoirs.connectome import Connectome
from commissure.reservoirs.inputs import real, whole
from commissure.reservoirs.partitions import checked_levels

__all__ = ["LouvainHierarchy", "adjusted_rand_index", "louvain_hierarchy"]


class LouvainHierarchy(NamedTuple):
    """`levels` of the run kept, the finest first; how well the runs agree at the finest level.

    `agreement`: mean adjusted Rand index of the run kept with the others, `mean_agreement`: over all pairs of runs (1.0
    for one run); `n_modules`: of each run.
    """

    levels: tuple[Int[np.ndarray, " nodes"], ...]
    agreement: float
    mean_agreement: float
    n_modules: tuple[int, ...]


def louvain_hierarchy(connectome: Connectome, *, gamma: float = 1.0, n_runs: int = 100, seed: int) -> LouvainHierarchy:
    """Nested modules of a network without negative weights: the medoid of `n_runs` of Louvain at resolution `gamma`.

    >>> two = np.kron(np.eye(2), np.ones((3, 3)) - np.eye(3))
    >>> two[2, 3] = two[3, 2] = 1
    >>> found = louvain_hierarchy(Connectome.from_array(two, orientation=None), n_runs=5, seed=0)
    >>> [level.tolist() for level in found.levels], found.agreement
    ([[0, 0, 0, 1, 1, 1]], 1.0)
    """
    import networkx as nx

    if not isinstance(connectome, Connectome):
        raise InputError("connectome", type(connectome).__name__, "a Connectome", "Connectome.from_array(weights, ...)")
    gamma, n_runs = real("gamma", gamma, 0), whole("n_runs", n_runs, 1)
    weights = connectome.weights
    if (weights.data < 0).any():
        at = int(np.flatnonzero(weights.data < 0)[0])
        fix = "modularity is not defined for negative weights: pass abs(weights)"
        raise InputError("connectome", float(weights.data[at]), "weights >= 0", fix)
    if not weights.nnz:
        raise DegenerateError("louvain_hierarchy: the network has no edges, every partition is as good")
    kind = nx.Graph if connectome.is_undirected else nx.DiGraph
    graph = nx.from_scipy_sparse_array(weights, create_using=kind)
    runs = [
        [_numbered(level, len(graph)) for level in partitions]
        for run in range(n_runs)
        for partitions in [nx.community.louvain_partitions(graph, resolution=gamma, seed=spawn(seed, "louvain", run))]
    ]
    pairs = np.ones((n_runs, n_runs))
    for a in range(n_runs):
        for b in range(a):
            pairs[a, b] = pairs[b, a] = adjusted_rand_index(runs[a][0], runs[b][0])
    mean = (pairs.sum(1) - 1) / (n_runs - 1) if n_runs > 1 else np.ones(1)
    medoid = int(mean.argmax())
    n_modules = tuple(int(run[0].max()) + 1 for run in runs)
    return LouvainHierarchy(tuple(runs[medoid]), float(mean[medoid]), float(mean.mean()), n_modules)


def adjusted_rand_index(a: Int[np.ndarray, " nodes"], b: Int[np.ndarray, " nodes"]) -> float:
    """Agreement of two partitions numbered from 0: 1 for the same modules, 0 as expected by chance.

    >>> adjusted_rand_index(np.array([0, 0, 1, 1]), np.array([1, 1, 0, 0]))
    1.0
    """
    (a,) = checked_levels("a", [a])
    (b,) = checked_levels("b", [b], len(a))
    table = np.zeros((int(a.max()) + 1, int(b.max()) + 1))
    np.add.at(table, (a, b), 1)
    together, in_a, in_b = (_pairs(counts) for counts in (table, table.sum(1), table.sum(0)))
    chance = in_a * in_b / max(1.0, _pairs(np.array([float(len(a))])))
    most = (in_a + in_b) / 2
    return 1.0 if most == chance else (together - chance) / (most - chance)


def _pairs(counts: Real[np.ndarray, "*counts"]) -> float:
    return float((counts * (counts - 1) / 2).sum())


def _numbered(modules: list[set[int]], n: int) -> Int[np.ndarray, " nodes"]:
    """Module numbers in the order of the modules' first nodes."""
    numbers = np.empty(n, np.int64)
    for number, module in enumerate(sorted(modules, key=min)):
        numbers[list(module)] = number
    return numbers
