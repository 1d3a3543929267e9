"""The oracle's rivals give what it gives, and the table of its bench is what it says."""

from __future__ import annotations

import pytest
import torch

from commissure.core.errors import CommissureError, InputError
from commissure.metahmm import MetaHMM, bench
from commissure.metahmm.oracle import BayesOracle
from commissure.metahmm.rivals import forward_batched, scan_reference


@pytest.mark.parametrize("length", [0, 1, 2, 3, 7, 8, 21])
def test_rivals_equal_the_oracle(length):
    env = MetaHMM.from_preset("e64", seed=2)
    tokens = env.sample([17], max(length, 1), seed=1).tokens[0, :length]
    want = BayesOracle(env)(tokens[None])
    ids = torch.arange(env.n_tasks)
    scan = scan_reference(env.initial, env.transition_matrix(ids), env.emission_matrix(ids), tokens)
    dense = forward_batched(env.initial, env.transitions, env.emissions, tokens)
    for probs, entropy in (scan, dense):
        torch.testing.assert_close(probs, want.log_probs[0].exp(), rtol=1e-11, atol=1e-13)
        torch.testing.assert_close(entropy, want.task_entropy[0], rtol=1e-11, atol=1e-12)


def test_the_bench_times_every_contender():
    rows = bench.bench_oracle("e64", seed=1, length=12, n_sequences=2, repeats=2)
    assert [row.contender for row in rows] == [bench.OURS, bench.PRUNED, bench.DENSE, bench.SCAN]
    assert [row.share for row in rows] == [1.0, 1.0, 1.0, 48 / 64]
    assert rows[0].gain == (1.0, 1.0, 1.0)
    for row in rows:
        assert row.dtype == "float32"
        assert 0 < row.seconds.low <= row.seconds.median <= row.seconds.high
        assert row.floor > 0
    env = MetaHMM.from_preset("e64", seed=1)
    entries = int((env.transitions != 0).sum())
    assert bench.multiplications(env) == entries * 4 + 64 * 6 + 4 * 6 * 10


def test_the_bench_refuses_an_oracle_that_is_wrong(monkeypatch):
    """Its error is its own, not a comparison with itself."""

    class Wrong(BayesOracle):
        def log_probs(self, tokens, lengths=None):
            return super().log_probs(tokens, lengths) + 1e-6

    monkeypatch.setattr(bench, "BayesOracle", Wrong)
    with pytest.raises(CommissureError, match="'oracle'"):
        bench.bench_oracle("e64", length=5, n_sequences=2, repeats=1)


@pytest.mark.parametrize("name", ["n_sequences", "repeats"])
def test_bad_sizes_are_named(name):
    for value in (0, 2.5, True):
        with pytest.raises(InputError, match=name):
            bench.bench_oracle("e64", length=5, **{name: value})


def test_the_bench_refuses_a_rival_that_is_wrong(monkeypatch):
    wrong = lambda *args: (forward_batched(*args)[0] + 1e-6, None)  # noqa: E731
    monkeypatch.setattr(bench, "forward_batched", wrong)
    with pytest.raises(CommissureError, match="dense batched forward"):
        bench.bench_oracle("e64", length=5, n_sequences=2, repeats=1)
