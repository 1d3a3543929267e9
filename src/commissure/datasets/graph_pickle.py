"""Read a list of `torch_geometric` graphs from a pickle that may be hostile, without torch_geometric.

A pickle is a program: each class or function it names is looked up and called.  The reader looks up only

- `collections.OrderedDict` and `torch._utils._rebuild_tensor_v2`, which build data from data;
- names in `torch_geometric`, which become inert stubs that only hold what they are given;
- `torch.storage._load_from_bytes`, which would unpickle without restriction and is replaced by
  `torch.load(..., weights_only=True)`.

Everything else is refused before it is called.
"""

from __future__ import annotations

import collections
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from commissure.core.errors import InputError

__all__ = ["read_graphs"]


def read_graphs(path: Path, *fields: str) -> list[dict[str, np.ndarray]]:
    """The arrays `fields` of each graph of `{'data': [Data, ...]}`, in order.

    Raises `InputError` where the file names anything outside the allowed list, or is not of this form.
    """
    try:
        with path.open("rb") as file:
            content = _RestrictedUnpickler(file).load()
        return [{name: _attributes(graph)[name].numpy() for name in fields} for graph in content["data"]]
    except InputError:
        raise
    except Exception as error:  # a damaged or hostile program may fail in any way
        raise InputError("path", str(path), f"a pickled list of graphs ({type(error).__name__}: {error})") from error


class _Stub:
    """Stands for a torch_geometric class: keeps its state, does nothing."""

    def __init__(self, *arguments: Any) -> None:
        del arguments

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _RestrictedUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuild_tensor()
        if (module, name) == ("torch.storage", "_load_from_bytes"):
            return _load_storage
        if module.split(".")[0] == "torch_geometric":
            return _Stub
        allowed = "a pickle of tensors and torch_geometric graphs only"
        raise InputError("path", f"{module}.{name}", allowed, "the file is not what it claims to be: do not use it")


def _rebuild_tensor() -> Callable[..., Any]:
    from torch._utils import _rebuild_tensor_v2

    return _rebuild_tensor_v2


def _load_storage(content: bytes) -> Any:
    import torch

    return torch.load(io.BytesIO(content), weights_only=True)


def _attributes(graph: Any) -> dict[str, Any]:
    """The tensors of a `Data` stub: its state holds a storage under `_store`, whose state holds them as `_mapping`."""
    return graph.state["_store"].state["_mapping"]
