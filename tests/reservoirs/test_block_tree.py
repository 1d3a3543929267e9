"""Block trees: the published probabilities, and expected edges that merging leaves alone whatever the sizes."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from commissure.core.errors import InputError
from commissure.reservoirs.block_tree import BlockTree

TREE = BlockTree.balanced(branching=2, depth=3, leaf_size=50)


def test_published_probabilities_of_the_levels() -> None:
    blocks = {level: TREE.block_probabilities(0.5, 0.5, level) for level in range(4)}
    assert blocks[3][0].tolist() == [0.5, 0.25, 0.125, 0.125, 0.0625, 0.0625, 0.0625, 0.0625]
    np.testing.assert_allclose(blocks[2][0], [0.5, 0.25, *[1 / 12] * 6], rtol=1e-15)
    np.testing.assert_allclose(blocks[1][5], [*[3 / 28] * 5, 0.5, *[3 / 28] * 2], rtol=1e-15)
    np.testing.assert_allclose(blocks[0], 24_800 / (400 * 399), rtol=1e-15)
    for level in (1, 2, 3):
        np.testing.assert_allclose(blocks[level].sum(1), 1.25, rtol=1e-14)
    spectrum = {level: np.sort(np.linalg.eigvalsh(blocks[level]))[::-1] for level in (1, 3)}
    np.testing.assert_allclose(spectrum[3], [1.25, 0.75, 0.5, 0.5, 0.25, 0.25, 0.25, 0.25], rtol=1e-12)
    np.testing.assert_allclose(spectrum[1], [1.25, *[0.5 - 3 / 28] * 7], rtol=1e-12)


def test_geometry_of_a_balanced_tree() -> None:
    tree = BlockTree.balanced(branching=3, depth=2, leaf_size=range(1, 10))
    assert (tree.n_nodes, tree.depth, tree.sizes.tolist()) == (45, 2, list(range(1, 10)))
    assert tree.separations[4].tolist() == [2, 2, 2, 1, 0, 1, 2, 2, 2]
    assert tree.levels[1].tolist() == [0] * 6 + [1] * 15 + [2] * 24


def dense_expected_edges(tree: BlockTree, level: int) -> float:
    """Expected edges summed over the ordered pairs of nodes one by one."""
    p, block = tree.block_probabilities(0.6, 0.3, level), tree.levels[0]
    nodes = range(tree.n_nodes)
    return math.fsum(p[block[i], block[j]] for i in nodes for j in nodes if i != j)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=25), st.lists(st.integers(0, 2), min_size=6, max_size=6))
def test_expected_edges_are_the_same_at_every_level(blocks: list[int], parents: list[int]) -> None:
    """Unequal blocks in any order of the nodes, singletons and repeated partitions among them; the diagonal is out."""
    fine = np.unique(blocks, return_inverse=True)[1]
    coarse = np.unique(np.asarray(parents)[fine], return_inverse=True)[1]
    tree = BlockTree.from_partitions([fine, coarse])
    expected = [dense_expected_edges(tree, level) for level in range(3)]
    np.testing.assert_allclose(expected, expected[0], rtol=1e-12)
    for level in range(3):
        assert tree.n_pairs @ tree.probabilities(0.6, 0.3, level) == pytest.approx(expected[level], rel=1e-12)


def test_separations_are_those_of_the_partitions() -> None:
    fine, middle, coarse = [3, 0, 1, 2, 0], [1, 0, 0, 2, 0], [1, 0, 0, 1, 0]
    tree = BlockTree.from_partitions([fine, middle, coarse])
    for i in range(5):
        for j in range(5):
            apart = sum(level[i] != level[j] for level in (fine, middle, coarse))
            assert tree.separations[fine[i], fine[j]] == apart


def test_arrays_are_checked_copies() -> None:
    mine = np.array([0, 0, 1])
    tree = BlockTree.from_partitions([mine])
    mine[:] = 7
    assert tree.levels[0].tolist() == [0, 0, 1]
    with pytest.raises(ValueError, match="read-only"):
        tree.levels[0][0] = 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BlockTree.from_partitions([]), "one partition at least"),
        (lambda: BlockTree.from_partitions([[0, 2, 2]]), "partitions[0] = [0, 2]: expected modules 0 ... k - 1"),
        (lambda: BlockTree.from_partitions([[0.0, 1.0]]), "partitions[0] = ((2,), 'float64'): expected integers"),
        (lambda: BlockTree.from_partitions([[0, 1], [0]]), "partitions[1] = 1: expected 2 module numbers"),
        (
            lambda: BlockTree.from_partitions([[0, 0, 1], [0, 1, 1]]),
            "partitions[1] = [0, 1]: expected whole modules of",
        ),
        (lambda: BlockTree.from_partitions(5), "partitions = 5: expected partitions"),
        (lambda: BlockTree(None), "levels = None: expected partitions"),
        (lambda: BlockTree.balanced(leaf_size=1.5), "leaf_size = 1.5: expected an integer >= 1, or one a block"),
        (lambda: BlockTree.balanced(depth=1, leaf_size="ab"), "leaf_size[0] = 'a': expected an integer"),
        (lambda: BlockTree.balanced(leaf_size=np.array(2.0)), "leaf_size = array(2.): expected an integer"),
        (lambda: BlockTree.balanced(depth=1, leaf_size=[[1, 2], 3]), "leaf_size[0] = [1, 2]: expected an integer"),
        (lambda: BlockTree.balanced(leaf_size=10**9), "at most 16777216 nodes in all, not 8000000000"),
        (lambda: BlockTree.balanced(depth=10**9), "depth = 1000000000: expected at most 16777216 blocks"),
        (lambda: BlockTree.balanced(branching=10**400, depth=1), "depth = 1: expected at most 16777216 blocks"),
        (lambda: BlockTree.balanced(branching=1), "branching = 1"),
        (lambda: BlockTree.balanced(depth=0), "depth = 0"),
        (lambda: BlockTree.balanced(depth=1, leaf_size=[3]), "leaf_size = 1: expected 2 sizes"),
        (lambda: BlockTree.balanced(depth=1, leaf_size=[3, 0]), "leaf_size[1] = 0"),
        (lambda: TREE.probabilities(1.2, 0.5), "p_within = 1.2"),
        (lambda: TREE.probabilities(0.5, float("nan")), "decay = nan"),
        (lambda: TREE.probabilities(0.5, 0.5, 4), "level = 4: expected 0 (random) to 3"),
    ],
)
def test_bad_input(make, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        make()
