"""The divergence from the oracle: alignment, both directions, tables, ragged rows, intervals."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from commissure.core.errors import InputError
from commissure.core.stats import paired_bootstrap
from commissure.metahmm import MetaHMM
from commissure.metahmm.backbones import backbone
from commissure.metahmm.divergence import evaluate_divergence, pointwise_divergence
from commissure.metahmm.oracle import BayesOracle

spec = importlib.util.spec_from_file_location("dense", Path(__file__).with_name("dense.py"))
assert spec is not None
assert spec.loader is not None
dense: Any = importlib.util.module_from_spec(spec)
spec.loader.exec_module(dense)

ENV = dense.small_environment()
ORACLE = dense.DenseOracle(ENV)
TOKENS = dense.sequences(ENV, 12, 9)


class Shifted:
    """The oracle's predictions, one position late: the commonest misalignment."""

    def log_probs(self, tokens: Tensor) -> Tensor:
        return ORACLE.log_probs(tokens).roll(1, 1)


class Smoothed:
    """A mixture of the oracle and the uniform distribution."""

    def log_probs(self, tokens: Tensor) -> Tensor:
        return (0.7 * ORACLE.log_probs(tokens).exp() + 0.3 / ENV.n_obs).log()


def test_the_oracle_has_no_divergence_and_a_misaligned_one_has() -> None:
    measured = evaluate_divergence(ORACLE, TOKENS, oracle=ORACLE, n_resamples=100)
    assert measured.overall.divergence == (0.0, 0.0, 0.0)
    assert measured.overall.nll == measured.overall.oracle_nll
    assert evaluate_divergence(Shifted(), TOKENS, oracle=ORACLE, n_resamples=100).overall.divergence.low > 0.05


def test_values_are_the_definitions_position_by_position() -> None:
    points = pointwise_divergence(Smoothed(), TOKENS, oracle=ORACLE, batch_size=5)
    for b in range(len(TOKENS)):
        for t in range(10):
            p = ORACLE.log_probs(TOKENS[b : b + 1, :t])[0, t].exp()
            q = 0.7 * p + 0.3 / 6
            forward, backward = (p * (p / q).log()).sum(), (q * (q / p).log()).sum()
            torch.testing.assert_close(points.forward[b, t], forward, rtol=0, atol=1e-12)
            torch.testing.assert_close(points.backward[b, t], backward, rtol=0, atol=1e-12)
            torch.testing.assert_close(points.divergence[b, t], (forward + backward) / 2, rtol=0, atol=1e-12)
            if t < 9:
                torch.testing.assert_close(points.nll[b, t], -q[TOKENS[b, t]].log(), rtol=0, atol=1e-12)
                torch.testing.assert_close(points.oracle_nll[b, t], -p[TOKENS[b, t]].log(), rtol=0, atol=1e-12)
    assert bool(points.nll[:, 9].isnan().all())


def test_tables_cut_the_same_predictions_two_ways() -> None:
    measured = evaluate_divergence(Smoothed(), TOKENS, oracle=ORACLE, n_resamples=200)
    assert [row.position for row in measured.by_position] == list(range(10))
    for rows in (measured.by_position, measured.by_entropy):
        assert sum(row.n for row in rows) == measured.overall.n == 120
        mean = sum(row.n * row.divergence.estimate for row in rows) / 120
        assert mean == pytest.approx(measured.overall.divergence.estimate, abs=1e-12)
    entropy = measured.pointwise.task_entropy
    for row in measured.by_entropy:
        assert row.entropy_low is not None
        assert row.entropy_high is not None
        inside = (entropy >= row.entropy_low) & (entropy < row.entropy_high)
        assert row.n == int(inside.sum())
        assert row.forward.estimate == pytest.approx(float(measured.pointwise.forward[inside].mean()), abs=1e-12)
        assert row.entropy_low <= row.task_entropy < row.entropy_high
    assert math.isnan(measured.by_position[-1].nll.estimate)
    frame = measured.to_frame()
    assert len(frame) == 1 + 10 + len(measured.by_entropy)
    assert {"divergence", "divergence_low", "divergence_high", "position", "entropy_low"} <= set(frame.columns)


