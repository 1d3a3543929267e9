"""Rewiring: kernel and reference make the same choices, and each kind of null is uniform over what it can reach."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2

from commissure.core.errors import InputError
from commissure.core.rng import generator
from commissure.native.rewire import anneal_weights, anneal_weights_reference, swap_edges, swap_edges_reference

NO_LABELS = np.zeros((0, 6), np.int64)


def draw(seed: int, nodes: int, density: float, undirected: bool) -> np.ndarray:
    """A ring, so that it is connected, and edges at random; in random order, undirected ones either way round."""
    rng = generator(seed, "edges")
    there = rng.random((nodes, nodes)) < density
    there |= np.roll(np.eye(nodes, dtype=bool), 1, axis=1)
    np.fill_diagonal(there, False)
    if undirected:
        there = np.triu(there | there.T)
    ends = rng.permutation(np.argwhere(there))
    return np.where(rng.random((len(ends), 1)) < 0.5, ends[:, ::-1], ends) if undirected else ends


def nested_labels(nodes: int) -> tuple[np.ndarray, int]:
    """Fours within eights, all labels different, and the number of classes."""
    fine = np.arange(nodes) // 4
    coarse = np.arange(nodes) // 8
    return np.stack([fine, fine.max() + 1 + coarse]), int(fine.max() + 1 + coarse.max() + 1 + 1)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**31),
    nodes=st.integers(3, 14),
    density=st.floats(0.0, 0.6),
    undirected=st.booleans(),
    keep_connected=st.booleans(),
    with_labels=st.booleans(),
)
def test_kernel_and_reference_make_the_same_swaps(seed, nodes, density, undirected, keep_connected, with_labels):
    ends = draw(seed, nodes, density, undirected)
    labels, n_classes = nested_labels(nodes) if with_labels else (np.zeros((0, nodes), np.int64), 1)
    options = {"n_classes": n_classes, "undirected": undirected, "keep_connected": keep_connected, "proposals": 60}
    before = ends.copy()
    swapped = swap_edges(ends, labels, key=2 * seed, **options)
    expected = swap_edges_reference(ends, labels, key=2 * seed, **options)
    assert swapped.accepted == expected.accepted
    assert swapped.ends.tolist() == expected.ends.tolist()
    assert (ends == before).all()
    again = swap_edges(np.asfortranarray(ends), labels, key=2 * seed, **options)
    assert again.ends.tolist() == expected.ends.tolist()


@pytest.mark.parametrize("undirected", [True, False])
@pytest.mark.parametrize("nodes", [60, 81, 100])
def test_long_searches_decide_on_sparse_rings(undirected, nodes):
    """Hardly an edge besides the ring: what is left of it between two nodes is found only after dozens of others."""
    for seed in range(3):
        ends = draw(seed, nodes, 0.0 if undirected else 5e-3, undirected)
        labels = np.zeros((0, nodes), np.int64)
        options = {"n_classes": 1, "undirected": undirected, "proposals": 150, "key": seed}
        swapped = swap_edges(ends, labels, keep_connected=True, **options)
        expected = swap_edges_reference(ends, labels, keep_connected=True, **options)
        assert 0 < swapped.accepted < swap_edges(ends, labels, keep_connected=False, **options).accepted
        assert swapped.ends.tolist() == expected.ends.tolist()


def graphs_of(ends: np.ndarray, nodes: int, undirected: bool) -> Iterator[frozenset[tuple[int, int]]]:
    """Every graph with these degrees, out and in."""
    pairs = list(itertools.combinations(range(nodes), 2) if undirected else itertools.permutations(range(nodes), 2))

    def degrees(edges) -> tuple[list[int], list[int]]:
        out, into = (
            np.bincount([a for a, _ in edges], minlength=nodes),
            np.bincount([b for _, b in edges], minlength=nodes),
        )
        return ((out + into).tolist(), []) if undirected else (out.tolist(), into.tolist())

    wanted = degrees([(int(a), int(b)) for a, b in ends])
    return (frozenset(edges) for edges in itertools.combinations(pairs, len(ends)) if degrees(edges) == wanted)


def named(ends: np.ndarray, undirected: bool) -> frozenset[tuple[int, int]]:
    return frozenset((int(a), int(b)) for a, b in (np.sort(ends, 1) if undirected else ends))


def is_strongly_connected(graph: frozenset[tuple[int, int]], nodes: int, undirected: bool) -> bool:
    """By powers of the adjacency matrix."""
    reach = np.eye(nodes, dtype=np.int64)
    for a, b in graph:
        reach[a, b] = 1
        reach[b, a] |= undirected
    for _ in range(nodes.bit_length()):
        reach = (reach @ reach > 0).astype(np.int64)
    return bool(reach.all())


CASES = {
    "undirected": ([(0, 1), (1, 2), (2, 3), (3, 4), (4, 5), (5, 0), (0, 3)], True, [0, 0, 0, 0, 1, 1]),
    "undirected-classes": ([(0, 1), (2, 3), (0, 4), (1, 5), (2, 4)], True, [0, 0, 0, 0, 1, 1]),
    "directed": ([(0, 1), (1, 2), (2, 3), (3, 4), (4, 0), (0, 2), (1, 3)], False, [0, 0, 0, 1, 1]),
    "directed-classes": ([(0, 1), (1, 2), (0, 3), (1, 4), (2, 3), (3, 1), (4, 2)], False, [0, 0, 0, 1, 1]),
}


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        *itertools.product(["undirected", "directed"], ["all", "connected"]),
        *itertools.product(["undirected-classes", "directed-classes"], ["classes"]),
    ],
)
def test_every_graph_is_equally_likely(name, variant):
    """Chi-squared over all graphs of one degree sequence, enumerated; 0.1 % would fail by chance, the seed is fixed."""
    edges, undirected, modules = CASES[name]
    ends = np.array(edges)
    nodes = int(ends.max()) + 1
    labels, n_classes = np.zeros((0, nodes), np.int64), 1
    found = list(graphs_of(ends, nodes, undirected))
    if variant == "connected":
        found = [graph for graph in found if is_strongly_connected(graph, nodes, undirected)]
    if variant == "classes":
        labels, n_classes = np.array([modules]), 3

        def class_degrees(graph) -> Counter:
            sides = ((a, b, int(labels[0, a] == labels[0, b])) for a, b in graph)
            return Counter(x for a, b, c in sides for x in ((a, "out", c), (b, "out" if undirected else "in", c)))

        found = [graph for graph in found if class_degrees(graph) == class_degrees(named(ends, undirected))]
    assert len(found) > 2
    counts = Counter()
    n_samples = 150 * len(found)
    for sample in range(n_samples):
        swapped = swap_edges(
            ends,
            labels,
            n_classes=n_classes,
            undirected=undirected,
            keep_connected=variant == "connected",
            proposals=400,
            key=1000 + sample,
        )
        counts[named(swapped.ends, undirected)] += 1
    assert set(counts) == set(found)
    expected = n_samples / len(found)
    statistic = sum((counts[graph] - expected) ** 2 / expected for graph in found)
    assert statistic < chi2.ppf(0.999, len(found) - 1)


@pytest.mark.parametrize("undirected", [True, False])
def test_large_networks_keep_degrees_and_stay_connected(undirected):
    """Many swaps on a sparse network, where a swap often cuts it: the edge set's removals and the searches are used."""
    nodes = 300
    ends = draw(3, nodes, 0.0 if undirected else 1e-4, undirected)
    options = {"n_classes": 1, "undirected": undirected, "proposals": 40 * len(ends), "key": 7}
    labels = np.zeros((0, nodes), np.int64)
    free = swap_edges(ends, labels, keep_connected=False, **options)
    kept = swap_edges(ends, labels, keep_connected=True, **options)
    assert not is_strongly_connected(named(free.ends, undirected), nodes, undirected)
    assert is_strongly_connected(named(kept.ends, undirected), nodes, undirected)
    for swapped in (free, kept):
        assert len(named(swapped.ends, undirected)) == len(ends)
        for column in [slice(None)] if undirected else [0, 1]:
            degrees = [np.bincount(e[:, column].ravel(), minlength=nodes) for e in (ends, swapped.ends)]
            assert (degrees[0] == degrees[1]).all()


