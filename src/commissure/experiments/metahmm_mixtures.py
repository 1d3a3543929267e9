"""Predictors that mix a conditional predictor over tasks, how far one is from the optimum, and what it costs.

Tabulated      q(theta | x_<=t) of every combination from a `FactorPosterior`, factor by factor: a tree of 61 steps on
               "e64", whatever K, in place of 5 a sample and 5 a density
Enumeration    sum_theta p_dec(theta | x_<=t) p_dec(x_{t+1} | x_<=t, theta): no sampler
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from commissure.experiments.metahmm_contenders import CHOSEN, LENGTH, World, conditional, sampler
from commissure.metahmm.backbones import flops_per_token
from commissure.metahmm.conditional import SoftPrefix, hidden_states
from commissure.metahmm.divergence import SequencePredictor, pointwise_divergence
from commissure.metahmm.monte_carlo import EntropyGate, MonteCarloPredictor
from commissure.metahmm.samplers import FactorPosterior, OraclePosterior, TablePosterior
from commissure.nn.stack import Stack

__all__ = ["BANDS", "FEW", "N_SAMPLES", "Enumeration", "Tabulated", "contenders", "cost", "evaluate", "gated"]

N_SAMPLES, FEW, THRESHOLD = 128, 8, 3.5
BANDS = {"all": (0.0, float("inf")), "amb": (1.0, 4.5), "low": (0.0, 0.5)}


class Tabulated:
    """A task sampler: the same proposals, drawn and looked up in a table."""

    def __init__(self, model: FactorPosterior) -> None:
        self.model = model
        self.codes = torch.cartesian_prod(*(torch.arange(size) for size in model.factor_sizes))

    @torch.no_grad()
    def propose(self, tokens: Int[Tensor, "batch time"]) -> TablePosterior:
        """One pass of the encoder; the combinations of the factors so far are told to the next factor's head."""
        model, h = self.model, hidden_states(self.model.lm, tokens)[:, :, None]
        known, log_q = h.new_zeros(1, h.shape[-1]), h.new_zeros(1)
        for factor, size in enumerate(model.factor_sizes):
            first = int(model.embedding.first[factor])
            log_q = (log_q[..., None] + model.logits(factor, h, known)).flatten(-2)
            known = (known[:, None] + model.embedding.weight[first : first + size]).flatten(0, 1)
        return TablePosterior(log_q, codes=self.codes)

    def flops_per_token(self, length: int) -> float:
        """The encoder, and each factor's head for every combination of the factors before it."""
        total, n = flops_per_token(self.model.lm, length), 1
        for hidden, out in zip(self.model.hidden, self.model.out, strict=True):
            total += n * (flops_per_token(hidden, length) + flops_per_token(out, length))
            n *= len(out.weight)  # type: ignore[arg-type]
        return total


class Enumeration:
    """The conditional predictor's Bayes mixture over all tasks, weighed by its own likelihood."""

    def __init__(self, model: SoftPrefix, codes: Int[Tensor, "tasks factors"]) -> None:
        self.model, self.codes = model, codes

    @torch.no_grad()
    def log_probs(self, tokens: Int[Tensor, "batch time"]) -> Float[Tensor, "batch time_plus_1 vocab"]:
        """Contract 2; the prior over tasks is uniform."""
        decoded = self.model.log_probs(tokens, self.codes.expand(len(tokens), -1, -1))
        gained = decoded[:, :, :-1].gather(-1, tokens[:, None, :, None].expand(-1, len(self.codes), -1, -1))[..., 0]
        weights = torch.nn.functional.pad(gained.cumsum(-1), (1, 0)).log_softmax(1)
        return torch.logsumexp(weights[..., None] + decoded, 1)


def gated(
    w: World, base: Stack, given: SoftPrefix, infer: Tabulated, *, n: int = N_SAMPLES, high: float = THRESHOLD
) -> MonteCarloPredictor:
    """Importance where the sampler's entropy is below `high`, the implicit predictor elsewhere."""
    return MonteCarloPredictor(
        given, infer, n_samples=n, weighting="importance", gate=EntropyGate(high=high), fallback=base, seed=w.seed
    )


def contenders(w: World, base: Stack) -> dict[str, SequencePredictor]:
    """All but the rival, from one trained implicit predictor."""
    given = conditional(w, CHOSEN["conditional"])
    infer = Tabulated(sampler(w, given, CHOSEN["sampler"]))
    codes = w.codes(torch.arange(w.env.n_tasks), seed=0)

    def mc(n: int = N_SAMPLES, sampler: Any = infer, **options: Any) -> MonteCarloPredictor:
        return MonteCarloPredictor(given, sampler, n_samples=n, seed=w.seed, **options)

    return {
        "implicit": base,
        "gated": gated(w, base, given, infer),
        "plain_few": mc(FEW),
        "plain": mc(),
        "importance_few": mc(FEW, weighting="importance"),
        "importance": mc(weighting="importance"),
        "smc": mc(FEW, weighting="smc"),
        "posterior": mc(sampler=OraclePosterior(w.oracle, codes=codes)),
        "enumeration": Enumeration(given, codes),
    }


class _Remembered:
    """What a predictor said of the sequences it is asked about."""

    def __init__(self, log_probs: Float[Tensor, "batch time_plus_1 vocab"]) -> None:
        self.said = log_probs

    def log_probs(self, tokens: Int[Tensor, "batch time"]) -> Float[Tensor, "batch time_plus_1 vocab"]:
        return self.said


def evaluate(w: World, name: str, predictor: SequencePredictor) -> dict[str, float]:
    """'<name> <set> <band>': mean Div in nats; '<name> cost': operations a predicted token, of the set with more."""
    found, costs = {}, []
    for which, tokens in w.tokens.items():
        if isinstance(predictor, MonteCarloPredictor):
            output = predictor(tokens)
            told: SequencePredictor = _Remembered(output.log_probs)
            costs.append(_table_cost(predictor) + predictor.flops_per_token(output))
        else:
            told = predictor
            costs.append(cost(predictor))
        points = pointwise_divergence(told, tokens, oracle=w.oracle, batch_size=len(tokens))
        for band, (low, high) in BANDS.items():
            chosen = (points.task_entropy >= low) & (points.task_entropy < high)
            found[f"{name} {which} {band}"] = float(points.divergence[chosen].mean())
    return found | {f"{name} cost": max(costs)}


def cost(predictor: SequencePredictor) -> float:
    """Operations a predicted token of one that costs the same for all sequences."""
    if isinstance(predictor, Enumeration):
        return len(predictor.codes) * flops_per_token(predictor.model, LENGTH + 1)
    return flops_per_token(predictor, LENGTH + 1)  # type: ignore[arg-type]


def _table_cost(predictor: MonteCarloPredictor) -> float:
    sampler = predictor.sampler
    return sampler.flops_per_token(LENGTH + 1) if isinstance(sampler, Tabulated) else 0.0
