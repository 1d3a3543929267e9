"""Communities: planted partitions are found, levels nest, and the medoid is the run that others agree with."""

from __future__ import annotations

import networkx as nx
import numpy as np
import pytest
from sklearn.metrics import adjusted_rand_score

from commissure import datasets
from commissure.core.errors import DegenerateError, InputError
from commissure.core.rng import spawn
from commissure.reservoirs.block_model import HierarchicalSBM
from commissure.reservoirs.block_tree import BlockTree
from commissure.reservoirs.communities import adjusted_rand_index, louvain_hierarchy
from commissure.reservoirs.connectome import Connectome
from commissure.reservoirs.datasets import hcp_s400, meg_timescales

needs_data = pytest.mark.skipif(
    not datasets.available("hcp-s400/SC_wei_HCP_s400.npy"), reason="no local copy: set COMMISSURE_DATA"
)


def planted(seed: int, directed: bool) -> Connectome:
    """Six blocks in two halves, in a random order of the nodes."""
    tree = BlockTree.from_partitions(
        [np.random.default_rng(seed).permutation(np.repeat(np.arange(6), [20, 25, 30, 20, 25, 30]))]
    )
    return HierarchicalSBM(tree, p_within=0.6, decay=0.08, directed=directed).sample(seed)


@pytest.mark.parametrize("directed", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_planted_partitions_are_found(seed: int, directed: bool) -> None:
    network = planted(seed, directed)
    found = louvain_hierarchy(network, n_runs=4, seed=seed)
    assert adjusted_rand_index(found.levels[-1], network.levels[0]) == 1
    BlockTree.from_partitions(found.levels)  # nested, numbered 0 ... k - 1
    assert all(len(level) == network.n_nodes for level in found.levels)


def test_planted_hierarchy_gives_its_levels() -> None:
    """A ring of cliques, larger than the resolution limit: modularity merges pairs of them at the second level."""
    graph = nx.ring_of_cliques(30, 5)
    network = Connectome.from_array(nx.to_numpy_array(graph), orientation=None)
    found = louvain_hierarchy(network, n_runs=5, seed=0)
    cliques = np.repeat(np.arange(30), 5)
    assert adjusted_rand_index(found.levels[0], cliques) == 1
    assert len(found.levels) > 1
    sizes = np.bincount(found.levels[1])
    assert sizes.max() <= 15
    assert set(sizes % 5) == {0}


@needs_data
def test_gamma_decides_how_fine() -> None:
    network = hcp_s400()
    few, many = (louvain_hierarchy(network, gamma=gamma, n_runs=3, seed=0).levels[0].max() for gamma in (0.5, 3.0))
    assert few < many


@needs_data
def test_connectome_of_400_parcels() -> None:
    network = hcp_s400()
    assert repr(network) == "Connectome(400 nodes, 4954 undirected edges)"
    assert network.coordinates is not None
    assert (network.coordinates[:200, 0] < 0).all()
    assert meg_timescales().shape == (400,)
    assert 10.6 < meg_timescales().min() < meg_timescales().max() < 43.4
    found = louvain_hierarchy(network, n_runs=10, seed=0)
    assert 12 <= found.levels[0].max() + 1 <= 18
    assert 4 <= found.levels[1].max() + 1 <= 8
    assert network.with_levels(found.levels).modules(1)[0][0] == 0
    assert len(found.n_modules) == 10
    assert found.mean_agreement < found.agreement < 1


@needs_data
def test_the_medoid_agrees_best() -> None:
    """Run by run: each single run is what one run from its own seed gives, and the statistics follow from them."""
    network = hcp_s400()
    found = louvain_hierarchy(network, n_runs=5, seed=2)
    graph = nx.from_numpy_array(network.to_array())
    runs = [next(nx.community.louvain_partitions(graph, seed=spawn(2, "louvain", run))) for run in range(5)]
    labels = [[next(k for k, module in enumerate(run) if node in module) for node in range(400)] for run in runs]
    rand = np.array([[adjusted_rand_score(a, b) for b in labels] for a in labels])
    mean = (rand.sum(1) - 1) / 4
    assert found.agreement == pytest.approx(mean.max(), abs=1e-12)
    assert found.mean_agreement == pytest.approx(mean.mean(), abs=1e-12)
    assert adjusted_rand_score(found.levels[0], labels[mean.argmax()]) == 1
    assert found.n_modules == tuple(len(run) for run in runs)


def test_adjusted_rand_index_is_sklearns() -> None:
    rng = np.random.default_rng(0)
    for k_a, k_b in ((1, 1), (1, 4), (3, 3), (7, 2), (40, 40)):
        for _ in range(10):
            a, b = (np.unique(rng.integers(0, k, 40), return_inverse=True)[1] for k in (k_a, k_b))
            assert adjusted_rand_index(a, b) == pytest.approx(adjusted_rand_score(a, b), abs=1e-12)
    every = np.arange(6)
    assert adjusted_rand_index(every, every) == adjusted_rand_score(every, every) == 1


@needs_data
def test_same_seed_same_levels() -> None:
    network = hcp_s400()
    first, again, other = (louvain_hierarchy(network, n_runs=2, seed=seed) for seed in (0, 0, 1))
    assert all(np.array_equal(a, b) for a, b in zip(first.levels, again.levels, strict=True))
    assert not np.array_equal(first.levels[0], other.levels[0])


def test_bad_input() -> None:
    signed = Connectome.from_array(np.array([[0, -1.0], [-1.0, 0]]), orientation=None)
    with pytest.raises(InputError, match=r"connectome = -1.0: expected weights >= 0; modularity is not defined"):
        louvain_hierarchy(signed, seed=0)
    with pytest.raises(DegenerateError, match="no edges"):
        louvain_hierarchy(Connectome.from_array(np.zeros((3, 3)), orientation=None), seed=0)
    with pytest.raises(InputError, match="connectome = 'ndarray': expected a Connectome"):
        louvain_hierarchy(np.ones((2, 2)), seed=0)
    for wrong in (3, [0.5, 1.0], [0, -1], [0, 1, 2]):
        with pytest.raises(InputError, match=r"^[ab]"):
            adjusted_rand_index(wrong, np.array([0, 1]))
    for wrong in ({"gamma": -1.0}, {"n_runs": 0}, {"seed": -1}):
        with pytest.raises(InputError, match=next(iter(wrong))):
            louvain_hierarchy(planted(0, True), **({"seed": 0, "n_runs": 1} | wrong))
