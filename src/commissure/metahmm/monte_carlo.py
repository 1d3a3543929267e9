"""Prediction by sampling tasks: the posterior predictive as an average over codes drawn from q(c | x_<=t).

    p(x_{t+1} | x_<=t) = sum_k W_k p_dec(x_{t+1} | x_<=t, c_k)
    plain        W_k = 1 / K,  or 0 where c_k excludes x_<=t,      c_k ~ q(. | x_<=t)
    importance   W_k prop. to p(c_k) prod_{i<=t} p_dec(x_i | x_<i, c_k) / q(c_k | x_<=t)
    smc          particles kept over time, weighted by p_dec(x_t | x_<t, c_k): `particles`

The plain average converges, as K grows, to the mixture under q, whatever q's bias; the other two to the conditional
predictor's own Bayes mixture.  ESS = 1 / sum W_k^2.  Probabilities are averaged, never logits.  A code is decoded once
a sequence however often it was drawn, so that the cost is the number of distinct codes.
arXiv 2506.16288 (plain).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from commissure.core.errors import InputError
from commissure.core.rng import spawn
from commissure.metahmm.backbones import flops_per_token
from commissure.metahmm.conditional import ConditionalPredictor
from commissure.metahmm.divergence import SequencePredictor
from commissure.metahmm.inputs import whole
from commissure.metahmm.particles import filter_particles, mixture
from commissure.metahmm.predictor_inputs import checked_tensor
from commissure.metahmm.samplers import Proposal, TaskSampler

__all__ = ["EntropyGate", "MonteCarloOutput", "MonteCarloPredictor"]

Weighting = Literal["plain", "importance", "smc"]
WEIGHTINGS: tuple[Weighting, ...] = get_args(Weighting)
_CELLS = 1 << 25  # log-probabilities of decoded codes held at once (float32: 128 MB)
_ROWS = 512  # codes decoded in one batch


@dataclass(frozen=True)
class EntropyGate:
    """Sample where low <= H < high (nats), elsewhere fall back; H is the mean of -log q of the position's own samples.

    Near a threshold this biases what is sampled, more so for small K: the samples that are averaged decided.  H of a
    density (`LatentFlow`) can be negative and depends on the codes' unit.
    """

    low: float = -math.inf
    high: float = math.inf

    def __post_init__(self) -> None:
        ends = (self.low, self.high)
        are_numbers = all(isinstance(end, (int, float)) and not isinstance(end, bool) for end in ends)
        if not (are_numbers and self.low < self.high):
            raise InputError("low, high", ends, "two numbers (nats), low below high")


class MonteCarloOutput(NamedTuple):
    """Predictions and their cost.

    `ess`: effective samples (for particles before resampling, copies that never moved counted as one), NaN where the
    gate fell back (`sampled` false).
    `n_forward`: codes decoded for a row, `n_tokens`: positions they were decoded at, padding to the longest prefix of
    their batch included, `n_head`: codes the sampler drew for a row or gave the density of.
    """

    log_probs: Float[Tensor, "batch time_plus_1 vocab"]
    ess: Float[Tensor, "batch time_plus_1"]
    sampled: Bool[Tensor, "batch time_plus_1"]
    n_forward: Int[Tensor, " batch"]
    n_tokens: Int[Tensor, " batch"]
    n_head: Int[Tensor, " batch"]


class MonteCarloPredictor:
    """A SequencePredictor that averages a conditional predictor over codes from a task sampler.

    `n_samples` = K; a row's numbers depend on `seed` and on its place in the batch.  `gate` needs a `fallback`, which
    predicts where the gate does not sample; codes are not decoded there, except by "smc", whose particles must go on.

    >>> from commissure.metahmm.conditional import FactorEmbedding, SoftPrefix
    >>> from commissure.metahmm.samplers import FactorPosterior
    >>> from commissure.nn import Stack
    >>> lm = SoftPrefix(Stack(["gru"], 8, vocab=5), 4, embedding=FactorEmbedding((4, 2), 4))
    >>> sampler = FactorPosterior(Stack(["gru"], 8, vocab=5), (4, 2))
    >>> predictor = MonteCarloPredictor(lm, sampler, n_samples=10, weighting="importance")
    >>> output = predictor(torch.tensor([[1, 2, 3]]))
    >>> output.log_probs.shape, bool((output.n_forward <= 8).all())
    (torch.Size([1, 4, 5]), True)
    """

    def __init__(
        self,
        conditional: ConditionalPredictor,
        sampler: TaskSampler,
        *,
        n_samples: int,
        weighting: Weighting = "plain",
        gate: EntropyGate | None = None,
        fallback: SequencePredictor | None = None,
        seed: int = 0,
    ) -> None:
        if not isinstance(conditional, ConditionalPredictor):
            raise InputError("conditional", type(conditional).__name__, "a SoftPrefix or another ConditionalPredictor")
        if not isinstance(sampler, TaskSampler):
            raise InputError("sampler", type(sampler).__name__, "a FactorPosterior or another TaskSampler")
        n_samples = whole("n_samples", n_samples, 1)
        if weighting not in WEIGHTINGS:
            raise InputError("weighting", weighting, f"one of {', '.join(WEIGHTINGS)}")
        if (gate is None) != (fallback is None):
            fix = "the fallback predicts where the gate does not sample"
            raise InputError("gate, fallback", (gate, fallback), "both or neither", fix)
        if gate is not None and not isinstance(gate, EntropyGate):
            raise InputError("gate", gate, "an EntropyGate")
        if fallback is not None and not isinstance(fallback, SequencePredictor):
            fix = "pass backbone(model) of a Hugging Face model"
            raise InputError("fallback", type(fallback).__name__, "a predictor with log_probs", fix)
        self.conditional, self.sampler, self.n_samples, self.weighting = conditional, sampler, n_samples, weighting
        self.gate, self.fallback, self.seed = gate, fallback, seed

    def log_probs(self, tokens: Int[Tensor, "batch time"]) -> Float[Tensor, "batch time_plus_1 vocab"]:
        """Contract 2."""
        return self(tokens).log_probs

    def from_row(self, row: int) -> MonteCarloPredictor:
        """The predictor for sequences from the `row`-th on: row 0's is itself, others draw other numbers."""
        row = whole("row", row, 0)
        return self if row == 0 else self.having(seed=spawn(self.seed, "from row", row))

    def having(
        self, *, n_samples: int | None = None, weighting: Weighting | None = None, seed: int | None = None
    ) -> MonteCarloPredictor:
        """The same parts with what is given here in place of what it had."""
        return MonteCarloPredictor(
            self.conditional,
            self.sampler,
            n_samples=self.n_samples if n_samples is None else n_samples,
            weighting=self.weighting if weighting is None else weighting,
            gate=self.gate,
            fallback=self.fallback,
            seed=self.seed if seed is None else seed,
        )

    @torch.no_grad()
    def __call__(self, tokens: Int[Tensor, "batch time"]) -> MonteCarloOutput:
        """Predictions at positions 0 .. T, with what they cost."""
        tokens = checked_tensor("tokens", tokens, ("batch", "time"), below=self.conditional.vocab)
        if not len(tokens):
            raise InputError("tokens", tuple(tokens.shape), "shape (batch, time) with batch >= 1")
        proposal = _Counted(self.sampler.propose(tokens))
        positions = torch.arange(tokens.shape[1] + 1, device=tokens.device)
        is_drawn = self.weighting != "smc" or self.gate is not None
        codes = proposal.sample(positions, self.n_samples, seed=spawn(self.seed, "codes")) if is_drawn else None
        needs_density = codes is not None and (self.gate is not None or self.weighting == "importance")
        log_q = proposal.log_prob(positions, codes) if needs_density else None  # type: ignore[arg-type]
        sampled = torch.ones(len(tokens), len(positions), dtype=torch.bool, device=tokens.device)
        if self.gate is not None and log_q is not None:
            entropy = -log_q.mean(-1)
            sampled = (entropy >= self.gate.low) & (entropy < self.gate.high)
        if self.weighting == "smc" or codes is None:
            filtered = filter_particles(self.conditional, proposal, tokens, n_particles=self.n_samples, seed=self.seed)
            return self._fall_back(
                tokens,
                MonteCarloOutput(
                    filtered.log_probs,
                    filtered.ess,
                    sampled,
                    *filtered[2:],
                    filtered.n_forward.new_full((len(tokens),), proposal.n_codes),
                ),
            )
        offset = proposal.log_prior(codes) - log_q if self.weighting == "importance" and log_q is not None else None
        cells = codes.shape[1] * codes.shape[2] * len(positions) * self.conditional.vocab
        parts = []
        for rows in torch.arange(len(tokens), device=tokens.device).split(max(1, _CELLS // cells)):
            own = None if offset is None else offset[rows]
            parts.append(
                _average(self.conditional, tokens[rows], codes[rows], own, sampled[rows], first_row=int(rows[0]))
            )
        return self._fall_back(
            tokens,
            MonteCarloOutput(*(torch.cat(field) for field in zip(*parts, strict=True)))._replace(
                n_head=parts[0].n_forward.new_full((len(tokens),), proposal.n_codes)
            ),
        )

    def flops_per_token(self, output: MonteCarloOutput) -> float:
        """Multiplications and additions of matrices for one predicted token, by `backbones.flops_per_token`.

        The conditional predictor at every position it was decoded at, the sampler's encoder once and its head for each
        code it drew or gave the density of, the fallback once.  What is not a module (an oracle, an exact conditional)
        counts nothing.
        """
        n_positions = output.sampled.numel()
        length = output.sampled.shape[1]
        total = _flops(self.conditional, length) * int(output.n_tokens.sum()) / n_positions + _flops(
            self.fallback, length
        )
        encoder = getattr(self.sampler, "lm", None)
        head = _flops(self.sampler, length) - _flops(encoder, length)
        return total + _flops(encoder, length) + head * int(output.n_head.sum()) / n_positions

    def _fall_back(self, tokens: Tensor, output: MonteCarloOutput) -> MonteCarloOutput:
        """The fallback's predictions where nothing was sampled."""
        if self.fallback is None:
            return output
        implicit = self.fallback.log_probs(tokens)
        if implicit.shape != output.log_probs.shape:
            raise InputError("fallback.log_probs", tuple(implicit.shape), f"shape {tuple(output.log_probs.shape)}")
        return output._replace(
            log_probs=torch.where(output.sampled[..., None], output.log_probs, implicit),
            ess=output.ess.masked_fill(~output.sampled, math.nan),
        )


def _average(
    conditional: ConditionalPredictor,
    tokens: Int[Tensor, "batch time"],
    codes: Shaped[Tensor, "batch time_plus_1 n code_dim"],
    offset: Float[Tensor, "batch time_plus_1 n"] | None,
    sampled: Bool[Tensor, "batch time_plus_1"],
    *,
    first_row: int,
) -> MonteCarloOutput:
    """The weighted average at every position; each distinct code of a row is decoded once, as far as it is needed.

    `offset`: log p(c) - log q(c) of each sample, or None for equal weights.
    """
    n, (n_positions, n_samples) = len(tokens), codes.shape[1:3]
    count = torch.zeros(n, dtype=torch.int64, device=tokens.device)
    if not bool(sampled.any()):
        empty = torch.zeros(n, n_positions, conditional.vocab, device=tokens.device)
        return MonteCarloOutput(empty, empty[..., 0], sampled, count, count, count)
    used = sampled[..., None].expand(-1, -1, n_samples)
    row, position, _ = used.nonzero(as_tuple=True)
    pairs = torch.cat([row[:, None].to(codes.dtype), codes[used]], 1)
    distinct, which = torch.unique(pairs, dim=0, return_inverse=True)
    owner = distinct[:, 0].to(torch.int64)
    last = torch.zeros_like(owner).scatter_reduce(0, which, position, "amax")
    decoded, n_run = _decode(conditional, tokens, owner, distinct[:, 1:], last)
    index = torch.zeros(used.shape, dtype=torch.int64, device=tokens.device)
    index[used] = which
    positions = torch.arange(n_positions, device=tokens.device)[:, None]
    gained = decoded[:, :-1].gather(-1, tokens[owner][..., None])[..., 0]
    log_lik = torch.nn.functional.pad(gained.cumsum(1), (1, 0))[index, positions]
    if offset is None:
        log_weights = torch.zeros_like(log_lik).masked_fill(log_lik == -math.inf, -math.inf)
    else:
        log_weights = offset.to(decoded) + log_lik
    log_weights, ess = mixture(log_weights.masked_fill(~used, 0.0), row=first_row)
    n_forward, n_tokens = count.index_add(0, owner, torch.ones_like(owner)), count.index_add(0, owner, n_run)
    log_probs = torch.logsumexp(log_weights[..., None] + decoded[index, positions], 2)
    return MonteCarloOutput(log_probs, ess, sampled, n_forward, n_tokens, count)


class _Counted:
    """A proposal that counts, for each row, the codes it draws and those it gives the density of."""

    def __init__(self, proposal: Proposal) -> None:
        self.proposal, self.n_codes = proposal, 0

    def sample(
        self, positions: Int[Tensor, " positions"], n: int, *, seed: int
    ) -> Shaped[Tensor, "batch positions n code_dim"]:
        self.n_codes += len(positions) * n
        return self.proposal.sample(positions, n, seed=seed)

    def log_prob(
        self, positions: Int[Tensor, " positions"], codes: Shaped[Tensor, "batch positions n code_dim"]
    ) -> Float[Tensor, "batch positions n"]:
        self.n_codes += codes.shape[1] * codes.shape[2]
        return self.proposal.log_prob(positions, codes)

    def log_prior(self, codes: Shaped[Tensor, "batch positions n code_dim"]) -> Float[Tensor, "batch positions n"]:
        return self.proposal.log_prior(codes)


def _decode(
    conditional: ConditionalPredictor,
    tokens: Int[Tensor, "batch time"],
    row: Int[Tensor, " distinct"],
    codes: Shaped[Tensor, "distinct code_dim"],
    last: Int[Tensor, " distinct"],
) -> tuple[Float[Tensor, "distinct time_plus_1 vocab"], Int[Tensor, " distinct"]]:
    """Predictions of each (row, code) up to its last position, and the positions it was really run at.

    Codes whose lengths are between the same powers of two run together, each up to the longest of its batch.
    """
    decoded, n_run = torch.zeros(0), torch.zeros_like(last)
    order = last.argsort(descending=True, stable=True)
    _, sizes = (last[order] + 1).log2().int().unique_consecutive(return_counts=True)
    for chosen in (batch for octave in order.split(sizes.tolist()) for batch in octave.split(_ROWS)):
        end = int(last[chosen].max())
        log_probs, _ = conditional.prefill(tokens[row[chosen], :end], codes[chosen])
        if not len(decoded):
            decoded = log_probs.new_zeros(len(row), tokens.shape[1] + 1, log_probs.shape[-1])
        decoded[chosen, : end + 1] = log_probs
        n_run[chosen] = end + 1
    return decoded, n_run


def _flops(part: object, length: int) -> float:
    return flops_per_token(part, length) if isinstance(part, nn.Module) else 0.0
