"""Many independent computations, in this process, in isolated ones or in any executor; results as they finish.

A computation gives the same result wherever it runs; `one_thread` sees to it that sums of floating-point numbers do
not depend on how many cores a process may use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from contextlib import ExitStack, contextmanager
from typing import TypeVar

from commissure.core.errors import InputError
from commissure.runs.environment import cores
from commissure.runs.workers import IsolatedExecutor

__all__ = ["check_workers", "finished", "one_thread", "sweep_bar"]

T = TypeVar("T")
A = TypeVar("A")


def check_workers(executor: Executor | None, workers: int | None) -> None:
    """`InputError` unless they are an executor or a number of processes >= 0, and not both."""
    if executor is not None and not isinstance(executor, Executor):
        raise InputError("executor", executor, "Executor or None")
    if workers is None:
        return
    if isinstance(workers, bool) or not isinstance(workers, int) or workers < 0:
        raise InputError("workers", workers, "an integer >= 0")
    if executor is not None:
        raise InputError("workers", workers, "None together with an executor")


def finished(
    compute: Callable[[A], T], tasks: Sequence[A], *, executor: Executor | None = None, workers: int | None = None
) -> Iterator[tuple[int, Callable[[], T]]]:
    """The number of each task when it is done, and a function that gives its result or raises its error.

    By default in isolated processes, `workers` of them (None: one a core, 0: in this process, when asked for).

    >>> [(i, result()) for i, result in finished(abs, [-1, 2], workers=0)]
    [(0, 1), (1, 2)]
    """
    if executor is None and workers == 0:
        for i, task in enumerate(tasks):
            yield i, lambda task=task: compute(task)
        return
    if not tasks:
        return
    with ExitStack() as stack:
        if executor is None:
            lanes = min(cores(), len(tasks)) if workers is None else workers
            assert lanes is not None
            executor = stack.enter_context(IsolatedExecutor(lanes))
        pending: dict[Future[T], int] = {executor.submit(compute, task): i for i, task in enumerate(tasks)}
        stack.callback(lambda: [future.cancel() for future in pending])
        while pending:
            done, _ = wait(pending, return_when=FIRST_COMPLETED)
            for future in sorted(done, key=lambda future: pending[future]):
                yield pending.pop(future), future.result


@contextmanager
def one_thread() -> Iterator[None]:
    """torch computes with one thread inside, then with as many as before."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def sweep_bar(unit: str, total: int) -> Iterator[Callable[[int, int], None]]:
    """A bar with the time left, on stderr where that is a terminal; gives the function to call with (done, total)."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    console = Console(stderr=True)
    columns = "sweep", BarColumn(), MofNCompleteColumn(), unit, TimeRemainingColumn()
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("sweep", total=total)
        yield lambda done, total: bar.update(task, completed=done, total=total)
