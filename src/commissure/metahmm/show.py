"""What an environment is made of, how fast its tasks become known, and how far a predictor is from the optimum.

A transition row's successors are its entries above zero; a state's tokens are those with an edge of the state, at least
half as probable as its most probable one, which leaves the noise out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from commissure.core.rng import generator
from commissure.metahmm.divergence import DivergenceRow
from commissure.metahmm.environment import MetaHMM
from commissure.metahmm.inputs import whole
from commissure.metahmm.oracle import BayesOracle
from commissure.metahmm.predictor_inputs import checked_environment

__all__ = ["Ambiguity", "Facts", "ambiguity", "draw", "facts"]


@dataclass(frozen=True)
class Facts:
    """Counts; entropies in nats, means over rows."""

    variant: str
    seed: int
    digest: str
    n_states: int
    n_obs: int
    n_tasks: int
    n_transitions: int
    n_emissions: int
    factors: tuple[tuple[str, int], ...]
    successors: float
    transition_entropy: float
    tokens_per_state: float
    emission_entropy: float

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


@dataclass(frozen=True)
class Ambiguity:
    """Entropy of the task posterior (nats) after `position` tokens: mean and quartiles over sequences."""

    position: int
    mean: float
    low: float
    high: float


def facts(env: MetaHMM) -> Facts:
    """What there is to count.

    >>> found = facts(MetaHMM.from_preset("e64", seed=0))
    >>> found.n_tasks, found.factors[0]
    (64, ('base_cycle', 4))
    """
    has_edge = checked_environment(env).emissions > env.emissions.amax(-1, keepdim=True) / 2
    return Facts(
        variant=env.variant,
        seed=env.seed,
        digest=env.digest,
        n_states=env.n_states,
        n_obs=env.n_obs,
        n_tasks=env.n_tasks,
        n_transitions=env.n_transitions,
        n_emissions=env.n_emissions,
        factors=tuple(zip(env.factor_names, env.factor_sizes, strict=True)),
        successors=float((env.transitions > 0).sum(-1).double().mean()),
        transition_entropy=float(torch.special.entr(env.transitions).sum(-1).mean()),
        tokens_per_state=float(has_edge.sum(-1).double().mean()),
        emission_entropy=float(torch.special.entr(env.emissions).sum(-1).mean()),
    )


def ambiguity(
    env: MetaHMM, *, n_sequences: int = 100, length: int = 32, seed: int = 0, prune: float = 0.0
) -> tuple[Ambiguity, ...]:
    """How much the task is in doubt after 0 .. `length` tokens, over sequences of random tasks.

    >>> doubt = ambiguity(MetaHMM.from_preset("e64", seed=0), length=1)
    >>> round(doubt[0].mean, 3), len(doubt)  # log 64 nats before the first token
    (4.159, 2)
    """
    checked_environment(env)
    n_sequences, length = whole("n_sequences", n_sequences, 1), whole("length", length, 1)
    tasks = torch.from_numpy(generator(seed, "show").integers(env.n_tasks, size=n_sequences))
    tokens = env.sample(tasks, length, seed=seed).tokens
    entropy = BayesOracle(env, prune=prune)(tokens).task_entropy
    low, high = entropy.quantile(torch.tensor([0.25, 0.75], dtype=entropy.dtype), dim=0)
    columns = zip(_floats(entropy.mean(0)), _floats(low), _floats(high), strict=True)
    return tuple(Ambiguity(t, *values) for t, values in enumerate(columns))


def draw(
    figure: Any,
    doubt: Sequence[Ambiguity],
    *,
    by_position: Mapping[str, Sequence[DivergenceRow]] | None = None,
    by_entropy: Mapping[str, Sequence[DivergenceRow]] | None = None,
) -> None:
    """Panels one above the other: task entropy by position and, for a predictor, its divergence by both.

    `figure` is matplotlib's, empty, in whatever style the caller has set.  Bands are the quartiles of the entropy and
    the 95 % intervals of the divergence.  The mappings are from a group of tasks to its rows.
    """
    drawn = [rows for rows in (by_position, by_entropy) if rows]
    first, *others = figure.subplots(1 + len(drawn), squeeze=False)[:, 0]
    positions = [row.position for row in doubt]
    first.plot(positions, [row.mean for row in doubt], label="mean")
    ends = [row.low for row in doubt], [row.high for row in doubt]
    first.fill_between(positions, *ends, alpha=0.2, linewidth=0, label="quartiles")
    first.legend(frameon=False)
    first.set(xlabel="tokens seen", ylabel="task entropy (nats)", ylim=(0, None))
    for axes, groups in zip(others, drawn, strict=True):
        for name, rows in groups.items():
            x = [_place(row) for row in rows]
            (line,) = axes.plot(x, [row.divergence.estimate for row in rows], "-o", markersize=2.5, label=name)
            ends = [row.divergence.low for row in rows], [row.divergence.high for row in rows]
            axes.fill_between(x, *ends, alpha=0.2, linewidth=0, color=line.get_color())
        label = "tokens seen" if groups is by_position else "task entropy (nats)"
        axes.set(xlabel=label, ylabel="divergence from the\noracle (nats)", ylim=(0, None))
        axes.legend(frameon=False)
    for axes in (first, *others):
        axes.grid(alpha=0.3)
    figure.align_ylabels()


def _place(row: DivergenceRow) -> float:
    """Where a row stands on its axis: its position, or the mean entropy of its bin."""
    return float(row.task_entropy if row.position is None else row.position)


def _floats(values: Tensor) -> list[float]:
    return [float(value) for value in values]
