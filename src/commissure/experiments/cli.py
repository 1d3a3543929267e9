"""`commissure reproduce`: measure the claims, print the table, write the report."""

from __future__ import annotations

import errno
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter
from rich.console import Console

from commissure.core.errors import InputError
from commissure.core.options import whole
from commissure.experiments.claims import CLAIMS, Budget, Claim
from commissure.experiments.runner import OnEntry, OnProgress, select
from commissure.experiments.runner import reproduce as run
from commissure.report.results import Entry

__all__ = ["reproduce"]


def reproduce(
    *,
    only: Annotated[tuple[str, ...], Parameter(negative="")] = (),
    budget: Literal["smoke", "quick", "full"] = "quick",
    strict: Annotated[bool, Parameter(negative="")] = False,
    as_json: Annotated[bool, Parameter(name="--json", negative="")] = False,
    workers: Annotated[int | None, Parameter(converter=whole)] = None,
    report_dir: Path = Path("reports"),
    claims: Annotated[tuple[Claim, ...], Parameter(parse=False)] = CLAIMS,
) -> int:
    """Measure the claims; print the table, write the report.

    Interrupted, the same command continues where it stopped.

    Parameters
    ----------
    only
        A claim, or an organ for all of its claims; may be repeated.
    budget
        How much to spend: quick takes a few minutes, full is what the README quotes.
    strict
        Exit 1 when a claim misses its gate.
    as_json
        Print the report as JSON in place of the table.
    workers
        Processes of one thread each; default one a core.
    report_dir
        Where BUDGET.json and index.html are written.
    """
    from commissure.report import page
    from commissure.report.text import print_table

    chosen = select(claims, only)
    try:
        report_dir.mkdir(parents=True, exist_ok=True)
        if not os.access(report_dir, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise InputError("report_dir", str(report_dir), f"a folder that can be written ({error.strerror})") from None
    with _display(chosen, budget) as (on_progress, on_entry):
        report = run(
            claims=claims, only=only, budget=budget, workers=workers, on_progress=on_progress, on_entry=on_entry
        )
    written = [report.write(report_dir / f"{budget}.json"), page.write(report, report_dir / "index.html")]
    ids = tuple(claim.id for claim in chosen)
    if as_json:
        print(json.dumps(json.loads(report.to_json(figures=False)), indent=1))  # noqa: T201 (ASCII for any terminal)
    else:
        print_table(report, only=ids)
    print("wrote " + " and ".join(map(str, written)), file=sys.stderr)  # noqa: T201
    verdicts = {entry.verdict for entry in report.entries if entry.id in ids}
    return 3 if "ERROR" in verdicts else 1 if strict and "MISS" in verdicts else 0


@contextmanager
def _display(claims: Sequence[Claim], budget: Budget) -> Iterator[tuple[OnProgress, OnEntry]]:
    """A line a finished claim and, on a terminal, a bar with rate and time left, weighted by the claims' costs."""
    from rich import progress

    console = Console(stderr=True)
    cost = {claim.id: max(claim.cost.at(budget), 0.1) for claim in claims}
    done = dict.fromkeys(cost, 0.0)  # every key from the start: lanes write while the bar reads
    begin = time.monotonic()
    bar = progress.Progress(
        progress.TextColumn("{task.description}", markup=False),
        progress.BarColumn(),
        progress.TaskProgressColumn(),
        progress.TextColumn("{task.fields[rate]}", markup=False),
        progress.TimeElapsedColumn(),
        progress.TextColumn("left"),
        progress.TimeRemainingColumn(elapsed_when_finished=False),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )

    def show(text: str) -> None:
        spent = sum(cost[name] * fraction for name, fraction in done.items())
        finished = sum(fraction >= 1 for fraction in done.values())
        rate = 60 * finished / max(time.monotonic() - begin, 1e-3)
        bar.update(task, completed=spent, description=text, rate=f"{finished}/{len(claims)} claims, {rate:.1f}/min")

    def on_progress(name: str, fraction: float, text: str) -> None:
        done[name] = min(max(done[name], fraction), 0.99)
        show(f"{name} {text}".strip())

    def on_entry(entry: Entry) -> None:
        done[entry.id] = 1.0
        show(entry.id)
        note = f"  {entry.note}" if entry.verdict in ("ERROR", "NOT RUN") and entry.note else ""
        line = f"{sum(fraction >= 1 for fraction in done.values())}/{len(claims)}  {entry.id}  {entry.verdict}"
        console.print(f"{line}  {entry.wall_s:.1f} s{note}", markup=False, highlight=False, soft_wrap=True)

    with bar:
        task = bar.add_task("starting", total=sum(cost.values()), rate="")
        yield on_progress, on_entry
