"""A dense oracle over a few tasks, as plain as its equations: what the predictors' tests measure against."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from commissure.metahmm import MetaHMM, MetaHMMConfig
from commissure.metahmm.conditional import ExactConditional
from commissure.metahmm.samplers import TablePosterior


class Dense(NamedTuple):
    log_probs: Tensor
    task_entropy: Tensor
    log_posterior: Tensor


class DenseOracle:
    """Bayes over all tasks with a uniform prior, each task filtered on its own."""

    def __init__(self, env: MetaHMM) -> None:
        self.env, self.exact = env, ExactConditional(env)

    def __call__(self, tokens: Tensor, lengths: Tensor | None = None) -> Dense:
        n = self.env.n_tasks
        tasks = torch.arange(n)[None, :, None].expand(len(tokens), -1, -1)
        each = self.exact.log_probs(tokens, tasks)
        seen = each[:, :, :-1].gather(-1, tokens[:, None, :, None].expand(-1, n, -1, 1))[..., 0]
        posterior = torch.nn.functional.pad(seen.cumsum(-1), (1, 0)).log_softmax(1)
        log_probs = torch.logsumexp(posterior[..., None] + each, 1)
        entropy = -(posterior.exp() * posterior).sum(1)
        return Dense(log_probs, entropy, posterior.transpose(1, 2))

    def log_probs(self, tokens: Tensor) -> Tensor:
        return self(tokens).log_probs


class DensePosterior:
    """Proposes tasks from the exact posterior, or from a distribution that never looks (`wrong`, (n_tasks,))."""

    def __init__(self, oracle: DenseOracle, wrong: Tensor | None = None) -> None:
        self.oracle, self.wrong = oracle, wrong

    def propose(self, tokens: Tensor) -> TablePosterior:
        table = self.oracle(tokens).log_posterior
        return TablePosterior(table if self.wrong is None else self.wrong.log().expand_as(table))


def small_environment(seed: int = 0) -> MetaHMM:
    """16 tasks, 4 states, 6 tokens."""
    config = MetaHMMConfig.from_preset("tiny")
    return MetaHMM(config.model_copy(update={"emission_noise": 0.02}), seed=seed)


def sequences(env: MetaHMM, n: int, length: int, seed: int = 0) -> Tensor:
    tasks = torch.randint(env.n_tasks, (n,), generator=torch.Generator().manual_seed(seed))
    return env.sample(tasks, length, seed=seed).tokens
