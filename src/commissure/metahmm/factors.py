"""The algebra of tasks: a task is a tuple of choices, its id their row-major number, and some choices can be held out.

    id = ((f_1 n_2 + f_2) n_3 + f_3) ...        0 <= f_i < n_i

A split by *held-out pairs* keeps some pairs of values (f_i = a, f_j = b) out of training: every task with such a pair
is out of distribution, although each value by itself is seen.  Training tasks show every value in every split.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int64, Integer
from torch import Tensor

from commissure.core.errors import InputError
from commissure.core.rng import generator
from commissure.metahmm.inputs import Ids, integers, whole

__all__ = ["FactorSpace", "HeldOutPair", "Split", "TaskFamily"]

Factors = Integer[Tensor, "n factors"] | Integer[np.ndarray, "n factors"] | Sequence[Sequence[int]]


@runtime_checkable
class TaskFamily(Protocol):
    """Hidden Markov models that share an initial distribution and matrices; task `u * W + w` has u and w of U x W."""

    @property
    def initial(self) -> Float[Tensor, " states"]:
        """pi."""

    @property
    def transitions(self) -> Float[Tensor, "u states states"]:
        """A_u."""

    @property
    def emissions(self) -> Float[Tensor, "w states tokens"]:
        """E_w."""


class HeldOutPair(NamedTuple):
    """Two values that no training task has together."""

    factor: str
    value: int
    other_factor: str
    other_value: int


class Split(NamedTuple):
    """Sorted task ids: disjoint, and together all tasks; `ood` has the tasks with a held-out pair."""

    train: Int64[Tensor, " train"]
    val: Int64[Tensor, " val"]
    ood: Int64[Tensor, " ood"]
    held_out: tuple[HeldOutPair, ...]


class FactorSpace:
    """All tuples of factor values, numbered row-major (the last factor runs fastest).

    >>> space = FactorSpace({"cycle": 3, "shift": 2})
    >>> space.to_factors([4])
    tensor([[2, 0]])
    >>> space.to_ids([[2, 0]])
    tensor([4])
    """

    def __init__(self, factors: dict[str, int]) -> None:
        if not isinstance(factors, dict):
            raise InputError("factors", factors, "a dict of names and numbers of values")
        self.names = tuple(factors)
        self.sizes = tuple(whole(f"factors[{name!r}]", size, 1) for name, size in factors.items())
        self.n_tasks = math.prod(self.sizes)
        strides = np.cumprod((1, *self.sizes[:0:-1]))[::-1]
        self._strides = torch.from_numpy(strides.astype(np.int64))
        self._sizes = torch.tensor(self.sizes)

    def to_factors(self, ids: Ids) -> Int64[Tensor, "n factors"]:
        """The factor values of task ids."""
        return self.check_ids("ids", ids)[:, None] // self._strides % self._sizes

    def to_ids(self, factors: Factors) -> Int64[Tensor, " n"]:
        """The task ids of factor values."""
        values = integers("factors", factors, "n", "factors").cpu()
        if values.shape[1] != len(self.sizes):
            raise InputError("factors.shape", tuple(values.shape), f"(n, {len(self.sizes)}): {', '.join(self.names)}")
        for column, (name, size) in enumerate(zip(self.names, self.sizes, strict=True)):
            wrong = (values[:, column] < 0) | (values[:, column] >= size)
            if wrong.any():
                raise InputError(f"factors ({name})", int(values[wrong, column][0]), f"0 to {size - 1}")
        return (values * self._strides).sum(1)

    def check_ids(self, argument: str, ids: Ids) -> Int64[Tensor, " n"]:
        """Task ids as a tensor (n,); anything else, or an id outside [0, n_tasks), raises `InputError`."""
        values = integers(argument, ids, "n").cpu()
        wrong = (values < 0) | (values >= self.n_tasks)
        if wrong.any():
            raise InputError(argument, int(values[wrong][0]), f"task ids from 0 to {self.n_tasks - 1}")
        return values

    def split(self, n_val: int, *, seed: int, n_held_out_pairs: int = 0) -> Split:
        """Random training and validation tasks, and those with one of `n_held_out_pairs` random pairs of values.

        Every value of every factor stays in the training tasks: where all validation tasks drawn at random would take
        one away, they are drawn from the tasks outside a random small set that has every value.

        >>> split = FactorSpace({"cycle": 3, "shift": 2}).split(2, seed=0, n_held_out_pairs=1)
        >>> [len(part) for part in split[:3]]
        [3, 2, 1]
        """
        n_val, factors = whole("n_val", n_val, 0), self.to_factors(torch.arange(self.n_tasks)).numpy()
        pairs, is_ood = self._hold_out(whole("n_held_out_pairs", n_held_out_pairs, 0), factors, seed)
        order = generator(seed, "metahmm split").permutation(np.flatnonzero(~is_ood))
        if not self._has_every_value(factors[order[n_val:]]):
            needed = order[self._cover(factors[order])]
            order = np.concatenate([order[~np.isin(order, needed)], needed])
            if n_val > len(order) - len(needed):
                allowed = f"0 to {len(order) - len(needed)}: training needs {len(needed)} tasks to see every value"
                raise InputError("n_val", n_val, allowed)
        parts = (np.sort(order[n_val:]), np.sort(order[:n_val]), np.flatnonzero(is_ood))
        train, val, ood = (torch.from_numpy(part) for part in parts)
        return Split(train, val, ood, pairs)

    def _has_every_value(self, factors: np.ndarray) -> bool:
        return all(len(np.unique(factors[:, c])) == size for c, size in enumerate(self.sizes))

    def _cover(self, factors: np.ndarray) -> list[int]:
        """Rows that have every value, one by one the first of those that add most: the fewest if no pair is missing."""
        rows: list[int] = []
        while not self._has_every_value(factors[rows]):
            is_new = [~np.isin(column, column[rows]) for column in factors.T]
            rows.append(int(np.sum(is_new, 0).argmax()))
        return rows

    def _hold_out(self, count: int, factors: np.ndarray, seed: int) -> tuple[tuple[HeldOutPair, ...], np.ndarray]:
        """The first `count` pairs, in random order, that leave every value with a task."""
        is_ood = np.zeros(self.n_tasks, bool)
        pairs: list[HeldOutPair] = []
        free = [i for i, size in enumerate(self.sizes) if size > 1]
        every = [(i, a, j, b) for i, j in combinations(free, 2) for a, b in np.ndindex(self.sizes[i], self.sizes[j])]
        for k in generator(seed, "metahmm held-out pairs").permutation(len(every)):
            if len(pairs) == count:
                break
            i, a, j, b = every[k]
            candidate = is_ood | ((factors[:, i] == a) & (factors[:, j] == b))
            if self._has_every_value(factors[~candidate]):
                is_ood = candidate
                pairs.append(HeldOutPair(self.names[i], a, self.names[j], b))
        if len(pairs) < count:
            raise InputError("n_held_out_pairs", count, f"at most {len(pairs)} here, so that every value stays seen")
        return tuple(pairs), is_ood
