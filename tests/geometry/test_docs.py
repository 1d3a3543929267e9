"""The page on `commissure.geometry` runs as it stands, and its commands are those there are."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from commissure.geometry.cli import app
from commissure.geometry.recorder import log_steps

PAGE = Path(__file__).parents[2] / "docs" / "geometry.md"


def test_every_block_of_the_page_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == 4
    names: dict[str, object] = {"__name__": "page"}
    for block in blocks:
        exec(block, names)
    assert "compression-seeking 200.0 1000.0" in capsys.readouterr().out
    assert (tmp_path / "spectra.svg").stat().st_size > 3000
    assert names["series"].steps.tolist() == list(log_steps(100))  # type: ignore[attr-defined]


def test_every_command_of_the_page_is_read() -> None:
    lines = re.findall(r"^commissure geometry (.*?)(?:  +#.*)?$", PAGE.read_text(), re.MULTILINE)
    assert {line.split()[0] for line in lines} == {"trace", "phases", "show", "bench"}
    for line in lines:
        _, bound, _ = app.parse_args(line, exit_on_error=False, print_error=False)
        assert bound.arguments or line == "bench"
