"""The oracle against hmmlearn and dynamax on "small" (corrected, seed 15), 200 tokens: CPU seconds a sequence, ratios.

    python benchmarks/hmm_oracle.py

Both give less: hmmlearn the likelihood of each task, dynamax the filtered states, neither the predictive nor the
posterior of the tasks.  They are timed on 256 of the 12,288 tasks, float32 where they offer it, and multiplied.
Likelihoods are compared first.  A peer that is not installed is left out.  hmmlearn twice: its public `score`, which
checks its input and gathers emissions for every task, and the C recursion under it with both done beforehand, which is
its best setting.

CPU seconds are those of the whole process, threads of XLA and of numerical libraries included; all of them share the
one core that the process is bound to before they start (where the system can do that), so that none works beside it.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from importlib.metadata import version

if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})

import numpy as np
import torch

from commissure.metahmm import MetaHMM
from commissure.metahmm.oracle import BayesOracle
from commissure.runs.turns import alternate

N_TASKS, LENGTH, REPEATS, SEQUENCES = 256, 200, 5, 8


def hmmlearn_likelihoods(env: MetaHMM, tokens: np.ndarray) -> Callable[[], np.ndarray]:
    """Its C forward recursion with scaling, one task after another."""
    from hmmlearn import _hmmc

    start = env.initial.numpy()
    transition, emission = (f(range(N_TASKS)).numpy() for f in (env.transition_matrix, env.emission_matrix))
    likelihood = [np.ascontiguousarray(e[:, tokens].T) for e in emission]
    return lambda: np.array(
        [_hmmc.forward_scaling(start, a, p)[0] for a, p in zip(transition, likelihood, strict=True)]
    )


def hmmlearn_scores(env: MetaHMM, tokens: np.ndarray) -> Callable[[], np.ndarray]:
    """`CategoricalHMM.score`, one model a task."""
    from hmmlearn.hmm import CategoricalHMM

    models = []
    for a, e in zip(env.transition_matrix(range(N_TASKS)), env.emission_matrix(range(N_TASKS)), strict=True):
        model = CategoricalHMM(env.n_states, n_features=env.n_obs)
        model.startprob_, model.transmat_, model.emissionprob_ = env.initial.numpy(), a.numpy(), e.numpy()
        models.append(model)
    return lambda: np.array([model.score(tokens[:, None]) for model in models])


def dynamax_likelihoods(env: MetaHMM, tokens: np.ndarray) -> Callable[[], np.ndarray]:
    """`hmm_filter` over a batch of tasks, compiled."""
    import jax
    import jax.numpy as jnp
    from dynamax.hidden_markov_model import hmm_filter

    start, transition, emission = (
        jnp.asarray(x.numpy(), jnp.float32)
        for x in (env.initial, env.transition_matrix(range(N_TASKS)), env.emission_matrix(range(N_TASKS)))
    )
    observed = jnp.log(emission[:, :, tokens].transpose(0, 2, 1))
    run = jax.jit(jax.vmap(lambda a, e: hmm_filter(start, a, e)))
    return lambda: np.asarray(jax.block_until_ready(run(transition, observed)).marginal_loglik)


def main() -> None:
    """Print one line a peer."""
    env = MetaHMM.from_preset("small", seed=15)
    tokens = env.sample(range(0, env.n_tasks, env.n_tasks // SEQUENCES), LENGTH, seed=0).tokens[:SEQUENCES]
    oracle = BayesOracle(env, dtype=torch.float32)
    peers = {"forward in C, likelihood only": ("hmmlearn", hmmlearn_likelihoods),
             "CategoricalHMM.score, likelihood": ("hmmlearn", hmmlearn_scores),
             "hmm_filter, vmapped": ("dynamax", dynamax_likelihoods)}  # fmt: skip
    want = np.array([float(BayesOracle(env, tasks=[i])(tokens[:1]).log_evidence[0, -1]) for i in range(4)])
    for label, (package, make) in peers.items():
        if importlib.util.find_spec(package) is None:
            print(f"{package} {label}: not installed")
            continue
        name = f"{package} {version(package)} {label}" + (f", jax {version('jax')}" if package == "dynamax" else "")
        peer = make(env, tokens[0].numpy())
        np.testing.assert_allclose(peer()[:4], want, rtol=1e-4)
        ours, theirs = alternate([lambda: oracle(tokens), peer], repeats=REPEATS)
        ours, theirs = ours / SEQUENCES, theirs * env.n_tasks / N_TASKS
        ratio = theirs / ours
        print(f"{name:48} {np.median(theirs):7.3f} s  oracle {1e3 * np.median(ours):5.1f} ms  {np.median(ratio):6.0f}x"
              f"  ({ratio.min():.0f}-{ratio.max():.0f})")  # fmt: skip


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
