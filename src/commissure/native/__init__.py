"""C++ kernels behind Python doors; each kernel has a `*_reference` twin with the same signature.

The streaming step is an object with state, not a torch operator: torch's dispatcher would cost a good part of the step.
Without a compiler at build time the extension is absent: the doors then run their references and warn once, as they do
where a build from before a kernel was added is still in place.
"""

from __future__ import annotations

import importlib
import warnings
from functools import cache
from types import ModuleType

from commissure.core.errors import CommissureWarning

__all__ = ["backend", "kernels"]

_KERNELS = (
    "PossmStep",
    "hmm_filter",
    "mesa_solve",
    "mesa_step",
    "linear_attention",
    "linear_attention_backward",
    "mesa_gradients",
    "reservoir_scan",
    "swap_edges",
    "anneal_weights",
)


@cache
def _load() -> ModuleType | ImportError:
    try:
        module = importlib.import_module("commissure.native._kernels")
    except ImportError as error:
        return error
    absent = [name for name in _KERNELS if not hasattr(module, name)]
    return ImportError(f"an older build, without {', '.join(absent)}") if absent else module


@cache
def kernels() -> ModuleType | None:
    """The compiled extension, or None (with one warning) where the package was built without a compiler."""
    found = _load()
    if isinstance(found, ModuleType):
        return found
    warnings.warn(
        f"commissure was built without its C++ kernels ({found}); the slower Python references run instead. "
        "Install a C++17 compiler and reinstall to get them.",
        CommissureWarning,
        stacklevel=3,
    )
    return None


def backend() -> str:
    """The live backend, 'c++' or 'python'; asking gives no warning."""
    return "c++" if isinstance(_load(), ModuleType) else "python"
