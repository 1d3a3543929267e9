"""A particle filter over task codes: the posterior followed token by token, one streaming state a distinct code.

    w_k <- w_k p_dec(x_t | x_<t, c_k);   where ESS < K / 2: resample, w = 1 / K, then move each particle to a proposal
    c' ~ q(. | x_<=t) with probability min(1, p(c') L_t(c') q(c) / (p(c) L_t(c) q(c'))),   L_t(c) = p_dec(x_<=t | c)

The first particles are q's at position 0, weighted by p / q.  The move leaves the conditional predictor's own posterior
invariant, so a biased q costs effective samples and no bias.  Particles of one code share one state; a proposal that is
a code already followed costs nothing.

ESS = 1 / sum_l W_l^2 over lineages l, W_l the weight of all copies of one particle that no move has replaced: copies
weigh the same ever after, so an ESS that counted each of them would stay K, and particles that collapsed while q was
wrong would never move again.  Resample-move: Gilks & Berzuini 2001; systematic resampling: Kitagawa 1996.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from commissure.core.errors import DegenerateError
from commissure.core.mixer import State, map_state, select
from commissure.core.rng import spawn, torch_generator
from commissure.metahmm.conditional import ConditionalPredictor
from commissure.metahmm.samplers import Proposal

__all__ = ["Filtered", "filter_particles", "mixture"]

_ROWS = 512  # prefixes decoded in one batch


class Filtered(NamedTuple):
    """The predictive and the effective lineages (before resampling) at every position, and the cost of each row."""

    log_probs: Float[Tensor, "batch time_plus_1 vocab"]
    ess: Float[Tensor, "batch time_plus_1"]
    n_forward: Int[Tensor, " batch"]
    n_tokens: Int[Tensor, " batch"]


class Pool(NamedTuple):
    """The distinct (row, code) pairs in use: likelihood so far, next prediction, state."""

    row: Int[Tensor, " pool"]
    codes: Shaped[Tensor, "pool code_dim"]
    log_lik: Float[Tensor, " pool"]
    log_probs: Float[Tensor, "pool vocab"]
    state: State


def filter_particles(
    conditional: ConditionalPredictor,
    proposal: Proposal,
    tokens: Int[Tensor, "batch time"],
    *,
    n_particles: int,
    seed: int,
) -> Filtered:
    """Run K particles over each sequence."""
    particles = _Particles(conditional, proposal, tokens, n_particles, seed)
    predictions, sizes = [], []
    for t in range(tokens.shape[1] + 1):
        if t > 0:
            particles.observe(t)
        normalized = mixture(particles.log_weights, position=t)[0]
        ess = particles.effective_lineages(normalized)
        poor = ess < n_particles / 2
        if t > 0 and bool(poor.any()):
            particles.rejuvenate(t, normalized, poor)
            normalized = mixture(particles.log_weights)[0]
        predictions.append(torch.logsumexp(normalized[..., None] + particles.pool.log_probs[particles.owner], 1))
        sizes.append(ess)
    return Filtered(torch.stack(predictions, 1), torch.stack(sizes, 1), particles.n_forward, particles.n_tokens)


def mixture(
    log_weights: Float[Tensor, "*batch n"], *, row: int = 0, position: int = 0
) -> tuple[Float[Tensor, "*batch n"], Float[Tensor, "*batch"]]:
    """Normalized log-weights and the effective sample size 1 / sum W^2.

    Raises `DegenerateError` where all weights are zero; `row` and `position` are those of the first entry.

    >>> mixture(torch.tensor([0.0, 0.0, -torch.inf]))[1].item()
    2.0
    """
    lost = (log_weights.amax(-1) == -torch.inf).nonzero()
    if len(lost):
        at, t, *_ = [*lost[0].tolist(), 0, 0]
        raise DegenerateError(
            f"tokens[{row + at}, :{position + t}]: impossible under each of the {log_weights.shape[-1]} codes drawn; "
            "draw more (n_samples), or take a conditional predictor that excludes nothing"
        )
    log_weights = log_weights.log_softmax(-1)
    return log_weights, torch.exp(-torch.logsumexp(2 * log_weights, -1))


class _Particles:
    """K particles a row: `owner` says which pair of the pool each one is, `log_weights` what it weighs.

    `lineage`: the same number, in [0, K), for the copies of one particle.
    """

    def __init__(
        self,
        conditional: ConditionalPredictor,
        proposal: Proposal,
        tokens: Int[Tensor, "batch time"],
        n_particles: int,
        seed: int,
    ) -> None:
        self.conditional, self.proposal, self.tokens, self.seed = conditional, proposal, tokens, seed
        self.n_forward = torch.zeros(len(tokens), dtype=torch.int64, device=tokens.device)
        self.n_tokens = torch.zeros_like(self.n_forward)
        position = torch.zeros(1, dtype=torch.int64, device=tokens.device)
        codes = proposal.sample(position, n_particles, seed=spawn(seed, "particles"))
        self.log_weights = (proposal.log_prior(codes) - proposal.log_prob(position, codes))[:, 0]
        rows = torch.arange(len(tokens), device=tokens.device)[:, None].expand(-1, n_particles)
        self.pool: Pool
        self.owner = self._follow(0, rows, codes[:, 0])
        self.lineage = torch.arange(n_particles, device=tokens.device).repeat(len(tokens), 1)

    def effective_lineages(self, normalized: Float[Tensor, "batch n"]) -> Float[Tensor, " batch"]:
        """1 / sum W^2 of the lineages' weights."""
        weights = normalized.exp()
        return 1 / torch.zeros_like(weights).scatter_add(1, self.lineage, weights).square().sum(1)

    def observe(self, t: int) -> None:
        """Weigh by token t and read it."""
        pool = self.pool
        token = self.tokens[pool.row, t - 1]
        gained = pool.log_probs.gather(1, token[:, None])[:, 0]
        log_probs, state = self.conditional.step(token, pool.state)
        self.log_weights = self.log_weights + gained[self.owner]
        self.pool = pool._replace(log_lik=pool.log_lik + gained, log_probs=log_probs, state=state)
        self.n_tokens = self.n_tokens.index_add(0, pool.row, torch.ones_like(pool.row))

    def rejuvenate(self, t: int, normalized: Float[Tensor, "batch n"], poor: Bool[Tensor, " batch"]) -> None:
        """Resample the rows `poor`, move their particles once, forget the pairs that no particle holds."""
        index = _resample(normalized[poor], seed=spawn(self.seed, "resample", t))
        kept = self.owner[poor].gather(1, index)
        candidate, log_ratio = self._propose(t, kept, poor)
        generator = torch_generator(self.seed, "accept", t, device=kept.device)
        uniform = torch.rand(kept.shape, generator=generator, dtype=torch.float64, device=kept.device)
        is_moved = uniform.log() < log_ratio
        self.owner = self.owner.masked_scatter(poor[:, None], torch.where(is_moved, candidate, kept))
        self.lineage = self.lineage.masked_scatter(
            poor[:, None], _lineages(self.lineage[poor].gather(1, index), is_moved)
        )
        self.log_weights = self.log_weights.masked_fill(poor[:, None], 0.0)
        used, self.owner = self.owner.unique(return_inverse=True)
        self.pool = select(self.pool, used)

    def _propose(
        self, t: int, kept: Int[Tensor, "some n"], poor: Bool[Tensor, " batch"]
    ) -> tuple[Int[Tensor, "some n"], Float[Tensor, "some n"]]:
        """A candidate for each particle of the rows `poor`, and the log of its Metropolis-Hastings ratio."""
        n = kept.shape[1]
        position = torch.tensor([t], device=kept.device)
        fresh = self.proposal.sample(position, n, seed=spawn(self.seed, "proposal", t))
        present = self.pool.codes[self.owner][:, None]  # of every row; those of `poor` are replaced
        present[poor, 0] = self.pool.codes[kept]
        gain = [self.proposal.log_prior(codes) - self.proposal.log_prob(position, codes) for codes in (fresh, present)]
        rows = poor.nonzero().expand(-1, n)
        candidate = self._follow(t, rows, fresh[poor, 0])
        likelihood = self.pool.log_lik[candidate] - self.pool.log_lik[kept]
        return candidate, (gain[0] - gain[1])[poor, 0] + likelihood

    def _follow(
        self, t: int, rows: Int[Tensor, "some n"], codes: Shaped[Tensor, "some n code_dim"]
    ) -> Int[Tensor, "some n"]:
        """Where these (row, code) pairs are in the pool, which keeps its order; new ones are decoded up to token t."""
        wanted = torch.cat([rows[..., None].to(codes.dtype), codes], -1).flatten(0, 1)
        pools = [self.pool] if t > 0 else []
        known = torch.cat([wanted[:0], *(torch.cat([p.row[:, None].to(codes.dtype), p.codes], 1) for p in pools)])
        distinct, group = torch.unique(torch.cat([known, wanted]), dim=0, return_inverse=True)
        places = torch.arange(len(group), device=group.device)
        first = torch.full((len(distinct),), len(group), device=group.device).scatter_reduce(0, group, places, "amin")
        is_new = first >= len(known)
        place = torch.where(is_new, len(known) + is_new.cumsum(0) - 1, first)
        row = distinct[is_new, 0].to(torch.int64)
        self.n_forward = self.n_forward.index_add(0, row, torch.ones_like(row))
        self.n_tokens = self.n_tokens.index_add(0, row, torch.full_like(row, t + 1))
        for some, new in zip(row.split(_ROWS), distinct[is_new, 1:].split(_ROWS), strict=True):
            if len(some):
                prefix = self.tokens[some, :t]
                log_probs, state = self.conditional.prefill(prefix, new)
                gained = log_probs[:, :-1].gather(-1, prefix[..., None])[..., 0]
                pools.append(Pool(some, new, gained.sum(1), log_probs[:, -1], state))
        self.pool = map_state(lambda *parts: torch.cat(parts), pools[0], *pools[1:])
        return place[group[len(known) :]].view(rows.shape)


def _lineages(inherited: Int[Tensor, "rows n"], is_moved: Bool[Tensor, "rows n"]) -> Int[Tensor, "rows n"]:
    """What moved starts a lineage of its own; each is called by the first particle of it."""
    slot = torch.arange(inherited.shape[1], device=inherited.device).expand_as(inherited)
    called = torch.where(is_moved, inherited.shape[1] + slot, inherited)
    first = slot.new_full((len(slot), 2 * slot.shape[1]), slot.shape[1]).scatter_reduce(1, called, slot, "amin")
    return first.gather(1, called)


def _resample(log_weights: Float[Tensor, "rows n"], *, seed: int) -> Int[Tensor, "rows n"]:
    """Systematic: n equally spaced points, shifted by one uniform number a row."""
    n = log_weights.shape[1]
    generator = torch_generator(seed, device=log_weights.device)
    shift = torch.rand((len(log_weights), 1), generator=generator, dtype=torch.float64, device=log_weights.device)
    points = (torch.arange(n, device=log_weights.device) + shift) / n
    cumulative = log_weights.double().exp().cumsum(-1)
    return torch.searchsorted(cumulative / cumulative[:, -1:], points, right=True)
