"""IOMap: which nodes are driven, which are read, and what it refuses."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import numpy as np
import pytest
from scipy.sparse import csr_array

from commissure.core.errors import InputError
from commissure.reservoirs.io_map import DisconnectedWarning, IOMap

MODULES = [np.arange(0, 5), np.arange(5, 9), np.arange(9, 15)]


def network(edges, n_nodes=15):
    source, target = np.array(edges).T
    weights = csr_array((np.ones(len(edges)), (source, target)), shape=(n_nodes, n_nodes))
    return SimpleNamespace(weights=weights, n_nodes=n_nodes)


def test_modules_become_channels_and_readouts():
    io = IOMap.from_modules(MODULES, inputs=[1])
    assert [nodes.tolist() for nodes in io.inputs] == [MODULES[1].tolist()]
    assert [nodes.tolist() for nodes in io.outputs] == [MODULES[0].tolist(), MODULES[2].tolist()]
    assert io.targets is None
    weights = io.input_weights(15)
    assert weights.shape == (1, 15)
    assert np.flatnonzero(weights[0]).tolist() == MODULES[1].tolist()
    assert set(weights.ravel()) == {0.0, 1.0}


def test_two_channels_may_drive_one_node():
    io = IOMap(inputs=([0, 1], [1, 2]), outputs=([3],))
    assert io.input_weights(4).tolist() == [[1, 1, 0, 0], [0, 1, 1, 0]]


def test_drawn_outputs_depend_on_the_seed_and_the_module_alone():
    both = IOMap.from_modules(MODULES, inputs=[1], n_outputs=3, seed=7)
    one = IOMap.from_modules(MODULES, inputs=[0], outputs=[2], n_outputs=3, seed=7)
    assert both.outputs[1].tolist() == one.outputs[0].tolist()
    assert all(len(np.unique(nodes)) == 3 for nodes in both.outputs)
    assert set(both.outputs[0]) <= set(MODULES[0])
    assert all((np.diff(nodes) > 0).all() for nodes in both.outputs)
    assert [len(nodes) for nodes in IOMap.from_modules(MODULES, inputs=[1], n_outputs=5).outputs] == [5, 5]
    seeds = {tuple(IOMap.from_modules(MODULES, inputs=[1], n_outputs=3, seed=s).outputs[1]) for s in range(20)}
    assert len(seeds) > 5
    alike = IOMap.from_modules(np.arange(80).reshape(4, 20), inputs=[0], n_outputs=10, seed=7)
    places = [(nodes % 20).tolist() for nodes in alike.outputs]
    assert places[0] != places[1] != places[2] != places[0]


def test_the_map_keeps_its_own_copy():
    nodes = np.array([0, 1])
    io = IOMap(inputs=(nodes,), outputs=([2],))
    nodes[0] = 2
    assert io.inputs[0].tolist() == [0, 1]
    with pytest.raises(ValueError, match="read-only"):
        io.outputs[0][0] = 1


@pytest.mark.parametrize(
    ("make", "argument"),
    [
        (lambda: IOMap(inputs=(), outputs=([1],)), "inputs"),
        (lambda: IOMap(inputs=([],), outputs=([1],)), "inputs[0]"),
        (lambda: IOMap(inputs=([0],), outputs=()), "outputs"),
        (lambda: IOMap(inputs=([0],), outputs=([1, 1],)), "outputs[0]"),
        (lambda: IOMap(inputs=([0, -1],), outputs=([1],)), "inputs[0][1]"),
        (lambda: IOMap(inputs=([0.5],), outputs=([1],)), "inputs[0]"),
        (lambda: IOMap(inputs=([0, 1],), outputs=([2], [1, 3])), "outputs[1]"),
        (lambda: IOMap(inputs=([0],), outputs=([1], [2]), targets=([0],)), "targets"),
        (lambda: IOMap(inputs=([0],), outputs=([1],), targets=([0], [0])), "targets"),
        (lambda: IOMap(inputs=(0,), outputs=([1],)), "inputs[0]"),
        (lambda: IOMap(inputs=0, outputs=([1],)), "inputs"),
        (lambda: IOMap(inputs=([[0], [1, 2]],), outputs=([1],)), "inputs[0]"),
        (lambda: IOMap.from_modules(3, inputs=[0]), "modules"),
        (lambda: IOMap.from_modules(MODULES, inputs=None), "inputs"),
        (lambda: IOMap.from_modules(MODULES, inputs=[True]), "inputs[0]"),
        (lambda: IOMap.from_modules(MODULES, inputs=[0], outputs=["1"]), "outputs[0]"),
        (lambda: IOMap.from_modules(MODULES, inputs=[0], n_outputs=1.5), "n_outputs"),
        (lambda: IOMap(inputs=([0],), outputs=([1],)).input_weights("9"), "n_nodes"),
        (lambda: IOMap.from_modules(MODULES, inputs=[0], n_outputs=0), "n_outputs"),
        (lambda: IOMap.from_modules(MODULES, inputs=[3]), "inputs[0]"),
        (lambda: IOMap.from_modules(MODULES, inputs=[0], outputs=[-1]), "outputs[0]"),
        (lambda: IOMap.from_modules(MODULES, inputs=[0], n_outputs=5), "n_outputs"),
        (lambda: IOMap.from_modules(MODULES, inputs=[0, 1, 2]), "outputs"),
        (lambda: IOMap.from_modules(MODULES, inputs=[0], outputs=[0]), "outputs[0]"),
        (lambda: IOMap(inputs=([0],), outputs=([9],)).input_weights(9), "n_nodes"),
    ],
)
def test_bad_maps_are_refused_by_name(make, argument):
    with pytest.raises(InputError) as raised:
        make()
    assert raised.value.argument == argument


def test_overlap_is_allowed_when_asked_for():
    io = IOMap.from_modules(MODULES, inputs=[0], outputs=[0, 1], allow_overlap=True)
    assert io.outputs[0].tolist() == io.inputs[0].tolist()


def test_check_lists_the_nodes_no_input_reaches():
    chain = network([(0, 1), (1, 2), (3, 2)], n_nodes=4)
    with pytest.warns(DisconnectedWarning, match=r"readout 1: nodes \[3\]$"):
        IOMap(inputs=([0],), outputs=([1, 2], [3])).check(chain)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        IOMap(inputs=([3], [0]), outputs=([1], [2])).check(chain)


def test_check_follows_the_direction_of_edges_and_negative_ones():
    inhibitory = network([(0, 1), (1, 2)], n_nodes=3)
    inhibitory.weights.data[:] = [-1.0, 1.0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        IOMap(inputs=([0],), outputs=([2],)).check(inhibitory)
    with pytest.warns(DisconnectedWarning, match=r"nodes \[0\]"):
        IOMap(inputs=([2],), outputs=([0],)).check(inhibitory)
