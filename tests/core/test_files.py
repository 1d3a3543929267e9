"""Replacing a file in one step."""

from __future__ import annotations

from pathlib import Path

import pytest

from commissure.core.errors import InputError
from commissure.core.files import check_target, replacing


def test_the_old_file_stays_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def fail() -> None:
        with replacing(path) as partial:
            partial.write_text("half")
            assert path.read_text() == "old"
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert path.read_text() == "old"
    with replacing(path) as partial, replacing(path) as other:
        assert partial != other, "two writers do not meet"
        partial.write_text("new")
        other.write_text("other")
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_place_that_cannot_be_written_is_refused_before_the_work(tmp_path: Path) -> None:
    for bad in (tmp_path, tmp_path / "missing" / "file"):
        with pytest.raises(InputError, match=r"output = .* a file in an existing folder"):
            check_target(bad, "output")
    assert check_target(str(tmp_path / "file")) == tmp_path / "file"
