"""The Bayes optimum: the exact predictive distribution of the next token, averaged over the posterior of the tasks.

    p*(x_{t+1} | x_1..x_t) = sum_theta p(theta | x_1..x_t) sum_s p(z_{t+1} = s | x_1..x_t, theta) E_theta[s, x_{t+1}]
    H_t = entropy of p(theta | x_1..x_t)
    I_t = H[p*] - sum_theta p(theta | x_1..x_t) H[p_theta]          mutual information of next token and task

| paper | name |
|---|---|
| theta = (u, w) | task id `u * n_emissions + w` |
| p* | `log_probs` |
| ambiguity | `task_entropy` H_t; `epistemic` I_t is zero where all live tasks agree |

Tasks share their transition matrices A_u and emission matrices E_w, so the filter keeps one joint distribution over
(u, state, w) and mixes over u before it multiplies by emissions: see `native.hmm`.  Index t of a result is the time
after t tokens; index 0 is the prior, pi E.  Factorization and pruning are our own.  arXiv 2506.16288.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from commissure.core.errors import DegenerateError, InputError
from commissure.core.rng import torch_generator
from commissure.metahmm.factors import TaskFamily
from commissure.metahmm.inputs import (
    Device,
    Ids,
    Lengths,
    Table,
    Tokens,
    checked_batch,
    checked_matrices,
    checked_prior,
    checked_prune,
    integers,
    whole,
)
from commissure.native.hmm import HMMFiltered, HMMState, hmm_family, hmm_filter, hmm_state

__all__ = ["BayesOracle", "FactorMarginals", "OraclePredictions", "TaskMarginals"]

_STATE_BYTES = 2**27  # of the sequences filtered in one call: their states are read once and written once


class OraclePredictions(NamedTuple):
    """What is known after 0, 1, ..., time tokens; NaN past a row's length and after impossible evidence.

    log_probs: of the next token.  log_evidence: log p(x_1..x_t).  task_entropy: in nats.  dropped_mass: posterior mass
    of the transition variants that pruning has left out so far, each at the time it was left out.
    """

    log_probs: Float[Tensor, "batch times vocab"]
    log_evidence: Float[Tensor, "batch times"]
    task_entropy: Float[Tensor, "batch times"]
    dropped_mass: Float[Tensor, "batch times"]


class TaskMarginals(NamedTuple):
    """Posteriors of the two parts of a task after 0, 1, ..., time tokens."""

    transition: Float[Tensor, "batch times variants"]
    emission: Float[Tensor, "batch times emissions"]


class FactorMarginals(NamedTuple):
    """The posterior of each of an environment's factors, in the order of `names`: (batch, times, size)."""

    names: tuple[str, ...]
    posteriors: tuple[Tensor, ...]


