"""The restricted reader: it reads graphs, and no pickle makes it call anything else."""

from __future__ import annotations

import io
import os
import pickle
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from commissure.core.errors import InputError
from commissure.datasets.graph_pickle import read_graphs


class _Reduced:
    """Pickles as a call of `function` with `arguments`."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


def _write(path: Path, content: Any, protocol: int = 4) -> Path:
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    return path


@pytest.fixture
def graph_classes(monkeypatch: pytest.MonkeyPatch) -> tuple[type, type]:
    """Stand-ins of torch_geometric's two classes, importable under its names while pickling."""

    def restore(self: Any, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    data = type("Data", (), {"__module__": "torch_geometric.data.data", "__setstate__": restore})
    storage = type("GlobalStorage", (), {"__module__": "torch_geometric.data.storage", "__setstate__": restore})
    for name, members in {"data": {"Data": data}, "storage": {"GlobalStorage": storage}}.items():
        module = types.ModuleType(f"torch_geometric.data.{name}")
        module.__dict__.update(members)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    for name in ("torch_geometric", "torch_geometric.data"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    return data, storage


def _graph(classes: tuple[type, type], **tensors: Any) -> Any:
    data, storage = classes[0](), classes[1]()
    storage._mapping, storage._parent = tensors, None
    data._store = storage
    return data


@pytest.mark.parametrize("protocol", [3, 4])
def test_graphs_come_back_as_arrays(graph_classes: tuple[type, type], tmp_path: Path, protocol: int) -> None:
    x = torch.arange(6.0).reshape(2, 3)
    content = {
        "data": [_graph(graph_classes, x=x, y=torch.tensor([1])), _graph(graph_classes, x=x + 1, y=torch.tensor([2]))]
    }
    first, second = read_graphs(_write(tmp_path / "g.pkl", content, protocol), "x", "y")
    np.testing.assert_array_equal(first["x"], x.numpy())
    np.testing.assert_array_equal(second["x"], x.numpy() + 1)
    assert (first["y"].tolist(), second["y"].tolist()) == ([1], [2])


def _mark(path: str) -> None:
    Path(path).touch()


def _hostile(trace: Path) -> dict[str, Any]:
    storage_bytes = pickle.dumps(_Reduced(_mark, str(trace)))
    return {
        "os.system": _Reduced(os.system, f"touch {trace}"),
        "builtins.eval": _Reduced(eval, f"__import__('pathlib').Path({str(trace)!r}).touch()"),
        "builtins.exec": _Reduced(exec, f"import pathlib; pathlib.Path({str(trace)!r}).touch()"),
        "builtins.getattr": _Reduced(getattr, "text", "upper"),
        "pickle.loads": _Reduced(pickle.loads, storage_bytes),
        "torch.load": _Reduced(torch.load, io.BytesIO(storage_bytes)),
        "torch.storage._load_from_bytes": _Reduced(torch.storage._load_from_bytes, storage_bytes),
        "own function": _Reduced(_mark, str(trace)),
        "numpy": np.zeros(3),
        "nested": {"data": [[_Reduced(os.system, f"touch {trace}")]]},
    }


@pytest.mark.parametrize("kind", sorted(_hostile(Path("x"))))
@pytest.mark.parametrize("protocol", [2, 4])
def test_hostile_pickles_are_refused_before_they_act(tmp_path: Path, kind: str, protocol: int) -> None:
    trace = tmp_path / "trace"
    path = _write(tmp_path / "hostile.pkl", {"data": [_hostile(trace)[kind]]}, protocol)
    with pytest.raises(InputError, match=r"^path = "):
        read_graphs(path, "x")
    assert not trace.exists()


@pytest.mark.parametrize(
    ("function", "named"), [(os.system, r"(posix|nt)\.system"), (eval, "builtins.eval"), (_mark, "_mark")]
)
def test_a_refusal_names_the_function(tmp_path: Path, function: Callable[..., Any], named: str) -> None:
    content = {"data": [], "beside": _Reduced(function, "1")}  # not even beside the data
    with pytest.raises(InputError, match=rf"{named}': expected a pickle of tensors"):
        read_graphs(_write(tmp_path / "hostile.pkl", content))


def test_the_hostile_payloads_do_act_when_they_are_unpickled_freely(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    for kind in ("os.system", "builtins.eval", "own function", "pickle.loads"):
        pickle.loads(pickle.dumps(_hostile(trace)[kind]))
        trace.unlink()


def test_a_legacy_torch_file_with_a_payload_is_refused(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    buffer = io.BytesIO()
    torch.save(_Reduced(os.system, f"touch {trace}"), buffer, _use_new_zipfile_serialization=False)
    content = _Reduced(torch.storage._load_from_bytes, buffer.getvalue())
    with pytest.raises(InputError, match=r"^path = "):
        read_graphs(_write(tmp_path / "hostile.pkl", {"data": [content]}), "x")
    assert not trace.exists()


def test_stubs_are_inert(tmp_path: Path) -> None:
    # protocol 0, by hand: torch_geometric.os.system called with a command, then given a state
    trace = tmp_path / "trace"
    path = tmp_path / "stub.pkl"
    path.write_bytes(f"(dS'data'\n(lctorch_geometric.os\nsystem\n(S'touch {trace}'\ntRas.".encode())
    with pytest.raises(InputError, match=r"^path = .*AttributeError"):  # a stub without state holds no arrays
        read_graphs(path, "x")
    assert not trace.exists()


@pytest.mark.parametrize("content", [b"", b"not a pickle", pickle.dumps({"other": 1}), pickle.dumps([1, 2])])
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "other.pkl"
    path.write_bytes(content)
    with pytest.raises(InputError, match="a pickled list of graphs"):
        read_graphs(path, "x")
