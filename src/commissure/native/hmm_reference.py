"""The filter of a family of HMMs in dense torch operations, one token after another, and what it takes and gives.

Batched over sequences and transition variants, on any device: the form that runs on a GPU, and what the C++ kernel is
held to.  It normalizes the joint at every token, where the kernel guesses scales; it multiplies whole matrices, where
the kernel walks over their entries.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from commissure.core.mixer import where

__all__ = ["PRUNE_PERIOD", "HMMFamily", "HMMFiltered", "HMMState", "hmm_filter_reference"]

PRUNE_PERIOD = 8  # tokens between two prunings, counted from a sequence's start, so that chunks do not matter
NEGLIGIBLE = {torch.float64: 1e-21, torch.float32: 1e-13}  # posterior mass of a task left out of `epistemic`
CHUNK_BYTES = 2**27  # of the joint distributions of the sequences worked on together


class HMMFamily(NamedTuple):
    """U transition matrices and W emission tables in one dtype; and, from them, the arrays that the kernel reads.

    Column i of variant u, ordered by the number of its entries, belongs to state order[u, i] and has the entries
    starts[u S + i] to starts[u S + i + 1] of rows and values; the first column with more entries is stops[u, i].
    """

    transitions: Float[Tensor, "variants states states"]
    emissions: Float[Tensor, "tables emissions states vocab"]  # tables: 1 for all variants together, or one for each
    starts: Int[Tensor, " columns"]
    stops: Int[Tensor, "variants states"]
    order: Int[Tensor, "variants states"]
    rows: Int[Tensor, " entries"]
    values: Float[Tensor, " entries"]
    by_token: Float[Tensor, "tables vocab states emissions"]
    by_state: Float[Tensor, "tables states emissions padded_vocab"]
    shifts: Int[Tensor, " vocab"]


class HMMState(NamedTuple):
    """The joint distribution of task and next hidden state given the tokens so far, not normalized.

    p(u, w, z = s | tokens) = joint[u, s, w] 2^exponent[u, w] / exp(log_mass); exponents are int32, and empty (batch, 0,
    0) where one scale serves all tasks.
    """

    joint: Float[Tensor, "batch variants states emissions"]
    exponent: Int[Tensor, "batch scaled_variants scaled_emissions"]
    log_mass: Float[Tensor, " batch"]
    log_evidence: Float[Tensor, " batch"]
    dropped_mass: Float[Tensor, " batch"]
    position: Int[Tensor, " batch"]


class HMMFiltered(NamedTuple):
    """What is known after 0, 1, ..., time tokens; NaN past a row's length and after an impossible token.

    `impossible`: the index of the first token of probability zero, or -1.  None is what was not asked for.
    """

    log_probs: Float[Tensor, "batch times vocab"]
    log_evidence: Float[Tensor, "batch times"]
    dropped_mass: Float[Tensor, "batch times"]
    impossible: Int[Tensor, " batch"]
    task_entropy: Float[Tensor, "batch times"] | None
    epistemic: Float[Tensor, "batch times"] | None
    transition_posterior: Float[Tensor, "batch times variants"] | None
    emission_posterior: Float[Tensor, "batch times emissions"] | None


def hmm_filter_reference(
    family: HMMFamily,
    tokens: Int[Tensor, "batch time"],
    state: HMMState,
    lengths: Int[Tensor, " batch"],
    *,
    prune: float = 0.0,
    start: bool = True,
    entropy: bool = True,
    epistemic: bool = False,
    marginals: bool = False,
) -> tuple[HMMFiltered, HMMState]:
    """`hmm_filter` by dense products."""
    chunk = max(1, CHUNK_BYTES // max(1, state.joint[:1].nbytes))
    asked = _Asked(prune, start, entropy, epistemic, marginals)
    runs = [
        _filter_rows(family, tokens[rows], HMMState(*(field[rows] for field in state)), lengths[rows], asked)
        for rows in (slice(i, i + chunk) for i in range(0, max(len(tokens), 1), chunk))
    ]
    told = zip(*(filtered for filtered, _ in runs), strict=True)
    after = zip(*(last for _, last in runs), strict=True)
    fields = [None if part[0] is None else torch.cat([x for x in part if x is not None]) for part in told]
    return HMMFiltered(*fields), HMMState(*(torch.cat(part) for part in after))  # type: ignore[arg-type]


class _Asked(NamedTuple):
    """The options of `hmm_filter`."""

    prune: float
    start: bool
    entropy: bool
    epistemic: bool
    marginals: bool


class _Belief(NamedTuple):
    """A state looked at: the log of its mass, the posterior of the tasks, joint distribution and predictive."""

    log_mass: Tensor  # (batch,), float64
    tasks: Tensor  # (batch, variants, emissions)
    joint: Tensor  # (batch, variants, states, emissions), sums to one
    probs: Tensor  # (batch, vocab), sums to one


def _filter_rows(
    family: HMMFamily, tokens: Tensor, state: HMMState, lengths: Tensor, asked: _Asked
) -> tuple[HMMFiltered, HMMState]:
    impossible = torch.full_like(state.position, -1)
    first = _tell(family, _look(family, state), state, asked)
    first = first if asked.start else [None if x is None else torch.full_like(x, torch.nan) for x in first]
    told = [_masked(first, state.log_evidence.isfinite(), state)]
    for t in range(tokens.shape[1]):
        running = t < lengths
        after, belief = _advance(family, state, tokens[:, t])
        failed = running & after.log_evidence.isneginf() & state.log_evidence.isfinite()
        impossible = torch.where(failed, t, impossible)
        results = _tell(family, belief, after, asked)
        if asked.prune > 0:
            after = _drop(after, belief, (after.position % PRUNE_PERIOD == 0), asked.prune)
            results[2] = after.dropped_mass
        told.append(_masked(results, running, after))
        state = where(running, after, state)
    log_probs, evidence, dropped, *others = (
        None if part[0] is None else torch.stack([x for x in part if x is not None], 1)
        for part in zip(*told, strict=True)
    )
    return HMMFiltered(log_probs, evidence, dropped, impossible, *others), state  # type: ignore[arg-type]


def _advance(family: HMMFamily, state: HMMState, token: Tensor) -> tuple[HMMState, _Belief]:
    """The state after one more token in every row, and what it says."""
    evidence = family.emissions[:, :, :, token].permute(3, 0, 2, 1)  # (batch, tables, states, emissions)
    joint, exponent = state.joint * evidence, state.exponent
    if exponent.shape[1]:
        power = torch.frexp(joint.sum(2)).exponent - 1
        power = torch.where(joint.sum(2) > 0, power, 0)
        joint, exponent = joint * torch.ldexp(torch.ones_like(joint[:, :, 0]), -power)[:, :, None], exponent + power
        scale = state.log_mass.new_zeros(())
    else:
        mass = joint.sum((1, 2, 3), dtype=torch.float64)
        scale = torch.where(mass > 0, mass, 1.0)
        joint, scale = joint / scale.to(joint.dtype)[:, None, None, None], scale.log()
    moved = state._replace(joint=family.transitions.mT @ joint, exponent=exponent)
    belief = _look(family, moved)
    is_impossible = belief.log_mass.isneginf() | state.log_evidence.isneginf()
    log_evidence = state.log_evidence + (belief.log_mass + scale - state.log_mass)
    log_evidence = torch.where(is_impossible, -torch.inf, log_evidence)
    moved = moved._replace(log_mass=belief.log_mass, log_evidence=log_evidence, position=state.position + 1)
    return moved, belief


def _look(family: HMMFamily, state: HMMState) -> _Belief:
    joint, highest = state.joint, state.log_mass.new_zeros(())
    if state.exponent.shape[1]:
        alive = joint.sum(2) > 0
        most = torch.where(alive, state.exponent, torch.iinfo(torch.int32).min).amax((1, 2), keepdim=True)
        joint = (
            joint
            * torch.where(alive, torch.ldexp(torch.ones_like(joint[:, :, 0]), state.exponent - most), 0)[:, :, None]
        )
        highest = most[:, 0, 0].double() * math.log(2)
    mass = joint.sum((1, 2, 3), dtype=torch.float64)
    joint = joint / mass.to(joint.dtype)[:, None, None, None]
    if len(family.emissions) == 1:
        probs = torch.einsum("bsw,wsv->bv", joint.sum(1), family.emissions[0])
    else:
        probs = torch.einsum("busw,uwsv->bv", joint, family.emissions)
    return _Belief(mass.log() + highest, joint.sum(2), joint, probs / probs.sum(1, keepdim=True))


def _tell(family: HMMFamily, belief: _Belief, state: HMMState, asked: _Asked) -> list[Tensor | None]:
    """The fields of HMMFiltered but `impossible`, at one time."""
    entropy = torch.special.entr(belief.tasks.double()).sum((1, 2)) if asked.entropy else None
    marginals = (belief.tasks.sum(2), belief.tasks.sum(1)) if asked.marginals else (None, None)
    epistemic = _epistemic(family, belief) if asked.epistemic else None
    return [belief.probs.log(), state.log_evidence, state.dropped_mass, entropy, epistemic, *marginals]


def _epistemic(family: HMMFamily, belief: _Belief) -> Tensor:
    """H[p*] minus the posterior mean of H[p_task]."""
    told = torch.special.entr(belief.probs.double()).sum(1)
    for row, (joint, tasks) in enumerate(zip(belief.joint, belief.tasks, strict=True)):
        u, w = (tasks > NEGLIGIBLE[joint.dtype]).nonzero(as_tuple=True)
        for some_u, some_w in zip(u.split(256), w.split(256), strict=True):
            tables = family.emissions[some_u if len(family.emissions) > 1 else 0, some_w]
            probs = torch.einsum("ns,nsv->nv", joint[some_u, :, some_w], tables)
            probs = probs / probs.sum(1, keepdim=True)
            told[row] -= (torch.special.entr(probs).sum(1) * tasks[some_u, some_w]).sum()
    return told


def _drop(state: HMMState, belief: _Belief, due: Tensor, prune: float) -> HMMState:
    share = belief.tasks.sum(2, dtype=torch.float64)
    drops = (share < prune) & due[:, None]
    lost = (share * drops).sum(1)
    return state._replace(
        joint=state.joint * ~drops[:, :, None, None],
        log_mass=state.log_mass + torch.log1p(-lost),
        dropped_mass=state.dropped_mass + lost,
    )


def _masked(results: list[Tensor | None], running: Tensor, state: HMMState) -> list[Tensor | None]:
    """NaN where a row has ended or nothing is possible any more; the evidence stays -inf there."""
    alive = running & state.log_evidence.isfinite()
    masked = [None if x is None else torch.where(alive.view(-1, *[1] * (x.ndim - 1)), x, torch.nan) for x in results]
    masked[1] = torch.where(running & ~alive, -torch.inf, torch.where(alive, state.log_evidence, torch.nan))
    return masked
