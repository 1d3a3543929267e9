"""In-context recall, noisy recall and fuzzy recall of the MAD suite (arXiv 2403.17844, appendix B, public generator).

    k_3 v_3 k_1 v_1 k_3 v_3 ... k_p v_p

A mapping from keys to values is drawn for each sequence, pairs follow each other, and the last pair asks for a key
that occurred.  In training every next token is a target; in the test only the value of a key that occurred before is.
Published sets: 12,800 training and 1,280 test examples.
"""

from __future__ import annotations

from functools import cache
from itertools import permutations
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator

from commissure.core.config import Config
from commissure.core.errors import InputError
from commissure.mesa.tasks.batch import Split, TaskBatch, draws, token_batch

__all__ = ["FuzzyRecall", "InContextRecall", "NoisyRecall"]


class InContextRecall(Config):
    """Single-token keys and values; `length` tokens with the answer, so that batches are length - 1 long.

    Half of the vocabulary are keys, half values.

    >>> InContextRecall().batch(seed=0, batch_size=2, split="test").inputs.shape
    torch.Size([2, 127])
    """

    name: ClassVar[str] = "in_context_recall"
    reads: ClassVar[Literal["each", "last"]] = "each"
    input_dim: ClassVar[int] = 0
    output_dim: ClassVar[int] = 0

    vocab: int = Field(default=16, ge=2)
    length: int = Field(default=128, ge=4, multiple_of=2)

    def batch(self, seed: int, batch_size: int, *, split: Split = "train") -> TaskBatch:
        """Rows of pairs; see the module for what is scored."""
        rng = draws(self.name, seed, batch_size, split)
        return _pairs(rng, batch_size, self.length // 2 - 1, vocab=self.vocab, noise_vocab=0, noise=0.0, split=split)


class NoisyRecall(Config):
    """In-context recall where a pair is two noise tokens with probability `noise`; at least one pair is none.

    The last `noise_vocab` tokens of the vocabulary are noise.
    """

    name: ClassVar[str] = "noisy_recall"
    reads: ClassVar[Literal["each", "last"]] = "each"
    input_dim: ClassVar[int] = 0
    output_dim: ClassVar[int] = 0

    vocab: int = Field(default=32, ge=3)
    length: int = Field(default=128, ge=4, multiple_of=2)
    noise_vocab: int = Field(default=16, ge=1)
    noise: float = Field(default=0.2, ge=0, lt=1)

    @model_validator(mode="after")
    def _fits(self) -> NoisyRecall:
        if self.vocab - self.noise_vocab < 2:
            raise InputError("noise_vocab", self.noise_vocab, f"at most vocab - 2 = {self.vocab - 2}")
        return self

    def batch(self, seed: int, batch_size: int, *, split: Split = "train") -> TaskBatch:
        """Rows of pairs; see the module for what is scored."""
        rng = draws(self.name, seed, batch_size, split)
        return _pairs(
            rng, batch_size, self.length // 2 - 1, vocab=self.vocab, noise_vocab=self.noise_vocab, noise=self.noise,
            split=split,
        )  # fmt: skip


class FuzzyRecall(Config):
    """Keys and values are motifs of 1 to `motif` different tokens; in the test keys have the full length.

    A key and its value keep their motifs within a sequence; rows are padded on the left with the token vocab - 1.
    Unlike the public generator, which in rare short rows asks for a key it has not shown, the key asked for last has
    always occurred.
    """

    name: ClassVar[str] = "fuzzy_recall"
    reads: ClassVar[Literal["each", "last"]] = "each"
    input_dim: ClassVar[int] = 0
    output_dim: ClassVar[int] = 0

    vocab: int = Field(default=16, ge=5)
    length: int = Field(default=128, ge=16)
    motif: int = Field(default=3, ge=1, le=4)

    @model_validator(mode="after")
    def _fits(self) -> FuzzyRecall:
        if (self.vocab - 1) // 2 < self.motif:
            raise InputError("motif", self.motif, f"at most the number of key tokens, {(self.vocab - 1) // 2}")
        if self.length < 6 * self.motif + 2:
            raise InputError(
                "length", self.length, f"at least {6 * self.motif + 2}, for the question and what precedes"
            )
        return self

    def batch(self, seed: int, batch_size: int, *, split: Split = "train") -> TaskBatch:
        """Rows of motif pairs; see the module for what is scored."""
        rng = draws(self.name, seed, batch_size, split)
        half, pad, widest = (self.vocab - 1) // 2, self.vocab - 1, 2 * self.motif
        keys, values = _motifs(0, half, self.motif), _motifs(half, pad, self.motif)
        smallest = 1 if split == "train" else self.motif
        n_items = self.length // (smallest + 1)
        chosen = _some(rng, keys, smallest, (batch_size, n_items))
        asked = _some(rng, keys, smallest, (batch_size, 1))
        mapping = _some(rng, values, 1, (batch_size, len(keys)))

        def width(items: np.ndarray) -> np.ndarray:
            return (keys[items] >= 0).sum(-1) + (values[np.take_along_axis(mapping, items, 1)] >= 0).sum(-1)

        limit = self.length - width(asked) - widest  # pairs begin before it, as in the public generator
        place = (rng.random((batch_size, 1)) * (limit - widest + 1)).astype(np.int64)
        chosen = _insert(chosen, asked, starts=_starts(width(chosen)), place=place)
        is_used = _starts(width(chosen)) < limit
        items = np.concatenate([chosen, asked], 1)
        is_used = np.concatenate([is_used, np.ones_like(asked, np.bool_)], 1)
        motifs = np.stack([keys[items], values[np.take_along_axis(mapping, items, 1)]], 2)
        is_answer = np.zeros_like(motifs, np.bool_)
        is_answer[:, :, 1] = _repeats(items)[..., None]
        exists = (motifs >= 0) & is_used[..., None, None]
        order = exists.reshape(batch_size, -1).argsort(1, kind="stable")[:, -self.length - 1 :]
        tokens = np.where(exists, motifs, pad).reshape(batch_size, -1)
        flags = (is_answer & exists).reshape(batch_size, -1)
        return _shifted(np.take_along_axis(tokens, order, 1), np.take_along_axis(flags, order, 1), split)


def _pairs(
    rng: np.random.Generator,
    batch_size: int,
    n_pairs: int,
    *,
    vocab: int,
    noise_vocab: int,
    noise: float,
    split: Split,
) -> TaskBatch:
    """Rows of `n_pairs` single-token pairs and the pair that asks."""
    used, rows = vocab - noise_vocab, np.arange(batch_size)
    n_keys = used // 2
    mapping = rng.integers(n_keys, used, (batch_size, n_keys))
    keys = rng.integers(0, n_keys, (batch_size, n_pairs))
    is_pair = rng.random((batch_size, n_pairs)) >= noise
    is_pair[rows, rng.integers(0, n_pairs, batch_size)] = True
    shown = np.zeros((batch_size, n_pairs + 1, n_keys), np.bool_)  # before each pair
    np.put_along_axis(shown[:, 1:], keys[..., None], is_pair[..., None], 2)
    shown = np.logical_or.accumulate(shown, 1)
    asked = np.where(shown[:, -1], rng.random((batch_size, n_keys)), -1.0).argmax(1)
    keys = np.concatenate([keys, asked[:, None]], 1)
    is_pair = np.concatenate([is_pair, np.ones((batch_size, 1), np.bool_)], 1)
    is_known = is_pair & np.take_along_axis(shown, keys[..., None], 2)[..., 0]
    pairs = np.stack([keys, np.take_along_axis(mapping, keys, 1)], 2)
    if noise:
        pairs = np.where(is_pair[..., None], pairs, rng.integers(used, vocab, pairs.shape))
    is_answer = np.stack([np.zeros_like(is_known), is_known], 2)
    return _shifted(pairs.reshape(batch_size, -1), is_answer.reshape(batch_size, -1), split)


def _shifted(tokens: np.ndarray, is_answer: np.ndarray, split: Split) -> TaskBatch:
    """Inputs and next tokens; in training all of them count."""
    mask = np.ones_like(is_answer[:, 1:]) if split == "train" else is_answer[:, 1:]
    return token_batch(tokens[:, :-1], tokens[:, 1:], mask)


@cache
def _motifs(start: int, stop: int, longest: int) -> np.ndarray:
    """All ordered choices of 1 to `longest` tokens of range(start, stop), filled up with -1."""
    rows = [p + (-1,) * (longest - n) for n in range(1, longest + 1) for p in permutations(range(start, stop), n)]
    return np.array(rows)


def _some(rng: np.random.Generator, motifs: np.ndarray, smallest: int, shape: tuple[int, int]) -> np.ndarray:
    """Row numbers of `motifs`: a length, uniform from `smallest` on, then one of that length."""
    lengths = (motifs >= 0).sum(1)
    counts = np.bincount(lengths, minlength=motifs.shape[1] + 1)
    first = np.cumsum(counts) - counts
    length = rng.integers(smallest, motifs.shape[1] + 1, shape)
    return first[length] + (rng.random(shape) * counts[length]).astype(np.int64)


def _starts(widths: np.ndarray) -> np.ndarray:
    """Where each item begins."""
    return np.cumsum(widths, 1) - widths


def _insert(chosen: np.ndarray, asked: np.ndarray, *, starts: np.ndarray, place: np.ndarray) -> np.ndarray:
    """`chosen` with `asked` before the first item that begins at or after `place`, unless it has come before."""
    n = chosen.shape[1]
    at = (starts < place).sum(1, keepdims=True)
    column = np.arange(n)
    has_come = ((chosen == asked) & (column < at)).any(1, keepdims=True)
    moved = np.take_along_axis(chosen, np.maximum(column - (column > at), 0), 1)
    return np.where(has_come, chosen, np.where(column == at, asked, moved))


def _repeats(items: np.ndarray) -> np.ndarray:
    """Whether each item of a row occurred before in it."""
    order = items.argsort(1, kind="stable")
    ranked = np.take_along_axis(items, order, 1)
    again = np.concatenate([np.zeros_like(ranked[:, :1], np.bool_), ranked[:, 1:] == ranked[:, :-1]], 1)
    result = np.zeros_like(again)
    np.put_along_axis(result, order, again, 1)
    return result
