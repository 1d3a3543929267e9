"""Random networks with hierarchical modules: the nested stochastic block model.

    P(edge i -> j) = p[separation of the blocks of i and j],  i != j;    w_ij ~ uniform(low, high)

Each class of pairs at one separation is one Bernoulli process; geometric gaps jump from edge to edge (Batagelj &
Brandes 2005), so sampling costs O(edges + blocks^2).  Topology (one stream a separation), weights, signs and pruning
have seeds of their own: with one seed the models of two levels share the edges and weights of every separation whose
probability they share.

| bioRxiv 2025.06.20.660760 | name |
|---|---|
| P, p1, delta | `block_probabilities`, `p_within`, `decay` |
| minimum and maximum weight | `weight_range` |
| inhibitory ratio (within modules) | `inhibitory_fraction` |
| pruning ratio | `prune` |
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.sparse import coo_array, csr_array
from scipy.sparse.csgraph import connected_components

from commissure.core.errors import ConvergenceError, InputError
from commissure.core.rng import generator
from commissure.reservoirs.block_tree import BlockTree
from commissure.reservoirs.connectome import Connectome
from commissure.reservoirs.inputs import real, whole

__all__ = ["HierarchicalSBM"]

_TRIES = 100  # networks drawn before connectedness is given up

_SHOWN = ("p_within", "decay", "level", "directed", "weight_range", "inhibitory_fraction", "prune", "require_connected")
_PRESETS: dict[str, tuple[dict[str, int], dict[str, Any]]] = {
    "milisav2025": ({"branching": 2, "depth": 3, "leaf_size": 50}, {"p_within": 0.5, "decay": 0.5, "prune": 0.36}),
}


class _Edges(NamedTuple):
    """Edges in the order drawn: by separation of their blocks, then by place."""

    source: Int[np.ndarray, " edges"]
    target: Int[np.ndarray, " edges"]
    is_within: Bool[np.ndarray, " edges"]


class HierarchicalSBM:
    """A distribution over networks whose modules nest; `sample(seed)` draws one.

    `tree` the modules; `p_within` (default 0.5) and `decay` the probabilities (see `block_tree`), or `n_edges` the
    expected edges of a sample in place of `p_within`; `level` how many levels of the hierarchy are left (None: all);
    `directed` every ordered pair for itself, else the upper triangle mirrored; weights uniform in `weight_range`;
    `inhibitory_fraction` of the edges within modules change sign; then `prune` of the edges are removed.  Samples are
    (strongly) connected unless `require_connected=False`.

    >>> model = HierarchicalSBM.from_preset("milisav2025", level=3)
    >>> model.sample(seed=0)
    Connectome(400 nodes, 15914 directed edges, 8 > 4 > 2 modules)
    >>> round(model.expected_edges), [round(HierarchicalSBM(model.tree, level=l).expected_edges) for l in range(4)]
    (15872, [24800, 24800, 24800, 24800])
    """

    def __init__(
        self,
        tree: BlockTree,
        *,
        p_within: float | None = None,
        decay: float = 0.5,
        level: int | None = None,
        n_edges: float | None = None,
        directed: bool = True,
        weight_range: tuple[float, float] = (0.0, 1.0),
        inhibitory_fraction: float = 0.0,
        prune: float = 0.0,
        require_connected: bool = True,
    ) -> None:
        if not isinstance(tree, BlockTree):
            raise InputError("tree", tree, "a BlockTree", "BlockTree.balanced(branching=2, depth=3, leaf_size=50)")
        for name, choice in (("directed", directed), ("require_connected", require_connected)):
            if not isinstance(choice, bool | np.bool_):
                raise InputError(name, choice, "True or False")
        self.tree, self.directed, self.require_connected = tree, bool(directed), bool(require_connected)
        self.level = tree.depth if level is None else whole("level", level, 0)
        self.decay = real("decay", decay, 0, 1)
        self.prune = real("prune", prune, 0, 1)
        self.inhibitory_fraction = real("inhibitory_fraction", inhibitory_fraction, 0, 1)
        if not isinstance(weight_range, tuple | list) or len(weight_range) != 2:
            raise InputError("weight_range", weight_range, "(low, high)")
        low, high = (real(f"weight_range[{at}]", end) for at, end in enumerate(weight_range))
        if low > high or low == high == 0 or not np.isfinite(high - low):
            raise InputError(
                "weight_range", weight_range, "(low, high) with low <= high, not (0, 0), high - low finite"
            )
        self.weight_range = (low, high)
        if n_edges is not None:
            if p_within is not None:
                raise InputError("p_within", p_within, "None: n_edges decides it")
            p_within = self._p_within(real("n_edges", n_edges, 0))
        self.p_within = real("p_within", 0.5 if p_within is None else p_within, 0, 1)
        self.probabilities = tree.probabilities(self.p_within, self.decay, self.level)

    @classmethod
    def from_preset(cls, name: str, *, level: int | None = None) -> HierarchicalSBM:
        """ "milisav2025": 8 modules of 50 nodes, directed, weights in (0, 1), 36 % of the edges pruned.

        The share pruned is inferred from the published numbers of cycles, it was not stated.
        """
        if not isinstance(name, str) or name not in _PRESETS:
            raise InputError("name", name, f"one of {', '.join(_PRESETS)}")
        tree, model = _PRESETS[name]
        return cls(BlockTree.balanced(**tree), level=level, **model)

    def __repr__(self) -> str:
        shown = ", ".join(f"{name}={getattr(self, name)!r}" for name in _SHOWN)
        return f"HierarchicalSBM({self.tree}, {shown})"

    @property
    def block_probabilities(self) -> Float[np.ndarray, "blocks blocks"]:
        """Probability of an edge from a node of one block to a node of another, before pruning."""
        return self.probabilities[self.tree.separations]

    @property
    def expected_edges(self) -> float:
        """Expected edges of a sample, pruning included: ordered pairs if directed, unordered ones if not."""
        return self._kept * float(self.tree.n_pairs @ self.probabilities)

    def sample(self, seed: int) -> Connectome:
        """One network; `ConvergenceError` if 100 in a row are not (strongly) connected."""
        for attempt in range(_TRIES):
            edges = self._topology(seed, attempt)
            weights = generator(seed, "weights", attempt).uniform(*self.weight_range, len(edges.source))
            within = np.flatnonzero(edges.is_within)
            weights[_share(within, self.inhibitory_fraction, generator(seed, "signs", attempt))] *= -1
            removed = _share(np.arange(len(weights)), self.prune, generator(seed, "pruning", attempt))
            kept = np.delete(np.arange(len(weights)), removed)
            matrix = self._matrix(edges.source[kept], edges.target[kept], weights[kept])
            if self._is_accepted(matrix):
                return self._connectome(matrix, seed)
        raise self._not_connected()

    def sample_reference(self, seed: int) -> Connectome:
        """`sample` by one Bernoulli trial a pair of nodes on a dense matrix: the same distribution, other draws."""
        blocks, n = self.tree.levels[0], self.tree.n_nodes
        p = self.block_probabilities[blocks][:, blocks]
        for attempt in range(_TRIES):
            rng = generator(seed, "reference", attempt)
            is_edge = (rng.random((n, n)) < p) & (~np.eye(n, dtype=bool) if self.directed else np.tri(n, k=-1).T > 0)
            low, high = self.weight_range
            weights = np.where(is_edge, low + (high - low) * rng.random((n, n)), 0.0)
            within = np.argwhere(is_edge & (blocks[:, None] == blocks))
            flipped = within[rng.permutation(len(within))[: round(self.inhibitory_fraction * len(within))]]
            weights[tuple(flipped.T)] *= -1
            places = np.argwhere(is_edge)
            weights[tuple(places[rng.permutation(len(places))[: round(self.prune * len(places))]].T)] = 0
            matrix = csr_array(weights if self.directed else weights + weights.T)
            if self._is_accepted(matrix):
                return self._connectome(matrix, seed)
        raise self._not_connected()

    @property
    def _kept(self) -> float:
        return (1 - self.prune) * (1 if self.directed else 0.5)

    def _p_within(self, n_edges: float) -> float:
        most = self._kept * float(self.tree.n_pairs @ self.tree.probabilities(1.0, self.decay))
        if n_edges > most:
            allowed = f"at most {most:.0f}, what p_within = 1 gives"
            raise InputError("n_edges", n_edges, allowed, "a larger decay, larger blocks or less pruning")
        return n_edges / most if most else 0.0

    def _topology(self, seed: int, attempt: int) -> _Edges:
        """Edges class by class: positions of the successes among all pairs at a separation, then their nodes."""
        sizes = self.tree.sizes
        order = np.argsort(self.tree.levels[0], kind="stable")
        starts = np.cumsum(sizes) - sizes
        parts: list[tuple[np.ndarray, np.ndarray]] = []
        for separation, p in enumerate(self.probabilities):
            a, b = np.nonzero(self.tree.separations == separation)
            if not self.directed:
                a, b = a[a <= b], b[a <= b]
            cells = sizes[a] * (sizes[b] - (a == b)) // np.where((a == b) & (not self.directed), 2, 1)
            ends = np.cumsum(cells)
            n_cells = int(ends[-1]) if len(ends) else 0
            hits = _successes(n_cells, float(p), generator(seed, "topology", attempt, separation))
            block = np.searchsorted(ends, hits, side="right")
            inside = hits - (ends - cells)[block]
            a, b = a[block], b[block]
            row, column = _places(inside, sizes[b], a == b, self.directed)
            parts.append((order[starts[a] + row], order[starts[b] + column]))
        source, target = (np.concatenate([part[end] for part in parts]) for end in (0, 1))
        return _Edges(source, target, np.arange(len(source)) < len(parts[0][0]))

    def _matrix(self, source: np.ndarray, target: np.ndarray, weights: np.ndarray) -> csr_array:
        if not self.directed:
            source, target = np.concatenate([source, target]), np.concatenate([target, source])
            weights = np.concatenate([weights, weights])
        return csr_array(coo_array((weights, (source, target)), shape=(self.tree.n_nodes,) * 2))

    def _is_accepted(self, matrix: csr_array) -> bool:
        if not self.require_connected:
            return True
        return int(connected_components(matrix, connection="strong", return_labels=False)) == 1

    def _connectome(self, matrix: csr_array, seed: int) -> Connectome:
        return Connectome(matrix, levels=self.tree.levels, provenance=(f"{self!r}.sample(seed={seed})",))

    def _not_connected(self) -> ConvergenceError:
        kind = "strongly connected" if self.directed else "connected"
        degree = self.expected_edges / self.tree.n_nodes * (1 if self.directed else 2)
        return ConvergenceError(
            f"no {kind} network in {_TRIES} draws of {self!r}: {degree:.3g} edges a node are expected; "
            "prune less, raise p_within or decay, or pass require_connected=False"
        )


def _successes(n: int, p: float, rng: np.random.Generator) -> Int[np.ndarray, " hits"]:
    """Where `n` Bernoulli trials succeed, ascending: cumulated geometric gaps, in O(hits)."""
    if not n or p <= 0:
        return np.zeros(0, np.int64)
    if p >= 1:
        return np.arange(n)
    hits, last = [np.zeros(0, np.int64)], -1
    while last < n - 1:
        expected = (n - 1 - last) * p
        gaps = rng.geometric(p, size=int(expected + 4 * expected**0.5) + 8)
        hits.append(last + np.cumsum(np.minimum(gaps, n)))
        last = int(hits[-1][-1])
    found = np.concatenate(hits)
    return found[found < n]


def _places(
    inside: Int[np.ndarray, " hits"],
    width: Int[np.ndarray, " hits"],
    is_same: Bool[np.ndarray, " hits"],
    directed: bool,
) -> tuple[Int[np.ndarray, " hits"], Int[np.ndarray, " hits"]]:
    """Row and column of each cell of its pair of blocks; within a block off the diagonal, undirected above it."""
    across = np.maximum(width, 1)
    if directed:
        within = np.maximum(width - 1, 1)
        row, column = inside // within, inside % within
        column = column + (column >= row)
    else:
        column = ((1 + np.sqrt(1 + 8.0 * inside)) / 2).astype(np.int64)
        column -= column * (column - 1) // 2 > inside  # the root was rounded up; it never comes out too small
        row = inside - column * (column - 1) // 2
    return np.where(is_same, row, inside // across), np.where(is_same, column, inside % across)


def _share(items: Int[np.ndarray, " items"], fraction: float, rng: np.random.Generator) -> Int[np.ndarray, " chosen"]:
    """`fraction` of the items, uniformly and to the nearest number."""
    chosen = np.argsort(rng.random(len(items)), kind="stable")[: round(fraction * len(items))]
    return items[chosen]
