"""The report as one self-contained HTML file: inline CSS and SVG, no script, nothing fetched."""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path
from xml.etree import ElementTree

from commissure.core.errors import InputError
from commissure.report.results import Entry, Report, Row, write_whole

__all__ = ["MAX_BYTES", "MAX_FIGURE", "check_figure", "render", "write"]

MAX_BYTES = 1_500_000  # a report opens at once and can be mailed
MAX_FIGURE = 200_000  # a curve of a thousand points takes a tenth of it
_MARKS = {"PASS": "✓", "MISS": "✗", "NOT CLAIMED": "~", "NOT RUN": "○", "ERROR": "!"}  # a verdict is never color alone
_UNSAFE = re.compile(
    r"<(?:script|style|foreignObject|image|iframe|animate|set)\b|[\s/]on\w+\s*=|(?:href|src)\s*=\s*(?![\"']#)|url\((?!#)",
    re.IGNORECASE,
)


def render(report: Report) -> str:
    """The page of a report; a figure that is not plain inline SVG raises `InputError`."""
    import jinja2

    for entry in report.entries:
        check_figure(entry.figure)
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"minus": _minus, "gate": _gate, "lead": _lead, "slug": lambda text: text.replace(".", "-")}
    template = environment.from_string(resources.files(__package__).joinpath("page.html.jinja").read_text("utf-8"))
    return template.render(report=report, marks=_MARKS)


def write(report: Report, path: str | Path) -> Path:
    """Write the page, whole or not at all; larger than `MAX_BYTES` raises `InputError`."""
    text = render(report)
    if (size := len(text.encode())) > MAX_BYTES:
        raise InputError("report", f"{size} bytes as HTML", f"at most {MAX_BYTES}", "draw fewer points in the figures")
    return write_whole(Path(path), text)


def check_figure(figure: str | None) -> None:
    """Raise `InputError` unless `figure` is None or small inline SVG without scripts and outside references."""
    if figure is None:
        return
    found = _UNSAFE.search(figure)
    if found or not _is_one_svg(figure):
        what = found[0] if found else figure[:40]
        raise InputError("figure", what, "inline SVG without scripts or outside references", "use style.to_svg")
    if len(figure) > MAX_FIGURE:
        raise InputError("figure", f"{len(figure)} characters", f"at most {MAX_FIGURE}", "draw fewer points")


def _is_one_svg(figure: str) -> bool:
    """Well-formed, nothing before the `<svg>` and nothing after it: the page around it stays whole."""
    try:
        return figure.startswith("<svg") and ElementTree.fromstring(figure).tag.rpartition("}")[2] == "svg"
    except ElementTree.ParseError:
        return False


def _minus(text: str) -> str:
    """Typographic minus signs for numbers."""
    return re.sub(r"(?<![\w.])-(?=[\d.])", "−", text)


def _lead(entry: Entry) -> Row | None:
    """The row that decides: the first that misses its gate, else the first that has one."""
    held = [row for bound in entry.gate for row in entry.rows if row.key == bound.key]
    missed = [row for row in held if not all(bound.is_met(row) for bound in entry.bounds_on(row))]
    return next(iter(missed + held), None)


def _gate(entry: Entry, row: Row) -> list[tuple[str, bool]]:
    """The inequalities on a row in words, and whether it meets them."""
    return [(_minus(bound.text), bound.is_met(row)) for bound in entry.bounds_on(row)]
