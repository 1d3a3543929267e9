"""Nonlinear transform: turn a sine into the square wave of the same sign.

    u_t = sin(2 pi n_cycles t / T + phase)        y_t = 1 where u_t >= 0, else -1        T = warmup + length

The target is the square wave: in the published code it is overwritten by the sine itself, which every network copies
with R^2 of about 1.  bioRxiv 2025.06.20.660760.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from commissure.core.errors import InputError
from commissure.reservoirs.inputs import real, whole
from commissure.reservoirs.tasks.data import Split, TaskData, split_generator

__all__ = ["NonlinearTransform"]


@dataclass(frozen=True, kw_only=True)
class NonlinearTransform:
    """Sine of `n_cycles` cycles over the whole series, at a random phase, to a square wave of -1 and 1.

    >>> data = NonlinearTransform(n_cycles=2, length=90, warmup=10).data(0, "train")
    >>> bool((data.targets == np.where(data.inputs >= 0, 1.0, -1.0)).all())
    True
    """

    n_cycles: float = 10.0
    length: int = 2000
    warmup: int = 100

    def __post_init__(self) -> None:
        half = (whole("warmup", self.warmup, 0) + whole("length", self.length, 1)) / 2
        if not 0 < real("n_cycles", self.n_cycles) < half:
            allowed = f"a number between 0 and half the steps, {half}"
            raise InputError("n_cycles", self.n_cycles, allowed)

    @property
    def n_inputs(self) -> int:
        """1."""
        return 1

    @property
    def n_outputs(self) -> int:
        """1."""
        return 1

    def data(self, seed: int, split: Split) -> TaskData:
        """One series; the splits differ in their phase."""
        phase = split_generator("nonlinear transform", seed, split).uniform(0.0, 2 * np.pi)
        steps = np.arange(self.warmup + self.length)
        u = np.sin(2 * np.pi * self.n_cycles * steps / steps.size + phase)[:, None]
        return TaskData(u, np.where(u >= 0, 1.0, -1.0), self.warmup)