class BayesOracle:
    """Exact Bayesian prediction over a family of tasks; a SequencePredictor.

    `tasks`: the ids that are assumed possible (all); `prior`: their probabilities (uniform), one for each.
    `dtype`: float64, or float32 for half the time at errors of about 1e-6.

    `prune` > 0: after every 8th token, transition variants with less posterior mass are left out.  The mass left out is
    added up in `dropped_mass`.  Under the model its later posterior mass is a martingale: it stays the same on average,
    and exceeds c at any later time with probability at most dropped_mass / c, while |p - p*|_1 is at most twice that
    later mass.  Must be below the prior mass of every variant, or the truth may go at once; 1e-8 is a good choice.
    The prediction told at such a token still counts what is then left out, and the next token's evidence does not:
    `log_evidence` is no longer quite the sum of `log_probs` (off by 4e-6 at most in 20 sequences of 100 tokens of
    "small" at 1e-8).

    `rescale`: "joint" keeps one scale for all tasks, settled every 8th token.  It loses tasks whose share of the mass
    is below 1e-308 (float32: 1e-38), and if those 8 tokens are very surprising, below 1e-187 (1e-26) in between.
    "task" keeps one a task, for data that no task explains and that may revive any of them, at several times the cost.

    `on_impossible`: "raise" a DegenerateError at a token of probability zero, or "-inf" as the log evidence from there.

    The matrices' rows may be off by 1e-3 (half precision); they are normalized.  Computes on `device`, or else on that
    of the matrices, where tokens are moved and results are: a C++ kernel on a CPU, torch on a GPU.  No gradient;
    `HMMFilter` has one.  Tensors, arrays and nested lists alike; batches of any size are filtered in chunks of rows.
    Raises InputError for what does not fit.

    >>> from commissure.metahmm import MetaHMM
    >>> env = MetaHMM.from_preset("e64", seed=0)
    >>> told = BayesOracle(env)(env.sample([5, 9], 20, seed=0).tokens)
    >>> told.log_probs.shape, bool((told.task_entropy[:, -1] < told.task_entropy[:, 0]).all())
    (torch.Size([2, 21, 10]), True)
    """

    def __init__(
        self,
        env: TaskFamily,
        *,
        tasks: Ids | None = None,
        prior: Table | None = None,
        dtype: torch.dtype = torch.float64,
        device: Device | None = None,
        prune: float = 0.0,
        rescale: Literal["joint", "task"] = "joint",
        on_impossible: Literal["raise", "-inf"] = "raise",
    ) -> None:
        if not isinstance(env, TaskFamily):
            fix = "pass a MetaHMM, or a list of HMMs to BayesOracle.from_hmms"
            raise InputError("env", type(env).__name__, "an object with initial, transitions and emissions", fix)
        self._factors = tuple(getattr(env, "factor_names", ())), tuple(getattr(env, "factor_sizes", ()))
        names = ("transitions", "emissions")
        initial, transitions, emissions = checked_matrices(names, env.initial, env.transitions, env.emissions, device)
        self._set_up(initial, transitions, emissions[None], tasks, prior, dtype)
        self._set_options(prune, rescale, on_impossible)

    @classmethod
    def from_hmms(
        cls,
        initial: Table,
        transition: Table,
        emission: Table,
        *,
        prior: Table | None = None,
        dtype: torch.dtype = torch.float64,
        device: Device | None = None,
        prune: float = 0.0,
        rescale: Literal["joint", "task"] = "joint",
        on_impossible: Literal["raise", "-inf"] = "raise",
    ) -> BayesOracle:
        """The oracle over a list of HMMs that share nothing; task i is the i-th.

        `initial` (tasks, states), or (states,) if all start alike; `transition` (tasks, states, states); `emission`
        (tasks, states, vocab).

        >>> stay, emission = [[[1, 0], [0, 1]]] * 2, [[[1, 0], [0, 1]], [[0.5, 0.5], [0.5, 0.5]]]
        >>> BayesOracle.from_hmms([0.5, 0.5], stay, emission).task_posterior([[0, 0, 0]]).tolist()
        [[0.8, 0.2]]
        """
        oracle = cls.__new__(cls)
        oracle._factors = (), ()
        names = ("transition", "emission")
        initial, transition, emission = checked_matrices(names, initial, transition, emission, device)
        if len(emission) != len(transition):
            raise InputError("emission", tuple(emission.shape), f"shape ({len(transition)}, states, vocab)")
        oracle._set_up(initial, transition, emission[:, None], None, prior, dtype)
        oracle._set_options(prune, rescale, on_impossible)
        return oracle

    def _set_up(
        self,
        initial: Tensor,
        transitions: Tensor,
        emissions: Tensor,
        tasks: Ids | None,
        prior: Table | None,
        dtype: torch.dtype,
    ) -> None:
        if not isinstance(dtype, torch.dtype) or dtype not in (torch.float32, torch.float64):
            raise InputError("dtype", dtype, "torch.float32 or torch.float64")
        self.dtype, self.device = dtype, transitions.device
        self.n_transitions, self.n_states, _ = transitions.shape
        self.n_emissions, self.n_obs = emissions.shape[1], emissions.shape[3]
        self.n_tasks = self.n_transitions * self.n_emissions
        self._family = hmm_family(transitions.to(dtype), emissions.to(dtype))
        self.prior = checked_prior(prior, tasks, self.n_tasks).to(self.device)
        by_parts = self.prior.view(self.n_transitions, 1, self.n_emissions)
        self._joint = (by_parts * initial.expand(self.n_transitions, -1)[:, :, None]).to(dtype)

    def _set_options(self, prune: float, rescale: str, on_impossible: str) -> None:
        if not isinstance(rescale, str) or rescale not in ("joint", "task"):
            raise InputError("rescale", rescale, "'joint' or 'task'")
        if not isinstance(on_impossible, str) or on_impossible not in ("raise", "-inf"):
            raise InputError("on_impossible", on_impossible, "'raise' or '-inf'")
        self.prune = checked_prune(prune, self.prior.view(self.n_transitions, -1).sum(1))
        self._per_task, self._raises = rescale == "task", on_impossible == "raise"

    def __call__(self, tokens: Tokens, lengths: Lengths | None = None) -> OraclePredictions:
        """Predictive, evidence and task entropy after every prefix; `lengths` of the rows of a padded batch."""
        told = [filtered for filtered, _ in self._run(tokens, lengths)]
        return OraclePredictions(
            torch.cat([x.log_probs for x in told]),
            torch.cat([x.log_evidence for x in told]),
            torch.cat([_nonnegative(x.task_entropy) for x in told]),
            torch.cat([x.dropped_mass for x in told]),
        )

    def log_probs(self, tokens: Tokens, lengths: Lengths | None = None) -> Float[Tensor, "batch times vocab"]:
        """log p*(next token) after 0, 1, ..., time tokens."""
        return torch.cat([filtered.log_probs for filtered, _ in self._run(tokens, lengths, entropy=False)])

    def epistemic(self, tokens: Tokens, lengths: Lengths | None = None) -> Float[Tensor, "batch times"]:
        """I_t in nats: what knowing the task would tell about the next token.

        Takes the predictive of every live task, states x vocab multiplications for each task and token (15 times the
        filter itself on "small" while all tasks live).  Tasks below 1e-21 of the posterior mass (float32: 1e-13) are
        left out: an error of at most that times n_tasks log(vocab).
        """
        return torch.cat(
            [_nonnegative(x.epistemic) for x, _ in self._run(tokens, lengths, entropy=False, epistemic=True)]
        )

    def marginals(self, tokens: Tokens, lengths: Lengths | None = None) -> TaskMarginals:
        """Posteriors over transition and over emission matrices after every prefix."""
        told = [filtered for filtered, _ in self._run(tokens, lengths, entropy=False, marginals=True)]
        transition = torch.cat([_given(x.transition_posterior) for x in told])
        return TaskMarginals(transition, torch.cat([_given(x.emission_posterior) for x in told]))

    def factor_marginals(self, tokens: Tokens, lengths: Lengths | None = None) -> FactorMarginals:
        """Posterior of each factor of the environment after every prefix; InputError if it names no factors."""
        names, sizes = self._factors
        cuts = [i for i in range(len(sizes) + 1) if math.prod(sizes[:i]) == self.n_transitions]
        if not names or not cuts or math.prod(sizes[cuts[-1] :]) != self.n_emissions:
            raise InputError("env.factor_sizes", sizes, "factors whose values are the tasks", "use marginals()")
        cut = cuts[-1]
        told = self.marginals(tokens, lengths)
        posteriors = (*_by_factor(told.transition, sizes[:cut]), *_by_factor(told.emission, sizes[cut:]))
        return FactorMarginals(names, posteriors)

    def task_posterior(self, tokens: Tokens, lengths: Lengths | None = None) -> Float[Tensor, "batch tasks"]:
        """Posterior of every task after each row's last token."""
        return torch.cat([self.posterior_of(state) for _, state in self._run(tokens, lengths, entropy=False)])

    def sample_tasks(
        self,
        tokens: Tokens,
        n: int,
        *,
        seed: int,
        lengths: Lengths | None = None,
        every_position: bool = False,
    ) -> Int64[Tensor, "*drawn"]:
        """`n` independent draws from the task posterior, (batch, n) after each row's last token.

        With `every_position`, (batch, time + 1, n), fresh draws after every prefix; positions past a row's length
        repeat the posterior of its end.  Raises DegenerateError where no assumed task explains the tokens.
        """
        n, (tokens, lengths) = whole("n", n, 1), self._checked(tokens, lengths)
        shape = (tokens.shape[1] + 1 if every_position else 1, len(tokens), n)
        generator = torch_generator(seed, "tasks", device=self.device)
        points = torch.rand(shape, generator=generator, dtype=torch.float64, device=self.device)
        if not every_position:
            return _draw(self.task_posterior(tokens, lengths), points[0])
        parts = (self._draw_everywhere(tokens, lengths, points, rows) for rows in self._chunks(len(tokens)))
        return torch.cat(list(parts))

    def init_state(self, batch_size: int) -> HMMState:
        """The state before the first token, for a batch."""
        joint = self._joint.expand(whole("batch_size", batch_size, 0), -1, -1, -1)
        try:
            return hmm_state(joint.contiguous(), per_task=self._per_task)
        except RuntimeError:  # torch's for memory
            size = batch_size * self._joint.nbytes / 2**30
            raise InputError(
                "batch_size", batch_size, f"states that fit in memory: {size:,.1f} GiB asked for"
            ) from None

    def step(self, token: Ids, state: HMMState) -> tuple[Float[Tensor, "batch vocab"], HMMState]:
        """One token in each row; the log probabilities of the next one, and the state after it."""
        token = integers("token", token, "batch").to(self.device)
        told, state = self._filter(token[:, None], _state(state), torch.ones_like(token), start=False, entropy=False)
        return told.log_probs[:, 1], state

    def posterior_of(self, state: HMMState) -> Float[Tensor, "batch tasks"]:
        """Posterior of every task in a streaming state."""
        mass = _state(state).joint.sum(2)
        if state.exponent.shape[1]:
            alive = mass > 0
            highest = torch.where(alive, state.exponent, torch.iinfo(torch.int32).min).amax((1, 2), keepdim=True)
            scale = torch.where(alive, state.exponent - highest, 0)
            mass = torch.ldexp(mass, scale)
        return (mass / mass.sum((1, 2), keepdim=True)).flatten(1)

    def _run(
        self,
        tokens: Tokens,
        lengths: Lengths | None,
        *,
        entropy: bool = True,
        epistemic: bool = False,
        marginals: bool = False,
    ) -> Iterator[tuple[HMMFiltered, HMMState]]:
        """Filter whole sequences, as many at once as memory is meant to hold."""
        tokens, lengths = self._checked(tokens, lengths)
        for rows in self._chunks(len(tokens)):
            some = tokens[rows]
            yield self._filter(
                some,
                self.init_state(len(some)),
                lengths[rows],
                entropy=entropy,
                epistemic=epistemic,
                marginals=marginals,
                first_row=rows.start,
            )

    def _checked(self, tokens: Tokens, lengths: Lengths | None) -> tuple[Tensor, Tensor]:
        return checked_batch(tokens, lengths, vocab=self.n_obs, device=self.device)

    def _chunks(self, batch: int) -> list[slice]:
        """Rows whose states are filtered together; one chunk for none."""
        rows = max(1, _STATE_BYTES // max(1, self._joint.nbytes))
        return [slice(first, first + rows) for first in range(0, max(1, batch), rows)]

    def _filter(
        self,
        tokens: Tensor,
        state: HMMState,
        lengths: Tensor,
        *,
        start: bool = True,
        entropy: bool = True,
        epistemic: bool = False,
        marginals: bool = False,
        first_row: int = 0,
        first_time: int = 0,
    ) -> tuple[HMMFiltered, HMMState]:
        options = {"start": start, "entropy": entropy, "epistemic": epistemic, "marginals": marginals}
        told, after = hmm_filter(self._family, tokens, state, lengths, prune=self.prune, **options)
        failed = (told.impossible >= 0).nonzero()
        if self._raises and len(failed):
            row = int(failed[0])
            at = int(told.impossible[row])
            raise DegenerateError(
                f"tokens[{first_row + row}, {first_time + at}] = {int(tokens[row, at])}: probability 0 under every "
                "assumed task, given the tokens before it; widen `tasks` or `prior`, or pass on_impossible='-inf'"
            )
        return told, after

    def _draw_everywhere(self, tokens: Tensor, lengths: Tensor, points: Tensor, rows: slice) -> Tensor:
        """Tasks (rows, time + 1, n) of a chunk of the batch."""
        tokens, lengths, points = tokens[rows], lengths[rows], points[:, rows]
        state = self.init_state(len(tokens))
        drawn = [_draw(self.posterior_of(state), points[0], rows.start)]
        for t in range(tokens.shape[1]):
            some, more = tokens[:, t : t + 1], (lengths > t).long()
            at = {"first_row": rows.start, "first_time": t}
            _, state = self._filter(some, state, more, start=False, entropy=False, **at)
            drawn.append(_draw(self.posterior_of(state), points[t + 1], rows.start))
        return torch.stack(drawn, 1)


def _draw(posterior: Float[Tensor, "rows tasks"], points: Float[Tensor, "rows n"], first_row: int = 0) -> Tensor:
    """The tasks that uniform numbers fall to."""
    lost = posterior.isnan().any(1).nonzero()
    if len(lost):
        raise DegenerateError(
            f"tokens[{first_row + int(lost[0])}]: no assumed task explains them, so none can be drawn"
        )
    sums = posterior.double().cumsum(1)
    drawn = torch.searchsorted(sums, points * sums[:, -1:], right=True)
    last = sums.shape[1] - 1 - posterior.flip(1).gt(0).int().argmax(1, keepdim=True)
    return torch.minimum(drawn, last)  # a point may round up to the total


def _state(state: HMMState) -> HMMState:
    if not isinstance(state, HMMState):
        raise InputError("state", type(state).__name__, "an HMMState", "begin with oracle.init_state(batch_size)")
    return state


def _given(x: Tensor | None) -> Tensor:
    assert x is not None
    return x


def _nonnegative(x: Tensor | None) -> Tensor:
    # Sums that cancel to zero round to either side of it, and bins that begin at 0 would drop those below.
    return _given(x).clamp_min(0)  # NaN stays NaN


def _by_factor(posterior: Tensor, sizes: tuple[int, ...]) -> Iterator[Tensor]:
    table = posterior.unflatten(-1, sizes) if sizes else posterior
    for axis in range(len(sizes)):
        others = [2 + i for i in range(len(sizes)) if i != axis]
        yield table.sum(others) if others else table
