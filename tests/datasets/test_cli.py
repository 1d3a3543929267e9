"""`commissure data`: list and get, as text and as JSON."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from commissure.core.errors import InputError
from commissure.datasets import catalog, cli
from commissure.datasets.catalog import Source


@pytest.fixture(autouse=True)
def _catalog(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    contents = {"a/one.txt": b"one", "a/two.txt": b"two", "b/three.txt": b"three"}
    sources = tuple(
        Source(name, f"http://127.0.0.1:1/{name}", hashlib.sha256(content).hexdigest(), len(content), "CC0", "nobody")
        for name, content in contents.items()
    )
    monkeypatch.setattr(catalog, "CATALOG", sources)
    monkeypatch.setattr(cli, "CATALOG", sources)
    monkeypatch.setenv("COMMISSURE_DATA", str(tmp_path))
    for name, content in list(contents.items())[:2]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)


def _run(*arguments: str) -> None:
    cli.app(list(arguments), result_action="return_value")


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    _run("list")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines] == [
        ["name", "bytes", "license", "present"],
        ["a/one.txt", "3", "CC0", "yes"],
        ["a/two.txt", "3", "CC0", "yes"],
        ["b/three.txt", "5", "CC0", "no"],
    ]
    assert len({line.index(word) for line, word in zip(lines, ("license", "CC0", "CC0", "CC0"), strict=True)}) == 1


def test_list_json(capsys: pytest.CaptureFixture[str]) -> None:
    _run("list", "--json")
    rows = json.loads(capsys.readouterr().out)
    assert [(row["name"], row["present"]) for row in rows] == [
        ("a/one.txt", True),
        ("a/two.txt", True),
        ("b/three.txt", False),
    ]
    assert set(rows[0]) == {"name", "bytes", "license", "citation", "address", "sha256", "present"}


def test_get(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    _run("get", "a")
    assert capsys.readouterr().out.split() == [str(tmp_path / "a/one.txt"), str(tmp_path / "a/two.txt")]
    _run("get", "a/two.txt", "--json")
    [row] = json.loads(capsys.readouterr().out)
    assert (row["name"], row["path"]) == ("a/two.txt", str(tmp_path / "a/two.txt"))


def test_get_refuses(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match="expected one of a/one"):
        _run("get", "c")
    with pytest.raises(InputError, match=r"holds b/three\.txt"):
        _run("get", "all")
