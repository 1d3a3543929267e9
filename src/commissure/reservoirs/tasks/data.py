"""What a task is: seeded series of inputs and of the targets a readout should give at the same steps."""

from __future__ import annotations

from typing import Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float

from commissure.core.rng import generator
from commissure.reservoirs.inputs import named

__all__ = ["Split", "Task", "TaskData", "split_generator"]

Split = Literal["train", "test"]


class TaskData(NamedTuple):
    """One series: `targets[t]` belongs to `inputs[t]`; the first `warmup` steps are neither fitted nor scored."""

    inputs: Float[np.ndarray, "time channels"]
    targets: Float[np.ndarray, "time outputs"]
    warmup: int


@runtime_checkable
class Task(Protocol):
    """What every task offers.  `data` depends on the seed, the split and the task's own settings, on nothing else."""

    @property
    def n_inputs(self) -> int:
        """Input channels."""

    @property
    def n_outputs(self) -> int:
        """Target columns."""

    def data(self, seed: int, split: Split) -> TaskData:
        """The series of `seed`; "train" and "test" are independent."""


def split_generator(task: str, seed: int, split: Split) -> np.random.Generator:
    """The random numbers of one split of a task."""
    named("split", split, ("train", "test"))
    return generator(seed, task, split)
