"""Write the claims table of the README from `reports/full.json`: `python -m commissure.report.readme`.

The table stands between two markers and is the only part of the README that changes.
"""

from __future__ import annotations

import sys
from pathlib import Path

from commissure.core.errors import InputError
from commissure.report.results import Entry, Report

__all__ = ["BEGIN", "END", "table", "update"]

BEGIN, END = "<!-- claims:begin -->", "<!-- claims:end -->"


def table(report: Report) -> str:
    """The entries of a report as a Markdown table."""
    lines = [
        "| claim | paper's number | ours [95 % CI] | gate | verdict | CPU s |",
        "|---|---|---|---|---|---|",
        *map(_line, report.entries),
        "",
        f"Budget `{report.budget}`, {report.machine.get('processor', 'unknown processor')}, torch "
        f"{report.versions.get('torch', '?')}, commit `{report.commit[:12] or 'unknown'}`, {report.created[:10]}.",
    ]
    return "\n".join(lines)


def _line(entry: Entry) -> str:
    held = [row for row in entry.rows if entry.bounds_on(row)]
    ours = "<br>".join(f"{row.label}: {row.text}" for row in held)
    gate = "<br>".join(" and ".join(bound.text for bound in entry.bounds_on(row)) for row in held)
    seconds = f"{entry.cpu_s:.0f}" if entry.cpu_s else ""
    cells = (f"`{entry.id}`", f"{entry.quoted}", ours or entry.note, gate, entry.verdict, seconds)
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def update(readme: str, report: Report) -> str:
    """The text of a README with the table between its markers renewed; missing markers raise `InputError`."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise InputError("readme", readme[:60], f"text with the lines {BEGIN} and {END}")
    return f"{before}{BEGIN}\n{table(report)}\n{END}{after}"


def main(arguments: list[str]) -> int:
    """`[REPORT [README]]`, default reports/full.json and README.md."""
    source, target = [*map(Path, arguments), *map(Path, ("reports/full.json", "README.md")[len(arguments) :])]
    text = update(target.read_text("utf-8"), Report.from_json(source.read_text("utf-8")))
    target.write_text(text, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
