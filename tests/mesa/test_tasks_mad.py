"""The six MAD tasks, each solved by a program that sees the inputs alone, and their frequencies."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from scipy.stats import chisquare

from commissure.mesa.tasks import (
    Compression,
    FuzzyRecall,
    InContextRecall,
    Memorization,
    NoisyRecall,
    SelectiveCopying,
    TaskBatch,
)


def rows(batch: TaskBatch) -> Iterator[tuple[list[int], list[int], list[bool]]]:
    yield from zip(*(part.tolist() for part in batch), strict=True)


@pytest.mark.parametrize("source", [InContextRecall(), InContextRecall(vocab=9, length=20), NoisyRecall()])
def test_recall_is_solved_by_looking_up(source: Any) -> None:
    """What is scored in the test is exactly what a program that remembers pairs can know."""
    noise_from = source.vocab - getattr(source, "noise_vocab", 0)
    n_keys = noise_from // 2
    batch = source.batch(1, 200, split="test")
    assert batch.inputs.shape == (200, source.length - 1)
    for inputs, targets, mask in rows(batch):
        memory: dict[int, int] = {}
        for t in range(0, len(inputs), 2):
            key, value = inputs[t], targets[t]
            assert mask[t] == (key in memory)
            if mask[t]:
                assert memory[key] == value
            if key < noise_from:
                assert key < n_keys <= value < noise_from
                memory[key] = value
            else:
                assert value >= noise_from
        assert not any(mask[1::2])
        assert mask[-1], "the last question has an answer"
        assert targets[:-1] == inputs[1:]


def test_in_training_every_next_token_counts() -> None:
    for source in (InContextRecall(), NoisyRecall(), FuzzyRecall()):
        inputs, targets, mask = source.batch(0, 20)
        assert mask.all()
        assert (targets[:, :-1] == inputs[:, 1:]).all()


def test_recall_frequencies() -> None:
    inputs, targets, _ = InContextRecall(vocab=8, length=10).batch(0, 4000)
    assert chisquare(np.bincount(inputs[:, 0], minlength=4)).pvalue > 1e-3
    assert chisquare(np.bincount(inputs[:, 1] - 4, minlength=4)).pvalue > 1e-3
    last = {}
    for row, answer in zip(inputs.tolist(), targets[:, -1].tolist(), strict=True):
        shown = sorted(set(row[:-1:2]))
        last.setdefault(len(shown), []).append(shown.index(row[-1]))
        assert answer == row[row.index(row[-1]) + 1]
    for n, found in last.items():  # the question is uniform over the keys shown
        if n > 1:
            assert chisquare(np.bincount(found, minlength=n)).pvalue > 1e-3


def test_noise_is_as_frequent_as_asked_and_never_everything() -> None:
    source = NoisyRecall(length=42, noise=0.4)
    pairs = source.batch(0, 2000).inputs[:, :-1:2].numpy()
    kept = pairs < 16
    assert kept.any(1).all()
    expected = 0.6 + 0.4 / 20  # one pair of twenty is never noise
    assert kept.mean() == pytest.approx(expected, abs=0.01)
    assert chisquare(np.bincount(pairs[~kept] - 16, minlength=16)).pvalue > 1e-3
    assert (NoisyRecall(length=8, noise=0.99).batch(0, 500, split="test").mask.any(1)).all()


def parse(tokens: list[int], half: int, pad: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(key, value) motifs: runs of key tokens and of value tokens take turns."""
    runs: list[list[int]] = []
    for token in tokens:
        assert token < pad
        if runs and (runs[-1][-1] < half) == (token < half):
            runs[-1].append(token)
        else:
            runs.append([token])
    assert len(runs) % 2 == 0
    return [(tuple(key), tuple(value)) for key, value in zip(runs[::2], runs[1::2], strict=True)]


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("source", [FuzzyRecall(), FuzzyRecall(vocab=11, length=40, motif=2)])
def test_fuzzy_recall_is_solved_by_parsing(source: FuzzyRecall, split: Any) -> None:
    half, pad = (source.vocab - 1) // 2, source.vocab - 1
    batch = source.batch(2, 200, split=split)
    assert batch.inputs.shape == (200, source.length)
    for inputs, targets, mask in rows(batch):
        tokens = [*inputs, targets[-1]]
        n_pad = sum(token == pad for token in tokens)
        assert tokens[:n_pad] == [pad] * n_pad
        assert n_pad <= 2 * 2 * source.motif
        memory: dict[tuple[int, ...], tuple[int, ...]] = {}
        scored, t = [False] * n_pad, n_pad
        for key, value in parse(tokens[n_pad:], half, pad):
            assert len(set(key)) == len(key) <= source.motif
            assert len(set(value)) == len(value) <= source.motif
            assert split == "train" or len(key) == source.motif
            is_known = key in memory
            assert memory.setdefault(key, value) == value
            scored += [False] * len(key) + [is_known] * len(value)
            t += len(key) + len(value)
        assert is_known, "the last key has occurred"
        assert mask == ([True] * source.length if split == "train" else scored[1:])


