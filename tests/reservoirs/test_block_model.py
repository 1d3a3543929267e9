"""The nested stochastic block model: published counts of cycles, the law of its samples, and pairing by seeds."""

from __future__ import annotations

import re

import numpy as np
import pytest
from scipy.stats import chi2

from commissure.core.errors import ConvergenceError, InputError
from commissure.reservoirs.block_model import HierarchicalSBM, _places
from commissure.reservoirs.block_tree import BlockTree
from commissure.reservoirs.connectome import Connectome

TREE = BlockTree.balanced(branching=2, depth=3, leaf_size=50)
UNEVEN = BlockTree.from_partitions([[2, 0, 1, 0, 3, 1, 0, 2, 0, 3, 2, 2], [1, 0, 0, 0, 1, 0, 0, 1, 0, 1, 1, 1]])


def off_diagonal(model: HierarchicalSBM) -> np.ndarray:
    """Probability of an edge for every ordered pair of nodes."""
    block = model.tree.levels[0]
    p = model.block_probabilities[block][:, block]
    np.fill_diagonal(p, 0)
    return p


def cycles(a: np.ndarray) -> tuple[float, float]:
    """3- and 4-cycles of an undirected graph, or their expectation from independent edges of probability `a`."""
    square = a * a
    closed = np.trace(a @ a @ a @ a) - 2 * (square.sum(1) ** 2).sum() + (square * square).sum()
    return np.trace(a @ a @ a) / 6, closed / 8


@pytest.mark.parametrize(
    ("level", "published", "directed"),
    [(1, (72_876, 3.577e6), 95_794), (2, (78_246, 3.694e6), 105_288), (3, (80_317, 3.783e6), 108_419)],
)
def test_published_cycles(level: int, published: tuple[float, float], directed: float) -> None:
    """The published medians are those of the undirected unions of the pruned networks; samples agree with both."""
    assert np.trace(np.linalg.matrix_power(off_diagonal(HierarchicalSBM(TREE, level=level)), 3)) / 3 == pytest.approx(
        directed, abs=0.5
    )
    model = HierarchicalSBM.from_preset("milisav2025", level=level)
    p = (1 - model.prune) * off_diagonal(model)
    expected = cycles(1 - (1 - p) * (1 - p.T))
    np.testing.assert_allclose(expected, published, rtol=3e-3)
    counted = np.array([cycles(np.maximum(a, a.T)) for seed in range(12) for a in [_edges(model.sample(seed))]])
    error = counted.std(0, ddof=1) / np.sqrt(len(counted))
    assert (np.abs(counted.mean(0) - expected) < 4 * error).all()


def _edges(network: Connectome) -> np.ndarray:
    return (network.to_array() != 0).astype(float)


@pytest.mark.parametrize("level", range(4))
def test_expected_edges(level: int) -> None:
    model = HierarchicalSBM(TREE, level=level)
    assert model.expected_edges == pytest.approx(24_800, rel=1e-12)
    p = off_diagonal(model)
    z = (np.mean([model.sample(seed).n_edges for seed in range(10)]) - 24_800) / np.sqrt((p * (1 - p)).sum() / 10)
    assert abs(z) < 4
    budget = HierarchicalSBM(TREE, level=level, n_edges=10_000, prune=0.2, directed=False)
    assert budget.expected_edges == pytest.approx(10_000, rel=1e-12)
    assert budget.sample(0).n_edges == pytest.approx(10_000, rel=0.03)


@pytest.mark.parametrize("directed", [True, False])
@pytest.mark.parametrize("level", range(3))
def test_every_pair_has_its_probability(level: int, directed: bool) -> None:
    """Fast and reference samplers: the frequency of each edge against its probability, one chi-squared test each."""
    model = HierarchicalSBM(UNEVEN, p_within=0.8, decay=0.6, level=level, directed=directed, require_connected=False)
    p, n = off_diagonal(model), 400
    pairs = np.nonzero(p if directed else np.triu(p))
    assert len(pairs[0]) == (132 if directed else 66)
    for draw in (model.sample, model.sample_reference):
        edges = sum(_edges(draw(seed)) for seed in range(n))
        assert directed or np.array_equal(edges, edges.T)
        z = (edges - n * p)[pairs] / np.sqrt(n * p * (1 - p))[pairs]
        assert chi2.sf((z**2).sum(), len(z)) > 1e-3
        assert np.trace(edges) == 0


