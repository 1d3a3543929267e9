"""How far a predictor is from the Bayes optimum, at every position and at every degree of ambiguity.

    Div(t) = KL[p* || p](t) / 2 + KL[p || p*](t) / 2        p*, p: of token t + 1 after t tokens; t = 0 is the prior

| paper | name |
|---|---|
| KL[p* \\|\\| p], KL[p \\|\\| p*] | `forward`, `backward` |
| Div, half the Jeffreys divergence (not Jensen-Shannon's) | `divergence` |
| H[p*(theta \\| x_<=t)] | `task_entropy` |

The divergence need not grow with the entropy: where every live task predicts the same, or the answer is close to the
marginal, ambiguity costs nothing.  The tables are by position and by entropy, and claim neither.
arXiv 2506.16288, section 3.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from commissure.core.errors import InputError
from commissure.core.stats import Interval, paired_bootstrap
from commissure.metahmm.backbones import backbone
from commissure.metahmm.inputs import Lengths, Tokens, checked_batch, whole

if TYPE_CHECKING:
    import pandas

__all__ = [
    "Divergence",
    "DivergenceRow",
    "PointwiseDivergence",
    "SamplingPredictor",
    "SequencePredictor",
    "evaluate_divergence",
    "pointwise_divergence",
]

ENTROPY_EDGES = (0.0, 0.1, 0.5, 1.0, 1.5, 2.0, 3.0, math.inf)  # nats; the bins of the CPU-scale figure
SUM_TOLERANCE = 0.05  # of log probabilities: half precision is off by less, logits and probabilities by more


@runtime_checkable
class SequencePredictor(Protocol):
    """Contract 2: the next token's log-probabilities after 0, 1, ..., T tokens."""

    def log_probs(self, tokens: Int[Tensor, "batch time"]) -> Float[Tensor, "batch time_plus_1 vocab"]:
        """Entry t has seen `tokens[:, :t]`."""


@runtime_checkable
class SamplingPredictor(Protocol):
    """A SequencePredictor whose numbers are drawn by row: asked for a later row's, so that chunks do not share them."""

    def from_row(self, row: int) -> SequencePredictor:
        """The predictor of a chunk whose first sequence is the `row`-th; that of row 0 is itself."""


@runtime_checkable
class OracleOutput(Protocol):
    """What is read of `OraclePredictions`."""

    @property
    def log_probs(self) -> Tensor:
        """(batch, time + 1, vocab)."""

    @property
    def task_entropy(self) -> Tensor:
        """(batch, time + 1), nats."""


@runtime_checkable
class Oracle(Protocol):
    """What is asked of `BayesOracle`."""

    def __call__(self, tokens: Tensor, lengths: Tensor | None = None) -> OracleOutput:
        """The predictive and the task entropy at every position."""


class PointwiseDivergence(NamedTuple):
    """One number a sequence and position, nats; past a row's length all are NaN, and so is the NLL of the last."""

    forward: Float[Tensor, "batch time_plus_1"]
    backward: Float[Tensor, "batch time_plus_1"]
    nll: Float[Tensor, "batch time_plus_1"]
    oracle_nll: Float[Tensor, "batch time_plus_1"]
    task_entropy: Float[Tensor, "batch time_plus_1"]

    @property
    def divergence(self) -> Float[Tensor, "batch time_plus_1"]:
        """Half the sum of both directions."""
        return (self.forward + self.backward) / 2


@dataclass(frozen=True)
class DivergenceRow:
    """Means over the predictions of a group with bootstrap intervals over its sequences, nats.

    `position` or the entropy range says which group; both are None for all of them.  `n` predictions come from
    `n_sequences`; with fewer than 2 of these, or a value that is not finite (an oracle that was shown impossible tokens
    gives NaN), the ends of an interval are NaN.
    """

    position: int | None
    entropy_low: float | None
    entropy_high: float | None
    n: int
    n_sequences: int
    task_entropy: float
    divergence: Interval
    forward: Interval
    backward: Interval
    nll: Interval
    oracle_nll: Interval

    def to_dict(self) -> dict[str, float | int | None]:
        """Plain data in one level: an interval is NAME, NAME_low and NAME_high."""
        flat: dict[str, float | int | None] = {}
        for name, value in asdict(self).items():
            if isinstance(value, Interval):
                flat |= {name: value.estimate, f"{name}_low": value.low, f"{name}_high": value.high}
            else:
                flat[name] = value
        return flat


