"""Hierarchies of modules and the probabilities of connection that they give.

    p(separation) = p_within * decay**separation        separation = levels of the tree one has to climb to meet

| bioRxiv 2025.06.20.660760, nested stochastic block model | name |
|---|---|
| p1, delta | `p_within`, `decay` |
| p2 = p1 delta, p3 = p1 delta^2, ... | probabilities at separation 1, 2, ... |
| level: random 0, modular 1, ..., hierarchical L | `level`: separations below it keep their own probability |
| merged probability, p3' = (2 p3 + 4 p4) / 6 | mean over the pairs of nodes merged: the expected edges stay the same |

The mean is over ordered pairs of different nodes, so it keeps the expected edges for blocks of any sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import ArrayLike

from commissure.core.errors import InputError
from commissure.reservoirs.inputs import real, whole
from commissure.reservoirs.partitions import checked_levels

__all__ = ["BlockTree"]


_MOST_NODES = 1 << 24  # of a tree: a network of more has no use here, and a slip in a size should not fill the memory


@dataclass(frozen=True, eq=False, repr=False)
class BlockTree:
    """Nested partitions of nodes, the finest first; the whole network is the root and no level of its own.

    >>> tree = BlockTree.balanced(branching=2, depth=3, leaf_size=50)
    >>> tree, tree.sizes.tolist()
    (BlockTree(400 nodes, 8 > 4 > 2 modules), [50, 50, 50, 50, 50, 50, 50, 50])
    >>> tree.block_probabilities(0.5, 0.5, level=1)[0].round(4).tolist()
    [0.5, 0.1071, 0.1071, 0.1071, 0.1071, 0.1071, 0.1071, 0.1071]
    """

    levels: tuple[Int[np.ndarray, " nodes"], ...]

    def __post_init__(self) -> None:
        levels = checked_levels("levels", self.levels)
        if not levels:
            raise InputError("levels", (), "one partition at least")
        object.__setattr__(self, "levels", levels)

    @classmethod
    def balanced(cls, *, branching: int = 2, depth: int = 3, leaf_size: int | Sequence[int] = 50) -> BlockTree:
        """`branching**depth` blocks of `leaf_size` nodes (one number for all, or one a block), nodes in block order."""
        branching, depth = whole("branching", branching, 2), whole("depth", depth, 1)
        if depth > _MOST_NODES.bit_length() or branching**depth > _MOST_NODES:
            raise InputError("depth", depth, f"at most {_MOST_NODES} blocks, branching**depth")
        n_blocks = branching**depth
        if isinstance(leaf_size, int | np.integer):
            sizes = [whole("leaf_size", leaf_size, 1)] * n_blocks
        else:
            try:
                sizes = [whole(f"leaf_size[{at}]", size, 1) for at, size in enumerate(leaf_size)]
            except TypeError as error:  # it cannot be iterated over
                raise InputError("leaf_size", leaf_size, "an integer >= 1, or one a block") from error
        if len(sizes) != n_blocks:
            raise InputError("leaf_size", len(sizes), f"{n_blocks} sizes, branching**depth, or one for all")
        if sum(sizes) > _MOST_NODES:
            raise InputError("leaf_size", leaf_size, f"at most {_MOST_NODES} nodes in all, not {sum(sizes)}")
        blocks = np.repeat(np.arange(n_blocks), sizes)
        return cls(tuple(blocks // branching**level for level in range(depth)))

    @classmethod
    def from_partitions(cls, partitions: Sequence[ArrayLike]) -> BlockTree:
        """Any hierarchy from nested partitions (nodes,), the finest first; modules numbered 0 ... k - 1.

        >>> BlockTree.from_partitions([[0, 1, 1, 2, 2, 2], [0, 0, 0, 1, 1, 1]]).sizes.tolist()
        [1, 2, 3]
        """
        return cls(checked_levels("partitions", partitions))

    def __repr__(self) -> str:
        return (
            f"BlockTree({self.n_nodes} nodes, {' > '.join(str(int(level.max()) + 1) for level in self.levels)} modules)"
        )

    @property
    def n_nodes(self) -> int:
        """Number of nodes."""
        return len(self.levels[0])

    @property
    def depth(self) -> int:
        """Number of partitions."""
        return len(self.levels)

    @cached_property
    def sizes(self) -> Int[np.ndarray, " blocks"]:
        """Number of nodes in each block of the finest partition."""
        return np.bincount(self.levels[0])

    @cached_property
    def separations(self) -> Int[np.ndarray, "blocks blocks"]:
        """Levels to climb from one block to another: 0 for itself, `depth` if only the root has both."""
        first = np.unique(self.levels[0], return_index=True)[1]
        together = [level[first][:, None] == level[first] for level in self.levels]
        return self.depth - np.sum(together, axis=0)

    @cached_property
    def n_pairs(self) -> Int[np.ndarray, " separations"]:
        """Number of ordered pairs of different nodes at separations 0 ... depth."""
        pairs = np.outer(self.sizes, self.sizes) - np.diag(self.sizes)
        return np.array([pairs[self.separations == d].sum() for d in range(self.depth + 1)])

    def probabilities(
        self, p_within: float, decay: float, level: int | None = None
    ) -> Float[np.ndarray, " separations"]:
        """Probability of an edge at separations 0 ... depth, those from `level` up merged (None: none merged).

        `level=0` is an Erdos-Renyi graph, 1 flat modules, `depth` the full hierarchy.  The sum over all pairs of nodes
        is the same at every level.
        """
        p_within, decay = real("p_within", p_within, 0, 1), real("decay", decay, 0, 1)
        level = self.depth if level is None else whole("level", level, 0)
        if level > self.depth:
            raise InputError("level", level, f"0 (random) to {self.depth}, the depth of the tree")
        p = p_within * decay ** np.arange(self.depth + 1)
        weight = self.n_pairs[level:]
        if weight.sum():  # without pairs so far apart there is nothing to preserve
            p[level:] = (weight @ p[level:]) / weight.sum()
        return p

    def block_probabilities(
        self, p_within: float, decay: float, level: int | None = None
    ) -> Float[np.ndarray, "blocks blocks"]:
        """Probability of an edge from a node of one block to a node of another; see `probabilities`."""
        return self.probabilities(p_within, decay, level)[self.separations]
