"""What is recorded beside a result."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

import commissure
from commissure.runs import environment


def test_versions_and_machine() -> None:
    versions = environment.versions()
    assert versions["commissure"] == commissure.__version__
    assert versions["torch"] != "absent"
    assert list(environment.machine()) == ["processor", "cores", "memory", "system"]


def test_git_state_only_of_its_own_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").touch()
    monkeypatch.setattr(environment, "_ROOT", package)
    assert environment.git_state() == {}
    git = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e@example.org"]
    subprocess.run([*git, "init", "-q"], check=True)
    assert environment.git_state() == {}, "inside a repository that does not track it"
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-qm", "first"], check=True)
    state = environment.git_state()
    assert len(str(state["commit"])) == 40
    assert state["dirty"] is False
    (package / "__init__.py").write_text("changed")
    assert environment.git_state()["dirty"] is True


def test_source_digest_sees_every_file_but_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "_ROOT", tmp_path)
    digest = environment.source_digest.__wrapped__
    (tmp_path / "a.py").write_text("1")
    first = digest()
    (tmp_path / "__pycache__").mkdir()
    (tmp_path / "__pycache__" / "a.pyc").write_text("x")
    assert digest() == first
    (tmp_path / "a.py").write_text("2")
    assert digest() != first