def test_intervals_resample_sequences_not_predictions() -> None:
    """Each sequence repeated in all its positions: as many predictions, no more information."""

    class Scaled:
        """A divergence that is the same at all positions of a sequence."""

        def log_probs(self, tokens: Tensor) -> Tensor:
            tilt = tokens[:, :1, None].double() * torch.tensor([1.0, 0, 0, 0, 0, 0], dtype=torch.float64)
            return tilt.expand(-1, tokens.shape[1] + 1, -1).log_softmax(-1)

    class Even:
        def __call__(self, tokens: Tensor, lengths: Tensor | None = None) -> Any:
            even = torch.full((*tokens.shape, 6), 1 / 6, dtype=torch.float64).log()
            even = torch.cat([even, even[:, :1]], 1)
            return SimpleNamespace(log_probs=even, task_entropy=even.new_zeros(even.shape[:2]))

    measured = evaluate_divergence(Scaled(), TOKENS, oracle=Even(), n_resamples=2000)
    overall, first = measured.overall.divergence, measured.by_position[0].divergence
    assert overall.estimate == pytest.approx(first.estimate)
    assert overall.high - overall.low == pytest.approx(first.high - first.low, rel=0.05)


def test_padding_is_left_out_whatever_it_holds() -> None:
    lengths = torch.tensor([9, 0, 4, 7, 9, 9, 2, 9, 9, 9, 9, 9])
    padded = TOKENS.clone()
    padded[torch.arange(9) >= lengths[:, None]] = -100

    class Ragged:
        def __call__(self, tokens: Tensor, lengths: Tensor | None = None) -> Any:
            assert lengths is not None
            return ORACLE(tokens)

    measured = evaluate_divergence(Smoothed(), padded, oracle=Ragged(), lengths=lengths, batch_size=5, n_resamples=100)
    assert measured.overall.n == int((lengths + 1).sum())
    whole = pointwise_divergence(Smoothed(), TOKENS, oracle=ORACLE)
    for b, length in enumerate(lengths.tolist()):
        for name in ("forward", "nll"):
            one, full = getattr(measured.pointwise, name)[b], getattr(whole, name)[b]
            n = length if name == "nll" else length + 1
            torch.testing.assert_close(one[:n], full[:n], rtol=0, atol=1e-12)
            assert bool(one[n:].isnan().all())


def test_the_fast_oracle_gives_the_same_table() -> None:
    lengths = torch.tensor([9, 0, 4, 7, 9, 9, 2, 9, 9, 9, 9, 9])
    fast = BayesOracle(ENV)
    measured = evaluate_divergence(Smoothed(), TOKENS, oracle=fast, lengths=lengths, batch_size=5, n_resamples=100)
    whole = pointwise_divergence(Smoothed(), TOKENS, oracle=ORACLE)
    seen = torch.arange(10) <= lengths[:, None]
    for name in ("forward", "backward", "task_entropy"):
        one, full = getattr(measured.pointwise, name), getattr(whole, name)
        torch.testing.assert_close(one[seen], full[seen], rtol=0, atol=1e-10)
    itself = evaluate_divergence(fast, TOKENS, oracle=fast, n_resamples=100).overall.divergence
    assert itself.estimate == pytest.approx(0, abs=1e-12)


def test_what_is_not_defined_shows() -> None:
    class Broken:
        def log_probs(self, tokens: Tensor) -> Tensor:
            out = ORACLE.log_probs(tokens)
            out[0, 3] = math.nan
            return out

    measured = evaluate_divergence(Broken(), TOKENS, oracle=ORACLE, n_resamples=100)
    assert math.isnan(measured.overall.divergence.estimate)
    assert [math.isnan(row.divergence.estimate) for row in measured.by_position] == [t == 3 for t in range(10)]


def test_a_predictor_that_excludes_a_token_is_infinitely_far() -> None:
    class Sure:
        def log_probs(self, tokens: Tensor) -> Tensor:
            out = torch.full((len(tokens), tokens.shape[1] + 1, 6), -math.inf, dtype=torch.float64)
            out[..., 0] = 0.0
            return out

    overall = evaluate_divergence(Sure(), TOKENS, oracle=ORACLE, n_resamples=100).overall
    assert overall.forward.estimate == math.inf
    assert math.isnan(overall.forward.low)
    assert math.isfinite(overall.backward.estimate)


def test_one_sequence_has_no_interval() -> None:
    overall = evaluate_divergence(Smoothed(), TOKENS[:1], oracle=ORACLE).overall
    assert math.isfinite(overall.divergence.estimate)
    assert math.isnan(overall.divergence.low)


