"""Text as bytes: the next byte of WikiText-2 (arXiv 1609.07843)."""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from commissure.core.config import Config
from commissure.mesa.tasks.batch import Split, TaskBatch, draws, token_batch

__all__ = ["WikiText2"]


class WikiText2(Config):
    """Windows of `length` + 1 bytes at random places; trained on the validation file (1.1 MB), tested on the test file.

    The training file is 10 MB and not in the catalog.
    """

    name: ClassVar[str] = "wikitext2"
    reads: ClassVar[Literal["each", "last"]] = "each"
    vocab: ClassVar[int] = 256
    input_dim: ClassVar[int] = 0
    output_dim: ClassVar[int] = 0

    length: int = Field(default=256, ge=1)

    def batch(self, seed: int, batch_size: int, *, split: Split = "train") -> TaskBatch:
        """Every byte is scored."""
        from commissure.datasets import wikitext2

        rng = draws(self.name, seed, batch_size, split)
        text = wikitext2("valid" if split == "train" else "test").utf8
        starts = rng.integers(0, len(text) - self.length, batch_size)
        tokens = text[starts[:, None] + np.arange(self.length + 1)]
        return token_batch(tokens[:, :-1], tokens[:, 1:], np.ones((batch_size, self.length), np.bool_))
