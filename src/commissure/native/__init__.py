"""C++ kernels behind Python doors; each kernel has a `*_reference` twin with the same signature.

Without a compiler at build time the extension is absent: the doors then run their references and warn once.
"""

from __future__ import annotations

import importlib
import warnings
from functools import cache
from types import ModuleType

from commissure.core.errors import CommissureWarning

__all__ = ["backend", "kernels"]


@cache
def kernels() -> ModuleType | None:
    """The compiled extension, or None (with one warning) where the package was built without a compiler."""
    try:
        _kernels = importlib.import_module("commissure.native._kernels")
    except ImportError as error:
        warnings.warn(
            f"commissure was built without its C++ kernels ({error}); the slower Python references run instead. "
            "Install a C++17 compiler and reinstall to get them.",
            CommissureWarning,
            stacklevel=3,
        )
        return None
    return _kernels


def backend() -> str:
    """The live backend, 'c++' or 'python'."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CommissureWarning)
        return "python" if kernels() is None else "c++"
