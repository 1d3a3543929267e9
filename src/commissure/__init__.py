"""commissure: seven published NeuroAI systems as one fast, exact, tested PyTorch library.

Names load on first use (PEP 562): importing the package imports neither torch nor numpy.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_MODULES = (
    "core",
    "datasets",
    "decode",
    "experiments",
    "geometry",
    "mesa",
    "metahmm",
    "native",
    "nn",
    "report",
    "reservoirs",
    "runs",
    "train",
)

__all__ = ["__version__", *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"commissure.{name}")
    raise AttributeError(f"module 'commissure' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted(__all__)
