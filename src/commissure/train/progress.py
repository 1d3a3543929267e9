"""A progress bar on stderr, where that is a terminal: rate, remaining time and the current loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["progress_bar"]


@contextmanager
def progress_bar(label: str) -> Iterator[Callable[[int, int, float], None]]:
    """Gives the function to call with (done, total, loss); the bar appears with the first call."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn(label),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        TextColumn("loss {task.fields[loss]:.4f}"),
    )
    console = Console(stderr=True)
    progress = Progress(*columns, console=console, disable=not console.is_terminal)
    task = progress.add_task(label, total=None, loss=float("nan"), rate="")

    def report(done: int, total: int, loss: float) -> None:
        progress.start()
        speed = progress.tasks[task].speed
        rate = f"{speed:.1f} steps/s" if speed else ""
        progress.update(task, completed=done, total=total, loss=loss, rate=rate)

    try:
        yield report
    finally:
        progress.stop()
