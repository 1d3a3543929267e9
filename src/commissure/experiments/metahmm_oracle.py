"""Claim `metahmm.oracle`: the exact posterior predictive over 12,288 tasks, its errors and its price on one CPU thread.

    brute_f64, brute_f32     max |dp| on "tiny" against all paths of all tasks, 5 tokens
    dense_f64, dense_f32     max |dp| on "small", 200 tokens, against one recursion a task in float64
    chain_rule               |log p(x_1..x_T) - sum of log p(x_t | x_<t)|, float64, nats
    scan                     time of the literal S x S associative scan / oracle's, per sequence
    peer                     time of one forward recursion a task / oracle's (`metahmm_peer`: likelihoods)
    dense                    time of the best dense forward we can write, which gives everything / oracle's
    seconds, seconds_pruned  CPU of 300 sequences of 200 tokens, scaled from the sequences that were timed

Speed: float32 on all sides, outputs equal in float64 first.  The scan and the peer run on a part of the tasks, and
their times are multiplied.  Third-party filters themselves: `benchmarks/hmm_oracle.py`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from commissure.experiments.claims import Budget, Context, Outcome, Row
from commissure.experiments.metahmm_peer import peer_gain
from commissure.experiments.rows import interval_row
from commissure.metahmm import MetaHMM
from commissure.metahmm.bench import DENSE, OURS, PRUNED, SCAN, bench_oracle, bench_sampler
from commissure.metahmm.oracle import BayesOracle
from commissure.metahmm.oracle_reference import dense_reference, enumeration_reference
from commissure.native import backend
from commissure.report.style import COLORS, figure, to_svg

__all__ = ["run"]

LENGTH, N_TIMED, WANTED = 200, 8, 300
_TRUTHS = (("brute", "tiny", 5, enumeration_reference), ("dense", "small", LENGTH, dense_reference))
PRESET, SEEDS = "small", (15, 23, 5345, 0, 1)
_SIZES: dict[Budget, tuple[int, int]] = {"smoke": (1, 1), "quick": (5, 1), "full": (5, 5)}  # seeds, turns


class Found(NamedTuple):
    """One seed's numbers by the keys of their rows; the errors by theirs."""

    times: dict[str, float]
    errors: dict[str, float]


def run(ctx: Context) -> Outcome:
    """Check and time; every seed draws its environment and its sequences."""
    if backend() != "c++":
        return Outcome((), "NOT RUN", note="this installation has no C++ kernels: install a compiler and reinstall")
    n_seeds, turns = _SIZES[ctx.budget]
    found = []
    for i, seed in enumerate(SEEDS[:n_seeds]):
        found.append(Found(_times(seed, turns), _errors(seed)))
        ctx.progress((i + 1) / n_seeds, f"seed {seed}: {found[-1].times['seconds']:.1f} s")
    rows = _rows(found)
    note = f"one thread; a batch of {N_TIMED} sequences by the oracle, times {WANTED / N_TIMED:g} for {WANTED} of them"
    return Outcome(tuple(rows), ctx.judge(rows, n_seeds), _figure(found), n_seeds, note, "generated sequences")


def _errors(seed: int) -> dict[str, float]:
    """Against all paths and against one recursion a task, both in float64."""
    errors = {}
    for name, preset, length, reference in _TRUTHS:
        env = MetaHMM.from_preset(preset, seed=seed)
        tokens = env.sample([seed % env.n_tasks], length, seed=seed).tokens
        ids = torch.arange(env.n_tasks)
        tables = env.initial.expand(env.n_tasks, -1), env.transition_matrix(ids), env.emission_matrix(ids)
        truth = reference(*tables, torch.full((env.n_tasks,), 1 / env.n_tasks, dtype=torch.float64), tokens[0])
        for bits, dtype in (("f64", torch.float64), ("f32", torch.float32)):
            told = BayesOracle(env, dtype=dtype)(tokens)
            errors[f"{name}_{bits}"] = float((told.log_probs[0].double().exp() - truth.log_probs.exp()).abs().max())
            if (name, bits) == ("dense", "f64"):
                summed = told.log_probs[0, :-1].gather(-1, tokens[0, :, None]).sum()
                errors["chain_rule"] = float((told.log_evidence[0, -1] - summed).abs())
    return errors