def test_edges_of_one_network_are_independent() -> None:
    """Counts of edges in the classes of pairs: binomial variances, no correlation; the same for both samplers."""
    model = HierarchicalSBM(UNEVEN, level=2, require_connected=False)
    block = UNEVEN.levels[0]
    apart = UNEVEN.separations[block][:, block]
    for draw in (model.sample, model.sample_reference):
        networks = [_edges(draw(seed)) for seed in range(600)]
        classes = [(apart == separation) & ~np.eye(12, dtype=bool) for separation in range(3)]
        counts = np.array([[a[cells].sum() for a in networks] for cells in classes])
        binomial = [cells.sum() * p * (1 - p) for cells, p in zip(classes, model.probabilities, strict=True)]
        np.testing.assert_allclose(counts.var(1, ddof=1), binomial, rtol=0.25)  # 4 SE of a variance
        assert np.abs(np.corrcoef(counts)[np.triu_indices(3, 1)]).max() < 4 / np.sqrt(600)


def test_weights_signs_and_pruning() -> None:
    model = HierarchicalSBM(TREE, weight_range=(0.5, 2.0), inhibitory_fraction=0.25, prune=0.36)
    block = TREE.levels[0]
    is_within = block[:, None] == block
    for draw in (model.sample, model.sample_reference):
        weights = draw(3).to_array()
        edges = np.abs(weights[weights != 0])
        assert edges.min() >= 0.5
        assert edges.max() < 2
        assert edges.mean() == pytest.approx(1.25, abs=4 * 1.5 / np.sqrt(12 * len(edges)))
        assert edges.var() == pytest.approx(1.5**2 / 12, rel=0.05)
        assert (weights[~is_within] >= 0).all()
        within = weights[is_within & (weights != 0)]
        assert (within < 0).mean() == pytest.approx(0.25, abs=4 * np.sqrt(0.25 * 0.75 / len(within)))
        apart = within[within > 0].mean() + within[within < 0].mean()  # signs and pruning do not look at weights
        assert apart == pytest.approx(0, abs=4 * np.sqrt(1.5**2 / 12 / (len(within) * 0.25 * 0.75)))
        assert len(edges) == pytest.approx(24_800 * 0.64, rel=0.03)
    full = HierarchicalSBM(TREE).sample(3)
    pruned = HierarchicalSBM(TREE, prune=0.36).sample(3)
    assert pruned.n_edges == full.n_edges - round(0.36 * full.n_edges)
    assert set(zip(*full.weights.nonzero(), strict=True)) > set(zip(*pruned.weights.nonzero(), strict=True))


def test_pruning_is_uniform() -> None:
    model = HierarchicalSBM(UNEVEN, p_within=1.0, decay=1.0, prune=0.4, require_connected=False)
    for draw in (model.sample, model.sample_reference):
        kept = sum(_edges(draw(seed)) for seed in range(300))[~np.eye(12, dtype=bool)]
        z = (kept - 180) / np.sqrt(300 * 0.4 * 0.6)
        assert kept.mean() == pytest.approx(180, abs=1)
        assert chi2.sf((z**2).sum(), 131) > 1e-3


def test_levels_are_paired() -> None:
    """With one seed, levels share the edges and weights of every separation that both keep."""
    block = TREE.levels[0]
    apart = TREE.separations[block][:, block]
    flat, pairs, full = (HierarchicalSBM(TREE, level=level).sample(5).to_array() for level in (1, 2, 3))
    assert np.array_equal(full[apart == 0], flat[apart == 0])
    assert np.array_equal(full[apart < 2], pairs[apart < 2])
    assert not np.array_equal(full[apart == 2] != 0, pairs[apart == 2] != 0)


def test_components_have_seeds_of_their_own() -> None:
    plain = HierarchicalSBM(TREE).sample(1)
    signed = HierarchicalSBM(TREE, inhibitory_fraction=0.3).sample(1)
    wide = HierarchicalSBM(TREE, weight_range=(0.0, 3.0)).sample(1)
    assert np.array_equal(np.abs(signed.to_array()), plain.to_array())
    np.testing.assert_allclose(wide.to_array(), 3 * plain.to_array(), rtol=1e-14)
    assert np.array_equal(HierarchicalSBM(TREE).sample(1).to_array(), plain.to_array())
    assert not np.array_equal(HierarchicalSBM(TREE).sample(2).to_array(), plain.to_array())


def test_sparse_networks_of_many_nodes() -> None:
    """8e9 pairs of nodes: only the edges are ever held, and no pair is hit twice."""
    tree = BlockTree.balanced(depth=3, leaf_size=11_250)
    for directed in (True, False):
        model = HierarchicalSBM(
            tree, n_edges=50_000, directed=directed, weight_range=(1.0, 1.0), require_connected=False
        )
        network = model.sample(0)
        assert network.n_edges == pytest.approx(50_000, rel=0.02)
        assert set(network.weights.data) == {1.0}


