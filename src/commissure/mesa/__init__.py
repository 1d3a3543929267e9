"""MesaNet: sequence modeling by locally optimal test-time training, exact and on any device.

    from commissure.mesa import MesaNetConfig, MesaNetForCausalLM
    model = MesaNetForCausalLM(MesaNetConfig.from_preset("140m"))

`mesa_attention` is the operator, `MesaLayer` the mixer around it, `set_test_time_compute` its dial at inference,
`inspect` looks inside.  Names load on first use, so that the command line shows its help without torch; the Hugging
Face classes register the Auto classes when they do, and need the extra `hf`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from commissure.mesa.config import MesaNetConfig, build_stack
    from commissure.mesa.fla import fla_config, load_fla, to_fla
    from commissure.mesa.hf import MesaNetForCausalLM, MesaNetModel
    from commissure.mesa.show import inspect
    from commissure.mesa.test_time import set_test_time_compute
    from commissure.nn.mesa import MesaLayer, MesaState, mesa_attention

# Where the names are; "mesa.hf", which imports transformers, last.
_MODULES = ("nn.mesa", "mesa.config", "mesa.fla", "mesa.show", "mesa.test_time", "mesa.hf")

__all__ = [
    "MesaLayer",
    "MesaNetConfig",
    "MesaNetForCausalLM",
    "MesaNetModel",
    "MesaState",
    "build_stack",
    "fla_config",
    "inspect",
    "load_fla",
    "mesa_attention",
    "set_test_time_compute",
    "to_fla",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        modules = (importlib.import_module(f"commissure.{path}") for path in _MODULES)
        return next(getattr(module, name) for module in modules if name in module.__all__)
    raise AttributeError(f"module 'commissure.mesa' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
