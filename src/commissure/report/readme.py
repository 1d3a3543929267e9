"""Write what is generated from `reports/full.json`: `python -m commissure.report.readme`.

The claims table of the README, between two markers, and the index of papers, `docs/papers.md`, a whole page.
"""

from __future__ import annotations

import sys
from pathlib import Path

from commissure.core.errors import InputError
from commissure.report.results import Entry, Report

__all__ = ["BEGIN", "END", "papers", "table", "update"]

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


def papers(report: Report) -> str:
    """The index of papers as a Markdown page: what each says, and what became of it here."""
    lines = [
        "# Papers and claims",
        "",
        "Generated from `reports/full.json`; the README and the report hold the numbers.",
    ]
    for paper in dict.fromkeys(entry.paper for entry in report.entries):
        lines += ["", f"## {paper}", "", "| claim | statement | paper's number | verdict |", "|---|---|---|---|"]
        for entry in report.entries:
            if entry.paper == paper:
                cells = (f"`{entry.id}`", entry.statement, entry.quoted, entry.verdict)
                lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str]) -> int:
    """`[REPORT [README [PAPERS]]]`, default reports/full.json, README.md and docs/papers.md."""
    defaults = ("reports/full.json", "README.md", "docs/papers.md")
    source, target, index = [*map(Path, arguments), *map(Path, defaults[len(arguments) :])]
    report = Report.from_json(source.read_text("utf-8"))
    target.write_text(update(target.read_text("utf-8"), report), "utf-8")
    index.write_text(papers(report), "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
