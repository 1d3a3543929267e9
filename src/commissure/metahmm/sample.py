"""Sampling sequences of many tasks at once, by inversion of the cumulative distribution.

Row r of a table is stored as r + (cumulative sums of its probabilities), so that the whole table is one sorted array
and a draw from row r with the uniform number v is one binary search for r + v.  v is a multiple of 2^-k with k so
small that r + v is exact: an entry of probability 0 is never drawn.

The states of all sequences advance together; their tokens are drawn when all states are known.  All numbers come from
the child streams of one seed: of states, tokens, lengths and steps of a switch.  Hence shorter sequences are the
beginnings of longer ones, and a switch changes nothing before it.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np
import torch
from jaxtyping import Bool, Float64, Int64
from torch import Tensor

from commissure.core.errors import InputError
from commissure.core.rng import generator

__all__ = ["Family", "Sampler", "Sequences", "sample_reference"]


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
        position = torch.arange(self.tokens.shape[1])
        inside = position < self.lengths[:, None]
        return inside if self.switch_at is None else inside & (position >= self.switch_at[:, None])

    @property
    def task_by_position(self) -> Int64[Tensor, "batch time"]:
        """The task that gave each token."""
        position = torch.arange(self.tokens.shape[1])
        before = self.task_ids[:, None].expand(self.tokens.shape)
        if self.switch_at is None or self.switch_to is None:
            return before
        return torch.where(position < self.switch_at[:, None], before, self.switch_to[:, None])


class Sampler:
    """The cumulative tables of a family: `transitions` (U, states, states), `emissions` (W, states, tokens).

    Task `u * W + w` has the matrices u and w.
    """

    def __init__(
        self,
        initial: Float64[np.ndarray, " states"],
        transitions: Float64[np.ndarray, "u states states"],
        emissions: Float64[np.ndarray, "w states tokens"],
    ) -> None:
        self._n_emissions, self._n_states, self._n_obs = emissions.shape
        self._initial = _cumulative(initial[None])
        self._transitions = _cumulative(transitions.reshape(-1, self._n_states))
        self._emissions = _cumulative(emissions.reshape(-1, self._n_obs))
        n_rows = self._n_states * max(len(transitions), len(emissions))
        self._grid = 2.0 ** (52 - n_rows.bit_length())

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
        draws = _draw(len(task_ids), length, switch_to, switch_at, seed)
        task = _task_by_time(task_ids, draws, switch_to)
        chosen, emitted = task // self._n_emissions * self._n_states, task % self._n_emissions * self._n_states
        uniform = np.floor(draws.states * self._grid) / self._grid
        states = np.empty(uniform.shape, np.int64)
        row, table = np.zeros(len(task_ids), np.int64), self._initial
        for t in range(len(states)):
            states[t] = np.searchsorted(table, row + uniform[t], side="right") - row * self._n_states
            row, table = chosen[t] + states[t], self._transitions
        rows = emitted + states
        uniform = np.floor(draws.tokens * self._grid) / self._grid
        tokens = np.searchsorted(self._emissions, rows + uniform, side="right") - rows * self._n_obs
        return _sequences(tokens, states, task_ids, draws, switch_to)


class Family(Protocol):
    """What a sequence is drawn from; an environment is one."""

    initial: Float64[Tensor, " states"]
    transitions: Float64[Tensor, "u states states"]
    emissions: Float64[Tensor, "w states tokens"]


def sample_reference(
    family: Family,
    task_ids: Int64[Tensor, " batch"],
    length: int | tuple[int, int],
    *,
    seed: int,
    switch_to: Int64[Tensor, " batch"] | None = None,
    switch_at: int | tuple[int, int] | None = None,
) -> Sequences:
    """The definition, one sequence and one token after another, from the same uniform numbers as `Sampler.sample`."""
    draws = _draw(len(task_ids), length, switch_to, switch_at, seed)
    tokens, states = np.zeros(draws.states.shape, np.int64), np.zeros(draws.states.shape, np.int64)
    for b, first in enumerate(task_ids.tolist()):
        p = family.initial
        for t in range(int(draws.lengths[b])):
            switched = switch_to is not None and t >= draws.switch_at[b]
            u, w = divmod(int(switch_to[b]) if switch_to is not None and switched else first, len(family.emissions))
            state = _invert(p, draws.states[t, b])
            states[t, b], tokens[t, b] = state, _invert(family.emissions[w, state], draws.tokens[t, b])
            p = family.transitions[u, state]
    return _sequences(tokens, states, task_ids, draws, switch_to)


class _Draws(NamedTuple):
    """What one call draws: uniform numbers (time, batch), lengths and steps of a switch (batch,)."""

    states: np.ndarray
    tokens: np.ndarray
    lengths: np.ndarray
    switch_at: np.ndarray


def _draw(
    n: int,
    length: int | tuple[int, int],
    switch_to: Tensor | None,
    switch_at: int | tuple[int, int] | None,
    seed: int,
) -> _Draws:
    shortest, longest = _ends("length", length, 1)
    if (switch_to is None) != (switch_at is None):
        missing = "switch_to" if switch_to is None else "switch_at"
        raise InputError(missing, None, "both switch_to and switch_at, or neither of them")
    if switch_to is not None and len(switch_to) != n:
        raise InputError("switch_to.shape", tuple(switch_to.shape), f"one task for each of {n} sequences")
    first, last = _ends("switch_at", switch_at if switch_at is not None else longest, 0)
    return _Draws(
        generator(seed, "metahmm states").random((longest, n)),
        generator(seed, "metahmm tokens").random((longest, n)),
        generator(seed, "metahmm lengths").integers(shortest, longest + 1, n),
        generator(seed, "metahmm switch").integers(first, last + 1, n),
    )


def _ends(argument: str, value: int | tuple[int, int], at_least: int) -> tuple[int, int]:
    low, high = (value, value) if isinstance(value, int) else value
    if isinstance(value, bool) or not at_least <= low <= high:
        raise InputError(argument, value, f"an integer >= {at_least}, or two of them in order")
    return int(low), int(high)


def _task_by_time(task_ids: Tensor, draws: _Draws, switch_to: Tensor | None) -> np.ndarray:
    """(time, batch); without a switch the lines are one and the same."""
    before = np.broadcast_to(task_ids.numpy(), draws.states.shape)
    if switch_to is None:
        return before
    return np.where(np.arange(len(before))[:, None] < draws.switch_at, before, switch_to.numpy())


def _sequences(
    tokens: np.ndarray, states: np.ndarray, task_ids: Tensor, draws: _Draws, switch_to: Tensor | None
) -> Sequences:
    is_inside = np.arange(len(tokens))[:, None] < draws.lengths
    return Sequences(
        *(torch.from_numpy(np.ascontiguousarray(np.where(is_inside, values, 0).T)) for values in (tokens, states)),
        task_ids=task_ids,
        lengths=torch.from_numpy(draws.lengths),
        switch_to=switch_to,
        switch_at=None if switch_to is None else torch.from_numpy(draws.switch_at),
    )


def _cumulative(table: np.ndarray) -> np.ndarray:
    """All rows as one sorted array: row r runs from r to r + 1, reached exactly."""
    total = table.cumsum(1)
    return (np.arange(len(table))[:, None] + total / total[:, -1:]).reshape(-1)


def _invert(p: Tensor, uniform: float) -> int:
    """The first entry whose cumulative probability is above the uniform number."""
    total = p.cumsum(0)
    return int((total / total[-1] <= uniform).sum())