def test_fuzzy_motifs_have_uniform_lengths_and_tokens() -> None:
    source = FuzzyRecall(vocab=16, length=128)
    lengths, firsts = [], []
    for inputs, _, _ in rows(source.batch(0, 3000)):
        first = next(t for t, token in enumerate(inputs) if token != 15)
        run = next(n for n in range(1, 5) if inputs[first + n] >= 7)
        lengths.append(run)
        firsts.append(inputs[first])
    # the first pair is the one asked for when its place is 0; both follow the same law
    assert chisquare(np.bincount(lengths, minlength=4)[1:]).pvalue > 1e-3
    assert chisquare(np.bincount(firsts, minlength=7)).pvalue > 1e-3


def test_memorization_has_one_mapping() -> None:
    source = Memorization()
    memory: dict[int, int] = {}
    for split in ("train", "test"):
        for inputs, targets, mask in rows(source.batch(0, 300, split=split)):  # type: ignore[arg-type]
            assert mask == [False, True] * 16
            assert set(inputs[1::2]) == {255}
            for key, value in zip(inputs[::2], targets[1::2], strict=True):
                assert memory.setdefault(key, value) == value
    assert sorted(memory) == list(range(127))
    assert len(set(memory.values())) == 127
    assert all(127 <= value < 255 for value in memory.values())
    keys = source.batch(1, 1000).inputs[:, ::2].flatten()
    assert chisquare(np.bincount(keys, minlength=127)).pvalue > 1e-3
    assert (Memorization(mapping_seed=1).mapping() != source.mapping()).any()


def test_compression_asks_for_the_inputs() -> None:
    inputs, targets, mask = Compression().batch(0, 500)
    assert (inputs == targets).all()
    assert mask.all()
    assert (inputs[:, -1] == 15).all()
    assert chisquare(np.bincount(inputs[:, :-1].flatten(), minlength=15)).pvalue > 1e-3


def test_selective_copying_is_solved_by_copying() -> None:
    source = SelectiveCopying(length=64, n_copied=7)
    gaps = []
    for inputs, targets, mask in rows(source.batch(0, 1000)):
        assert mask == [False] * 57 + [True] * 7
        assert inputs[-8:] == [15] + [14] * 7
        places = [t for t, token in enumerate(inputs[:-8]) if token != 14]
        assert [inputs[t] for t in places] == targets[-7:]
        assert places[-1] == 55, "the last token stands before the copy token"
        gaps.append([b - a - 1 for a, b in pairwise([-1, *places])])
    assert chisquare(np.sum(gaps, 0)).pvalue > 1e-3
    assert np.var(gaps, axis=0).mean() == pytest.approx(49 * 1 / 7 * 6 / 7, rel=0.1), "multinomial"
