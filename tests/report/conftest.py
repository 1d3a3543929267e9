"""A report with every verdict, figures, intervals, hostile text and numbers that are not finite."""

from __future__ import annotations

import math

import pytest

from commissure.report.results import Bound, Entry, Report, Row
from commissure.report.style import COLORS, figure, to_svg

GATE = (Bound("x", at_least=12.0), Bound("y", at_most=-0.01, side="low"))


@pytest.fixture(scope="session")
def svg() -> str:
    with figure() as (fig, ax):
        for offset, name in enumerate(COLORS):
            ax.plot([0, 1, 2], [offset, offset + 1, offset], color=COLORS[name], label=name)
        ax.set_xlabel("time (s)")
        ax.set_ylabel("R²  <&>")
        ax.legend(ncols=3, fontsize=7)
    return to_svg(fig, label='lines "of" <methods>')


@pytest.fixture(scope="session")
def report(svg: str) -> Report:
    def entry(name: str, verdict: str, rows: tuple[Row, ...] = (), **options: object) -> Entry:
        about = (f"toy.{name}", "A paper (arXiv 0000.00000)", f"It does {name}.", "2.44 ms · R² ± .1", GATE)
        return Entry(*about, verdict, rows, **options)  # type: ignore[arg-type]

    x = Row("x", "eager torch / C++ engine, 200 spikes per chunk", 13.06, 12.5, 13.9, "×", paper="9")
    y = Row("y", "possm-direct − Wiener, R²", -0.02, -0.03, 0.01, note="paired")
    return Report(
        "quick", "2026-01-02T03:04:05+00:00", "0123456789abcdef0123456789abcdef01234567 (altered)",
        {"processor": "A <b>processor</b>", "cores": "2", "memory": "8 GiB", "system": "Linux"},
        {"python": "3.11", "torch": "2.13.0"},
        (
            entry("pass", "PASS", (x, y), n_seeds=5, figure=svg, data="two minutes of simulation", cpu_s=12.34),
            entry("miss", "MISS", (Row("x", "eager / C++", 3.0), y), figure=svg, note="a <script>note", cpu_s=1.0),
            entry("few", "NOT CLAIMED", (Row("x", "eager / C++", math.nan), y), n_seeds=1),
            entry("none", "NOT RUN", note="needs a GPU"),
            entry("broken", "ERROR", note="ValueError: no", trace="Traceback\n  " + "long_name_" * 40),
        ),
    )  # fmt: skip
