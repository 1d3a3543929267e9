"""In-context linear regression: keys and values of a new random linear map in every sequence (Garg et al., arXiv
2208.01066, section 3, in the layout of alternating keys and values).

    v = W k + noise * e,   W_ij, e_i ~ N(0, 1),   |k| = 1

Keys are directions of N(0, I) ("isotropic") or of N(0, diag(1, 1/4, .., 1/d^2)) ("power_law": standard deviation 1/i).
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

__all__ = ["Pairs", "Regression"]


class Pairs(NamedTuple):
    """Keys, their values, and the map (values = keys @ weights plus noise)."""

    keys: Float[Tensor, "batch pairs dim"]
    values: Float[Tensor, "batch pairs dim"]
    weights: Float[Tensor, "batch dim dim"]


class Regression(Config):
    """`n_pairs` pairs of `dim`-vectors; as a sequence (k_1, 0), (0, v_1), (k_2, 0), ..., scored at the keys.

    >>> task = Regression(dim=4, n_pairs=8)
    >>> task.pairs(seed=0, batch_size=2).values.shape, task.batch(seed=0, batch_size=2).inputs.shape
    (torch.Size([2, 8, 4]), torch.Size([2, 16, 8]))
    """

    name: ClassVar[str] = "regression"
    reads: ClassVar[Literal["each", "last"]] = "each"
    vocab: ClassVar[None] = None

    dim: int = Field(default=32, ge=1)
    n_pairs: int = Field(default=128, ge=1)
    noise: float = Field(default=0.05, ge=0)
    keys: Literal["isotropic", "power_law"] = "isotropic"

    @property
    def input_dim(self) -> int:
        """A key and a value side by side."""
        return 2 * self.dim

    @property
    def output_dim(self) -> int:
        """A value."""
        return self.dim

    def pairs(self, seed: int, batch_size: int, *, split: Split = "train") -> Pairs:
        """Keys, values and maps, float64."""
        rng = draws(self.name, seed, batch_size, split)
        scale = np.ones(self.dim) if self.keys == "isotropic" else 1 / np.arange(1.0, self.dim + 1)
        keys = rng.standard_normal((batch_size, self.n_pairs, self.dim)) * scale
        keys /= np.linalg.norm(keys, axis=2, keepdims=True)
        weights = rng.standard_normal((batch_size, self.dim, self.dim))
        values = keys @ weights + self.noise * rng.standard_normal(keys.shape)
        return Pairs(torch.from_numpy(keys), torch.from_numpy(values), torch.from_numpy(weights))

    def batch(self, seed: int, batch_size: int, *, split: Split = "train") -> TaskBatch:
        """The pairs as sequences of length 2 n_pairs; both splits have the same distribution."""
        keys, values, _ = self.pairs(seed, batch_size, split=split)
        inputs = torch.zeros(batch_size, 2 * self.n_pairs, 2 * self.dim)
        inputs[:, ::2, : self.dim], inputs[:, 1::2, self.dim :] = keys.float(), values.float()
        targets = torch.zeros(batch_size, 2 * self.n_pairs, self.dim)
        targets[:, ::2] = values.float()
        mask = torch.zeros(batch_size, 2 * self.n_pairs, dtype=torch.bool)
        mask[:, ::2] = True
        return TaskBatch(inputs, targets, mask)
