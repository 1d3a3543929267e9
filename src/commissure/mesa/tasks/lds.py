"""Linear dynamical systems: predict the next state of a system that is new in every sequence.

    s_{t+1} = W s_t + noise * e_t,   s_1, e_t ~ N(0, I),   W orthogonal, uniform (Haar)

The setting of the first mesa layer (arXiv 2309.05858, section 4), with a rotation instead of a random contraction.
"""

from __future__ import annotations

from typing import ClassVar, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from commissure.core.config import Config
from commissure.mesa.tasks.batch import Split, TaskBatch, draws

__all__ = ["LinearSystem", "Trajectories"]


class Trajectories(NamedTuple):
    """States s_1 .. s_{T+1}, and each sequence's map."""

    states: Float[Tensor, "batch time_plus_1 dim"]
    transition: Float[Tensor, "batch dim dim"]


class LinearSystem(Config):
    """`length` predictions of `dim`-vectors; input s_t, target s_{t+1}.

    >>> LinearSystem().batch(seed=0, batch_size=2).inputs.shape
    torch.Size([2, 64, 10])
    """

    name: ClassVar[str] = "lds"
    reads: ClassVar[Literal["each", "last"]] = "each"
    vocab: ClassVar[None] = None

    dim: int = Field(default=10, ge=1)
    length: int = Field(default=64, ge=1)
    noise: float = Field(default=0.05, ge=0)

    @property
    def input_dim(self) -> int:
        """A state."""
        return self.dim

    @property
    def output_dim(self) -> int:
        """A state."""
        return self.dim

    def trajectories(self, seed: int, batch_size: int, *, split: Split = "train") -> Trajectories:
        """States and maps, float64."""
        rng = draws(self.name, seed, batch_size, split)
        q, r = np.linalg.qr(rng.standard_normal((batch_size, self.dim, self.dim)))
        transition = q * np.sign(np.einsum("bii->bi", r))[:, None]  # without the signs Q is not uniform
        states = rng.standard_normal((self.length + 1, batch_size, self.dim))
        states[1:] *= self.noise
        for t in range(self.length):
            states[t + 1] += np.einsum("bij,bj->bi", transition, states[t])
        return Trajectories(torch.from_numpy(states.transpose(1, 0, 2).copy()), torch.from_numpy(transition))

    def batch(self, seed: int, batch_size: int, *, split: Split = "train") -> TaskBatch:
        """Every position is scored; both splits have the same distribution."""
        states = self.trajectories(seed, batch_size, split=split).states.float()
        return TaskBatch(states[:, :-1], states[:, 1:], torch.ones(batch_size, self.length, dtype=torch.bool))
