"""A network with its names, modules and places: what every reservoir, null model and task of this organ starts from.

    weights[i, j] = w   the edge from source i to target j has weight w;   x_t = f(x_{t-1} weights + ...)

No self-loops, no explicit zeros.  Published matrices come in both orientations, so reading one that is not symmetric
asks which it is.  Levels: nested partitions of the nodes into modules, the finest first.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from os import PathLike
from typing import Literal, get_args

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import ArrayLike
from scipy.sparse import csr_array, issparse, sparray, spmatrix

from commissure.core.errors import CommissureWarning, InputError
from commissure.reservoirs.partitions import checked_levels, groups

__all__ = ["Connectome", "Orientation", "SelfLoopWarning", "as_csr"]

Orientation = Literal["source_target", "target_source"]
Weights = ArrayLike | sparray | spmatrix


class SelfLoopWarning(CommissureWarning):
    """A matrix had entries on its diagonal, which a connectome leaves out."""


@dataclass(frozen=True, eq=False, repr=False)
class Connectome:
    """A weighted network, directed or not; every array is a checked read-only copy.

    `weights` (n, n) float64, sources in rows; `labels` a name of its own for each node; `levels` nested partitions,
    the finest first; `coordinates` (n, 3) in mm; `tract_lengths` (n, n) in mm, oriented as the weights; `provenance`
    says what made it, in order.  Not square, not finite or of another length: `InputError` with the index.

    >>> ring = Connectome.from_array(np.roll(np.eye(4), 1, axis=1), orientation="source_target", levels=[[0, 0, 1, 1]])
    >>> ring
    Connectome(4 nodes, 4 directed edges, 2 modules)
    >>> ring.modules()[1].tolist(), ring.density
    ([2, 3], 0.3333333333333333)
    """

    weights: csr_array
    labels: tuple[str, ...] | None = None
    levels: tuple[Int[np.ndarray, " n"], ...] = ()
    coordinates: Float[np.ndarray, "n 3"] | None = None
    tract_lengths: csr_array | None = None
    provenance: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        weights = _checked_matrix("weights", self.weights)
        n = weights.shape[0]
        found = {
            "weights": weights,
            "labels": None if self.labels is None else _checked_labels(self.labels, n),
            "levels": checked_levels("levels", self.levels, n),
            "coordinates": None if self.coordinates is None else _checked_coordinates(self.coordinates, n),
            "provenance": _strings(
                "provenance", self.provenance, "a tuple of strings: what made the network, in order"
            ),
        }
        if self.tract_lengths is not None:
            lengths = _checked_matrix("tract_lengths", self.tract_lengths)
            if lengths.shape != weights.shape:
                raise InputError("tract_lengths", lengths.shape, f"shape {weights.shape}, as the weights")
            if (lengths.data < 0).any():
                raise InputError("tract_lengths", float(lengths.data.min()), "lengths >= 0 in mm")
            found["tract_lengths"] = lengths
        for name, value in found.items():
            object.__setattr__(self, name, value)

    @classmethod
    def from_array(
        cls,
        weights: Weights,
        *,
        orientation: Orientation | None,
        labels: Sequence[str] | None = None,
        levels: Sequence[ArrayLike] = (),
        coordinates: ArrayLike | None = None,
        tract_lengths: Weights | None = None,
        provenance: str = "",
    ) -> Connectome:
        """A connectome from a dense or sparse matrix (n, n); `tract_lengths` has the same orientation.

        `orientation="source_target"`: entry [i, j] is the edge from i to j; "target_source": from j to i.  A symmetric
        matrix may leave it None.
        """
        if orientation is not None and not (isinstance(orientation, str) and orientation in get_args(Orientation)):
            raise InputError("orientation", orientation, "'source_target', 'target_source' or None")
        if not isinstance(provenance, str):
            raise InputError("provenance", provenance, "a string: what made the network")
        matrix = as_csr("weights", weights)
        lengths = None if tract_lengths is None else as_csr("tract_lengths", tract_lengths)
        if orientation is None and not _is_symmetric(matrix):
            fix = "pass 'source_target' if entry [i, j] is the edge from i to j, 'target_source' if it is from j to i"
            raise InputError("orientation", None, "a choice: the matrix is not symmetric", fix)
        if orientation == "target_source":
            matrix, lengths = csr_array(matrix.T), None if lengths is None else csr_array(lengths.T)
        return cls(
            matrix,
            labels=labels,  # type: ignore[arg-type]  # it and the next two are checked as what they are
            levels=levels,  # type: ignore[arg-type]
            coordinates=coordinates,  # type: ignore[arg-type]
            tract_lengths=lengths,
            provenance=(provenance,) if provenance else (),
        )

    @classmethod
    def from_file(
        cls, path: str | PathLike[str], *, orientation: Orientation | None = None, variable: str | None = None
    ) -> Connectome:
        """A connectome from a .npy, .csv, .mat or .graphml file or a TVB connectivity .zip; see `loading.load`."""
        from commissure.reservoirs.loading import load

        return load(path, orientation=orientation, variable=variable)

    def __repr__(self) -> str:
        kind = "undirected" if self.is_undirected else "directed"
        modules = " > ".join(str(int(level.max()) + 1) for level in self.levels)
        return f"Connectome({self.n_nodes} nodes, {self.n_edges} {kind} edges{modules and f', {modules} modules'})"

    @property
    def n_nodes(self) -> int:
        """Number of nodes."""
        return int(self.weights.shape[0])

    @property
    def n_edges(self) -> int:
        """Number of edges: of ordered pairs if directed, of unordered ones if undirected."""
        return int(self.weights.nnz) // (2 if self.is_undirected else 1)

    @cached_property
    def is_undirected(self) -> bool:
        """Whether every edge has one of the same weight the other way."""
        return _is_symmetric(self.weights)

    @property
    def density(self) -> float:
        """Share of the ordered pairs of different nodes that have an edge; 0 for a single node."""
        return int(self.weights.nnz) / max(1, self.n_nodes * (self.n_nodes - 1))

    def modules(self, level: int = 0) -> tuple[Int[np.ndarray, " members"], ...]:
        """The nodes of each module of `levels[level]`, ascending."""
        if not self.levels:
            fix = "with_levels(louvain_hierarchy(connectome, seed=0).levels), or partitions of your own"
            raise InputError("levels", (), "a connectome with at least one partition", fix)
        is_number = isinstance(level, int | np.integer) and not isinstance(level, bool)
        if not is_number or not 0 <= level < len(self.levels):
            raise InputError("level", level, f"0 (the finest) to {len(self.levels) - 1}")
        return groups(self.levels[level])

    def with_levels(self, levels: Sequence[ArrayLike]) -> Connectome:
        """The same network with these partitions, the finest first."""
        return replace(self, levels=checked_levels("levels", levels, self.n_nodes))

    def to_array(self) -> Float[np.ndarray, "n n"]:
        """The weights as a dense array, sources in rows."""
        return self.weights.toarray()


def as_csr(name: str, network: Connectome | Weights) -> csr_array:
    """The weights of a network, or a square finite matrix, as a float64 copy with each edge once and no zeros."""
    matrix = network.weights if isinstance(network, Connectome) else network
    try:
        dense = matrix if issparse(matrix) else np.asarray(matrix)
    except (TypeError, ValueError, RuntimeError) as error:  # numpy's, for ragged lists; torch's, for what has no array
        raise InputError(name, type(matrix).__name__, "a square matrix of real numbers", str(error)) from error
    if dense.ndim != 2 or dense.shape[0] != dense.shape[1] or not dense.shape[0]:
        given = tuple(dense.shape) if dense.ndim else matrix
        raise InputError(name, given, "a square matrix (n, n)", "one row and column a node")
    if dense.dtype.kind not in "biuf":
        raise InputError(f"{name}.dtype", str(dense.dtype), "real numbers")
    with np.errstate(over="ignore"):  # long doubles beyond float64 become infinite and are refused as that
        csr = csr_array(dense, dtype=np.float64, copy=True)
    csr.sum_duplicates()
    csr.eliminate_zeros()
    bad = np.flatnonzero(~np.isfinite(csr.data))
    if len(bad):
        row = int(np.searchsorted(csr.indptr, bad[0], side="right")) - 1
        fix = f"{len(bad)} in all; np.nan_to_num(matrix) makes absent edges of NaN"
        raise InputError(f"{name}[{row}, {csr.indices[bad[0]]}]", float(csr.data[bad[0]]), "finite numbers", fix)
    return csr


def _checked_matrix(name: str, matrix: Weights) -> csr_array:
    """A canonical read-only copy without self-loops and explicit zeros."""
    csr = as_csr(name, matrix)
    row = np.repeat(np.arange(csr.shape[0]), np.diff(csr.indptr))
    loops = csr.indices == row
    if loops.any():
        message = f"{name}: {int(loops.sum())} entries on the diagonal left out, the first at node {row[loops][0]}"
        warnings.warn(SelfLoopWarning(message), stacklevel=4)
        csr.data[loops] = 0
        csr.eliminate_zeros()
    for part in (csr.data, csr.indices, csr.indptr):
        part.flags.writeable = False
    return csr


def _is_symmetric(matrix: csr_array) -> bool:
    return (matrix != matrix.T).nnz == 0


def _checked_labels(labels: Sequence[str], n: int) -> tuple[str, ...]:
    found = _strings("labels", labels, f"{n} strings, one a node")
    if len(found) != n:
        raise InputError("labels", len(found), f"{n} labels, one a node")
    seen: dict[str, int] = {}
    for node, label in enumerate(found):
        if label in seen:
            raise InputError(f"labels[{node}]", label, f"a string of its own for each node; {seen[label]} has this one")
        seen[label] = node
    return found


def _strings(name: str, values: Sequence[str], allowed: str) -> tuple[str, ...]:
    try:
        found = None if isinstance(values, str) else tuple(values)
    except TypeError:
        found = None
    if found is None:
        raise InputError(name, values, allowed)
    for at, value in enumerate(found):
        if not isinstance(value, str):
            raise InputError(f"{name}[{at}]", value, "a string")
    return tuple(map(str, found))  # numpy's strings too


def _checked_coordinates(coordinates: ArrayLike, n: int) -> Float[np.ndarray, "n 3"]:
    allowed = f"({n}, 3): x, y, z in mm of each node"
    try:
        given = np.asarray(coordinates)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError("coordinates", coordinates, allowed) from error
    if given.dtype.kind not in "biuf":
        raise InputError("coordinates.dtype", str(given.dtype), "real numbers")
    if given.shape != (n, 3):
        raise InputError("coordinates.shape", given.shape, allowed)
    found = given.astype(np.float64)
    bad = np.argwhere(~np.isfinite(found))
    if len(bad):
        raise InputError(f"coordinates[{', '.join(map(str, bad[0]))}]", float(found[tuple(bad[0])]), "finite numbers")
    found.flags.writeable = False
    return found
