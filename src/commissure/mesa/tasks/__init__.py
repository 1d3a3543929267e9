"""Synthetic tasks with their published definitions, and text: seeded, vectorized sources of batches.

task("mqar", n_pairs=16, length=64, vocab=128).batch(seed=0, batch_size=32)
"""

from __future__ import annotations

from typing import Any

from commissure.core.errors import InputError
from commissure.mesa.tasks.batch import Split, Task, TaskBatch
from commissure.mesa.tasks.lds import LinearSystem, Trajectories
from commissure.mesa.tasks.mad import Compression, Memorization, SelectiveCopying
from commissure.mesa.tasks.mad_recall import FuzzyRecall, InContextRecall, NoisyRecall
from commissure.mesa.tasks.mqar import MQAR, MQAR_TEST, MQAR_TRAIN
from commissure.mesa.tasks.regbench import Automata, RegBench
from commissure.mesa.tasks.regression import Pairs, Regression
from commissure.mesa.tasks.text import WikiText2

__all__ = [
    "MQAR",
    "MQAR_TEST",
    "MQAR_TRAIN",
    "TASKS",
    "Automata",
    "Compression",
    "FuzzyRecall",
    "InContextRecall",
    "LinearSystem",
    "Memorization",
    "NoisyRecall",
    "Pairs",
    "RegBench",
    "Regression",
    "SelectiveCopying",
    "Split",
    "Task",
    "TaskBatch",
    "Trajectories",
    "WikiText2",
    "task",
]

TASKS: dict[str, type[Any]] = {
    kind.name: kind
    for kind in (
        Compression, FuzzyRecall, InContextRecall, LinearSystem, MQAR, Memorization, NoisyRecall, RegBench, Regression,
        SelectiveCopying, WikiText2,
    )
}  # fmt: skip


def task(name: str, **sizes: Any) -> Task:
    """The task of this name with the published sizes, or with those given.

    >>> task("mqar", n_pairs=8).n_pairs
    8
    >>> task("copying")
    Traceback (most recent call last):
    commissure.core.errors.InputError: task = 'copying': expected one of compression, fuzzy_recall, in_context_recall, \
lds, memorization, mqar, noisy_recall, regbench, regression, selective_copying, wikitext2
    """
    if name not in TASKS:
        raise InputError("task", name, f"one of {', '.join(sorted(TASKS))}")
    return TASKS[name](**sizes)