def _times(seed: int, turns: int) -> dict[str, float]:
    """Ratios and seconds of one seed, medians over its turns."""
    options = {"seed": seed, "length": LENGTH, "n_sequences": N_TIMED, "repeats": turns}
    timed = {row.contender: row for row in bench_oracle(PRESET, **options)}  # type: ignore[arg-type]
    ours = timed[OURS].seconds.median
    sampled = {row.contender: row.ratio.median for row in bench_sampler(PRESET, seed=seed, repeats=turns)}
    return {
        "scan": timed[SCAN].gain.median,
        "peer": peer_gain(PRESET, seed=seed, length=LENGTH, n_sequences=N_TIMED, turns=turns),
        "dense": timed[DENSE].gain.median,
        "seconds": WANTED * ours,
        "seconds_pruned": WANTED * timed[PRUNED].seconds.median,
        "over_floor": ours / timed[OURS].floor,
        "sampler_choice": sampled["loop of rng.choice"],
        "sampler_bisect": sampled["loop of bisections"],
    }


def _rows(found: list[Found]) -> list[Row]:
    def timed(key: str, label: str, unit: str = "x", note: str = "") -> Row:
        return interval_row(key, label, np.array([f.times[key] for f in found]), unit, note)

    labels = {"brute": "tiny, against all paths", "dense": "small, against one recursion a task"}
    worst = {key: max(f.errors[key] for f in found) for key in found[0].errors}
    errors = [
        Row(f"{name}_{bits}", f"largest |dp|, {label}, float{bits[1:]}", worst[f"{name}_{bits}"])
        for name, label in labels.items()
        for bits in ("f64", "f32")
    ]
    return [
        *errors,
        Row("chain_rule", f"log evidence against the sum over {LENGTH} predictions", worst["chain_rule"], unit="nats"),
        timed("scan", "S x S associative scan / oracle, a sequence"),
        timed("peer", "one forward recursion a task, likelihoods alone / oracle with everything, a sequence"),
        timed("dense", "dense batched forward, everything / oracle, a sequence"),
        timed("seconds", f"{WANTED} sequences of {LENGTH} tokens, all tasks", "s"),
        timed("seconds_pruned", f"{WANTED} sequences of {LENGTH} tokens, pruned at 1e-8", "s"),
        timed("over_floor", "oracle / its multiplications at the rate of sgemm(256)"),
        timed("sampler_choice", "loop of rng.choice / vectorized sampler, a token"),
        timed("sampler_bisect", "loop of bisections / vectorized sampler, a token"),
    ]


def _figure(found: list[Found]) -> str:
    seconds = np.array([f.times["seconds"] for f in found]) / WANTED
    shown = {
        "oracle, pruned": np.array([f.times["seconds_pruned"] for f in found]) / WANTED,
        "oracle": seconds,
        "dense forward": seconds * [f.times["dense"] for f in found],
        "forward a task": seconds * [f.times["peer"] for f in found],
        "associative scan": seconds * [f.times["scan"] for f in found],
    }
    with figure(6.4, 2.8) as (fig, ax):
        for place, (name, values) in enumerate(reversed(shown.items())):
            color = COLORS["Cholesky kernel" if name.startswith("oracle") else "attention"]
            ax.plot(values, np.full(len(values), place), "o", color=color)
            ax.annotate(
                f"{1e3 * values.mean():,.0f} ms", (values.max(), place), (8, 0), textcoords="offset points", va="center"
            )
        ax.set_yticks(range(len(shown)), list(reversed(shown)))
        ax.set_xscale("log")
        ax.set_xlabel(f"CPU a sequence of {LENGTH} tokens, one dot a seed (s)")
        ax.margins(x=0.3, y=0.12)
        return to_svg(fig, label="Seconds a sequence of the oracle and its rivals, log scale")
