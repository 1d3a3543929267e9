"""Null networks: the same degrees, and as much of the module structure as is asked for, otherwise random.

    preserve             what stays, besides every node's degree (in and out) and the multiset of weights
    "degree"             nothing else (Maslov & Sneppen 2002, 10.1126/science.1065103)
    "degree+modules"     each node's degree within its finest module, and across modules
    "degree+levels"      each node's degree within its module of every level, and outside all

Of a model and its nulls, the step that changes the score names the structure that matters.  Weights move with their
edges: a directed edge keeps its source, so that every node keeps its out-strength and, where it obeys Dale's law, its
sign.  `strengths=True` then exchanges weights of one sign within a class of edges, by simulated annealing, until each
node's strength, in and out, is near that of the original (Milisav et al. 2025, 10.1038/s43588-024-00755-1).

Categories of edges by level: bioRxiv 2025.06.20.660760.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, get_args

import numpy as np
from jaxtyping import Float, Int
from scipy.sparse import coo_array, csr_array, triu

from commissure.core.errors import CommissureError, CommissureWarning, InputError
from commissure.core.rng import spawn
from commissure.native.rewire import anneal_weights, swap_edges
from commissure.reservoirs.connectome import Connectome
from commissure.reservoirs.inputs import real

__all__ = ["NothingRewiredWarning", "Preserve", "RewireStatistics", "Rewired", "rewire"]

Preserve = Literal["degree", "degree+modules", "degree+levels"]

# Slower cooling or longer stages lower an error of 0.2 (lognormal weights) by a tenth; one of a connectome is 1e-4.
_STAGES, _PER_EDGE, _COOLING = 60, 10, 0.8
_MOST_PROPOSALS = 1e15  # years of swaps; more does not fit the kernel's counters


class NothingRewiredWarning(CommissureWarning):
    """No swap could be made: none leads to another network, or too few were tried."""


@dataclass(frozen=True)
class RewireStatistics:
    """What was done: proposed and accepted swaps, the share of edges whose pair of nodes is new, and strengths.

    `strength_error`: the sum of the absolute deviations of the nodes' strengths, in and out, over the sum of the
    strengths' magnitudes; `strength_error_swapped`: before weights were exchanged, the same without `strengths`.
    """

    proposed: int
    accepted: int
    moved: float
    strength_error_swapped: float
    strength_error: float


class Rewired(NamedTuple):
    """A null network and how it was made."""

    connectome: Connectome
    statistics: RewireStatistics


def rewire(
    connectome: Connectome,
    *,
    preserve: Preserve = "degree",
    swaps_per_edge: float = 10,
    keep_connected: bool = False,
    strengths: bool = False,
    seed: int,
) -> Rewired:
    """A random network with the degrees of `connectome`; nodes, labels, places and levels stay, tract lengths go.

    `swaps_per_edge` proposals for each edge (bioRxiv 2025.06.20.660760 makes 10 and 25 successful ones); those that
    cannot be made count, so that all networks that can be reached are equally likely.  `keep_connected`: connected, or
    strongly connected, after every swap.  Not one swap made: the network unchanged and a `NothingRewiredWarning`.

    >>> ring = Connectome.from_array(np.roll(np.eye(8), 1, axis=1), orientation="source_target")
    >>> null, statistics = rewire(ring, seed=0)
    >>> null.weights.sum(axis=0).tolist() == [1.0] * 8, statistics.proposed, statistics.moved > 0.5
    (True, 80, True)
    """
    if not isinstance(connectome, Connectome):
        raise InputError("connectome", type(connectome).__name__, "a Connectome", "Connectome.from_array(weights, ...)")
    if not isinstance(preserve, str) or preserve not in get_args(Preserve):
        raise InputError("preserve", preserve, f"one of {', '.join(map(repr, get_args(Preserve)))}")
    for name, choice in (("keep_connected", keep_connected), ("strengths", strengths)):
        if not isinstance(choice, bool | np.bool_):
            raise InputError(name, choice, "True or False")
    swaps_per_edge = real("swaps_per_edge", swaps_per_edge, 0)
    if not 0 < swaps_per_edge * max(1, connectome.n_edges) <= _MOST_PROPOSALS:
        raise InputError("swaps_per_edge", swaps_per_edge, f"a number > 0, at most {_MOST_PROPOSALS:.0e} swaps in all")
    if preserve != "degree":
        connectome.modules()  # raises where there are none
    levels = {"degree": (), "degree+modules": connectome.levels[:1], "degree+levels": connectome.levels}[preserve]
    undirected = connectome.is_undirected
    ends, weights = _edges(connectome)
    labels, n_classes = _labels(levels, connectome.n_nodes)
    proposals = int(np.ceil(swaps_per_edge * len(ends)))
    swapped = swap_edges(
        ends,
        labels,
        n_classes=n_classes,
        undirected=undirected,
        keep_connected=bool(keep_connected),
        proposals=proposals,
        key=spawn(seed, "rewire", "swaps"),
    )
    classes = _classes(swapped.ends, labels, n_classes)
    if not swapped.accepted:
        message = f"none of {proposals} proposed swaps could be made ({preserve}); the network is returned unchanged"
        warnings.warn(NothingRewiredWarning(message), stacklevel=2)
        return Rewired(connectome, RewireStatistics(proposals, 0, 0.0, 0.0, 0.0))
    new = _anneal(swapped.ends, weights, classes, _strengths(connectome), undirected, seed) if strengths else weights
    note = f"rewired: {preserve}, {swaps_per_edge:g} swaps an edge, {swapped.accepted} of {proposals} accepted"
    note += f"{', kept connected' if keep_connected else ''}{', strengths annealed' if strengths else ''}, seed {seed}"
    null = replace(
        connectome,
        weights=_matrix(swapped.ends, new, connectome.n_nodes, undirected),
        tract_lengths=None,
        provenance=(*connectome.provenance, note),
    )
    _verify(connectome, null, labels, n_classes)
    before = _matrix(swapped.ends, weights, connectome.n_nodes, undirected)
    there = (null.weights != 0).multiply(connectome.weights != 0).nnz
    errors = (_strength_error(connectome, replace(null, weights=before)), _strength_error(connectome, null))
    return Rewired(null, RewireStatistics(proposals, swapped.accepted, 1 - there / connectome.weights.nnz, *errors))


def _edges(connectome: Connectome) -> tuple[Int[np.ndarray, "edges 2"], Float[np.ndarray, " edges"]]:
    """Source and target of every edge, an undirected one once, and its weight."""
    found = coo_array(triu(connectome.weights) if connectome.is_undirected else connectome.weights)
    return np.stack(found.coords, 1).astype(np.int64), found.data


def _matrix(
    ends: Int[np.ndarray, "edges 2"], weights: Float[np.ndarray, " edges"], n_nodes: int, undirected: bool
) -> csr_array:
    if undirected:
        ends, weights = np.concatenate([ends, ends[:, ::-1]]), np.tile(weights, 2)
    return csr_array((weights, (ends[:, 0], ends[:, 1])), shape=(n_nodes, n_nodes))


def _labels(levels: tuple[Int[np.ndarray, " n"], ...], n_nodes: int) -> tuple[Int[np.ndarray, "levels n"], int]:
    """Levels with labels of their own, and the number of classes of edges: one a module, and one of those outside."""
    found, first = np.zeros((len(levels), n_nodes), np.int64), 0
    for i, level in enumerate(levels):
        found[i] = level + first
        first += int(level.max()) + 1
    return found, first + 1


def _classes(
    ends: Int[np.ndarray, "edges 2"], labels: Int[np.ndarray, "levels n"], n_classes: int
) -> Int[np.ndarray, " edges"]:
    """The finest module that holds both ends of each edge."""
    found = np.full(len(ends), n_classes - 1)
    for level in labels[::-1]:
        found = np.where(level[ends[:, 0]] == level[ends[:, 1]], level[ends[:, 0]], found)
    return found


def _anneal(
    ends: Int[np.ndarray, "edges 2"],
    weights: Float[np.ndarray, " edges"],
    classes: Int[np.ndarray, " edges"],
    strengths: Float[np.ndarray, " sums"],
    undirected: bool,
    seed: int,
) -> Float[np.ndarray, " edges"]:
    """The same weights in another order; at the first temperature most exchanges are accepted."""
    variance = float(weights.var())
    if not variance:
        return weights
    return anneal_weights(
        ends,
        weights,
        2 * classes + (weights < 0),
        strengths,
        undirected=undirected,
        stages=_STAGES,
        proposals=_PER_EDGE * len(ends),
        temperature=4 * variance,
        cooling=_COOLING,
        key=spawn(seed, "rewire", "weights"),
    ).weights


def _strengths(connectome: Connectome) -> Float[np.ndarray, " sums"]:
    """Out- and in-strengths, or those of an undirected network once."""
    out, into = (np.asarray(connectome.weights.sum(axis=axis)) for axis in (1, 0))
    return out if connectome.is_undirected else np.concatenate([out, into])


def _strength_error(original: Connectome, null: Connectome) -> float:
    wanted, found = _strengths(original), _strengths(null)
    scale = float(np.abs(wanted).sum())
    return float(np.abs(found - wanted).sum()) / scale if scale else 0.0


def _verify(original: Connectome, null: Connectome, labels: Int[np.ndarray, "levels n"], n_classes: int) -> None:
    """Raise CommissureError where the null breaks what it should keep: the result of a bug, never of bad input."""

    def degrees(connectome: Connectome) -> Int[np.ndarray, "2 counts"]:
        ends = np.stack(connectome.weights.nonzero(), 1)
        classes = _classes(ends, labels, n_classes)
        cells = (np.bincount(side * n_classes + classes, minlength=len(labels.T) * n_classes) for side in ends.T)
        return np.stack(list(cells))

    kept = {
        "the nodes' degrees in each class of edges": np.array_equal(degrees(original), degrees(null)),
        "the weights": np.array_equal(np.sort(original.weights.data), np.sort(null.weights.data)),
        "the symmetry": null.is_undirected or not original.is_undirected,
        "the empty diagonal": not null.weights.diagonal().any(),
    }
    broken = [name for name, is_kept in kept.items() if not is_kept]
    if broken:
        raise CommissureError(f"rewire did not keep {' and '.join(broken)}; please report this with the seed")
