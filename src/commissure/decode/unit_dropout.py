"""Unit dropout: in training, hide all spikes of random units, so that no unit is indispensable.

`UnitDropout` is the published rule: the number of units kept follows a density that rises linearly from 1 at
`minimum` to `peak` at `mode` and falls back to 1 at `maximum`, cut at the number of units present; with fewer than
`minimum` units present all are kept.  (The public code's rejection sampler redraws its uniform inside the acceptance
ratio, which flattens 4:1 to 2.3:1; here the distribution is sampled from its exact probabilities.)
`UnitDropoutRate` draws a rate p ~ U(0, maximum) per window and hides each unit with probability p.

Source: arXiv 2506.05320 and its code's documentation (triangular rule).
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float
from pydantic import Field, model_validator

from commissure.core.config import Config

__all__ = ["UnitDropout", "UnitDropoutRate"]


class UnitDropout(Config):
    """Keep a random number of units, triangular between `minimum` and `maximum`."""

    minimum: int = Field(default=60, ge=1)
    mode: int = Field(default=300, ge=1)
    maximum: int = Field(default=1000, ge=1)
    peak: float = Field(default=4.0, ge=1)

    @model_validator(mode="after")
    def _ordered(self) -> UnitDropout:
        if not self.minimum <= self.mode <= self.maximum:
            raise ValueError("minimum <= mode <= maximum")
        return self

    def kept_probabilities(self, n_units: int) -> Float[np.ndarray, " counts"]:
        """Probability of keeping 0, 1, ..., n_units units.

        >>> UnitDropout(minimum=1, mode=2, maximum=3, peak=4).kept_probabilities(3).round(3)
        array([0.   , 0.167, 0.667, 0.167])
        """
        probabilities = np.zeros(n_units + 1)
        if n_units <= self.minimum:
            probabilities[n_units] = 1.0
            return probabilities
        kept = np.arange(self.minimum, min(n_units, self.maximum) + 1)
        corners = np.array([self.minimum, self.mode, self.maximum], dtype=float)
        heights = np.array([1.0, self.peak, 1.0])
        distinct = np.append(True, np.diff(corners) > 0)
        density = np.interp(kept, corners[distinct], heights[distinct])
        probabilities[kept] = density / density.sum()
        return probabilities

    def keep(self, n_units: int, rng: np.random.Generator) -> Bool[np.ndarray, " units"]:
        """Which units keep their spikes."""
        mask = np.zeros(n_units, dtype=bool)
        n_kept = rng.choice(n_units + 1, p=self.kept_probabilities(n_units))
        mask[rng.permutation(n_units)[:n_kept]] = True
        return mask


class UnitDropoutRate(Config):
    """Hide each unit with a probability drawn from U(0, maximum) once per window."""

    maximum: float = Field(default=0.3, ge=0, lt=1)

    def keep(self, n_units: int, rng: np.random.Generator) -> Bool[np.ndarray, " units"]:
        """Which units keep their spikes."""
        return rng.random(n_units) >= self.maximum * rng.random()