def test_refusals() -> None:
    class Headless:
        def log_probs(self, tokens: Tensor) -> Tensor:
            return ORACLE.log_probs(tokens)[:, 1:]

    with pytest.raises(InputError, match="position 0 is the prior"):
        evaluate_divergence(Headless(), TOKENS, oracle=ORACLE)
    with pytest.raises(InputError, match="entropy_edges"):
        evaluate_divergence(ORACLE, TOKENS, oracle=ORACLE, entropy_edges=(1.0, 0.5))
    with pytest.raises(InputError, match="tokens"):
        evaluate_divergence(ORACLE, TOKENS[0], oracle=ORACLE)
    with pytest.raises(InputError, match="batch_size"):
        evaluate_divergence(ORACLE, TOKENS, oracle=ORACLE, batch_size=0)


def test_what_is_no_predictor_no_oracle_or_no_batch_is_named() -> None:
    class Scores:
        """Logits."""

        def log_probs(self, tokens: Tensor) -> Tensor:
            return ORACLE.log_probs(tokens) + 1

    class Listed:
        def log_probs(self, tokens: Tensor) -> list:
            return ORACLE.log_probs(tokens).tolist()

    for bad in (Scores(), Listed()):
        with pytest.raises(InputError, match=r"predictor\.log_probs"):
            evaluate_divergence(bad, TOKENS, oracle=ORACLE)
    for bad in (None, torch.nn.Linear(2, 2), lambda tokens: tokens):
        with pytest.raises(InputError, match=r"log_probs|lm = "):
            evaluate_divergence(bad, TOKENS, oracle=ORACLE)
    with pytest.raises(InputError, match=r"BayesOracle\(env\)"):
        evaluate_divergence(ORACLE, TOKENS, oracle=ENV)
    with pytest.raises(InputError, match=r"pass tokens=batch\.tokens"):
        evaluate_divergence(ORACLE, ENV.sample([0, 1], 3, seed=0), oracle=ORACLE)
    for edges in (3, ["a", "b"], (0.0, math.nan, 1.0)):
        with pytest.raises(InputError, match="entropy_edges"):
            evaluate_divergence(ORACLE, TOKENS, oracle=ORACLE, entropy_edges=edges)
    for batch_size in (2.5, True, -1):
        with pytest.raises(InputError, match="batch_size"):
            evaluate_divergence(ORACLE, TOKENS, oracle=ORACLE, batch_size=batch_size)


def test_arrays_and_lists() -> None:
    want = evaluate_divergence(Smoothed(), TOKENS, oracle=ORACLE, n_resamples=100)
    for tokens in (TOKENS.numpy(), TOKENS.tolist(), TOKENS.int()):
        found = evaluate_divergence(Smoothed(), tokens, oracle=ORACLE, n_resamples=100, lengths=[9] * len(TOKENS))
        assert found.overall == want.overall


def test_a_hugging_face_model_needs_no_wrapper() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=6, n_positions=16, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=None
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    want = pointwise_divergence(backbone(model), TOKENS, oracle=ORACLE)
    found = pointwise_divergence(model, TOKENS, oracle=ORACLE)
    assert torch.equal(found.divergence, want.divergence)
    assert bool(found.divergence.isfinite().all())


def test_no_prediction_is_lost_where_the_posterior_has_settled() -> None:
    """Entropies that cancel to zero stay within the bins, which begin at zero."""
    env = MetaHMM.from_preset("e64", seed=0)
    oracle = BayesOracle(env, dtype=torch.float32)
    tokens = env.sample(env.task_ids, 100, seed=0).tokens
    told = oracle(tokens)
    assert bool((told.task_entropy >= 0).all())
    assert bool((oracle.epistemic(tokens) >= 0).all())
    measured = evaluate_divergence(oracle, tokens, oracle=oracle, n_resamples=100)
    assert sum(row.n for row in measured.by_entropy) == measured.overall.n == told.task_entropy.numel()


def test_intervals_are_the_bootstrap_that_was_asked_for() -> None:
    """Seed, number of resamples and level go with every interval; sequences are counted apart from predictions."""
    asked: dict[str, Any] = {"seed": 4, "n_resamples": 150, "level": 0.5}
    measured = evaluate_divergence(Smoothed(), TOKENS, oracle=ORACLE, **asked)
    values = measured.pointwise.divergence
    sequence = torch.arange(len(values))[:, None].expand(values.shape)
    want = paired_bootstrap(values.flatten().numpy(), groups=sequence.flatten().numpy(), **asked)
    assert measured.overall.divergence == want
    assert (measured.overall.n, measured.overall.n_sequences) == (120, 12)
    assert {(row.n, row.n_sequences) for row in measured.by_position} == {(12, 12)}
