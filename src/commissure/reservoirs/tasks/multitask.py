"""Multitask: several inputs at once, half to be remembered, half to be transformed, each read near where it enters.

    input c   a memory task (max_delay targets)   or   a nonlinear transform of 10, 20, 30 or 40 cycles (1 target)

The modules fall into as many groups as there are inputs, in order, so that groups follow a hierarchy's branches:

| modules in a group | input                       | readouts, each on the group's own task |
|--------------------|-----------------------------|----------------------------------------|
| 1                  | one node of it (drawn)      | its other nodes                        |
| 2                  | the first                   | the second                             |
| more               | one of them (drawn)         | each of the others                     |

With 8 modules these are the published 8, 4 and 2 inputs (bioRxiv 2025.06.20.660760).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Int
from numpy.typing import ArrayLike

from commissure.core.errors import InputError
from commissure.core.rng import generator, spawn
from commissure.reservoirs.inputs import listed, named, whole
from commissure.reservoirs.io_map import IOMap, indices
from commissure.reservoirs.tasks.data import Split, TaskData
from commissure.reservoirs.tasks.memory import MemoryCapacity
from commissure.reservoirs.tasks.nonlinear import NonlinearTransform

__all__ = ["Multitask"]


@dataclass(frozen=True, kw_only=True)
class Multitask:
    """`n_inputs` (2, 4 or 8) tasks at once, half of memory and half of nonlinear transform.

    `layout`: "aligned" gives the first half of the groups memory and the second half transforms, so that a hierarchy's
    two main branches differ in task; "interleaved" alternates, so that siblings differ.

    >>> task = Multitask(n_inputs=4, layout="interleaved", max_delay=2)
    >>> [columns.tolist() for columns in task.columns]
    [[0, 1], [2], [3, 4], [5]]
    >>> io = task.io([[2 * i, 2 * i + 1] for i in range(8)], seed=0)
    >>> [nodes.tolist() for nodes in io.outputs], [columns.tolist() for columns in io.targets]
    ([[2, 3], [6, 7], [10, 11], [14, 15]], [[0, 1], [2], [3, 4], [5]])
    """

    n_inputs: Literal[2, 4, 8] = 4
    layout: Literal["aligned", "interleaved"] = "aligned"
    max_delay: int = 16
    length: int = 2000
    warmup: int = 100

    def __post_init__(self) -> None:
        if whole("n_inputs", self.n_inputs, 2) not in (2, 4, 8):
            raise InputError("n_inputs", self.n_inputs, "2, 4 or 8")
        named("layout", self.layout, ("aligned", "interleaved"))
        _ = self.tasks  # refuses bad delays and lengths by name

    @property
    def tasks(self) -> tuple[MemoryCapacity | NonlinearTransform, ...]:
        """The task of each input channel."""
        half, size = self.n_inputs // 2, {"length": self.length, "warmup": self.warmup}
        memory = [MemoryCapacity(max_delay=self.max_delay, **size) for _ in range(half)]
        transform = [NonlinearTransform(n_cycles=10.0 * (i + 1), **size) for i in range(half)]
        if self.layout == "aligned":
            return (*memory, *transform)
        return tuple(task for pair in zip(memory, transform, strict=True) for task in pair)

    @property
    def columns(self) -> tuple[Int[np.ndarray, " _"], ...]:
        """The target columns of each input channel."""
        ends = np.cumsum([task.n_outputs for task in self.tasks])
        return tuple(np.arange(end - task.n_outputs, end) for task, end in zip(self.tasks, ends, strict=True))

    @property
    def n_outputs(self) -> int:
        """Target columns of all channels together."""
        return sum(task.n_outputs for task in self.tasks)

    def data(self, seed: int, split: Split) -> TaskData:
        """All channels and all their targets; every channel has its own random numbers."""
        parts = [task.data(spawn(seed, "multitask", i), split) for i, task in enumerate(self.tasks)]
        inputs, targets = (np.concatenate([part[field] for part in parts], 1) for field in (0, 1))
        return TaskData(inputs, targets, self.warmup)

    def io(self, modules: Sequence[ArrayLike], *, seed: int = 0) -> IOMap:
        """Where the channels enter and where each readout, with its channel's target columns, is.

        `modules`: node indices of each, in the hierarchy's order; their number a multiple of `n_inputs`.
        """
        nodes = [indices(f"modules[{i}]", module) for i, module in enumerate(listed("modules", modules))]
        if not nodes or len(nodes) % self.n_inputs:
            allowed = f"a multiple of n_inputs = {self.n_inputs}: one group of modules for each input"
            raise InputError("modules", f"{len(nodes)} modules", allowed, "merge or drop modules, or build an IOMap")
        size = len(nodes) // self.n_inputs
        inputs, outputs, targets = [], [], []
        for channel, columns in enumerate(self.columns):
            group = nodes[channel * size : (channel + 1) * size]
            rng = generator(seed, "multitask input", channel)
            if size == 1:
                if group[0].size < 2:
                    raise InputError(
                        f"modules[{channel}]", group[0].tolist(), "at least 2 nodes: one drives the others"
                    )
                chosen = int(rng.integers(group[0].size))
                driven, read = group[0][[chosen]], [np.delete(group[0], chosen)]
            else:
                chosen = 0 if size == 2 else int(rng.integers(size))
                driven, read = group[chosen], [module for i, module in enumerate(group) if i != chosen]
            inputs.append(driven)
            outputs += read
            targets += [columns] * len(read)
        return IOMap(tuple(inputs), tuple(outputs), tuple(targets))
