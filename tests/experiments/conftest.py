"""Makes `toy` importable here and in the workers, and gives each test its own store and log."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def toy_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    monkeypatch.setenv("TOY_LOG", str(tmp_path / "log"))
    monkeypatch.setenv("TOY_GATE", str(tmp_path / "gate"))
    monkeypatch.setenv("COMMISSURE_HOME", str(tmp_path / "home"))
    return lambda: (tmp_path / "log").read_text().splitlines() if (tmp_path / "log").exists() else []
