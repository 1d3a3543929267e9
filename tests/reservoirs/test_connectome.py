"""Connectomes: what they accept, which way their edges point, and that they own their arrays."""

from __future__ import annotations

import re

import numpy as np
import pytest
from scipy.sparse import coo_array, csr_array, csr_matrix

from commissure.core.errors import InputError
from commissure.reservoirs.connectome import Connectome, SelfLoopWarning, as_csr

DIRECTED = np.array([[0, 2.0, 0], [0, 0, -1.5], [0, 0.5, 0]])
UNDIRECTED = np.array([[0, 2.0, 0], [2.0, 0, -1.5], [0, -1.5, 0]])


def test_orientation() -> None:
    """Row 0 of the stored matrix holds the targets of node 0, whichever way the file was written."""
    ours = Connectome.from_array(DIRECTED, orientation="source_target")
    theirs = Connectome.from_array(DIRECTED.T, orientation="target_source", tract_lengths=9 * np.abs(DIRECTED.T))
    assert np.array_equal(ours.to_array(), DIRECTED)
    assert np.array_equal(theirs.to_array(), DIRECTED)
    assert theirs.tract_lengths is not None
    assert np.array_equal(theirs.tract_lengths.toarray(), 9 * np.abs(DIRECTED))
    with pytest.raises(InputError, match="orientation = None: expected a choice: the matrix is not symmetric"):
        Connectome.from_array(DIRECTED, orientation=None)
    assert np.array_equal(Connectome.from_array(UNDIRECTED, orientation=None).to_array(), UNDIRECTED)


def test_counts() -> None:
    directed = Connectome.from_array(DIRECTED, orientation="source_target")
    undirected = Connectome.from_array(UNDIRECTED, orientation=None)
    assert (directed.n_nodes, directed.n_edges, directed.is_undirected, directed.density) == (3, 3, False, 0.5)
    assert (undirected.n_nodes, undirected.n_edges, undirected.is_undirected) == (3, 2, True)
    assert undirected.density == 4 / 6
    assert Connectome.from_array([[0]], orientation=None).density == 0


@pytest.mark.parametrize("kind", [np.array, csr_array, csr_matrix, coo_array, np.ndarray.tolist, np.float32])
def test_any_container(kind) -> None:
    network = Connectome.from_array(kind(DIRECTED), orientation="source_target")
    assert isinstance(network.weights, csr_array)
    assert network.weights.dtype == np.float64
    assert network.weights.has_canonical_format
    assert np.array_equal(network.to_array(), DIRECTED)


def test_it_owns_its_arrays() -> None:
    weights, coordinates, level = csr_array(DIRECTED), np.zeros((3, 3)), np.array([0, 1, 1])
    network = Connectome.from_array(
        weights, orientation="source_target", coordinates=coordinates, levels=[level], tract_lengths=np.abs(DIRECTED)
    )
    weights.data[:], coordinates[:], level[:] = 9, 9, 9
    assert np.array_equal(network.to_array(), DIRECTED)
    assert network.coordinates is not None
    assert not network.coordinates.any()
    assert network.levels[0].tolist() == [0, 1, 1]
    assert network.tract_lengths is not None
    for array in (network.weights.data, network.weights.indices, network.coordinates, network.levels[0],
                  network.tract_lengths.data):  # fmt: skip
        with pytest.raises(ValueError, match="read-only"):
            array[:] = 0
    network.to_array()[:] = 9
    assert np.array_equal(network.to_array(), DIRECTED)


def test_explicit_zeros_and_duplicates() -> None:
    given = csr_array(([1.0, 2.0, 5.0, -5.0], [1, 1, 2, 2], [0, 2, 4, 4]), shape=(3, 3))
    network = Connectome.from_array(given, orientation="source_target")
    assert network.n_edges == 1
    assert network.weights[0, 1] == 3


def test_self_loops_are_left_out_aloud() -> None:
    matrix = DIRECTED + np.diag([0, 7.0, 8.0])
    with pytest.warns(SelfLoopWarning, match="weights: 2 entries on the diagonal left out, the first at node 1"):
        network = Connectome.from_array(matrix, orientation="source_target")
    assert np.array_equal(network.to_array(), DIRECTED)
    assert matrix[1, 1] == 7


