"""MesaNet: sequence modeling by locally optimal test-time training, exact and on any device.

    from commissure.mesa import MesaNetConfig, MesaNetForCausalLM
    model = MesaNetForCausalLM(MesaNetConfig.from_preset("140m"))

`mesa_attention` is the operator, `MesaLayer` the mixer around it, `set_test_time_compute` its dial at inference,
`inspect` looks inside.  The Hugging Face classes load on first use, which registers the Auto classes: they need the
extra `hf`.
"""

from __future__ import annotations

import importlib
from typing import Any

from commissure.mesa.config import MesaNetConfig, build_stack
from commissure.mesa.fla import fla_config, load_fla, to_fla
from commissure.mesa.show import inspect
from commissure.mesa.test_time import set_test_time_compute
from commissure.nn.mesa import MesaLayer, MesaState, mesa_attention

_HUGGING_FACE = ("MesaNetForCausalLM", "MesaNetModel")

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
    if name in _HUGGING_FACE:
        return getattr(importlib.import_module("commissure.mesa.hf"), name)
    raise AttributeError(f"module 'commissure.mesa' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
