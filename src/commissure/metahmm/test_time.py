"""What more samples buy: divergence from the oracle against what a prediction costs, over K and the ways to weigh.

A row for each (weighting, K): the divergence with its interval, and decoded codes, operations and seconds.  All rows
are measured on the same sequences against the same oracle predictions, which are made once.
arXiv 2506.16288.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from commissure.core.errors import InputError
from commissure.core.stats import Interval
from commissure.metahmm.divergence import Oracle, OracleOutput, evaluate_divergence
from commissure.metahmm.inputs import whole
from commissure.metahmm.monte_carlo import MonteCarloPredictor, Weighting
from commissure.metahmm.predictor_inputs import checked_counts, checked_tensor

__all__ = ["ComputeRow", "compute_curve"]


@dataclass(frozen=True)
class ComputeRow:
    """One weighting at one K.

    `divergence` in nats with its bootstrap interval over sequences; `ess` the mean effective samples where there were
    samples; `n_forward` the codes decoded for a sequence, `flops_per_token` the operations of one predicted token (see
    `MonteCarloPredictor.flops_per_token`), `seconds` the wall-clock time of predicting all sequences once.
    """

    n_samples: int
    weighting: Weighting
    divergence: Interval
    ess: float
    n_forward: float
    flops_per_token: float
    seconds: float

    def to_dict(self) -> dict[str, float | int | str]:
        """Plain data in one level: divergence, divergence_low and divergence_high."""
        estimate, low, high = self.divergence
        return asdict(self) | {"divergence": estimate, "divergence_low": low, "divergence_high": high}


def compute_curve(
    predictor: MonteCarloPredictor,
    tokens: Int[Tensor, "batch time"],
    *,
    oracle: Oracle,
    n_samples: Sequence[int] = (1, 2, 5, 10, 20, 50),
    weightings: Sequence[Weighting] | None = None,
    batch_size: int = 64,
    seed: int = 0,
    n_resamples: int = 1000,
    level: float = 0.95,
) -> tuple[ComputeRow, ...]:
    """Measure `predictor` with other numbers of samples and, unless None, other weightings; the rest stays as it is.

    `seed`, `n_resamples` and `level` are the intervals'.

    >>> from commissure.metahmm.conditional import ExactConditional
    >>> from commissure.metahmm.environment import MetaHMM
    >>> from commissure.metahmm.oracle import BayesOracle
    >>> from commissure.metahmm.samplers import OraclePosterior
    >>> env = MetaHMM.from_preset("e64", seed=0)
    >>> tokens, oracle = env.sample(torch.arange(8), 5, seed=0).tokens, BayesOracle(env)
    >>> model = MonteCarloPredictor(ExactConditional(env), OraclePosterior(oracle), n_samples=1)
    >>> few, many = compute_curve(model, tokens, oracle=oracle, n_samples=(1, 50))
    >>> many.divergence.estimate < few.divergence.estimate, many.n_forward > few.n_forward
    (True, True)
    """
    if not isinstance(predictor, MonteCarloPredictor):
        raise InputError("predictor", type(predictor).__name__, "a MonteCarloPredictor")
    if not isinstance(oracle, Oracle):
        raise InputError("oracle", type(oracle).__name__, "a BayesOracle")
    if weightings is not None and (not isinstance(weightings, (list, tuple)) or not weightings):
        raise InputError("weightings", weightings, "a sequence of weightings, or None")
    tokens, batch_size = checked_tensor("tokens", tokens, ("batch", "time")), whole("batch_size", batch_size, 1)
    remembered = _Remembered(oracle)
    rows = []
    for weighting in (predictor.weighting,) if weightings is None else weightings:
        for count in checked_counts("n_samples", n_samples):
            metered = _Metered(predictor.having(n_samples=count, weighting=weighting))
            measured = evaluate_divergence(
                metered, tokens, oracle=remembered, batch_size=batch_size, seed=seed, n_resamples=n_resamples,
                level=level,
            )  # fmt: skip
            rows.append(metered.row(measured.overall.divergence))
    return tuple(rows)


class _Remembered:
    """An oracle that answers each batch once."""

    def __init__(self, oracle: Oracle) -> None:
        self.oracle = oracle
        self.answers: dict[bytes, OracleOutput] = {}

    def __call__(self, tokens: Tensor, lengths: Tensor | None = None) -> OracleOutput:
        asked = tokens.cpu().numpy().tobytes()
        if asked not in self.answers:
            self.answers[asked] = self.oracle(tokens, lengths)
        return self.answers[asked]


class _Metered:
    """A predictor that adds up what its predictions cost."""

    def __init__(self, predictor: MonteCarloPredictor) -> None:
        self.predictor = predictor
        self.n_rows = self.n_sampled = 0
        self.n_forward = self.flops = self.ess = self.seconds = 0.0

    def from_row(self, row: int) -> _Metered:
        """Other numbers, the same meter."""
        self.current = self.predictor.from_row(row)
        return self

    def log_probs(self, tokens: Int[Tensor, "batch time"]) -> Float[Tensor, "batch time_plus_1 vocab"]:
        """Contract 2."""
        start = time.perf_counter()
        output = self.current(tokens)
        if output.log_probs.is_cuda:
            torch.cuda.synchronize(output.log_probs.device)
        self.seconds += time.perf_counter() - start
        self.n_rows += len(tokens)
        self.n_forward += float(output.n_forward.sum())
        self.flops += len(tokens) * self.predictor.flops_per_token(output)
        self.n_sampled += int(output.sampled.sum())
        self.ess += float(output.ess[output.sampled].sum())
        return output.log_probs

    def row(self, divergence: Interval) -> ComputeRow:
        """Means over all sequences seen."""
        return ComputeRow(
            n_samples=self.predictor.n_samples,
            weighting=self.predictor.weighting,
            divergence=divergence,
            ess=self.ess / self.n_sampled if self.n_sampled else float("nan"),
            n_forward=self.n_forward / self.n_rows,
            flops_per_token=self.flops / self.n_rows,
            seconds=self.seconds,
        )