def test_modules_and_levels() -> None:
    network = Connectome.from_array(UNDIRECTED, orientation=None)
    with pytest.raises(InputError, match="at least one partition"):
        network.modules()
    network = network.with_levels([[2, 0, 1], [1, 0, 1]])
    assert [m.tolist() for m in network.modules()] == [[1], [2], [0]]
    assert [m.tolist() for m in network.modules(1)] == [[1], [0, 2]]
    assert repr(network) == "Connectome(3 nodes, 2 undirected edges, 3 > 2 modules)"
    for level in (2, -1, 0.0):
        with pytest.raises(InputError, match=r"level = .*expected 0 \(the finest\) to 1"):
            network.modules(level)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": [[0, 1.0], [np.nan, 0]]}, "weights[1, 0] = nan: expected finite numbers"),
        ({"weights": [[0, np.inf, 0], [0, 0, 0], [0, 0, 0]]}, "weights[0, 1] = inf"),
        ({"weights": csr_array(np.diag([np.nan, 0, 0]))}, "weights[0, 0] = nan"),
        ({"weights": np.ones((2, 3))}, "weights = (2, 3): expected a square matrix"),
        ({"weights": np.ones(4)}, "weights = (4,)"),
        ({"weights": np.zeros((0, 0))}, "weights = (0, 0)"),
        ({"weights": np.array([["a"]])}, "weights.dtype = '<U1': expected real numbers"),
        ({"weights": np.eye(2) * 1j}, "weights.dtype = 'complex128'"),
        ({"weights": [[0, 1], [2]]}, "weights = 'list': expected a square matrix of real numbers"),
        ({"weights": None}, "weights = None: expected a square matrix"),
        ({"weights": np.array([[1, {}]] * 2)}, "weights.dtype = 'object'"),
        ({"weights": np.array([["1", "2"]] * 2)}, "weights.dtype = '<U1'"),
        ({"weights": np.full((2, 2), 10**400, object)}, "weights.dtype = 'object'"),
        ({"orientation": "rows"}, "orientation = 'rows'"),
        ({"orientation": np.array(["rows", "columns"])}, "orientation = array(['rows', 'columns']"),
        ({"labels": 5}, "labels = 5: expected 3 strings, one a node"),
        ({"labels": "abc"}, "labels = 'abc': expected 3 strings"),
        ({"labels": ["a", "b"]}, "labels = 2: expected 3 labels"),
        ({"labels": ["a", "b", "a"]}, "labels[2] = 'a': expected a string of its own"),
        ({"labels": ["a", "b", 3]}, "labels[2] = 3"),
        ({"levels": 5}, "levels = 5: expected partitions"),
        ({"levels": None}, "levels = None: expected partitions"),
        ({"levels": [[0, [1], 2]]}, "levels[0] = [0, [1], 2]: expected integers"),
        ({"levels": ["abc"]}, "levels[0] = ((), '<U3'): expected integers"),
        ({"levels": [[0, 1]]}, "levels[0] = 2: expected 3 module numbers"),
        ({"levels": [[0, 0, 1], [0, 1, 1]]}, "levels[1] = [0, 1]: expected whole modules of levels[0]"),
        ({"coordinates": np.zeros((3, 2))}, "coordinates.shape = (3, 2)"),
        ({"coordinates": [[0, 0, 0], [0, 0, 0], [0, np.inf, 0]]}, "coordinates[2, 1] = inf"),
        ({"coordinates": "here"}, "coordinates.dtype = '<U4': expected real numbers"),
        ({"coordinates": np.zeros((3, 3)) * 1j}, "coordinates.dtype = 'complex128'"),
        ({"coordinates": [[1, 2, 3], [1]]}, "coordinates = [[1, 2, 3], [1]]: expected (3, 3): x, y, z in mm"),
        ({"tract_lengths": np.zeros((2, 2))}, "tract_lengths = (2, 2): expected shape (3, 3), as the weights"),
        ({"tract_lengths": -np.abs(DIRECTED)}, "tract_lengths = -2.0: expected lengths >= 0"),
        ({"provenance": 5}, "provenance = 5: expected a string"),
    ],
)
def test_bad_input(change: dict, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        Connectome.from_array(**{"weights": DIRECTED, "orientation": "source_target"} | change)


def test_only_strings_say_what_made_a_network() -> None:
    assert Connectome(csr_array(DIRECTED), provenance=("drawn", "rewired")).provenance == ("drawn", "rewired")
    for wrong, message in (("drawn", "provenance = 'drawn': expected a tuple"), ((1,), r"provenance\[0\] = 1")):
        with pytest.raises(InputError, match=message):
            Connectome(csr_array(DIRECTED), provenance=wrong)
    for wrong in (5, [[0, 1]]):
        with pytest.raises(InputError, match="levels"):
            Connectome(csr_array(DIRECTED)).with_levels(wrong)


def test_one_function_checks_every_matrix() -> None:
    """Reservoirs refuse what networks refuse, complex numbers too, and name their own argument."""
    for wrong in (np.eye(2) * 1j, [["1"]], [[0, 1], [2]], csr_array(np.eye(2) * 1j)):
        with pytest.raises(InputError, match=r"^network"):
            as_csr("network", wrong)
    network = Connectome.from_array(DIRECTED, orientation="source_target")
    assert (as_csr("network", network) != as_csr("network", DIRECTED)).nnz == 0
    assert as_csr("network", network).data.flags.writeable
