"""Seconds a sequence of the oracle and of its rivals on one environment, in turn on one thread; outputs equal first.

Full output for all: the predictive after every prefix and the entropy of the task posterior.  The associative scan is
run on a share of the tasks (memory) and its time is multiplied; `share` says by how much.  The floor is the oracle's
multiplications at the rate of a matrix product of the same dtype, sgemm or dgemm (256), measured in the same turns.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from commissure.core.errors import CommissureError
from commissure.metahmm.environment import MetaHMM
from commissure.metahmm.oracle import BayesOracle
from commissure.metahmm.rivals import forward_batched, scan_reference

__all__ = ["OracleRow", "Spread", "bench_oracle", "multiplications"]

OURS, PRUNED, DENSE, SCAN = "oracle", "oracle, pruned 1e-8", "dense batched forward", "S x S associative scan"
SCAN_TASKS = 48  # tasks of the scan that are timed: its messages take 154 MB at 200 tokens in float32
CHECK_TOKENS = 30


class Spread(NamedTuple):
    """Smallest, median and largest over the turns."""

    low: float
    median: float
    high: float


@dataclass(frozen=True)
class OracleRow:
    """One contender; `gain` is its time over the oracle's, `share` the part of the tasks that was timed."""

    contender: str
    dtype: str
    n_tasks: int
    length: int
    seconds: Spread
    gain: Spread
    share: float
    error: float
    floor: float


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
    env = MetaHMM.from_preset(preset, seed=seed)
    tasks = torch.arange(n_sequences) * (env.n_tasks // n_sequences)
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
    spent = _alternate([*(call for call, _ in contenders.values()), lambda: square @ square], repeats)
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


def _errors(env: MetaHMM, tokens: Tensor) -> dict[str, float]:
    """Largest deviation of each predictive in float64; the scan's on its own tasks, pruning's is told only."""
    exact = BayesOracle(env).log_probs(tokens[None])[0].exp()
    dense = forward_batched(env.initial, env.transitions, env.emissions, tokens)[0]
    ids = torch.arange(min(env.n_tasks, SCAN_TASKS))
    scan = scan_reference(env.initial, env.transition_matrix(ids), env.emission_matrix(ids), tokens)[0]
    some = BayesOracle(env, tasks=ids).log_probs(tokens[None])[0].exp()
    pruned = BayesOracle(env, prune=1e-8).log_probs(tokens[None])[0].exp()
    pairs = {OURS: (exact, exact), PRUNED: (pruned, exact), DENSE: (dense, exact), SCAN: (scan, some)}
    errors = {name: float((a - b).abs().max()) for name, (a, b) in pairs.items()}
    wrong = {name: error for name, error in errors.items() if error > 1e-9 and name != PRUNED}
    if wrong:
        raise CommissureError(f"contenders differ in float64: {wrong}")
    return errors


def _alternate(contenders: Sequence[Callable[[], object]], repeats: int) -> Float[np.ndarray, "contenders repeats"]:
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
