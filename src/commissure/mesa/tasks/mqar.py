"""Multi-query associative recall (Zoology, arXiv 2312.04927, section 4 and the public generator).

    k_1 v_1 ... k_n v_n | fill ... k_j fill ... k_i ...        targets: v_j at k_j, v_i at k_i

Keys are distinct tokens of the lower half of the vocabulary (token 0 excluded), values distinct tokens of the upper
half.  After the pairs each key is asked once, at an even distance 2 g, where the g are drawn without replacement with
probability proportional to (g + 1)^(a - 1); everything else is filled with random tokens.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator

from commissure.core.config import Config
from commissure.core.errors import InputError
from commissure.mesa.tasks.batch import Split, TaskBatch, distinct, draws, token_batch

__all__ = ["MQAR", "MQAR_TEST", "MQAR_TRAIN"]


class MQAR(Config):
    """Recall of `n_pairs` pairs in `length` tokens out of `vocab`; every answer is scored, nothing else.

    >>> batch = MQAR(n_pairs=2, length=16, vocab=12).batch(seed=0, batch_size=3)
    >>> batch.inputs.shape, batch.mask.sum(1).tolist()
    (torch.Size([3, 16]), [2, 2, 2])
    """

    name: ClassVar[str] = "mqar"
    reads: ClassVar[Literal["each", "last"]] = "each"
    input_dim: ClassVar[int] = 0
    output_dim: ClassVar[int] = 0

    n_pairs: int = Field(default=4, ge=1)
    length: int = Field(default=64, ge=4)
    vocab: int = Field(default=8192, ge=4)
    power: float = Field(default=0.01, gt=0, le=1, description="a of the gaps' power law; 1 is uniform")

    @model_validator(mode="after")
    def _fits(self) -> MQAR:
        if self.length % 2 or self.length < 4 * self.n_pairs:
            raise InputError("length", self.length, f"an even number >= 4 n_pairs = {4 * self.n_pairs}")
        if self.vocab // 2 - 1 < self.n_pairs:
            raise InputError("vocab", self.vocab, f"at least {2 * self.n_pairs + 2}, for as many keys and values")
        return self

    def batch(self, seed: int, batch_size: int, *, split: Split = "train") -> TaskBatch:
        """Rows of pairs and questions; both splits have the same distribution."""
        rng = draws(self.name, seed, batch_size, split)
        half, context = self.vocab // 2, 2 * self.n_pairs
        keys = 1 + distinct(rng, batch_size, self.n_pairs, half - 1)
        values = half + distinct(rng, batch_size, self.n_pairs, self.vocab - half)
        slots = (self.length - context) // 2
        gaps = distinct(rng, batch_size, self.n_pairs, slots, np.arange(1.0, slots + 1) ** (self.power - 1))
        inputs = rng.integers(0, self.vocab, (batch_size, self.length))
        inputs[:, 0:context:2], inputs[:, 1:context:2] = keys, values
        asked = context + 2 * gaps
        np.put_along_axis(inputs, asked, keys, 1)
        targets, mask = np.zeros_like(inputs), np.zeros(inputs.shape, np.bool_)
        np.put_along_axis(targets, asked, values, 1)
        np.put_along_axis(mask, asked, True, 1)
        return token_batch(inputs, targets, mask)


def _sizes(*sizes: tuple[int, int]) -> tuple[MQAR, ...]:
    return tuple(MQAR(length=length, n_pairs=n_pairs) for length, n_pairs in sizes)


MQAR_TRAIN = _sizes((64, 4), (128, 8), (256, 16), (256, 32), (256, 64))
"""The published training mix: 100,000 examples of the first size, 20,000 of each other."""

MQAR_TEST = _sizes((64, 4), (64, 8), (64, 16), (128, 32), (256, 64), (512, 128), (1024, 256))
"""The published test sizes, 1,000 examples each."""
