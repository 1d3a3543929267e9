"""Sampling sequences of many tasks at once by the alias method (Walker 1977): each draw is one look into a table.

A row of n probabilities p is kept as n columns of height 1 / n, each shared by two entries: its own, up to
`threshold`, and its `alias` above.  A uniform number picks the column by its integer part times n, and the entry by
what is left; an entry of probability 0 is never drawn.

The states of all sequences advance together; their tokens are drawn when all states are known.  All numbers come from
the child streams of one seed: of states, tokens, lengths and steps of a switch.  Hence shorter sequences are the
beginnings of longer ones, and a switch changes nothing before it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float64, Int64
from torch import Tensor

from commissure.core.errors import InputError
from commissure.core.rng import generator
from commissure.metahmm.factors import TaskFamily

__all__ = ["AliasTable", "Sampler", "Sequences", "alias_table", "sample_reference"]


class Sequences(NamedTuple):
    """Sequences drawn from tasks; beyond a row's length tokens and states are 0.

    With a switch, `switch_at` is the first position of the new task: its state is reached by the old task, its token
    and all that follows are the new one's.
    """

    tokens: Int64[Tensor, "batch time"]
    states: Int64[Tensor, "batch time"]
    task_ids: Int64[Tensor, " batch"]
    lengths: Int64[Tensor, " batch"]
    switch_to: Int64[Tensor, " batch"] | None = None
    switch_at: Int64[Tensor, " batch"] | None = None

    @property
    def is_scored(self) -> Bool[Tensor, "batch time"]:
        """Positions inside the length and, after an intervention, not before the switch."""
        position = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        inside = position < self.lengths[:, None]
        return inside if self.switch_at is None else inside & (position >= self.switch_at[:, None])

    @property
    def task_by_position(self) -> Int64[Tensor, "batch time"]:
        """The task that gave each token."""
        position = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        before = self.task_ids[:, None].expand(self.tokens.shape)
        if self.switch_at is None or self.switch_to is None:
            return before
        return torch.where(position < self.switch_at[:, None], before, self.switch_to[:, None])


class Sampler:
    """The alias tables of a family: `transitions` (U, states, states), `emissions` (W, states, tokens).

    Task `u * W + w` has the matrices u and w.  Rows are normalized.
    """

    def __init__(
        self,
        initial: Float64[np.ndarray, " states"],
        transitions: Float64[np.ndarray, "u states states"],
        emissions: Float64[np.ndarray, "w states tokens"],
    ) -> None:
        self._n_emissions, self._n_states, self._n_obs = emissions.shape
        self._initial = alias_table(initial[None])
        self._transitions = alias_table(transitions.reshape(-1, self._n_states))
        self._emissions = alias_table(emissions.reshape(-1, self._n_obs))

    def sample(
        self,
        task_ids: Int64[Tensor, " batch"],
        length: int | tuple[int, int],
        *,
        seed: int,
        switch_to: Int64[Tensor, " batch"] | None = None,
        switch_at: int | tuple[int, int] | None = None,
    ) -> Sequences:
        """One sequence of each task; the result depends on the arguments alone.

        `length`: of all sequences, or the ends (included) of a uniform distribution; each sequence begins at a uniform
        state.  `switch_to`: the tasks that take over at position `switch_at` (or uniform between its two ends,
        included), from the state reached.
        """
        plan = _plan(len(task_ids), length, switch_to, switch_at, seed)
        shape, n = (plan.longest, len(task_ids)), self._n_states
        task = _task_by_time(task_ids, plan, switch_to)
        column, rest = _split(generator(seed, "metahmm states").random(shape), n)
        states = np.empty(shape, np.int64)
        states[0] = self._initial.pick(column[0], column[0], rest[0])
        from_zero = task[:-1] // self._n_emissions * n**2 + column[1:]
        for t in range(1, plan.longest):
            states[t] = self._transitions.pick(from_zero[t - 1] + n * states[t - 1], column[t], rest[t])
        column, rest = _split(generator(seed, "metahmm tokens").random(shape), self._n_obs)
        rows = task % self._n_emissions * n + states
        tokens = self._emissions.pick(rows * self._n_obs + column, column, rest)
        return _sequences(tokens, states, task_ids, plan, switch_to)


class AliasTable(NamedTuple):
    """Rows of probabilities, ready to be drawn from; flattened."""

    threshold: Float64[np.ndarray, " entries"]
    alias: Int64[np.ndarray, " entries"]

    def pick(self, cell: np.ndarray, column: np.ndarray, rest: np.ndarray) -> np.ndarray:
        """The entries that fall to `rest` in [0, 1) of `column`; `cell` is that column's place in the table."""
        return np.where(rest < self.threshold.take(cell), column, self.alias.take(cell))


