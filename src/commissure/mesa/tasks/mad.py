"""Memorization, compression and selective copying of the MAD suite (arXiv 2403.17844, appendix B, public generator).

Published sets: 12,800 training examples (memorization: 256) and 1,280 test examples.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator

from commissure.core.config import Config
from commissure.core.errors import InputError
from commissure.core.rng import generator
from commissure.mesa.tasks.batch import Split, TaskBatch, draws, token_batch

__all__ = ["Compression", "Memorization", "SelectiveCopying"]


class Memorization(Config):
    """Key, insert token, key, insert token, ...: at each insert token the value of the key before it.

    One mapping, drawn from `mapping_seed`, for all sequences of both splits: it can only be learned by heart.  The
    last token is the insert token, the lower half of the others are keys, the upper half values, no value twice.
    """

    name: ClassVar[str] = "memorization"
    reads: ClassVar[Literal["each", "last"]] = "each"
    input_dim: ClassVar[int] = 0
    output_dim: ClassVar[int] = 0

    vocab: int = Field(default=256, ge=3)
    length: int = Field(default=32, ge=2, multiple_of=2)
    mapping_seed: int = Field(default=12345, ge=0)

    def mapping(self) -> np.ndarray:
        """The value of each key."""
        half = (self.vocab - 1) // 2
        return generator(self.mapping_seed, self.name).permutation(np.arange(half, self.vocab - 1))[:half]

    def batch(self, seed: int, batch_size: int, *, split: Split = "train") -> TaskBatch:
        """Rows of keys; both splits have the same distribution."""
        rng = draws(self.name, seed, batch_size, split)
        mapping = self.mapping()
        inputs = np.full((batch_size, self.length), self.vocab - 1)
        inputs[:, ::2] = keys = rng.integers(0, len(mapping), (batch_size, self.length // 2))
        targets, mask = np.zeros_like(inputs), np.zeros(inputs.shape, np.bool_)
        targets[:, 1::2], mask[:, 1::2] = mapping[keys], True
        return token_batch(inputs, targets, mask)


class Compression(Config):
    """length - 1 random tokens and a compression token, all to be rebuilt from the last position's output.

    The target of position t is the input at t; a small network reads it from the last output and a code of t
    (`reads = "last"`).
    """

    name: ClassVar[str] = "compression"
    reads: ClassVar[Literal["each", "last"]] = "last"
    input_dim: ClassVar[int] = 0
    output_dim: ClassVar[int] = 0

    vocab: int = Field(default=16, ge=2)
    length: int = Field(default=32, ge=2)

    def batch(self, seed: int, batch_size: int, *, split: Split = "train") -> TaskBatch:
        """Rows of tokens; both splits have the same distribution."""
        rng = draws(self.name, seed, batch_size, split)
        inputs = rng.integers(0, self.vocab - 1, (batch_size, self.length))
        inputs[:, -1] = self.vocab - 1
        return token_batch(inputs, inputs, np.ones(inputs.shape, np.bool_))


class SelectiveCopying(Config):
    """`n_copied` tokens scattered among blanks, a copy token, then as many blanks, at which the tokens come in order.

    The copy token is vocab - 1, the blank vocab - 2.  As in the public generator each blank falls with equal
    probability before one of the tokens, so that the last token stands right before the copy token.
    """

    name: ClassVar[str] = "selective_copying"
    reads: ClassVar[Literal["each", "last"]] = "each"
    input_dim: ClassVar[int] = 0
    output_dim: ClassVar[int] = 0

    vocab: int = Field(default=16, ge=3)
    length: int = Field(default=256, ge=4)
    n_copied: int = Field(default=16, ge=1)

    @model_validator(mode="after")
    def _fits(self) -> SelectiveCopying:
        if self.length <= 2 * self.n_copied + 1:
            raise InputError("length", self.length, f"more than 2 n_copied + 1 = {2 * self.n_copied + 1}")
        return self

    def batch(self, seed: int, batch_size: int, *, split: Split = "train") -> TaskBatch:
        """Rows of scattered tokens; both splits have the same distribution."""
        rng = draws(self.name, seed, batch_size, split)
        n = self.n_copied
        tokens = rng.integers(0, self.vocab - 2, (batch_size, n))
        before = rng.multinomial(self.length - 2 * n - 1, np.full(n, 1 / n), batch_size)
        inputs = np.full((batch_size, self.length), self.vocab - 2)
        np.put_along_axis(inputs, np.cumsum(before, 1) + np.arange(n), tokens, 1)
        inputs[:, -n - 1] = self.vocab - 1
        targets, mask = np.zeros_like(inputs), np.zeros(inputs.shape, np.bool_)
        targets[:, -n:], mask[:, -n:] = tokens, True
        return token_batch(inputs, targets, mask)
