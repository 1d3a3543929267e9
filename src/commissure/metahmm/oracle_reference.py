"""The oracle twice more, slow and derived otherwise: one HMM a task, and every path of hidden states.

`dense_reference` filters each task on its own, normalized at every token, and weighs the tasks by their likelihoods'
logarithms.  `enumeration_reference` has no filter in it: it adds up the probability of every task, path and token.
"""

from __future__ import annotations

from itertools import pairwise, product
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

__all__ = ["ReferencePredictions", "dense_reference", "enumeration_reference"]


class ReferencePredictions(NamedTuple):
    """As OraclePredictions for one sequence, with the whole posterior."""

    log_probs: Float[Tensor, "times vocab"]
    log_evidence: Float[Tensor, " times"]
    posterior: Float[Tensor, "times tasks"]
    task_entropy: Float[Tensor, " times"]
    epistemic: Float[Tensor, " times"]


def dense_reference(
    initial: Float[Tensor, "tasks states"],
    transition: Float[Tensor, "tasks states states"],
    emission: Float[Tensor, "tasks states vocab"],
    prior: Float[Tensor, " tasks"],
    tokens: Int64[Tensor, " time"],
) -> ReferencePredictions:
    """Every task's own forward recursion, mixed at the end.

    >>> one = torch.ones(2, 1, 1)
    >>> half = torch.tensor([[[0.5, 0.5]], [[1.0, 0.0]]])
    >>> told = dense_reference(one[:, 0], one, half, torch.tensor([0.5, 0.5]), torch.tensor([0]))
    >>> torch.round(12 * told.posterior[1]).tolist()
    [4.0, 8.0]
    """
    state, log_evidence = initial, torch.zeros_like(prior)
    rows = [_mix(state, emission, log_evidence + prior.log())]
    for token in tokens:
        seen = state * emission[:, :, token]
        likelihood = seen.sum(1)
        log_evidence = log_evidence + likelihood.log()
        filtered = torch.where(likelihood[:, None] > 0, seen / likelihood[:, None], initial)
        state = torch.einsum("ns,nst->nt", filtered, transition)
        rows.append(_mix(state, emission, log_evidence + prior.log()))
    return ReferencePredictions(*(torch.stack(list(column)) for column in zip(*rows, strict=True)))


def _mix(state: Tensor, emission: Tensor, log_joint: Tensor) -> tuple[Tensor, ...]:
    """The mixture over tasks of their predictives, log_joint being log p(task, tokens)."""
    posterior = log_joint.softmax(0)
    predictive = torch.einsum("ns,nsv->nv", state, emission)
    mixed = posterior @ predictive
    own_entropy = torch.special.entr(predictive).sum(1)
    epistemic = torch.special.entr(mixed).sum() - posterior @ own_entropy
    return mixed.log(), log_joint.logsumexp(0), posterior, torch.special.entr(posterior).sum(), epistemic


def enumeration_reference(
    initial: Float[Tensor, "tasks states"],
    transition: Float[Tensor, "tasks states states"],
    emission: Float[Tensor, "tasks states vocab"],
    prior: Float[Tensor, " tasks"],
    tokens: Int64[Tensor, " time"],
) -> ReferencePredictions:
    """The same by adding up all states^(time + 1) paths of every task: only for a few states and tokens."""
    n_states, vocab, time = initial.shape[1], emission.shape[2], len(tokens)
    joint = torch.zeros(time + 1, len(prior), vocab, dtype=prior.dtype)  # p(task, x_1..x_t, x_{t+1} = v)
    for t in range(time + 1):
        for path in product(range(n_states), repeat=t + 1):
            probability = prior * initial[:, path[0]]
            for before, after in pairwise(path):
                probability = probability * transition[:, before, after]
            for hidden, token in zip(path, tokens[:t].tolist(), strict=False):
                probability = probability * emission[:, hidden, token]
            joint[t] += probability[:, None] * emission[:, path[-1]]
    evidence = joint.sum((1, 2))
    posterior = joint.sum(2) / evidence[:, None]
    mixed = joint.sum(1) / evidence[:, None]
    own = joint / joint.sum(2, keepdim=True).clamp(min=torch.finfo(joint.dtype).tiny)
    epistemic = torch.special.entr(mixed).sum(1) - (posterior * torch.special.entr(own).sum(2)).sum(1)
    entropy = torch.special.entr(posterior).sum(1)
    return ReferencePredictions(mixed.log(), evidence.log(), posterior, entropy, epistemic)
