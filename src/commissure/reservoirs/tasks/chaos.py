"""Forecast a chaotic system: give the state it will have `horizon` samples from now.

    u_t = z_t,   y_t = z_{t + horizon},   z = (samples of the system - mean) / standard deviation

Mean and standard deviation are those of the training series.  Training and test series start elsewhere on the
attractor, from their own random numbers.  The equations are in `commissure.reservoirs.tasks.systems`, and one more,
driven by noise:

    NARMA-10   y_{t+1} = 0.3 y_t + 0.05 y_t (y_t + ... + y_{t-9}) + 1.5 u_{t-9} u_t + 0.1,   u ~ U(0, 0.5)

Atiya & Parlos, IEEE Transactions on Neural Networks 11 (2000).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from commissure.core.errors import InputError
from commissure.reservoirs.inputs import named, whole
from commissure.reservoirs.tasks.data import Split, TaskData, split_generator
from commissure.reservoirs.tasks.systems import SYSTEMS, simulate

__all__ = ["ChaoticForecast"]

_NARMA_LIMIT = 2.0  # regular series stay below 1; the rare ones that pass this bound never come back


@dataclass(frozen=True, kw_only=True)
class ChaoticForecast:
    """Forecast `system` `horizon` samples ahead; one channel and one target for each of its coordinates.

    `system`: "lorenz", "mackey_glass", "henon", "rossler", "logistic", "multiscroll", "doublescroll",
    "rabinovich_fabrikant", "lorenz96" or "narma" (whose input is its noise and whose horizon is 1: the target is
    unforeseeable beyond).

    >>> data = ChaoticForecast(system="henon", horizon=2, length=8, warmup=2).data(0, "train")
    >>> data.inputs.shape, bool((data.targets[:-2] == data.inputs[2:]).all())
    ((10, 2), True)
    """

    system: str = "lorenz"
    horizon: int = 1
    length: int = 2000
    warmup: int = 100

    def __post_init__(self) -> None:
        named("system", self.system, (*SYSTEMS, "narma"))
        if whole("horizon", self.horizon, 1) > 1 and self.system == "narma":
            raise InputError("horizon", self.horizon, "1 for narma")
        if whole("length", self.length, 1) + whole("warmup", self.warmup, 0) < 2:
            raise InputError("length", self.length, "2 steps with the warm-up: one has no standard deviation")

    @property
    def n_inputs(self) -> int:
        """Coordinates of the system."""
        return 1 if self.system == "narma" else len(SYSTEMS[self.system].start)

    @property
    def n_outputs(self) -> int:
        """Coordinates of the system."""
        return self.n_inputs

    def data(self, seed: int, split: Split) -> TaskData:
        """One series, standardized by the training series of the same seed."""
        train = self._series(seed, "train")
        inputs, targets = train if split == "train" else self._series(seed, split)
        of_inputs, of_targets = train if self.system == "narma" else (train[0], train[0])
        inputs = (inputs - of_inputs.mean(0)) / of_inputs.std(0)
        return TaskData(inputs, (targets - of_targets.mean(0)) / of_targets.std(0), self.warmup)

    def _series(self, seed: int, split: Split) -> tuple[Float[np.ndarray, "time _"], Float[np.ndarray, "time _"]]:
        """Inputs and targets in the system's own units."""
        rng = split_generator(self.system, seed, split)
        n_steps = self.warmup + self.length
        if self.system == "narma":
            return _narma(n_steps, rng)
        samples = simulate(self.system, n_steps + self.horizon, rng=rng)
        return samples[:n_steps], samples[self.horizon :]


def _narma(n_steps: int, rng: np.random.Generator) -> tuple[Float[np.ndarray, "time 1"], Float[np.ndarray, "time 1"]]:
    """Noise u_t and the value y_{t+1} that it makes; series that diverge are drawn anew."""
    while True:
        u = rng.uniform(0.0, 0.5, n_steps + 9).tolist()
        y = [0.0] * 10
        for t in range(9, len(u)):
            y.append(0.3 * y[-1] + 0.05 * y[-1] * sum(y[-10:]) + 1.5 * u[t - 9] * u[t] + 0.1)
            if y[-1] > _NARMA_LIMIT:
                break
        else:
            return np.array(u[9:])[:, None], np.array(y[10:])[:, None]
