"""Rows, bounds and the JSON form."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from commissure.core.errors import BackendMissing, InputError
from commissure.report.results import Bound, Report, Row, number


def test_json_round_trip_keeps_everything(report: Report) -> None:
    back = Report.from_json(report.to_json())
    assert repr(back) == repr(report), "repr, for nan is not equal to itself"
    assert json.loads(report.to_json(figures=False))["entries"][0]["figure"] is None


def test_write_is_whole(report: Report, tmp_path: Path) -> None:
    path = report.write(tmp_path / "reports" / "full.json")
    assert repr(Report.from_json(path.read_text("utf-8"))) == repr(report)
    assert [file.name for file in path.parent.iterdir()] == ["full.json"]


def test_other_json_is_refused(report: Report) -> None:
    for text in ("[]", "{}", "not json", report.to_json().replace('"quick"', '"huge"')):
        with pytest.raises(InputError, match="JSON of a Report"):
            Report.from_json(text)
    extra = json.loads(report.to_json()) | {"surprise": 1}
    with pytest.raises(InputError, match="surprise"):
        Report.from_json(json.dumps(extra))


def test_counts_in_fixed_order(report: Report) -> None:
    assert list(report.counts.items()) == [
        ("PASS", 1), ("MISS", 1), ("NOT CLAIMED", 1), ("NOT RUN", 1), ("ERROR", 1),
    ]  # fmt: skip
    assert replace(report, entries=()).counts == {}


@pytest.mark.parametrize(
    ("bound", "row", "is_met"),
    [
        (Bound("x", at_least=1), Row("x", "", 1.0), True),
        (Bound("x", at_least=1), Row("x", "", 0.999), False),
        (Bound("x", at_most=1), Row("x", "", 1.0), True),
        (Bound("x", at_most=1), Row("x", "", 1.001), False),
        (Bound("x", at_least=0, at_most=1), Row("x", "", 2.0), False),
        (Bound("x", at_least=1, side="low"), Row("x", "", 2.0, 0.9, 3.0), False),
        (Bound("x", at_most=1, side="high"), Row("x", "", 0.0, -1.0, 1.1), False),
        (Bound("x", at_least=1, side="low"), Row("x", "", 2.0), False),
        (Bound("x", at_least=1), Row("x", "", math.nan), False),
        (Bound("x", at_most=1), Row("x", "", math.nan), False),
    ],
)
def test_bounds(bound: Bound, row: Row, is_met: bool) -> None:
    assert bound.is_met(row) is is_met


def test_texts() -> None:
    assert Bound("x", at_least=12).text == "≥ 12"
    assert Bound("x", at_most=1e-10, side="high").text == "≤ 1e-10 (high end)"
    assert Bound("x", at_least=0, at_most=1).text == "≥ 0 and ≤ 1"
    assert Row("x", "", 0.0).text == "0"
    assert Row("x", "", 0.21, 0.19, 0.24, "ms").text == "0.210 [0.190, 0.240] ms"
    assert Row("x", "", 1.0, low=0.5).text == "1.00 [0.50, ?]"
    assert [number(x) for x in (-13.06, 999_999, 2e6, math.inf, -math.nan)] == [
        "-13.1",
        "999999",
        "2e+06",
        "inf",
        "nan",
    ]


def test_to_frame_has_one_line_a_row(report: Report) -> None:
    pytest.importorskip("pandas", reason="pandas is not installed (extra frames)")
    frame = report.to_frame()
    assert len(frame) == sum(len(entry.rows) for entry in report.entries)
    assert list(frame.columns[:3]) == ["claim", "verdict", "key"]
    first = next(entry for entry in report.entries if entry.rows)
    assert frame.iloc[0]["value"] == first.rows[0].value


def test_to_frame_without_pandas_names_the_extra(report: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(BackendMissing, match=r"commissure\[frames\]"):
        report.to_frame()
