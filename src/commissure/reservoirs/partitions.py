"""Nested partitions of the nodes of a network: its modules at several levels, the finest first.

levels[0][i]   module of node i among 0 ... k_0 - 1;   levels[l + 1] merges whole modules of levels[l]
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from commissure.core.errors import InputError

__all__ = ["checked_levels", "groups"]


def checked_levels(
    argument: str, levels: Sequence[object], n_nodes: int | None = None
) -> tuple[Int[np.ndarray, " nodes"], ...]:
    """Read-only int64 copies of `levels`; `InputError` unless they are nested partitions numbered 0 ... k - 1.

    >>> [level.tolist() for level in checked_levels("levels", [[0, 1, 2, 2], [0, 0, 1, 1]])]
    [[0, 1, 2, 2], [0, 0, 1, 1]]
    """
    found: list[np.ndarray] = []
    try:
        given = list(levels)
    except TypeError as error:
        raise InputError(argument, levels, "partitions, each with one module number a node") from error
    for at, level in enumerate(given):
        name = f"{argument}[{at}]"
        try:
            modules = np.array(level)
        except (TypeError, ValueError, RuntimeError) as error:
            raise InputError(name, level, "integers, one module number a node") from error
        if modules.ndim != 1 or not np.issubdtype(modules.dtype, np.integer) or not len(modules):
            raise InputError(name, (modules.shape, str(modules.dtype)), "integers, one module number a node")
        if len(modules) != (n_nodes := n_nodes or len(modules)):
            raise InputError(name, len(modules), f"{n_nodes} module numbers, one a node")
        k = int(modules.max()) + 1
        if modules.min() < 0 or len(np.unique(modules)) != k:
            fix = "number them with np.unique(modules, return_inverse=True)[1]"
            raise InputError(name, sorted({*modules.tolist()}), "modules 0 ... k - 1, each with a node", fix)
        modules = modules.astype(np.int64, copy=False)  # a copy since np.array
        if found:
            _check_nested(name, f"{argument}[{at - 1}]", found[-1], modules)
        modules.flags.writeable = False
        found.append(modules)
    return tuple(found)


def groups(modules: Int[np.ndarray, " nodes"]) -> tuple[Int[np.ndarray, " members"], ...]:
    """The nodes of each module, ascending.

    >>> [group.tolist() for group in groups(np.array([1, 0, 1]))]
    [[1], [0, 2]]
    """
    order = np.argsort(modules, kind="stable")
    return tuple(np.split(order, np.cumsum(np.bincount(modules))[:-1]))


def _check_nested(name: str, finer_name: str, finer: np.ndarray, modules: np.ndarray) -> None:
    parent = np.zeros(int(finer.max()) + 1, np.int64)
    parent[finer] = modules
    split = np.flatnonzero(parent[finer] != modules)
    if len(split):
        module = int(finer[split[0]])
        parts = sorted({*modules[finer == module].tolist()})
        allowed = f"whole modules of {finer_name}; its module {module} is split"
        raise InputError(name, parts, allowed, "pass the finest partition first, each a coarsening of the one before")
