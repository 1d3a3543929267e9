"""The claims table on a terminal: claim, the paper's number, ours with its interval, gate, verdict, seconds.

Each claim takes a line with its verdict and CPU seconds, a line with the paper's number, and a line per measured
number with the gate it is held to.  Signs a terminal cannot show are replaced (>= for ≥).
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from rich.console import Console
from rich.text import Text

from commissure.report.results import Entry, Report

__all__ = ["print_table"]

_STYLES = {"PASS": "bold green", "MISS": "bold red", "NOT CLAIMED": "yellow", "NOT RUN": "dim", "ERROR": "bold red"}
_PLAIN = str.maketrans({"≥": ">=", "≤": "<=", "±": "+-", "−": "-", "–": "-", "—": "-", "─": "-", "·": "-", "×": "x",
                        "²": "^2", "µ": "u"})  # fmt: skip
_MET = 7  # characters of "not met"


def print_table(report: Report, *, only: tuple[str, ...] = (), console: Console | None = None) -> None:
    """Print the entries named in `only` (all when empty) as a table at the console's width."""
    console = Console() if console is None else console
    entries = [_safe_entry(entry, console) for entry in report.entries if not only or entry.id in only]
    for line in _lines(entries, max(console.width, 60), _safe("─", console)):
        line.rstrip()
        console.print(line, soft_wrap=True, highlight=False)
    counts = {verdict: sum(entry.verdict == verdict for entry in entries) for verdict in _STYLES}
    shown = ", ".join(f"{n} {verdict}" for verdict, n in counts.items() if n)
    console.print(Text(f"budget {report.budget}: {shown}", "bold"), highlight=False)
    if any(entry.verdict == "NOT CLAIMED" for entry in entries):
        console.print(Text("NOT CLAIMED: too few seeds at this budget for a verdict", "dim"), highlight=False)
    if report.budget == "smoke":
        console.print(Text("smoke runs every step briefly; its numbers mean nothing", "dim"), highlight=False)


def _lines(entries: Sequence[_Plain], width: int, rule: str) -> Iterator[Text]:
    rows = [row for entry in entries for row in entry.rows]
    ours = max([len(row.ours) for row in rows] + [len("ours [95 % CI]")])
    gate = max([len(row.gate) for row in rows] + [len("gate")])
    room = max(20, width - ours - gate - _MET - 6)
    label = min(room, max([len(row.label) + 2 for row in rows] + [36]))
    width = label + ours + gate + _MET + 6
    yield Text(f"{'claim':<{label}}  {'ours [95 % CI]':<{ours}}  {'gate':<{gate}}  {'verdict':>{_MET}}", "bold")
    yield Text(rule * width, "dim")
    for entry in entries:
        filler = " " * max(2, width - len(entry.id) - len(entry.verdict) - len(entry.seconds))
        yield Text.assemble((entry.id, "bold"), filler, (entry.verdict, _STYLES[entry.verdict]), entry.seconds)
        yield from _paragraph(entry.paper, width)
        for row in entry.rows:
            first, *others = textwrap.wrap(row.label, label - 2, subsequent_indent="  ") or [""]
            middle = f"  {first:<{label - 2}}  {row.ours:<{ours}}  {row.gate:<{gate}}  "
            yield Text.assemble(middle, (f"{row.met:>{_MET}}", _STYLES["MISS"] if row.met == "not met" else ""))
            for other in others:
                yield Text(f"  {other}")
        for text in entry.notes:
            yield from _paragraph(text, width)
        yield Text()


def _paragraph(text: str, width: int) -> Iterator[Text]:
    for part in textwrap.wrap(text, width, initial_indent="  ", subsequent_indent="    "):
        yield Text(part, "dim")


class _PlainRow(NamedTuple):
    label: str
    ours: str
    gate: str
    met: str


class _Plain(NamedTuple):
    """An entry as strings the console can show."""

    id: str
    verdict: str
    seconds: str
    paper: str
    rows: tuple[_PlainRow, ...]
    notes: tuple[str, ...]


def _safe_entry(entry: Entry, console: Console) -> _Plain:
    def safe(text: str) -> str:
        return _safe(text, console)

    rows = []
    for row in entry.rows:
        bounds = entry.bounds_on(row)
        met = "" if not bounds else "met" if all(bound.is_met(row) for bound in bounds) else "not met"
        label = row.label + (f" (paper {row.paper})" if row.paper else "")
        rows.append(_PlainRow(safe(label), safe(row.text), safe(" and ".join(bound.text for bound in bounds)), met))
    seconds = f"{entry.cpu_s:8.1f} CPU s" if entry.cpu_s else ""
    notes = [f"{name}: {text}" for name, text in (("data", entry.data), ("note", entry.note)) if text]
    paper = safe(f"paper: {entry.quoted}")
    return _Plain(safe(entry.id), entry.verdict, seconds, paper, tuple(rows), tuple(map(safe, notes)))


def _safe(text: str, console: Console) -> str:
    """`text` in the console's encoding."""
    try:
        text.encode(console.encoding)
    except UnicodeEncodeError:
        return text.translate(_PLAIN).encode(console.encoding, "replace").decode(console.encoding)
    return text