def alias_table(rows: Float64[np.ndarray, "rows entries"]) -> AliasTable:
    """The table of rows of weights, all rows at once: in turn, the lowest column is filled up from the highest one.

    >>> alias_table(np.array([[0.5, 0.0, 0.25, 0.25]]))
    AliasTable(threshold=array([1., 0., 1., 1.]), alias=array([0, 0, 2, 3]))
    """
    n = rows.shape[1]
    height = rows * (n / rows.sum(1, keepdims=True))
    threshold, alias = np.ones_like(height), np.tile(np.arange(n), (len(rows), 1))
    lowest, highest, row = height.copy(), height.copy(), np.arange(len(rows))  # finished columns at +inf and -inf
    for _ in range(n - 1):
        low, high = lowest.argmin(1), highest.argmax(1)
        threshold[row, low], alias[row, low] = lowest[row, low], high
        highest[row, high] -= 1 - lowest[row, low]
        lowest[row, high] = highest[row, high]
        lowest[row, low], highest[row, low] = np.inf, -np.inf
    return AliasTable(threshold.reshape(-1), alias.reshape(-1))


def sample_reference(
    family: TaskFamily,
    task_ids: Int64[Tensor, " batch"],
    length: int | tuple[int, int],
    *,
    seed: int,
    switch_to: Int64[Tensor, " batch"] | None = None,
    switch_at: int | tuple[int, int] | None = None,
) -> Sequences:
    """The definition, one sequence and one token after another: the same law as `Sampler.sample`, other numbers.

    Lengths and steps of a switch are the same.
    """
    plan = _plan(len(task_ids), length, switch_to, switch_at, seed)
    rng = generator(seed, "metahmm reference")
    transitions, emissions = ((t / t.sum(-1, keepdim=True)).numpy() for t in (family.transitions, family.emissions))
    tokens, states = (
        np.zeros((plan.longest, len(task_ids)), np.int64),
        np.zeros((plan.longest, len(task_ids)), np.int64),
    )
    for b, task in enumerate(task_ids.tolist()):
        u, w = divmod(task, len(emissions))
        state = rng.choice(len(family.initial), p=family.initial.numpy())
        for t in range(int(plan.lengths[b])):
            if switch_to is not None and t == plan.switch_at[b]:
                u, w = divmod(int(switch_to[b]), len(emissions))
            states[t, b] = state
            tokens[t, b] = rng.choice(emissions.shape[2], p=emissions[w, state])
            state = rng.choice(len(family.initial), p=transitions[u, state])
    return _sequences(tokens, states, task_ids, plan, switch_to)


class _Plan(NamedTuple):
    """Lengths and steps of a switch (batch,); `longest` is the length that all are padded to."""

    longest: int
    lengths: np.ndarray
    switch_at: np.ndarray


def _plan(
    n: int,
    length: int | tuple[int, int],
    switch_to: Tensor | None,
    switch_at: int | tuple[int, int] | None,
    seed: int,
) -> _Plan:
    shortest, longest = _ends("length", length, 1)
    if (switch_to is None) != (switch_at is None):
        missing = "switch_to" if switch_to is None else "switch_at"
        raise InputError(missing, None, "both switch_to and switch_at, or neither of them")
    if switch_to is not None and len(switch_to) != n:
        raise InputError("switch_to.shape", tuple(switch_to.shape), f"one task for each of {n} sequences")
    first, last = _ends("switch_at", switch_at if switch_at is not None else longest, 0)
    return _Plan(
        longest,
        generator(seed, "metahmm lengths").integers(shortest, longest + 1, n),
        generator(seed, "metahmm switch").integers(first, last + 1, n),
    )


def _ends(argument: str, value: int | tuple[int, int], at_least: int) -> tuple[int, int]:
    ends = tuple(value) if isinstance(value, tuple | list) else (value, value)
    are_whole = all(isinstance(end, int | np.integer) and not isinstance(end, bool) for end in ends)
    if len(ends) != 2 or not are_whole or not at_least <= ends[0] <= ends[1]:
        raise InputError(argument, value, f"an integer >= {at_least}, or a pair of them in order")
    return int(ends[0]), int(ends[1])


def _task_by_time(task_ids: Tensor, plan: _Plan, switch_to: Tensor | None) -> np.ndarray:
    """(time, batch); without a switch the lines are one and the same."""
    before = np.broadcast_to(task_ids.numpy(), (plan.longest, len(task_ids)))
    if switch_to is None:
        return before
    return np.where(np.arange(len(before))[:, None] < plan.switch_at, before, switch_to.numpy())


def _sequences(
    tokens: np.ndarray, states: np.ndarray, task_ids: Tensor, plan: _Plan, switch_to: Tensor | None
) -> Sequences:
    is_inside = np.arange(len(tokens))[:, None] < plan.lengths
    return Sequences(
        *(torch.from_numpy(np.ascontiguousarray(np.where(is_inside, values, 0).T)) for values in (tokens, states)),
        task_ids=task_ids,
        lengths=torch.from_numpy(plan.lengths),
        switch_to=switch_to,
        switch_at=None if switch_to is None else torch.from_numpy(plan.switch_at),
    )


def _split(uniform: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Integer part and rest of n times a number in [0, 1), which is below n in floating point too."""
    scaled = n * uniform
    column = scaled.astype(np.int64)
    return column, scaled - column