def test_cells_of_a_triangle() -> None:
    """Exact at the ends of rows of a triangle, where the square root is just below or above an integer."""
    column = np.concatenate([np.arange(1, 2000), 2 ** np.arange(11, 31) - 1, 10 ** np.arange(4, 10) * 3])
    first = column * (column - 1) // 2
    width, is_same = np.full(len(column), 2**32), np.ones(len(column), bool)
    for inside, row in ((first, np.zeros_like(column)), (first + column - 1, column - 1)):
        found = _places(inside, width, is_same, False)
        assert np.array_equal(found[0], row)
        assert np.array_equal(found[1], column)


def test_connectedness() -> None:
    sparse = HierarchicalSBM(BlockTree.balanced(depth=2, leaf_size=5), p_within=0.4, decay=0.5)
    loose = HierarchicalSBM(sparse.tree, p_within=0.4, decay=0.5, require_connected=False)
    rejected = 0
    for seed in range(20):
        for draw in (sparse.sample, sparse.sample_reference):
            assert _reaches_all(draw(seed).to_array())
            assert _reaches_all(draw(seed).to_array().T)
        free = loose.sample(seed).to_array()
        is_connected = _reaches_all(free) and _reaches_all(free.T)
        rejected += not is_connected
        assert np.array_equal(free, sparse.sample(seed).to_array()) == is_connected
    assert 0 < rejected < 20
    with pytest.raises(ConvergenceError, match=r"no strongly connected network in 100 draws.* prune less"):
        HierarchicalSBM(TREE, decay=0.0).sample(0)
    with pytest.raises(ConvergenceError, match="no connected network"):
        HierarchicalSBM(TREE, decay=0.0, directed=False).sample_reference(0)


def _reaches_all(weights: np.ndarray) -> bool:
    """Whether node 0 has a path to every node."""
    reached = np.zeros(len(weights), bool)
    reached[0] = True
    for _ in weights:
        reached = reached | ((weights != 0) & reached[:, None]).any(0)
    return bool(reached.all())


def test_what_a_sample_says() -> None:
    model = HierarchicalSBM(UNEVEN, p_within=0.9, decay=0.9, directed=False)
    network = model.sample(4)
    assert network.is_undirected
    assert all(np.array_equal(a, b) for a, b in zip(network.levels, UNEVEN.levels, strict=True))
    assert network.provenance == (f"{model!r}.sample(seed=4)",)
    assert "p_within=0.9" in network.provenance[0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: HierarchicalSBM([[0, 1]]), "tree = [[0, 1]]: expected a BlockTree"),
        (lambda: HierarchicalSBM(TREE, p_within=-0.1), "p_within = -0.1"),
        (lambda: HierarchicalSBM(TREE, level=4), "level = 4"),
        (lambda: HierarchicalSBM(TREE, n_edges=1e6), "n_edges = 1000000.0: expected at most 49600"),
        (lambda: HierarchicalSBM(TREE, n_edges=10, p_within=0.5), "p_within = 0.5: expected None"),
        (lambda: HierarchicalSBM(TREE, weight_range=(1, 0)), "weight_range = (1, 0)"),
        (lambda: HierarchicalSBM(TREE, weight_range=(0, 0)), "weight_range = (0, 0)"),
        (lambda: HierarchicalSBM(TREE, weight_range=(0, float("inf"))), "weight_range[1] = inf"),
        (lambda: HierarchicalSBM(TREE, weight_range=5), "weight_range = 5: expected (low, high)"),
        (lambda: HierarchicalSBM(TREE, weight_range=(0, 1, 2)), "weight_range = (0, 1, 2): expected (low, high)"),
        (lambda: HierarchicalSBM(TREE, weight_range="01"), "weight_range = '01': expected (low, high)"),
        (lambda: HierarchicalSBM(TREE, weight_range=(-1e308, 1e308)), "high - low finite"),
        (lambda: HierarchicalSBM(TREE, directed="no"), "directed = 'no': expected True or False"),
        (lambda: HierarchicalSBM(TREE, require_connected=np.ones(2)), "require_connected = array([1., 1.])"),
        (lambda: HierarchicalSBM(TREE, prune=1.5), "prune = 1.5"),
        (lambda: HierarchicalSBM(TREE, inhibitory_fraction=True), "inhibitory_fraction = True"),
        (lambda: HierarchicalSBM.from_preset("milisav"), "name = 'milisav': expected one of milisav2025"),
        (lambda: HierarchicalSBM(TREE).sample(-1), "seed = -1"),
    ],
)
def test_bad_input(make, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        make()
