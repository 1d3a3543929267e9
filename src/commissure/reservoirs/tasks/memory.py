"""Memory capacity: repeat the input of some steps ago.

    y_t = (u_{t - k}),   k = first_delay .. max_delay,   u_t ~ U(-1, 1) independent

The mean R^2 over the delays is the published score; the sum of r^2 over all delays of a readout of all units is
Jaeger's memory capacity, at most the number of units.  Jaeger, GMD report 152 (2001); bioRxiv 2025.06.20.660760.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from commissure.core.errors import InputError
from commissure.reservoirs.inputs import whole
from commissure.reservoirs.tasks.data import Split, TaskData, split_generator

__all__ = ["MemoryCapacity"]


@dataclass(frozen=True, kw_only=True)
class MemoryCapacity:
    """Repeat the input of 1 (`first_delay`) to `max_delay` steps ago: one target column for each delay.

    `length` steps are scored, after `warmup` more.  Delays beyond the warm-up would reach before the first input.

    >>> task = MemoryCapacity(max_delay=2, length=5, warmup=2)
    >>> data = task.data(0, "train")
    >>> data.inputs.shape, data.targets.shape, bool((data.targets[2:, 1] == data.inputs[:-2, 0]).all())
    ((7, 1), (7, 2), True)
    """

    max_delay: int = 16
    length: int = 2000
    warmup: int = 100
    first_delay: int = 1

    def __post_init__(self) -> None:
        whole("length", self.length, 1)
        if whole("first_delay", self.first_delay, 0) > 1:
            raise InputError("first_delay", self.first_delay, "0 or 1")
        if whole("max_delay", self.max_delay, self.first_delay) > whole("warmup", self.warmup, 0):
            allowed = f"an integer from {self.first_delay} to warmup = {self.warmup}"
            raise InputError("max_delay", self.max_delay, allowed, "raise the warm-up")

    @property
    def n_inputs(self) -> int:
        """1."""
        return 1

    @property
    def n_outputs(self) -> int:
        """One for each delay."""
        return self.max_delay - self.first_delay + 1

    def data(self, seed: int, split: Split) -> TaskData:
        """One series; before its start the input counts as 0."""
        u = split_generator("memory capacity", seed, split).uniform(-1.0, 1.0, self.warmup + self.length)
        padded = np.concatenate([np.zeros(self.max_delay), u])
        delays = range(self.first_delay, self.max_delay + 1)
        targets = np.stack([padded[self.max_delay - k : len(padded) - k] for k in delays], 1)
        return TaskData(u[:, None], targets, self.warmup)