@dataclass(frozen=True)
class Divergence:
    """The tables of one evaluation, and the numbers they were made from (for paired comparisons)."""

    overall: DivergenceRow
    by_position: tuple[DivergenceRow, ...]
    by_entropy: tuple[DivergenceRow, ...]
    pointwise: PointwiseDivergence

    def to_frame(self) -> pandas.DataFrame:
        """All rows as a pandas table; empty entropy bins are left out of it, as of the rows."""
        import pandas

        return pandas.DataFrame([row.to_dict() for row in (self.overall, *self.by_position, *self.by_entropy)])


def evaluate_divergence(
    predictor: SequencePredictor | nn.Module,
    tokens: Tokens,
    *,
    oracle: Oracle,
    lengths: Lengths | None = None,
    entropy_edges: Sequence[float] = ENTROPY_EDGES,
    batch_size: int = 64,
    seed: int = 0,
    n_resamples: int = 1000,
    level: float = 0.95,
) -> Divergence:
    """Measure a predictor against the oracle on sequences: overall, by position 0 .. T and by task entropy.

    `predictor`: anything with `log_probs`, or a Hugging Face causal language model, which `backbone` gives them; a
    module is run in the mode it is in, so call `.eval()` first where there is dropout.
    `entropy_edges` (nats, increasing) cut the bins [low, high).  Sequences, not predictions, are resampled: those of
    one sequence are dependent.  Position T has divergences and no NLL.

    >>> from types import SimpleNamespace
    >>> class Coin:  # fair, and there is only this task: its own oracle
    ...     def log_probs(self, tokens):
    ...         return torch.full((len(tokens), tokens.shape[1] + 1, 2), 0.5).log()
    ...     def __call__(self, tokens, lengths=None):
    ...         return SimpleNamespace(log_probs=(p := self.log_probs(tokens)), task_entropy=0 * p[..., 0])
    >>> measured = evaluate_divergence(Coin(), torch.tensor([[0, 1], [1, 1]]), oracle=Coin())
    >>> measured.overall.divergence.estimate, len(measured.by_position), round(measured.overall.nll.estimate, 4)
    (0.0, 3, 0.6931)
    """
    edges = _edges(entropy_edges)
    tokens, lengths = checked_batch(tokens, lengths)
    points = pointwise_divergence(predictor, tokens, oracle=oracle, lengths=lengths, batch_size=batch_size)
    positions, ends = torch.arange(tokens.shape[1] + 1, device=tokens.device), lengths[:, None]
    seen, followed = positions <= ends, positions < ends

    def row(chosen: Bool[Tensor, "batch time_plus_1"], **group: float | int | None) -> DivergenceRow:
        sequence, _ = chosen.nonzero(as_tuple=True)
        named = {"position": None, "entropy_low": None, "entropy_high": None, **group}
        intervals = {
            name: _interval(
                getattr(points, name),
                chosen & followed if name.endswith("nll") else chosen,
                seed=seed,
                n_resamples=n_resamples,
                level=level,
            )
            for name in ("divergence", "forward", "backward", "nll", "oracle_nll")
        }
        entropy = float(points.task_entropy[chosen].mean())
        counts = {"n": len(sequence), "n_sequences": len(sequence.unique())}
        return DivergenceRow(**named, **counts, task_entropy=entropy, **intervals)  # type: ignore[arg-type]

    by_position = [(seen & (positions == t), t) for t in positions.tolist()]
    entropy = points.task_entropy
    bins = [(seen & (entropy >= low) & (entropy < high), low, high) for low, high in pairwise(edges)]
    return Divergence(
        row(seen),
        tuple(row(chosen, position=t) for chosen, t in by_position if chosen.any()),
        tuple(row(chosen, entropy_low=low, entropy_high=high) for chosen, low, high in bins if chosen.any()),
        points,
    )


