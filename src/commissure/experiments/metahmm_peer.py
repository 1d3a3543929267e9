"""The stand-in for third-party filters in `metahmm.oracle`: one forward recursion a task, batched in torch, float32.

It computes what dynamax's and hmmlearn's filters do, the likelihood of every task and neither predictive nor posterior,
over as many tasks at once as is fastest.  Those packages themselves: `benchmarks/hmm_oracle.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from commissure.core.errors import CommissureError
from commissure.metahmm import MetaHMM
from commissure.metahmm.bench import alternate
from commissure.metahmm.oracle import BayesOracle

__all__ = ["filter_tasks", "peer_gain"]

N_TASKS = (128, 512, 2048)


def peer_gain(preset: str, *, seed: int, length: int, n_sequences: int, turns: int) -> float:
    """Seconds a sequence of the fastest batch size over the oracle's for `n_sequences`, in turns, median over them.

    Likelihoods are equal to the oracle's evidence first.
    """
    env = MetaHMM.from_preset(preset, seed=seed)
    tokens = env.sample(torch.arange(n_sequences) * (env.n_tasks // n_sequences), length, seed=seed).tokens
    ids = torch.arange(4)
    log_lik = filter_tasks(env.initial, env.transition_matrix(ids), env.emission_matrix(ids), tokens[0])
    want = [BayesOracle(env, tasks=[i])(tokens[:1]).log_evidence[0, -1] for i in ids.tolist()]
    if not torch.allclose(log_lik, torch.stack(want), rtol=1e-9):
        raise CommissureError(f"the peer's likelihoods {log_lik.tolist()} differ from {want}")
    sizes = [min(n_tasks, env.n_tasks) for n_tasks in N_TASKS]
    oracle = BayesOracle(env, dtype=torch.float32)
    contenders: list[Callable[[], object]] = [lambda: oracle(tokens)]
    for n_tasks in sizes:
        ids = torch.arange(n_tasks)
        transition, emission = env.transition_matrix(ids).float(), env.emission_matrix(ids).float()
        contenders.append(partial(filter_tasks, env.initial.float(), transition, emission, tokens[0]))
    ours, *spent = alternate(contenders, turns)
    each = [seconds * env.n_tasks / n_tasks for seconds, n_tasks in zip(spent, sizes, strict=True)]
    return float(min(np.median(seconds / (ours / n_sequences)) for seconds in each))


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
