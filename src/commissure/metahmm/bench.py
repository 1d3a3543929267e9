"""What the oracle and the sampler cost beside their rivals, in turns on one thread, CPU time; oracles equal first.

Oracle: full output for all, the predictive after every prefix and the entropy of the task posterior.  The associative
scan is run on a share of the tasks (memory) and its time is multiplied; `share` says by how much.  The floor is the
oracle's multiplications at the rate of a matrix product of the same dtype, sgemm or dgemm (256), in the same turns.

Sampler: all sequences at once against two loops over sequences, `rng.choice` for every draw, as such code is commonly
written, and the best that a loop in Python can do, bisection in lists of cumulative probabilities made beforehand.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from commissure.core.errors import CommissureError
from commissure.core.rng import generator
from commissure.metahmm.environment import MetaHMM
from commissure.metahmm.inputs import whole
from commissure.metahmm.oracle import BayesOracle
from commissure.metahmm.oracle_reference import dense_reference
from commissure.metahmm.rivals import forward_batched, scan_reference
from commissure.metahmm.sample import sample_reference

__all__ = ["OracleRow", "SamplerRow", "Spread", "alternate", "bench_oracle", "bench_sampler", "multiplications"]

OURS, PRUNED, DENSE, SCAN = "oracle", "oracle, pruned 1e-8", "dense batched forward", "S x S associative scan"
SCAN_TASKS = 48  # tasks of the scan that are timed: its messages take 154 MB at 200 tokens in float32
CHECK_TOKENS = 30
_LOOP_SEQUENCES = 16  # a loop's cost a sequence does not depend on how many there are


class Spread(NamedTuple):
    """Smallest, median and largest over the turns."""

    low: float
    median: float
    high: float


@dataclass(frozen=True)
class OracleRow:
    """One contender; `gain` is its time over the oracle's, `share` the part of the tasks that was timed.

    `error`: largest deviation of a probability, in float64, from one forward recursion a task (`dense_reference`).
    """

    contender: str
    dtype: str
    n_tasks: int
    length: int
    seconds: Spread
    gain: Spread
    share: float
    error: float
    floor: float


@dataclass(frozen=True)
class SamplerRow:
    """One way to sample: tokens a second (median), and how many times as many the vectorized sampler draws."""

    contender: str
    tokens_a_second: float
    ratio: Spread


def multiplications(env: MetaHMM) -> float:
    """Multiplications of the oracle a token: transitions, evidence, and the mixed predictive.

    >>> multiplications(MetaHMM.from_preset("e64", seed=0)) < 1500
    True
    """
    entries = float((env.transitions != 0).sum()) * env.n_emissions
    return entries + env.n_tasks * env.n_states + env.n_emissions * env.n_states * env.n_obs


def bench_oracle(
    preset: str = "small",
    *,
    seed: int = 15,
    length: int = 200,
    n_sequences: int = 8,
    dtype: torch.dtype = torch.float32,
    repeats: int = 5,
) -> list[OracleRow]:
    """Time a batch of `n_sequences` by the oracle, one sequence by its rivals; CommissureError where outputs differ."""
    env, repeats = MetaHMM.from_preset(preset, seed=seed), whole("repeats", repeats, 1)
    tasks = torch.arange(whole("n_sequences", n_sequences, 1)) * (env.n_tasks // n_sequences)
    tokens = env.sample(tasks, length, seed=seed).tokens
    errors = _errors(env, tokens[0, : min(length, CHECK_TOKENS)])
    exact, pruned = BayesOracle(env, dtype=dtype), BayesOracle(env, dtype=dtype, prune=1e-8)
    initial, transitions, emissions = (x.to(dtype) for x in (env.initial, env.transitions, env.emissions))
    n_scan = min(env.n_tasks, SCAN_TASKS)
    ids = torch.arange(n_scan)
    own = initial, env.transition_matrix(ids).to(dtype), env.emission_matrix(ids).to(dtype)
    square = torch.ones(256, 256, dtype=dtype)
    contenders: dict[str, tuple[Callable[[], object], float]] = {
        OURS: (lambda: exact(tokens), n_sequences),
        PRUNED: (lambda: pruned(tokens), n_sequences),
        DENSE: (lambda: forward_batched(initial, transitions, emissions, tokens[0]), 1),
        SCAN: (lambda: scan_reference(*own, tokens[0]), n_scan / env.n_tasks),
    }
    spent = alternate([*(call for call, _ in contenders.values()), lambda: square @ square], repeats)
    each = {name: row / units for row, (name, (_, units)) in zip(spent, contenders.items(), strict=False)}
    floor = float(np.median(spent[-1])) / 256**3 * multiplications(env) * length
    return [
        OracleRow(
            name,
            str(dtype).removeprefix("torch."),
            env.n_tasks,
            length,
            _spread(seconds),
            _spread(seconds / each[OURS]),
            n_scan / env.n_tasks if name == SCAN else 1.0,
            errors[name],
            floor,
        )
        for name, seconds in each.items()
    ]


def bench_sampler(
    preset: str = "small", *, batch_size: int = 256, length: int = 200, repeats: int = 7, seed: int = 15
) -> list[SamplerRow]:
    """Sample `batch_size` sequences at once, and some by each loop, in turns; the first turn is not counted.

    >>> [row.contender for row in bench_sampler("tiny", batch_size=2, length=3, repeats=1)]
    ['vectorized', 'loop of rng.choice', 'loop of bisections']
    """
    env, repeats = MetaHMM.from_preset(preset, seed=seed), whole("repeats", repeats, 1)
    batch_size = whole("batch_size", batch_size, 1)
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
        SamplerRow(name, 1 / float(np.median(spent)), _spread(ratio))
        for name, spent, ratio in zip(contenders, seconds[1:].T, ratios.T, strict=True)
    ]


def _errors(env: MetaHMM, tokens: Tensor) -> dict[str, float]:
    """Largest deviation of each predictive in float64; the scan's on its own tasks, pruning's is told only."""
    exact, pruned = (BayesOracle(env, prune=prune).log_probs(tokens[None])[0].exp() for prune in (0.0, 1e-8))
    dense = forward_batched(env.initial, env.transitions, env.emissions, tokens)[0]
    ids = torch.arange(min(env.n_tasks, SCAN_TASKS))
    scan = scan_reference(env.initial, env.transition_matrix(ids), env.emission_matrix(ids), tokens)[0]
    truth, some = (_one_by_one(env, tasks, tokens) for tasks in (env.task_ids, ids))
    pairs = {OURS: (exact, truth), PRUNED: (pruned, truth), DENSE: (dense, truth), SCAN: (scan, some)}
    errors = {name: float((a - b).abs().max()) for name, (a, b) in pairs.items()}
    wrong = {name: error for name, error in errors.items() if error > 1e-9 and name != PRUNED}
    if wrong:
        raise CommissureError(f"contenders differ in float64: {wrong}")
    return errors


def _one_by_one(env: MetaHMM, ids: Tensor, tokens: Tensor) -> Tensor:
    """The predictive under these tasks, equally likely, each filtered on its own."""
    prior = torch.full((len(ids),), 1 / len(ids), dtype=torch.float64)
    matrices = env.transition_matrix(ids), env.emission_matrix(ids)
    return dense_reference(env.initial.expand(len(ids), -1), *matrices, prior, tokens).log_probs.exp()


def alternate(contenders: Sequence[Callable[[], object]], repeats: int) -> Float[np.ndarray, "contenders repeats"]:
    """CPU seconds of each, called in turn after one round that is not counted."""
    spent = np.empty((len(contenders), repeats))
    for turn in range(-1, repeats):
        for number, contender in enumerate(contenders):
            start = time.thread_time()
            contender()
            if turn >= 0:
                spent[number, turn] = time.thread_time() - start
    return spent


def _spread(values: Float[np.ndarray, " turns"]) -> Spread:
    return Spread(float(values.min()), float(np.median(values)), float(values.max()))


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
