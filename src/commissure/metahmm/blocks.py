"""The pool of blocks that all tasks of an environment share: cycles of states, and edges from states to tokens.

    base[b, dir, speed]           one cycle through all states; dir 1 reverses it, speed k walks it with stride k + 1
    family[f, g, fdir, fspeed]    `cycle_per_group` cycles of 3 to 8 states, reversed and strided in the same way
    emission[h, o, shift]         edges of the states of group h, each moved by `shift` states inside the group

Everything is drawn once from `numpy.random.default_rng(seed)`, in this order: the base cycles (a permutation each); for
each family and group the lengths of its cycles together and then their states; for each emission group and option its
edges.  The order of the transitions is the one that gives the published numbers of distinct matrices and of edges; the
order inside the emissions (tokens of the states, then state and token of every extra edge) follows the description,
and no published number tells it from others.

`variant="reference"` repeats the defects of the published code, as far as its numbers tell, in addition to storage in
half precision (see `environment`):

- a family cycle whose stride is prime to its length *replaces* the cycles of its group before it, so that with stride
  1 only the last one is left;
- any other family cycle adds a stale variable instead of itself, the last base cycle in its last direction;
- a cycle split by its stride k has len // k states a part, which is wrong unless k divides the length.

With fewer than 8 states the lengths are drawn up to `n_states`.  arXiv 2506.16288.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Int

from commissure.metahmm.config import MetaHMMConfig

__all__ = ["Blocks", "Variant", "draw_blocks"]

Variant = Literal["corrected", "reference"]
_SHORTEST, _LONGEST = 3, 8  # states in a family's cycle


class Blocks(NamedTuple):
    """Numbers of edges; `emission` is 0 or 1 and has the rows of the states outside the group at 0."""

    base: Int[np.ndarray, "cycles directions speeds states states"]
    family: Int[np.ndarray, "families groups directions speeds states states"]
    emission: Int[np.ndarray, "groups options shifts states tokens"]


def draw_blocks(config: MetaHMMConfig, *, seed: int, variant: Variant) -> Blocks:
    """Draw the blocks of an environment.

    >>> blocks = draw_blocks(MetaHMMConfig.from_preset("small"), seed=15, variant="corrected")
    >>> [block.shape for block in blocks]
    [(4, 2, 2, 20, 20), (3, 2, 2, 2, 20, 20), (3, 2, 3, 20, 50)]
    """
    rng = np.random.default_rng(seed)
    base = [rng.permutation(config.n_states) for _ in range(config.base_cycles)]
    families = [
        [_draw_group(rng, config) for _ in range(config.group_per_family)] for _ in range(config.cycle_families)
    ]
    return Blocks(_base(base, config, variant), _family(families, base, config, variant), _emission(rng, config))


def _draw_group(rng: np.random.Generator, config: MetaHMMConfig) -> list[np.ndarray]:
    """The cycles of one group; states are distinct inside a cycle, cycles may share states."""
    lengths = rng.integers(_SHORTEST, min(_LONGEST, config.n_states) + 1, config.cycle_per_group)
    return [rng.choice(config.n_states, length, replace=False) for length in lengths]


def _base(cycles: list[np.ndarray], config: MetaHMMConfig, variant: Variant) -> np.ndarray:
    n = config.n_states
    blocks = np.zeros((config.base_cycles, config.base_directions, config.base_speeds, n, n), np.int64)
    for b, direction, speed in np.ndindex(blocks.shape[:3]):
        cycle, stride = _directed(cycles[b], direction), speed + 1
        n_parts = math.gcd(stride, n)
        is_split = variant == "reference" and n_parts > 1
        blocks[b, direction, speed] = _defective_parts(cycle, stride, n_parts) if is_split else _walk(cycle, stride, n)
    return blocks


def _family(
    families: list[list[list[np.ndarray]]], base: list[np.ndarray], config: MetaHMMConfig, variant: Variant
) -> np.ndarray:
    n = config.n_states
    directions, speeds = config.family_directions, config.family_speeds
    blocks = np.zeros((config.cycle_families, config.group_per_family, directions, speeds, n, n), np.int64)
    stale = _directed(base[-1], config.base_directions - 1)
    for f, g, direction, speed in np.ndindex(blocks.shape[:4]):
        stride = speed + 1
        for cycle in families[f][g]:
            walk = _walk(_directed(cycle, direction), stride, n)
            n_parts = math.gcd(stride, len(cycle))
            if variant == "corrected":
                blocks[f, g, direction, speed] += walk
            elif n_parts == 1:
                blocks[f, g, direction, speed] = walk
            else:
                blocks[f, g, direction, speed] += _defective_parts(stale, stride, n_parts)
    return blocks


def _directed(cycle: np.ndarray, direction: int) -> np.ndarray:
    return cycle[::-1] if direction else cycle


def _walk(cycle: np.ndarray, stride: int, n_states: int) -> np.ndarray:
    """Edges from each state of the cycle to the one `stride` further on; gcd(stride, len) cycles come out."""
    edges = np.zeros((n_states, n_states), np.int64)
    edges[cycle, np.roll(cycle, -stride)] = 1
    return edges


def _defective_parts(cycle: np.ndarray, stride: int, n_parts: int) -> np.ndarray:
    """`n_parts` cycles of len // stride states each (the published rule); `cycle` has all states."""
    edges = np.zeros((len(cycle), len(cycle)), np.int64)
    for part in range(n_parts):
        states = cycle[part + stride * np.arange(len(cycle) // stride)]
        edges[states, np.roll(states, -1)] += 1
    return edges


def _emission(rng: np.random.Generator, config: MetaHMMConfig) -> np.ndarray:
    sizes = (config.emission_groups, config.emission_group_size, config.emission_shifts)
    blocks = np.zeros((*sizes, config.n_states, config.n_obs), np.int64)
    for g, states in enumerate(np.array_split(np.arange(config.n_states), config.emission_groups)):
        for option in range(config.emission_group_size):
            edges = _draw_edges(rng, len(states), config)
            for shift in range(config.emission_shifts):
                blocks[g, option, shift, states] = np.roll(edges, shift, axis=0)
    return blocks


def _draw_edges(rng: np.random.Generator, n: int, config: MetaHMMConfig) -> np.ndarray:
    """Preferential attachment: a token of its own for each of `n` states, then edges to tokens by exp(degree).

    The degree of a token counts every edge drawn to it, repeated ones too; in the result an edge is there or not.
    """
    edges = np.zeros((n, config.n_obs), np.int64)
    edges[np.arange(n), rng.choice(config.n_obs, n, replace=False)] = 1
    for _ in range(config.emission_edge_per_node * n):
        degree = edges.sum(0)
        weight = np.exp(degree - degree.max())
        state = rng.integers(n)
        edges[state, rng.choice(config.n_obs, p=weight / weight.sum())] += 1
    return (edges > 0).astype(np.int64)
