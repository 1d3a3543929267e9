"""Where a task enters a network and where it is read: nodes per input channel, nodes per readout.

    (u_t W_in)_i = sum of the channels that drive node i        every driven node with weight 1

| symbol | name                                                         |
|--------|--------------------------------------------------------------|
| W_in   | `IOMap.input_weights`: (channels, nodes), 0 or 1             |
| -      | `IOMap.targets`: the target columns each readout is fitted on |

In the published protocol (bioRxiv 2025.06.20.660760) every node of one module is driven and each other module is read
out separately.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import ArrayLike

from commissure.core.errors import CommissureWarning, InputError
from commissure.core.rng import generator
from commissure.reservoirs.inputs import listed, whole

if TYPE_CHECKING:
    from commissure.reservoirs.connectome import Connectome

__all__ = ["DisconnectedWarning", "IOMap", "indices"]

Nodes = Int[np.ndarray, " _"]  # each of its own length


class DisconnectedWarning(CommissureWarning):
    """A readout holds nodes that no input can reach: their states stay 0 whatever is fed in."""


@dataclass(frozen=True, eq=False)
class IOMap:
    """Nodes driven by each input channel (`inputs`) and nodes read by each readout (`outputs`).

    `targets` holds, for each readout, the target columns it is fitted and scored on; None: every readout, all of them.
    A node both driven and read would answer with its own input: refused unless `allow_overlap`.  Indices are copied.

    >>> io = IOMap(inputs=(np.array([0, 1]),), outputs=(np.array([2]), np.array([3, 4])))
    >>> io.n_inputs, io.n_readouts, io.input_weights(5).tolist()
    (1, 2, [[1.0, 1.0, 0.0, 0.0, 0.0]])
    """

    inputs: tuple[Nodes, ...]
    outputs: tuple[Nodes, ...]
    targets: tuple[Int[np.ndarray, " _"], ...] | None = None
    allow_overlap: bool = False

    def __post_init__(self) -> None:
        for name in ("inputs", "outputs", "targets"):
            given = getattr(self, name)
            if name == "targets" and given is None:
                continue
            arrays = listed(name, given)
            if not arrays:
                raise InputError(name, given, "at least one array of indices")
            object.__setattr__(self, name, tuple(indices(f"{name}[{i}]", array) for i, array in enumerate(arrays)))
        if self.targets is not None and len(self.targets) != len(self.outputs):
            raise InputError("targets", len(self.targets), f"one array for each of the {len(self.outputs)} readouts")
        driven = np.unique(np.concatenate(self.inputs))
        for i, nodes in enumerate(self.outputs):
            both = np.intersect1d(driven, nodes)
            if both.size and not self.allow_overlap:
                allowed = "nodes that no input drives"
                raise InputError(f"outputs[{i}]", both.tolist(), allowed, "pass allow_overlap=True to read them anyway")

    @classmethod
    def from_modules(
        cls,
        modules: Sequence[ArrayLike],
        *,
        inputs: Sequence[int],
        outputs: Sequence[int] | None = None,
        n_outputs: int | None = None,
        seed: int = 0,
        allow_overlap: bool = False,
    ) -> IOMap:
        """One channel for each of the modules `inputs`, one readout for each of `outputs` (None: all the others).

        `n_outputs` reads only so many nodes of each, drawn by `seed` and the module's number alone.

        >>> io = IOMap.from_modules([[0, 1], [2, 3], [4, 5]], inputs=[1], n_outputs=1, seed=0)
        >>> [len(nodes) for nodes in io.outputs]
        [1, 1]
        """
        nodes = [indices(f"modules[{i}]", module) for i, module in enumerate(listed("modules", modules))]
        driven = _modules("inputs", inputs, len(nodes))
        others = [i for i in range(len(nodes)) if i not in driven]
        read = others if outputs is None else _modules("outputs", outputs, len(nodes))
        smallest = min((nodes[i].size for i in read), default=0)
        if n_outputs is not None and whole("n_outputs", n_outputs, 1) > smallest:
            raise InputError("n_outputs", n_outputs, f"an integer from 1 to the smallest module's size, {smallest}")

        def drawn(number: int) -> Nodes:
            if n_outputs is None:
                return nodes[number]
            return np.sort(generator(seed, "readout", number).choice(nodes[number], n_outputs, replace=False))

        return cls(tuple(nodes[i] for i in driven), tuple(drawn(i) for i in read), allow_overlap=allow_overlap)

    @property
    def n_inputs(self) -> int:
        """Input channels."""
        return len(self.inputs)

    @property
    def n_readouts(self) -> int:
        """Readouts, each with its own weights and score."""
        return len(self.outputs)

    def input_weights(self, n_nodes: int) -> Float[np.ndarray, "channels nodes"]:
        """W_in for a network of `n_nodes`: 1 where a channel drives a node."""
        highest = max(int(nodes.max()) for nodes in (*self.inputs, *self.outputs))
        if whole("n_nodes", n_nodes, 1) <= highest:
            raise InputError("n_nodes", n_nodes, f"an integer > {highest}, the highest node of the map")
        weights = np.zeros((self.n_inputs, n_nodes))
        for channel, nodes in enumerate(self.inputs):
            weights[channel, nodes] = 1.0
        return weights

    def check(self, network: Connectome) -> None:
        """Warn, with the list, of nodes read that no driven node reaches along the edges of `network`."""
        from scipy.sparse import csgraph, csr_array, vstack

        driven = csr_array(self.input_weights(network.n_nodes).sum(0, keepdims=True))
        rooted = csr_array(vstack([network.weights, driven]))  # one more node, with an edge to every driven one
        rooted.resize((network.n_nodes + 1, network.n_nodes + 1))
        reached = csgraph.breadth_first_order(rooted, network.n_nodes, return_predecessors=False)
        lost = [np.setdiff1d(nodes, reached).tolist() for nodes in self.outputs]
        if any(lost):
            listed = "; ".join(f"readout {i}: nodes {nodes}" for i, nodes in enumerate(lost) if nodes)
            warnings.warn(f"no input reaches {listed}", DisconnectedWarning, stacklevel=2)


def _modules(name: str, numbers: Sequence[int], n_modules: int) -> list[int]:
    chosen = listed(name, numbers)
    for i, number in enumerate(chosen):
        if whole(f"{name}[{i}]", number, 0) >= n_modules:
            raise InputError(f"{name}[{i}]", number, f"the number of a module, 0 to {n_modules - 1}")
    return chosen


def indices(name: str, values: ArrayLike) -> Nodes:
    """Node numbers as a copy; not empty, whole, from 0 on, each once."""
    try:
        array = np.asarray(values)
    except (TypeError, ValueError, RuntimeError):  # ragged; a tensor that wants a gradient
        array = np.empty(0)
    if array.ndim != 1 or not array.size or not np.issubdtype(array.dtype, np.integer):
        raise InputError(name, values, "a non-empty array of integers, 1 dimension")
    array = array.astype(np.int64)  # a copy
    if array.min() < 0:
        raise InputError(f"{name}[{int(array.argmin())}]", int(array.min()), "an index >= 0")
    if np.unique(array).size < array.size:
        raise InputError(name, array.tolist(), "distinct indices")
    array.flags.writeable = False
    return array
