"""Tasks: what a network is asked to compute.  Each gives independent training and test series by seed.

task = MemoryCapacity(max_delay=16)
train, test = task.data(0, "train"), task.data(0, "test")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from commissure.reservoirs.tasks.chaos import ChaoticForecast
    from commissure.reservoirs.tasks.data import Task, TaskData
    from commissure.reservoirs.tasks.memory import MemoryCapacity
    from commissure.reservoirs.tasks.multitask import Multitask
    from commissure.reservoirs.tasks.neurogym import DecisionReadout, NeuroGym, Trials, fit_decisions
    from commissure.reservoirs.tasks.nonlinear import NonlinearTransform

# Where the names are.
_MODULES = ("chaos", "data", "memory", "multitask", "neurogym", "nonlinear")

__all__ = [
    "ChaoticForecast",
    "DecisionReadout",
    "MemoryCapacity",
    "Multitask",
    "NeuroGym",
    "NonlinearTransform",
    "Task",
    "TaskData",
    "Trials",
    "fit_decisions",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        modules = (importlib.import_module(f"commissure.reservoirs.tasks.{path}") for path in _MODULES)
        return next(getattr(module, name) for module in modules if name in module.__all__)
    raise AttributeError(f"module 'commissure.reservoirs.tasks' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