@torch.no_grad()
def pointwise_divergence(
    predictor: SequencePredictor | nn.Module,
    tokens: Tokens,
    *,
    oracle: Oracle,
    lengths: Lengths | None = None,
    batch_size: int = 64,
) -> PointwiseDivergence:
    """Both divergences, both negative log-likelihoods and the task entropy of every prediction, in float64.

    `batch_size` sequences at a time; a `SamplingPredictor` draws other numbers for each of these chunks.
    Raises `InputError` for a predictor that has not the oracle's shape or gives no log-probabilities.
    """
    predictor, batch_size, parts = _predictor(predictor), whole("batch_size", batch_size, 1), []
    if not callable(oracle):
        raise InputError("oracle", type(oracle).__name__, "a BayesOracle", "pass for example BayesOracle(env)")
    tokens, ends = checked_batch(tokens, lengths)
    if not len(tokens):
        raise InputError("tokens", tuple(tokens.shape), "one sequence at least")
    for row, some, end in zip(
        range(0, len(tokens), batch_size), tokens.split(batch_size), ends.split(batch_size), strict=True
    ):
        here = predictor.from_row(row) if isinstance(predictor, SamplingPredictor) else predictor
        beyond = torch.arange(some.shape[1], device=some.device) >= end[:, None]
        some = some.masked_fill(beyond, 0)  # padding may be any number; a causal predictor never shows it
        truth = oracle(some, None if lengths is None else end)
        parts.append(_compare(here.log_probs(some), truth, some, end))
    return PointwiseDivergence(*(torch.cat(field) for field in zip(*parts, strict=True)))


def _predictor(given: SequencePredictor | nn.Module) -> SequencePredictor:
    if isinstance(given, SequencePredictor):
        return given
    if isinstance(given, nn.Module):
        return backbone(given)
    allowed = "an object with log_probs(tokens), a Stack or a Hugging Face causal language model"
    raise InputError("predictor", type(given).__name__, allowed)


def _edges(given: Sequence[float]) -> list[float]:
    """The bins' edges, two at least, increasing."""
    try:
        edges = [float(edge) for edge in given]
    except (TypeError, ValueError):
        edges = []
    if len(edges) < 2 or not all(a < b for a, b in pairwise(edges)):
        raise InputError("entropy_edges", given, "two or more increasing numbers (nats)")
    return edges


def _compare(predicted: Tensor, truth: OracleOutput, tokens: Tensor, lengths: Tensor) -> PointwiseDivergence:
    """One chunk's numbers, NaN past each row's length."""
    expected = truth.log_probs
    if not isinstance(predicted, Tensor) or predicted.shape != expected.shape:
        fix = "position 0 is the prior: a predictor gives one entry more than there are tokens"
        found = tuple(getattr(predicted, "shape", (type(predicted).__name__,)))
        raise InputError("predictor.log_probs", found, f"a tensor of shape {tuple(expected.shape)}", fix)
    p, q = (t.double().to(tokens.device) for t in (expected, predicted))
    positions = torch.arange(p.shape[1], device=tokens.device)
    after = positions > lengths[:, None]
    sums = q.exp().sum(-1).masked_fill(after, 1.0)
    if bool(((sums - 1).abs() > SUM_TOLERANCE).any()):  # a NaN passes, and shows
        worst = float(sums.flatten()[(sums - 1).nan_to_num().abs().argmax()])
        fix = "apply log_softmax(-1) to logits, log() to probabilities"
        raise InputError("predictor.log_probs", worst, "log-probabilities, whose exponentials sum to 1", fix)
    unknown = positions >= lengths[:, None]  # no token follows
    target = torch.nn.functional.pad(tokens, (0, 1))[..., None]
    nll, oracle_nll = (-t.gather(-1, target)[..., 0].masked_fill(unknown, math.nan) for t in (q, p))
    forward, backward, entropy = (
        t.masked_fill(after, math.nan) for t in (_kl(p, q), _kl(q, p), truth.task_entropy.double().to(tokens.device))
    )
    return PointwiseDivergence(forward, backward, nll, oracle_nll, entropy)


def _kl(p: Float[Tensor, "*batch vocab"], q: Float[Tensor, "*batch vocab"]) -> Float[Tensor, "*batch"]:
    """sum p (log p - log q) of log-probabilities; 0 log 0 = 0, infinite where q excludes what p allows."""
    terms = p.exp() * (p - q)
    return terms.masked_fill(p == -math.inf, 0.0).sum(-1)


def _interval(
    values: Float[Tensor, "batch time_plus_1"],
    chosen: Bool[Tensor, "batch time_plus_1"],
    *,
    seed: int,
    n_resamples: int,
    level: float,
) -> Interval:
    """Mean over the chosen predictions; sequences are drawn with all of theirs."""
    sequence = chosen.nonzero()[:, 0].cpu().numpy()
    sample = values[chosen].cpu().numpy()
    if not sample.size:
        return Interval(math.nan, math.nan, math.nan)
    if len(np.unique(sequence)) < 2 or not np.isfinite(sample).all():
        return Interval(float(sample.mean()), math.nan, math.nan)
    return paired_bootstrap(sample, seed=seed, n_resamples=n_resamples, level=level, groups=sequence)
