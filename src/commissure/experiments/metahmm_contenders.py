"""What `metahmm.monte_carlo` trains on "e64", one seed at a time: a world, predictors, a sampler.

Everything is a GRU.  Given the task, prediction is a filter over 6 states, so that the conditional predictor is half as
wide as the implicit one and about a quarter of its cost; it is told the factors at every token.  The sampler learns
from sequences that the trained conditional predictor generates for all combinations of factors, as in the sleep phase
of wake-sleep: its target is then the posterior that importance weights correct towards, for tasks nobody trained on
too.  Every part trains from scratch for as many steps, in all for fewer operations than the rival.  `CHOSEN`:
`metahmm_search`, on a seed of its own; figures in LOG.md.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from commissure.core.rng import generator, isolated, spawn, torch_generator
from commissure.metahmm import MetaHMM
from commissure.metahmm.conditional import FactorEmbedding, SoftPrefix
from commissure.metahmm.fit import FitConfig, fit
from commissure.metahmm.oracle import BayesOracle
from commissure.metahmm.samplers import FactorPosterior
from commissure.nn.stack import Stack
from commissure.train import train

__all__ = [
    "CHOSEN",
    "DIM",
    "LENGTH",
    "NARROW",
    "STEPS",
    "World",
    "conditional",
    "implicit",
    "sampler",
    "stack",
    "world",
]

DIM, NARROW, LENGTH, HELD_OUT, SEQUENCES = 64, 32, 32, 8, 160
STEPS = 2400  # of every part, the rival too
CHOSEN = {"implicit": 8e-3, "rival": 2e-3, "conditional": 8e-3, "sampler": 16e-3}
_POOL = 64  # batches that are generated at once


class Informative:
    """Codes: the factors that have a choice."""

    def __init__(self, env: MetaHMM) -> None:
        self.env, self.key = env, "informative factors"
        self.columns = [i for i, size in enumerate(env.factor_sizes) if size > 1]
        self.sizes = [env.factor_sizes[i] for i in self.columns]

    def __call__(self, task_ids: Int[Tensor, " batch"], *, seed: int) -> Int[Tensor, "batch factors"]:
        """Row by row; `seed` is not used."""
        return self.env.task_to_factors(task_ids)[:, self.columns]


class World(NamedTuple):
    """What a seed decides."""

    env: MetaHMM
    tasks: Tensor
    codes: Informative
    tokens: dict[str, Tensor]
    oracle: BayesOracle
    seed: int
    steps: int


def world(seed: int, steps: int) -> World:
    """Environment, split and the sequences of the evaluation."""
    env = MetaHMM.from_preset("e64", seed=seed)
    split, tokens = env.split(HELD_OUT, seed=seed), {}
    for name, tasks in (("train", split.train), ("held_out", split.val)):
        drawn = tasks[torch.from_numpy(generator(seed, "evaluate", name).integers(len(tasks), size=SEQUENCES))]
        tokens[name] = env.sample(drawn, LENGTH, seed=spawn(seed, "evaluate", name)).tokens
    return World(env, split.train, Informative(env), tokens, BayesOracle(env), seed, steps)


def stack(w: World, dim: int, name: str = "model") -> Stack:
    """Two blocks of a width, not trained."""
    with isolated(w.seed, name, dim):
        return Stack(["gru"] * 2, dim, vocab=w.env.n_obs)


def implicit(w: World, dim: int, lr: float) -> Stack:
    """Trained to predict."""
    model = stack(w, dim)
    fit(model, w.env, tasks=w.tasks, config=FitConfig(steps=w.steps, lr=lr, length=LENGTH), seed=w.seed)
    return model


def conditional(w: World, lr: float) -> SoftPrefix:
    """Trained to predict given the factors."""
    seed, lm = spawn(w.seed, "conditional"), stack(w, NARROW, "conditional")
    with isolated(seed, "embedding"):
        model = SoftPrefix(lm, NARROW, embedding=FactorEmbedding(w.codes.sizes, NARROW), every_token=True)
    config = FitConfig(steps=w.steps, lr=lr, length=LENGTH)
    fit(model, w.env, tasks=w.tasks, codes=w.codes, config=config, seed=seed)
    return model


def sampler(w: World, given: SoftPrefix, lr: float) -> FactorPosterior:
    """Trained to infer the factors of what `given` generates."""
    seed, lm = spawn(w.seed, "sampler"), stack(w, NARROW, "sampler")
    with isolated(seed, "head"):
        model = FactorPosterior(lm, w.codes.sizes)
    config, pool = FitConfig(steps=w.steps, lr=lr, length=LENGTH), dict[int, tuple[Tensor, Tensor]]()

    def draw(step: int) -> tuple[Tensor, Tensor]:
        index, place = divmod(step, _POOL)
        if index not in pool:
            pool.clear()
            pool[index] = generated(w, given, _POOL * config.batch_size, spawn(seed, "generated", index))
        rows = slice(place * config.batch_size, (place + 1) * config.batch_size)
        tokens, codes = pool[index]
        return tokens[rows], codes[rows]

    train(model, draw, loss=lambda batch: model.loss(*batch), config=config, seed=seed)
    return model


@torch.no_grad()
def generated(
    w: World, given: SoftPrefix, n: int, seed: int
) -> tuple[Int[Tensor, "n length"], Int[Tensor, "n factors"]]:
    """Sequences of `given` and their codes, uniform over all tasks."""
    ids = torch.from_numpy(generator(seed, "tasks").integers(w.env.n_tasks, size=n))
    codes, drawn = w.codes(ids, seed=0), torch_generator(seed, "tokens")
    log_probs, state = given.prefill(ids.new_zeros(n, 0), codes)
    log_probs, tokens = log_probs[:, 0], []
    for _ in range(LENGTH):
        tokens.append(torch.multinomial(log_probs.exp(), 1, generator=drawn)[:, 0])
        log_probs, state = given.step(tokens[-1], state)
    return torch.stack(tokens, 1), codes
