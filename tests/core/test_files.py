"""Replacing a file in one step."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from commissure.core.errors import InputError
from commissure.core.files import check_target, read_tensors, replacing


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


def test_tensors_come_back_aligned_with_their_metadata(tmp_path: Path) -> None:
    written = {"a": torch.arange(3, dtype=torch.uint8), "b": torch.rand(5, 7), "c": torch.zeros(0, 2)}
    save_file(written, tmp_path / "file", metadata={"what": "a test"})
    metadata, tensors = read_tensors(tmp_path / "file")
    assert metadata == {"what": "a test"}
    assert tensors.keys() == written.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, written[name])
        assert tensor.numel() == 0 or tensor.data_ptr() % 64 == 0
    save_file(written, tmp_path / "file")
    assert read_tensors(tmp_path / "file")[0] == {}


def test_files_that_hold_no_tensors_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no tensors")
    for bad, message in (("missing", "an existing"), (".", "an existing"), ("text", "a readable safetensors")):
        with pytest.raises(InputError, match=f"checkpoint = .*: expected {message}"):
            read_tensors(tmp_path / bad, "checkpoint")
