"""What `metahmm.monte_carlo` trains on "e64", one seed at a time: a world, predictors, a sampler, the enumeration.

The conditional predictor and the sampler's encoder start from the implicit predictor's weights (arXiv 2506.16288,
section 4.2) and are fine-tuned for three quarters of its steps.  `CHOSEN` are the better
learning rates of 4e-3 and 8e-3 on seed 100, which draws an environment of its own (figures in LOG.md); the rival's is
the implicit predictor's, not searched at its own width.
"""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from commissure.core.rng import generator, isolated, spawn
from commissure.metahmm import MetaHMM
from commissure.metahmm.backbones import flops_per_token
from commissure.metahmm.conditional import FactorEmbedding, SoftPrefix
from commissure.metahmm.divergence import SequencePredictor, pointwise_divergence
from commissure.metahmm.fit import FitConfig, fit
from commissure.metahmm.monte_carlo import MonteCarloPredictor
from commissure.metahmm.oracle import BayesOracle
from commissure.metahmm.samplers import FactorPosterior
from commissure.nn.stack import Stack

__all__ = [
    "BANDS",
    "CHOSEN",
    "DIM",
    "Enumeration",
    "World",
    "conditional",
    "cost",
    "evaluate",
    "implicit",
    "sampler",
    "stack",
    "world",
]

DIM, LENGTH, HELD_OUT, SEQUENCES = 64, 32, 8, 160
BANDS = {"all": (0.0, float("inf")), "amb": (1.0, 4.5), "low": (0.0, 0.5)}
CHOSEN = {"implicit": 8e-3, "rival": 8e-3, "conditional": 8e-3, "sampler": 8e-3}


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
        return Stack(["gru"] * 2, dim, vocab=w.env.n_obs)


def implicit(w: World, dim: int, lr: float) -> Stack:
    """Trained to predict."""
    model = stack(w, dim)
    fit(model, w.env, tasks=w.tasks, config=FitConfig(steps=w.steps, lr=lr, length=LENGTH), seed=w.seed)
    return model


def conditional(w: World, base: Stack, lr: float) -> SoftPrefix:
    """Fine-tuned to predict given the factors."""
    with isolated(w.seed, "conditional"):
        model = SoftPrefix(copy.deepcopy(base), DIM, embedding=FactorEmbedding(w.codes.sizes, DIM))
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


def evaluate(w: World, name: str, predictor: SequencePredictor) -> dict[str, float]:
    """Mean Div by set and band in nats, and the cost."""
    found = {}
    for which, tokens in w.tokens.items():
        points = pointwise_divergence(predictor, tokens, oracle=w.oracle, batch_size=len(tokens))
        for band, (low, high) in BANDS.items():
            chosen = (points.task_entropy >= low) & (points.task_entropy < high)
            found[f"{name} {which} {band}"] = float(points.divergence[chosen].mean())
    return found | {f"{name} cost": cost(w, predictor)}


def cost(w: World, predictor: SequencePredictor) -> float:
    """Operations a predicted token; of the set of sequences where they are more."""
    if isinstance(predictor, MonteCarloPredictor):
        return max(predictor.flops_per_token(predictor(tokens)) for tokens in w.tokens.values())
    length = w.tokens["train"].shape[1] + 1
    if isinstance(predictor, Enumeration):
        return len(predictor.codes) * flops_per_token(predictor.model, length)
    return flops_per_token(predictor, length)  # type: ignore[arg-type]
