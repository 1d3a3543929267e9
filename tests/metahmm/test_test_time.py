"""Curves over K: what each row is, what it costs, what it shares with the others."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from commissure.core.errors import InputError
from commissure.core.rng import isolated
from commissure.metahmm.conditional import ExactConditional, FactorEmbedding, SoftPrefix
from commissure.metahmm.divergence import evaluate_divergence
from commissure.metahmm.monte_carlo import EntropyGate, MonteCarloPredictor
from commissure.metahmm.samplers import FactorPosterior
from commissure.metahmm.test_time import compute_curve
from commissure.nn import Stack

spec = importlib.util.spec_from_file_location("dense", Path(__file__).with_name("dense.py"))
assert spec is not None
assert spec.loader is not None
dense: Any = importlib.util.module_from_spec(spec)
spec.loader.exec_module(dense)

ENV = dense.small_environment()
ORACLE = dense.DenseOracle(ENV)
EXACT = MonteCarloPredictor(ExactConditional(ENV), dense.DensePosterior(ORACLE), n_samples=3, seed=5)
TOKENS = dense.sequences(ENV, 40, 8)


class Counting:
    """An oracle that counts its calls."""

    def __init__(self) -> None:
        self.n_calls = 0

    def __call__(self, tokens: Tensor, lengths: Tensor | None = None) -> Any:
        self.n_calls += 1
        return ORACLE(tokens)


def test_rows_are_the_predictors_measured_one_by_one() -> None:
    oracle = Counting()
    rows = compute_curve(
        EXACT, TOKENS, oracle=oracle, n_samples=(1, 4), weightings=("plain", "smc"), batch_size=16, n_resamples=200
    )
    assert [(row.weighting, row.n_samples) for row in rows] == [("plain", 1), ("plain", 4), ("smc", 1), ("smc", 4)]
    assert oracle.n_calls == 3, "once a chunk, not once a row"
    for row in rows:
        alone = EXACT.having(n_samples=row.n_samples, weighting=row.weighting)
        measured = evaluate_divergence(alone, TOKENS, oracle=ORACLE, batch_size=16, n_resamples=200)
        assert row.divergence == measured.overall.divergence
        outputs = [alone.from_row(i)(TOKENS[i : i + 16]) for i in (0, 16, 32)]
        assert row.n_forward == pytest.approx(float(torch.cat([out.n_forward for out in outputs]).double().mean()))
        assert row.ess == pytest.approx(float(torch.cat([out.ess for out in outputs]).mean()))
        assert row.seconds > 0


def test_more_samples_are_closer_and_dearer() -> None:
    one, ten, many = compute_curve(EXACT, TOKENS, oracle=ORACLE, n_samples=(1, 10, 100), n_resamples=200)
    assert one.divergence.low > ten.divergence.high > ten.divergence.low > many.divergence.high
    assert one.n_forward < ten.n_forward < many.n_forward <= ENV.n_tasks
    assert (one.weighting, EXACT.n_samples) == ("plain", 3), "the predictor's own weighting; itself is left alone"


def test_operations_are_means_over_all_chunks() -> None:
    with isolated(0, "models"):
        lm = Stack(["gru"], 8, vocab=ENV.n_obs)
        known = SoftPrefix(lm, 4, embedding=FactorEmbedding(ENV.factor_sizes, 4))
        model = MonteCarloPredictor(known, FactorPosterior(lm, ENV.factor_sizes), n_samples=5)
    (row,) = compute_curve(model, TOKENS, oracle=ORACLE, n_samples=(5,), batch_size=32, n_resamples=100)
    expected = sum(
        len(TOKENS[i:j]) * model.flops_per_token(model.from_row(i)(TOKENS[i:j])) for i, j in ((0, 32), (32, 40))
    )
    assert row.flops_per_token == pytest.approx(expected / 40)
    flat = row.to_dict()
    assert (flat["divergence"], flat["divergence_low"], flat["divergence_high"]) == row.divergence
    assert all(isinstance(value, (int, float, str)) for value in flat.values())


def test_the_gate_goes_with_every_row() -> None:
    closed = MonteCarloPredictor(EXACT.conditional, EXACT.sampler, n_samples=1, gate=EntropyGate(1e3), fallback=ORACLE)
    for row in compute_curve(closed, TOKENS, oracle=ORACLE, n_samples=(1, 9), n_resamples=100):
        assert row.divergence.estimate == 0
        assert row.n_forward == 0
        assert row.ess != row.ess


def test_it_is_the_package_s() -> None:
    import commissure.metahmm

    assert commissure.metahmm.compute_curve is compute_curve


def test_refusals() -> None:
    for n_samples in ((), (0,), 5, (True,), (2.0,), "5", None):
        with pytest.raises(InputError, match="n_samples"):
            compute_curve(EXACT, TOKENS, oracle=ORACLE, n_samples=n_samples)  # type: ignore[arg-type]
    for weightings in ("plain", (), 3):
        with pytest.raises(InputError, match="weightings"):
            compute_curve(EXACT, TOKENS, oracle=ORACLE, weightings=weightings)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="tokens"):
        compute_curve(EXACT, TOKENS.tolist(), oracle=ORACLE)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="predictor"):
        compute_curve(ORACLE, TOKENS, oracle=ORACLE)
    with pytest.raises(InputError, match="oracle"):
        compute_curve(EXACT, TOKENS, oracle=None)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="batch_size"):
        compute_curve(EXACT, TOKENS, oracle=ORACLE, batch_size=0)
    with pytest.raises(InputError, match="weighting"):
        compute_curve(EXACT, TOKENS, oracle=ORACLE, weightings=("best",))  # type: ignore[arg-type]


def test_intervals_are_those_asked_for() -> None:
    asked: dict[str, Any] = {"seed": 3, "n_resamples": 150, "level": 0.5}
    (row,) = compute_curve(EXACT, TOKENS, oracle=ORACLE, n_samples=(2,), **asked)
    measured = evaluate_divergence(EXACT.having(n_samples=2), TOKENS, oracle=ORACLE, **asked)
    assert row.divergence == measured.overall.divergence
