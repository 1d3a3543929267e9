"""What sampling costs: all sequences at once against loops over sequences, in turns in one process.

Two loops: `rng.choice` for every draw, as such code is commonly written, and the best that a loop in Python can do,
bisection in lists of cumulative probabilities made beforehand.  CPU time of one thread.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from commissure.core.rng import generator
from commissure.metahmm.environment import MetaHMM
from commissure.metahmm.sample import sample_reference

__all__ = ["Range", "SamplerRow", "bench_sampler"]

_LOOP_SEQUENCES = 16  # a loop's cost a sequence does not depend on how many there are


@dataclass(frozen=True)
class Range:
    """Smallest, median and largest over the turns."""

    low: float
    median: float
    high: float


@dataclass(frozen=True)
class SamplerRow:
    """One way to sample: tokens a second (median), and how many times as many the vectorized sampler draws."""

    contender: str
    tokens_a_second: float
    ratio: Range


def bench_sampler(
    preset: str = "small", *, batch_size: int = 256, length: int = 200, repeats: int = 7, seed: int = 15
) -> list[SamplerRow]:
    """Sample `batch_size` sequences at once, and some by each loop, in turns; the first turn is not counted.

    >>> [row.contender for row in bench_sampler("tiny", batch_size=2, length=3, repeats=1)]
    ['vectorized', 'loop of rng.choice', 'loop of bisections']
    """
    env = MetaHMM.from_preset(preset, seed=seed)
    ids = torch.from_numpy(generator(seed, "bench").integers(env.n_tasks, size=batch_size))
    few = ids[:_LOOP_SEQUENCES]
    rng, lists = np.random.default_rng(seed), _cumulative_lists(env)
    contenders: dict[str, tuple[int, Callable[[], object]]] = {
        "vectorized": (batch_size, lambda: env.sample(ids, length, seed=seed)),
        "loop of rng.choice": (len(few), lambda: sample_reference(env, few, length, seed=seed)),
        "loop of bisections": (len(few), lambda: [_bisect(lists, task, length, rng) for task in few.tolist()]),
    }
    seconds = np.empty((repeats + 1, len(contenders)))
    for turn in range(repeats + 1):
        for column, (n_sequences, run) in enumerate(contenders.values()):
            start = time.thread_time()
            run()
            seconds[turn, column] = (time.thread_time() - start) / (n_sequences * length)
    ratios = seconds[1:] / seconds[1:, :1]
    return [
        SamplerRow(name, 1 / float(np.median(spent)), Range(*(float(q) for q in np.quantile(ratio, (0, 0.5, 1)))))
        for name, spent, ratio in zip(contenders, seconds[1:].T, ratios.T, strict=True)
    ]


Lists = tuple[list[list[list[float]]], list[list[list[float]]]]


def _cumulative_lists(env: MetaHMM) -> Lists:
    transitions, emissions = (table.cumsum(-1) for table in (env.transitions, env.emissions))
    return (transitions / transitions[..., -1:]).tolist(), (emissions / emissions[..., -1:]).tolist()


def _bisect(lists: Lists, task: int, length: int, rng: np.random.Generator) -> list[int]:
    u, w = divmod(task, len(lists[1]))
    transition, emission = lists[0][u], lists[1][w]
    tokens, state = [], int(rng.integers(len(transition)))
    for state_uniform, token_uniform in rng.random((length, 2)).tolist():
        tokens.append(bisect_right(emission[state], token_uniform))
        state = bisect_right(transition[state], state_uniform)
    return tokens
