"""What a task gives: a batch with its targets, and how tasks draw.

A task is a frozen configuration; `batch(seed, batch_size, split=)` depends on these alone.  The two splits never share
random numbers, and differ in their distribution where the published task says so.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import numpy as np
import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor

from commissure.core.errors import InputError
from commissure.core.rng import generator

__all__ = ["Split", "Task", "TaskBatch", "distinct", "draws", "token_batch"]

Split = Literal["train", "test"]


class TaskBatch(NamedTuple):
    """`targets[:, t]` is what must be predicted from `inputs[:, : t + 1]`; only where `mask` is true is it scored.

    Tokens are int64 (batch, time); vectors are float32 (batch, time, dim).
    """

    inputs: Shaped[Tensor, "batch time *input"]
    targets: Shaped[Tensor, "batch time *output"]
    mask: Bool[Tensor, "batch time"]


class Task(Protocol):
    """A source of batches; tokens where `vocab` is a number, else vectors of `input_dim` to `output_dim`."""

    name: ClassVar[str]
    reads: ClassVar[Literal["each", "last"]]

    @property
    def vocab(self) -> int | None:
        """Number of tokens, None for vectors."""

    @property
    def input_dim(self) -> int:
        """Width of an input vector; 0 for tokens."""

    @property
    def output_dim(self) -> int:
        """Width of a target vector; 0 for tokens."""

    def batch(self, seed: int, batch_size: int, *, split: Split = "train") -> TaskBatch:
        """Rows drawn from the seed."""

    def model_dump(self) -> dict[str, Any]:
        """The sizes."""


def draws(name: str, seed: int, batch_size: int, split: Split) -> np.random.Generator:
    """The generator of one batch."""
    if split not in ("train", "test"):
        raise InputError("split", split, "'train' or 'test'")
    if not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1:
        raise InputError("batch_size", batch_size, "an integer >= 1")
    return generator(seed, name, split)


def distinct(
    rng: np.random.Generator, batch_size: int, n: int, size: int, weights: np.ndarray | None = None
) -> Int[np.ndarray, "batch n"]:
    """`n` different numbers of range(size) a row, drawn one after the other with probabilities proportional to weights.

    The n first arrivals of exponential clocks with these rates are such draws (Efraimidis & Spirakis 2006).
    """
    arrival = rng.standard_exponential((batch_size, size))
    if weights is not None:
        arrival /= weights
    first = arrival.argpartition(min(n, size - 1), axis=1)[:, :n]
    order = np.take_along_axis(arrival, first, 1).argsort(1)
    return np.take_along_axis(first, order, 1)


def token_batch(inputs: np.ndarray, targets: np.ndarray, mask: np.ndarray) -> TaskBatch:
    """A batch of tokens as tensors."""
    tokens, following = (torch.from_numpy(np.ascontiguousarray(x, np.int64)) for x in (inputs, targets))
    return TaskBatch(tokens, following, torch.from_numpy(np.ascontiguousarray(mask, np.bool_)))
