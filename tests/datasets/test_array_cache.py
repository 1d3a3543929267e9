"""The array cache: one read a source, no pickle, damage repaired with a warning, files in one step."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from commissure.core.errors import CommissureWarning
from commissure.datasets import catalog
from commissure.datasets.array_cache import cached_arrays
from commissure.datasets.catalog import Source

NAME = "small/numbers.txt"
CONTENT = b"1 2 3"


class _Reader:
    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, path: Path) -> dict[str, np.ndarray]:
        self.calls += 1
        return {"numbers": np.array(path.read_text().split(), np.int64), "spare": np.zeros(1)}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    source = Source(NAME, "http://127.0.0.1:1/", hashlib.sha256(CONTENT).hexdigest(), len(CONTENT), "CC0", "nobody")
    monkeypatch.setattr(catalog, "CATALOG", (source,))
    monkeypatch.setenv("COMMISSURE_DATA", str(tmp_path / "local"))
    monkeypatch.setenv("COMMISSURE_HOME", str(tmp_path / "home"))
    (tmp_path / "local" / "small").mkdir(parents=True)
    (tmp_path / "local" / NAME).write_bytes(CONTENT)
    return tmp_path / "home"


def _cached(home: Path) -> Path:
    [path] = (home / "data" / "arrays").iterdir()
    return path


def test_a_source_is_read_once(home: Path) -> None:
    read = _Reader()
    for _ in range(3):
        arrays = cached_arrays(NAME, read, ("numbers",))
        assert list(arrays) == ["numbers"]
        np.testing.assert_array_equal(arrays["numbers"], [1, 2, 3])
    assert read.calls == 1
    assert _cached(home).name.startswith(hashlib.sha256(CONTENT).hexdigest())
    with np.load(_cached(home), allow_pickle=False) as archive:
        assert archive["numbers"].dtype == np.int64


@pytest.mark.parametrize("damage", ["truncated", "flipped", "garbage", "empty", "another layout", "pickled"])
def test_a_damaged_cache_is_rebuilt_with_a_warning(home: Path, damage: str) -> None:
    read = _Reader()
    cached_arrays(NAME, read, ("numbers",))
    path = _cached(home)
    content = path.read_bytes()
    if damage == "another layout":
        np.savez(path, other=np.zeros(2))
    elif damage == "pickled":
        np.savez(path, numbers=np.array([print], dtype=object))
    else:
        middle = content.index(b"numbers.npy") + 60
        flipped = content[:middle] + bytes([content[middle] ^ 0xFF]) + content[middle + 1 :]
        path.write_bytes({"truncated": content[:50], "flipped": flipped, "garbage": b"x" * 99, "empty": b""}[damage])
    with pytest.warns(CommissureWarning, match=r"are damaged .* read again from small/numbers\.txt"):
        arrays = cached_arrays(NAME, read, ("numbers",))
    np.testing.assert_array_equal(arrays["numbers"], [1, 2, 3])
    assert read.calls == 2
    np.testing.assert_array_equal(cached_arrays(NAME, read, ("numbers",))["numbers"], [1, 2, 3])
    assert read.calls == 2


def test_a_failed_write_leaves_no_partial_file_and_the_arrays_arrive(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.warns(CommissureWarning, match="could not be cached"):
        arrays = cached_arrays(NAME, _Reader(), ("numbers",))
    np.testing.assert_array_equal(arrays["numbers"], [1, 2, 3])
    assert list((home / "data" / "arrays").iterdir()) == []
