"""Tasks: every one is deterministic, in range and vectorized; MQAR, regression and linear systems against oracles."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare, kstest

from commissure.core.errors import InputError
from commissure.mesa.tasks import (
    MQAR,
    MQAR_TEST,
    MQAR_TRAIN,
    TASKS,
    LinearSystem,
    Regression,
    Task,
    WikiText2,
    task,
)
from commissure.mesa.tasks.batch import distinct

SMALL: dict[str, dict[str, Any]] = {
    "mqar": {"n_pairs": 6, "length": 40, "vocab": 40},
    "regbench": {"n_train": 60, "n_test": 40, "length": 200},
    "regression": {"dim": 4, "n_pairs": 10},
}
SYNTHETIC = sorted(TASKS.keys() - {"wikitext2"})


def small(name: str) -> Task:
    return task(name, **SMALL.get(name, {}))


def digest(batch: Any) -> str:
    return hashlib.sha256(b"".join(part.numpy().tobytes() for part in batch)).hexdigest()


@pytest.mark.parametrize("name", SYNTHETIC)
def test_a_batch_is_a_function_of_seed_and_split(name: str) -> None:
    source = small(name)
    before = torch.random.get_rng_state()
    first = source.batch(5, 7)
    assert digest(first) == digest(small(name).batch(5, 7))
    others = {digest(source.batch(6, 7)), digest(source.batch(5, 7, split="test")), digest(first)}
    assert len(others) == 3
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("name", SYNTHETIC)
def test_shapes_and_ranges(name: str, split: Any) -> None:
    source = small(name)
    inputs, targets, mask = source.batch(0, 9, split=split)
    assert mask.shape == inputs.shape[:2] == targets.shape[:2]
    assert mask.dtype == torch.bool
    assert mask.any(1).all(), "every row has something to score"
    if source.vocab is None:
        assert (inputs.dtype, targets.dtype) == (torch.float32, torch.float32)
        assert (inputs.shape[2], targets.shape[2]) == (source.input_dim, source.output_dim)
    else:
        assert (inputs.dtype, targets.dtype) == (torch.int64, torch.int64)
        assert min(int(inputs.min()), int(targets.min())) >= 0
        assert max(int(inputs.max()), int(targets[mask].max())) < source.vocab


@pytest.mark.parametrize("name", sorted(TASKS))
def test_a_task_is_rebuilt_from_its_sizes(name: str) -> None:
    source = small(name)
    assert task(name, **source.model_dump()) == source
    with pytest.raises(InputError, match="batch_size = 0"):
        source.batch(0, 0)
    with pytest.raises(InputError, match="split = 'valid'"):
        source.batch(0, 1, split="valid")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "sizes", "named"),
    [
        ("mqar", {"length": 15}, "length = 15"),
        ("mqar", {"n_pairs": 17}, "length = 64"),
        ("mqar", {"vocab": 8}, "vocab = 8"),
        ("noisy_recall", {"noise_vocab": 31}, "noise_vocab = 31"),
        ("fuzzy_recall", {"vocab": 6}, "motif = 3"),
        ("fuzzy_recall", {"length": 19}, "length = 19"),
        ("selective_copying", {"length": 33}, "length = 33"),
        ("regbench", {"min_strings": 21}, "min_strings = 21"),
        ("lds", {"dim": 0}, "dim = 0"),
        ("lds", {"size": 3}, "size = 3"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(name: str, sizes: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError, match=named):
        task(name, **sizes)


def test_distinct_draws_without_replacement_in_proportion() -> None:
    """The first two of four with weights 1, 2, 3, 4: P(i then j) = w_i / 10 * w_j / (10 - w_i)."""
    weights = np.arange(1.0, 5.0)
    drawn = distinct(np.random.default_rng(0), 20_000, 2, 4, weights)
    pairs = [(i, j) for i in range(4) for j in range(4) if i != j]
    counts = [int(((drawn == pair).all(1)).sum()) for pair in pairs]
    expected = [20_000 * weights[i] / 10 * weights[j] / (10 - weights[i]) for i, j in pairs]
    assert chisquare(counts, expected).pvalue > 1e-3
    everything = distinct(np.random.default_rng(1), 50, 4, 4)
    assert (np.sort(everything, 1) == np.arange(4)).all()


@pytest.mark.parametrize("source", [MQAR(n_pairs=6, length=40, vocab=40), MQAR(n_pairs=16, length=64, vocab=128)])
def test_mqar_is_solved_by_looking_up(source: MQAR) -> None:
    """A program that sees the inputs alone: remember each pair, answer the key at hand."""
    batch = source.batch(3, 50)
    for inputs, targets, mask in zip(*(part.tolist() for part in batch), strict=True):
        pairs = inputs[: 2 * source.n_pairs]
        memory = dict(zip(pairs[::2], pairs[1::2], strict=True))
        assert len(memory) == len(set(memory.values())) == source.n_pairs
        asked = [t for t, scored in enumerate(mask) if scored]
        assert [memory[inputs[t]] for t in asked] == [targets[t] for t in asked]
        assert sorted(inputs[t] for t in asked) == sorted(memory)
        assert all(t >= 2 * source.n_pairs and t % 2 == 0 for t in asked)
        assert all(1 <= key < source.vocab // 2 <= memory[key] for key in memory)


def test_mqar_frequencies() -> None:
    """Keys, values and fill are uniform; the first key's gap follows the power law."""
    source = MQAR(n_pairs=2, length=32, vocab=20)
    inputs, _, mask = source.batch(0, 6000)
    assert chisquare(np.bincount(inputs[:, 0], minlength=10)[1:10]).pvalue > 1e-3
    assert chisquare(np.bincount(inputs[:, 1], minlength=20)[10:]).pvalue > 1e-3
    fill = inputs[:, 5::2].flatten()  # odd positions after the pairs hold no question
    assert chisquare(np.bincount(fill, minlength=20)).pvalue > 1e-3
    first = ((inputs == inputs[:, :1]) & mask).int().argmax(1)
    law = np.arange(1.0, 15.0) ** (0.01 - 1)
    assert chisquare(np.bincount((first - 4) // 2, minlength=14), 6000 * law / law.sum()).pvalue > 1e-3


def test_mqar_sizes_are_the_published_ones() -> None:
    assert [(t.length, t.n_pairs) for t in MQAR_TRAIN] == [(64, 4), (128, 8), (256, 16), (256, 32), (256, 64)]
    assert [(t.length, t.n_pairs) for t in MQAR_TEST][-2:] == [(512, 128), (1024, 256)]
    assert {t.vocab for t in (*MQAR_TRAIN, *MQAR_TEST)} == {8192}
    assert MQAR_TEST[-1].batch(0, 2).mask.sum(1).tolist() == [256, 256]


@pytest.mark.parametrize("kind", ["isotropic", "power_law"])
def test_regression_is_solved_by_ridge(kind: Any) -> None:
    """More pairs than dimensions: what is left of the error is the noise's, sigma^2 tr (K^T K)^-1 a column."""
    source = Regression(dim=6, n_pairs=40, keys=kind)
    keys, values, weights = source.pairs(0, 300)
    torch.testing.assert_close(keys.norm(dim=-1), torch.ones(300, 40, dtype=torch.float64))
    residual = (values - keys @ weights) / source.noise
    assert kstest(residual.flatten().numpy(), "norm").pvalue > 1e-3
    assert kstest(weights.flatten().numpy(), "norm").pvalue > 1e-3
    gram = keys.mT @ keys + 1e-9 * torch.eye(6, dtype=torch.float64)
    estimate = torch.linalg.solve(gram, keys.mT @ values)
    expected = source.noise**2 * torch.linalg.inv(gram).diagonal(dim1=1, dim2=2).sum()
    found = (estimate - weights).square().sum() / 6
    assert float(found / expected) == pytest.approx(1, abs=0.1)


def test_power_law_keys_have_the_spectrum_of_their_source() -> None:
    """E[k_i^2] of a normalized N(0, diag(1/i^2)), against an independent average."""
    keys = Regression(dim=5, n_pairs=500, keys="power_law").pairs(0, 100).keys.flatten(0, 1).square().mean(0)
    rng = np.random.default_rng(7)
    raw = rng.standard_normal((50_000, 5)) / np.arange(1, 6)
    expected = (raw**2 / (raw**2).sum(1, keepdims=True)).mean(0)
    np.testing.assert_allclose(keys.numpy(), expected, rtol=0.05)
    assert expected[0] > 0.5 > 0.06 > expected[4]


def test_regression_sequences_alternate_keys_and_values() -> None:
    source = Regression(dim=3, n_pairs=5)
    keys, values, _ = source.pairs(2, 4)
    inputs, targets, mask = source.batch(2, 4)
    torch.testing.assert_close(inputs[:, ::2], torch.cat([keys, 0 * keys], 2).float())
    torch.testing.assert_close(inputs[:, 1::2], torch.cat([0 * values, values], 2).float())
    torch.testing.assert_close(targets[:, ::2], values.float())
    assert mask.tolist() == [[True, False] * 5] * 4


def test_linear_systems_follow_their_equation() -> None:
    source = LinearSystem(dim=4, length=20)
    states, transition = source.trajectories(0, 400)
    identity = torch.eye(4, dtype=torch.float64).expand(400, 4, 4)
    torch.testing.assert_close(transition @ transition.mT, identity, atol=1e-12, rtol=0)
    residual = (states[:, 1:] - states[:, :-1] @ transition.mT).flatten(0, 1)
    covariance = residual.mT @ residual / len(residual)
    torch.testing.assert_close(covariance / source.noise**2, identity[0], atol=0.06, rtol=0)
    assert kstest((residual / source.noise).flatten().numpy(), "norm").pvalue > 1e-3
    assert kstest(states[:, 0].flatten().numpy(), "norm").pvalue > 1e-3
    inputs, targets, _ = source.batch(0, 400)
    torch.testing.assert_close(torch.cat([inputs[:, :1], targets], 1), states.float())


def test_rotations_are_uniform() -> None:
    """Haar: E[tr W] = 0, E[(tr W)^2] = 1, and both signs of the determinant are as frequent."""
    transition = LinearSystem(dim=3, length=1).trajectories(0, 4000).transition
    trace = transition.diagonal(dim1=1, dim2=2).sum(1)
    assert float(trace.mean()) == pytest.approx(0, abs=0.06)
    assert float(trace.square().mean()) == pytest.approx(1, abs=0.08)
    positive = int((torch.linalg.det(transition) > 0).sum())
    assert chisquare([positive, 4000 - positive]).pvalue > 1e-3


def test_text_is_cut_from_the_split_s_file(monkeypatch: pytest.MonkeyPatch) -> None:
    from commissure import datasets

    texts = {"valid": b"abcdefghij" * 5, "test": b"0123456789" * 5}

    def wikitext2(split: str) -> datasets.Text:
        return datasets.Text(split, texts[split].decode(), np.frombuffer(texts[split], np.uint8))

    monkeypatch.setattr(datasets, "wikitext2", wikitext2)
    for split, text in (("train", texts["valid"]), ("test", texts["test"])):
        inputs, targets, mask = WikiText2(length=7).batch(0, 30, split=split)  # type: ignore[arg-type]
        assert mask.all()
        for row, following in zip(inputs.tolist(), targets.tolist(), strict=True):
            assert bytes([*row, following[-1]]) in text
            assert row[1:] == following[:-1]
        starts = {bytes(row) for row in inputs.tolist()}
        assert len(starts) > 5
