"""The HTML page: complete, escaped, self-contained, small."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from commissure.core.errors import InputError
from commissure.report import page
from commissure.report.results import Report

VOID = {"meta", "link", "br", "path", "use", "rect"}


class Checker(HTMLParser):
    """Tags balanced, ids unique."""

    def __init__(self) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attributes)
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = dict(attributes)
        if "id" in found:
            self.ids.append(str(found["id"]))
        if tag == "a":
            self.links.append(str(found["href"]))

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag


def test_page_is_well_formed_and_complete(report: Report) -> None:
    text = page.render(report)
    checker = Checker()
    checker.feed(text)
    assert checker.stack == []
    own = [name for name in checker.ids if not re.match(r"f[0-9a-f]{8}-", name)]
    assert len(set(own)) == len(own)
    assert {link.removeprefix("#") for link in checker.links} <= set(own)
    for word in ("toy.pass", "2.44 ms · R² ± .1", "[12.5, 13.9] ×", "not met", "−0.0200", "needs a GPU", "12.3",
                 "torch 2.13.0", "commissure reproduce --budget quick", "make demo", "NOT CLAIMED"):  # fmt: skip
        assert word in text, word
    assert text.count("<svg") == 2
    assert text.count("<caption>") == 4, "one a table"


def test_the_summary_shows_the_gate_that_was_missed(report: Report) -> None:
    entry = report.entries[1]
    y = replace(entry.rows[1], low=0.5)
    text = page.render(replace(report, entries=(replace(entry, rows=(replace(entry.rows[0], value=20.0), y)),)))
    summary = text[: text.index("<article")]
    assert "possm-direct − Wiener" in summary
    assert "eager" not in summary


def test_foreign_text_is_escaped(report: Report) -> None:
    text = page.render(report)
    assert "<script" not in text
    assert "a &lt;script&gt;note" in text
    assert "A &lt;b&gt;processor" in text


def test_nothing_outside_is_referenced(report: Report) -> None:
    text = page.render(report)
    references = re.findall(r"(?:src|href)=\"([^\"]*)\"", text) + re.findall(r"url\(([^)]*)\)", text)
    assert all(reference.startswith(("#", "data:,")) for reference in references)
    assert set(re.findall(r"https?://[^\"' <]+", text)) <= {
        "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink",
    }  # fmt: skip
    assert "@import" not in text


@pytest.mark.parametrize(
    "figure",
    [
        "<p>no figure</p>",
        "<svg><script>alert(1)</script></svg>",
        '<svg onload="alert(1)"></svg>',
        '<svg/onload="alert(1)"></svg>',
        "<svg></svg><p>more</p>",
        "<svg><g></svg>",
        "<svg><style>path { fill: red }</style></svg>",
        "<svg><a href=https://example.org>x</a></svg>",
        '<svg><set attributeName="onload" to="alert(1)"/></svg>',
        '<svg><image href="https://example.org/x.png"/></svg>',
        '<svg><a href="https://example.org">x</a></svg>',
        '<svg><path style="fill: url(https://example.org/f)"/></svg>',
        f"<svg>{'x' * page.MAX_FIGURE}</svg>",
    ],
)
def test_unsafe_figures_are_refused(report: Report, figure: str) -> None:
    bad = replace(report, entries=(replace(report.entries[0], figure=figure),))
    with pytest.raises(InputError, match="figure = "):
        page.render(bad)


def test_size_limit(report: Report, tmp_path: Path) -> None:
    assert page.write(report, tmp_path / "index.html").stat().st_size < page.MAX_BYTES
    large = replace(report, entries=(replace(report.entries[0], note="x" * page.MAX_BYTES),))
    with pytest.raises(InputError, match="fewer points"):
        page.write(large, tmp_path / "large.html")
    assert not (tmp_path / "large.html").exists()


def test_an_empty_report_still_renders(report: Report) -> None:
    assert "Claims" in page.render(replace(report, entries=(), commit=""))
