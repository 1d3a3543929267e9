"""The stand-in for third-party filters in `metahmm.oracle`: one forward recursion a task, batched in torch, float32.

It computes what dynamax's and hmmlearn's filters do, the likelihood of every task and neither predictive nor posterior,
over as many tasks at once as is fastest.  Those packages themselves: `benchmarks/hmm_oracle.py`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from commissure.core.errors import CommissureError
from commissure.metahmm import MetaHMM
from commissure.metahmm.oracle import BayesOracle

__all__ = ["filter_tasks", "peer_seconds"]

N_TASKS = (128, 512, 2048)


def peer_seconds(preset: str, *, seed: int, length: int, turns: int) -> float:
    """Seconds a sequence over all tasks of the fastest batch size; likelihoods equal to the oracle's evidence first."""
    env = MetaHMM.from_preset(preset, seed=seed)
    tokens = env.sample([seed % env.n_tasks], length, seed=seed).tokens
    ids = torch.arange(4)
    log_lik = filter_tasks(env.initial, env.transition_matrix(ids), env.emission_matrix(ids), tokens[0])
    want = [BayesOracle(env, tasks=[i])(tokens).log_evidence[0, -1] for i in ids.tolist()]
    if not torch.allclose(log_lik, torch.stack(want), rtol=1e-9):
        raise CommissureError(f"the peer's likelihoods {log_lik.tolist()} differ from {want}")
    spent = []
    for n_tasks in N_TASKS:
        ids = torch.arange(min(n_tasks, env.n_tasks))
        transition, emission = env.transition_matrix(ids).float(), env.emission_matrix(ids).float()
        each = _seconds(partial(filter_tasks, env.initial.float(), transition, emission, tokens[0]), turns)
        spent.append(each * env.n_tasks / len(ids))
    return min(spent)


def filter_tasks(
    initial: Float[Tensor, " states"],
    transition: Float[Tensor, "tasks states states"],
    emission: Float[Tensor, "tasks states vocab"],
    tokens: Int64[Tensor, " time"],
) -> Float[Tensor, " tasks"]:
    """log p(tokens | task) of every task (n,): one forward step of all tasks a token."""
    likelihood = emission[:, :, tokens].permute(2, 0, 1).contiguous()
    belief, total = initial.expand(len(transition), 1, -1), initial.new_zeros(len(transition))
    for weight in likelihood:
        joint = belief * weight[:, None]
        evidence = joint.sum(-1, keepdim=True)
        total = total + evidence[:, 0, 0].log()
        belief = torch.bmm(joint / evidence, transition)
    return total


def _seconds(call: Callable[[], object], turns: int) -> float:
    spent = []
    for _ in range(turns + 1):
        start = time.thread_time()
        call()
        spent.append(time.thread_time() - start)
    return float(np.median(spent[1:]))