@pytest.mark.parametrize("undirected", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_kernel_and_reference_exchange_the_same_weights(undirected, seed):
    ends = draw(seed, 9, 0.4, undirected)
    rng = generator(seed, "weights")
    weights, wanted = rng.normal(size=len(ends)), rng.normal(size=9 if undirected else 18)
    classes = rng.integers(3, size=len(ends))
    options = {"undirected": undirected, "stages": 5, "proposals": 100, "temperature": 2.0, "cooling": 0.4, "key": seed}
    told = anneal_weights(ends, weights, classes, wanted, **options)
    expected = anneal_weights_reference(ends, weights, classes, wanted, **options)
    assert 0 < told.accepted < 500
    assert told.accepted == expected.accepted
    assert told.weights.tolist() == expected.weights.tolist()
    for c in range(3):
        assert sorted(told.weights[classes == c]) == sorted(weights[classes == c])


@pytest.mark.parametrize("undirected", [True, False])
def test_slow_cooling_finds_the_best_of_all_orders(undirected):
    ends = np.array([[0, 1], [1, 2], [2, 3], [3, 0], [0, 2], [1, 3]])
    rng = generator(11, "anneal", int(undirected))
    weights, wanted = rng.exponential(size=6), 3 * rng.random(4 if undirected else 8)

    def energy(order: np.ndarray) -> float:
        out, into = (np.bincount(ends[:, side], weights=order, minlength=4) for side in (0, 1))
        return float(((out + into if undirected else np.concatenate([out, into])) - wanted).__pow__(2).sum())

    best = min(energy(np.array(order)) for order in itertools.permutations(weights))
    schedule = {"stages": 100, "proposals": 400, "temperature": 20.0, "cooling": 0.9, "key": 5}
    told = anneal_weights(ends, weights, np.zeros(6, np.int64), wanted, undirected=undirected, **schedule)
    assert energy(told.weights) == pytest.approx(best, abs=1e-12)


def test_a_metropolis_chain_visits_orders_by_their_energy():
    """At a constant temperature: two orders of two weights, exp(-E / T) each."""
    ends, weights, wanted = np.array([[0, 1], [2, 3]]), np.array([1.0, 2.0]), np.array([1.2, 1.2, 1.8, 1.8])
    gap = 4 * (0.8**2 - 0.2**2)
    n = 4000
    swapped = 0
    schedule = {"stages": 1, "proposals": 60, "temperature": 1.5, "cooling": 1.0}
    for sample in range(n):
        told = anneal_weights(ends, weights, np.zeros(2, np.int64), wanted, undirected=True, key=sample, **schedule)
        swapped += told.weights[0] == 2.0
    chance = 1 / (1 + math.exp(gap / 1.5))
    assert abs(swapped / n - chance) < 4 * math.sqrt(chance * (1 - chance) / n)


@pytest.mark.parametrize(
    ("ends", "message"),
    [
        ([[0, 1], [2, 2]], r"ends\[1\].*no loops"),
        ([[0, 6]], r"ends\[0\].*nodes from 0 to 5"),
        ([[0, 1], [1, 2], [0, 1]], r"ends\[2\].*every edge once"),
    ],
)
def test_bad_edges_are_refused(ends, message):
    with pytest.raises(InputError, match=message):
        swap_edges(np.array(ends), NO_LABELS, n_classes=1, undirected=False, keep_connected=False, proposals=1, key=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ends": "ab"}, "ends = 'ab': expected an array with 2 axes"),
        ({"ends": [[0, 1], [2]]}, "ends = 'list': expected an array of numbers"),
        ({"ends": [[0.5, 1.0]]}, r"ends\.dtype = 'float64': expected integers"),
        ({"ends": [[0, 1, 2]]}, r"ends = \(1, 3\)"),
        ({"labels": np.zeros(6, np.int64)}, r"labels = \(6,\): expected an array with 2 axes"),
        ({"labels": [[0, 0, 0, 1, 1, 2]]}, r"labels = \(0, 2\): expected labels from 0 to 1"),
        ({"labels": [[-1, 0, 0, 0, 1, 1]]}, r"labels = \(-1, 1\): expected labels from 0 to 1"),
        ({"labels": [[0.0] * 6]}, r"labels\.dtype = 'float64'"),
        ({"n_classes": 0}, "n_classes = 0"),
        ({"proposals": -1}, "proposals = -1: expected an integer from 0"),
        ({"proposals": 1.5}, "proposals = 1.5"),
        ({"proposals": 10**20}, "proposals = 100000000000000000000"),
        ({"key": -1}, "key = -1"),
        ({"key": 2**64}, "key = 18446744073709551616"),
        ({"undirected": 1}, "undirected = 1: expected True or False"),
        ({"keep_connected": None}, "keep_connected = None"),
    ],
)
def test_bad_swaps_are_refused(change, message):
    given = {
        "ends": [[0, 1], [2, 3]], "labels": [[0, 0, 0, 0, 1, 1]], "n_classes": 3, "undirected": True,
        "keep_connected": False, "proposals": 4, "key": 2**64 - 1,
    }  # fmt: skip
    assert swap_edges(**given).accepted >= 0
    with pytest.raises(InputError, match=message):
        swap_edges(**(given | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": [1.0]}, r"weights = \(1,\): expected 2 numbers, one an edge"),
        ({"weights": [1.0, math.nan]}, "weights = .*expected finite real numbers"),
        ({"weights": ["1", "2"]}, "weights = .*expected finite real numbers"),
        ({"weights": 1.0}, "weights = 1.0: expected an array with 1 axes"),
        ({"classes": [0, 0, 0]}, r"classes = \(3,\): expected 2 numbers"),
        ({"classes": [0, -1]}, "classes = -1: expected integers >= 0"),
        ({"classes": [0.0, 1.0]}, r"classes\.dtype = 'float64'"),
        ({"strengths": [1.0, 1.0, math.inf, 1.0]}, "strengths"),
        ({"strengths": [1.0, 1.0, 1.0]}, r"ends\[1\] = \[2, 3\]: expected nodes from 0 to 2"),
        ({"strengths": np.ones(9), "undirected": False}, r"strengths = \(9,\): expected two for each node"),
        ({"stages": -1}, "stages = -1"),
        ({"proposals": True}, "proposals = True"),
        ({"temperature": 0.0}, "temperature = 0.0: expected a finite number > 0"),
        ({"temperature": math.inf}, "temperature = inf"),
        ({"temperature": 10**400}, "temperature = 1000"),
        ({"temperature": "hot"}, "temperature = 'hot'"),
        ({"cooling": 1.5}, "cooling = 1.5: expected a number > 0, at most 1"),
        ({"cooling": math.nan}, "cooling = nan"),
        ({"key": 0.0}, "key = 0.0"),
    ],
)
def test_bad_exchanges_are_refused(change, message):
    given = {
        "ends": [[0, 1], [2, 3]], "weights": [1.0, 2.0], "classes": [0, 0], "strengths": np.ones(4), "undirected": True,
        "stages": 1, "proposals": 4, "temperature": 1.0, "cooling": 1.0, "key": 0,
    }  # fmt: skip
    assert anneal_weights(**given).accepted >= 0
    with pytest.raises(InputError, match=message):
        anneal_weights(**(given | change))


def test_an_undirected_edge_both_ways_is_twice_the_same():
    options = {"n_classes": 1, "keep_connected": False, "proposals": 0, "key": 0}
    both = np.array([[0, 1], [1, 0]])
    assert swap_edges(both, NO_LABELS, undirected=False, **options).ends.tolist() == both.tolist()
    with pytest.raises(InputError, match="every edge once"):
        swap_edges(both, NO_LABELS, undirected=True, **options)


def test_a_network_in_pieces_cannot_be_kept_connected():
    with pytest.raises(InputError, match="strongly connected"):
        swap_edges(
            np.array([[0, 1], [1, 2]]),
            NO_LABELS,
            n_classes=1,
            undirected=False,
            keep_connected=True,
            proposals=1,
            key=0,
        )
