"""Claim `metahmm.monte_carlo`: predictors that sample tasks against one that does not, at matched test compute.

On "e64", trained on 56 of 64 tasks; a seed draws environment, split, weights and batches.  From one implicit attention
predictor come the conditional one and the encoder of the task sampler, both fine-tuned from its weights (arXiv
2506.16288, section 4.2).  K samples a position, decoded once a distinct task; `gated` samples by importance where the
sampler's own entropy is below a threshold and leaves the rest to the implicit predictor.

    rival        the implicit predictor at the least width whose operations a predicted token are at least those of
                 `gated`: encoder, K heads, fallback, and the conditional predictor at each position it decodes
    all, amb     mean Div over all positions; over those where 1 <= H < 4.5 nats, H the exact task entropy
    gate         rival's Div / gated Div, paired by seed

Learning rates are each model's best of `RATES` on a seed of its own, K and threshold of `gated` likewise (LOG.md).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from commissure.core.rng import generator, isolated, spawn
from commissure.experiments.claims import Budget, Context, Outcome, Row
from commissure.experiments.mesa_in_context import interval_row
from commissure.metahmm import MetaHMM
from commissure.metahmm.backbones import flops_per_token
from commissure.metahmm.conditional import FactorEmbedding, SoftPrefix
from commissure.metahmm.divergence import pointwise_divergence
from commissure.metahmm.fit import FitConfig, fit
from commissure.metahmm.monte_carlo import EntropyGate, MonteCarloPredictor
from commissure.metahmm.oracle import BayesOracle
from commissure.metahmm.samplers import FactorPosterior, OraclePosterior
from commissure.nn.stack import Stack
from commissure.report.style import COLORS, figure, to_svg

__all__ = ["run"]

DIM, LENGTH, HELD_OUT, SEQUENCES = 32, 32, 8, 160
RATES = (2e-3, 4e-3, 8e-3)
CHOSEN = {"implicit": 4e-3, "rival": 4e-3, "conditional": 4e-3, "sampler": 4e-3}
N_SAMPLES, THRESHOLD = 16, 1.5
BANDS = {"all": (0.0, np.inf), "amb": (1.0, 4.5), "low": (0.0, 0.5)}
SETS = {"train": "training tasks", "held_out": "held-out tasks"}
_SIZES: dict[Budget, tuple[int, int]] = {"smoke": (1, 4), "quick": (1, 200), "full": (3, 2000)}  # seeds, steps


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


def stack(w: World, dim: int) -> Stack:
    """The implicit predictor at a width."""
    with isolated(w.seed, "model", dim):
        return Stack(["attention"] * 2, dim, vocab=w.env.n_obs, heads=4, head_dim=dim // 4, positions="rotary")


def implicit(w: World, dim: int, lr: float) -> Stack:
    """Trained to predict."""
    model = stack(w, dim)
    fit(model, w.env, tasks=w.tasks, config=FitConfig(steps=w.steps, lr=lr, length=LENGTH), seed=w.seed)
    return model


def conditional(w: World, base: Stack, lr: float) -> SoftPrefix:
    """Fine-tuned to predict given the factors."""
    with isolated(w.seed, "conditional"):
        model = SoftPrefix(copy.deepcopy(base), DIM, embedding=FactorEmbedding(w.codes.sizes, DIM), placement="start")
    config = FitConfig(steps=3 * w.steps // 4, lr=lr, length=LENGTH)
    fit(model, w.env, tasks=w.tasks, codes=w.codes, config=config, seed=spawn(w.seed, "conditional"))
    return model


def sampler(w: World, base: Stack, lr: float) -> FactorPosterior:
    """Fine-tuned to infer the factors."""
    with isolated(w.seed, "sampler"):
        model = FactorPosterior(copy.deepcopy(base), w.codes.sizes)
    config = FitConfig(steps=3 * w.steps // 4, lr=lr, length=LENGTH)
    fit(model, w.env, tasks=w.tasks, codes=w.codes, config=config, seed=spawn(w.seed, "sampler"))
    return model


class Enumeration:
    """The conditional predictor's Bayes mixture over all tasks, weighed by its own likelihood: no sampler."""

    def __init__(self, model: SoftPrefix, codes: Int[Tensor, "tasks factors"]) -> None:
        self.model, self.codes = model, codes

    @torch.no_grad()
    def log_probs(self, tokens: Int[Tensor, "batch time"]) -> Float[Tensor, "batch time_plus_1 vocab"]:
        """Contract 2; the prior over tasks is uniform."""
        decoded = self.model.log_probs(tokens, self.codes.expand(len(tokens), -1, -1))
        gained = decoded[:, :, :-1].gather(-1, tokens[:, None, :, None].expand(-1, len(self.codes), -1, -1))[..., 0]
        weights = torch.nn.functional.pad(gained.cumsum(-1), (1, 0)).log_softmax(1)
        return torch.logsumexp(weights[..., None] + decoded, 1)
