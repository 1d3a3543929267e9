"""The page on `commissure.reservoirs` runs as it stands, and its commands are those there are."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from commissure.reservoirs.cli import app

PAGE = Path(__file__).parents[2] / "docs" / "reservoirs.md"


def test_every_block_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == 4
    names: dict[str, object] = {}
    for block in blocks:
        exec(block, names)
    assert "bistable" in repr(names["regime"](names["reservoir"], names["u"]))  # type: ignore[operator]


def test_every_command_of_the_page_is_read() -> None:
    lines = re.findall(r"^commissure reservoirs (.*?)(?:  +#.*)?$", PAGE.read_text(), re.MULTILINE)
    assert {line.split()[0] for line in lines} == {"show", "eval", "null", "bench"}
    for line in lines:
        _, bound, _ = app.parse_args(line, exit_on_error=False, print_error=False)
        assert bound.arguments or line == "bench"
