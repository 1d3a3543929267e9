"""The terminal table at both widths and in ASCII."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console

from commissure.report.results import Report, Row
from commissure.report.text import print_table


def printed(report: Report, width: int, encoding: str = "utf-8", **options: object) -> str:
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=encoding, errors="strict")
    print_table(report, console=Console(file=file, width=width), **options)  # type: ignore[arg-type]
    file.flush()
    return raw.getvalue().decode(encoding)


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_fits_and_says_everything(report: Report, width: int, encoding: str) -> None:
    text = printed(report, width, encoding)
    assert max(map(len, text.splitlines())) <= width
    assert "..." not in text
    assert "…" not in text
    for word in ("toy.pass", "PASS", "MISS", "NOT CLAIMED", "NOT RUN", "ERROR", "2.44 ms", "not met", "12.3 CPU s",
                 "needs a GPU", "two minutes of simulation", "ValueError: no", "nan"):  # fmt: skip
        assert word in text, word
    assert ("≥ 12" if encoding == "utf-8" else ">= 12") in text


def test_columns_line_up(report: Report) -> None:
    lines = printed(report, 120).splitlines()
    header = lines[0]
    row = next(line for line in lines if "13.1 [12.5, 13.9] ×" in line)
    assert row.index("13.1") == header.index("ours")
    assert row.index("≥ 12") == header.index("gate")
    assert len(row) == len(header) == len(lines[1])


def test_only(report: Report) -> None:
    text = printed(report, 80, only=("toy.miss",))
    assert "toy.miss" in text
    assert "toy.pass" not in text
    assert "budget quick: 1 MISS" in text


def test_a_row_without_a_label_or_an_interval_its_gate_is_on(report: Report) -> None:
    few = replace(report.entries[2], rows=(Row("x", "", 3.0), Row("y", "gated on its low end", -1.0)))
    text = printed(replace(report, entries=(few,)), 80)
    assert "3.00" in text
    assert "low end)  not met" in text
