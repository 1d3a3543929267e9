"""Mixers by name: what a configuration or a checkpoint may say instead of a factory."""

from __future__ import annotations

from collections.abc import Callable

from commissure.core.errors import InputError
from commissure.core.mixer import SequenceMixer
from commissure.nn.attention import Attention
from commissure.nn.gru import GRU
from commissure.nn.mamba import Mamba
from commissure.nn.s4d import S4D

__all__ = ["MIXERS", "MixerFactory", "mixer"]

MixerFactory = Callable[[int], SequenceMixer]

MIXERS: dict[str, MixerFactory] = {"attention": Attention, "gru": GRU, "mamba": Mamba, "s4d": S4D}


def mixer(name: str | MixerFactory, dim: int) -> SequenceMixer:
    """A mixer of width `dim` with its default sizes, from its name or from a factory `dim -> SequenceMixer`.

    An unknown name, or a factory whose result is not a `SequenceMixer`, raises `InputError`.

    >>> type(mixer("s4d", 8)).__name__, type(mixer(lambda dim: S4D(dim, d_state=16), 8)).__name__
    ('S4D', 'S4D')
    >>> mixer("lstm", 8)
    Traceback (most recent call last):
    commissure.core.errors.InputError: mixer = 'lstm': expected one of attention, gru, mamba, s4d; or pass a factory
    """
    if isinstance(name, str) and name not in MIXERS:
        raise InputError("mixer", name, f"one of {', '.join(sorted(MIXERS))}", "or pass a factory")
    made = (MIXERS[name] if isinstance(name, str) else name)(dim)
    if not isinstance(made, SequenceMixer):
        raise InputError("mixer", type(made).__name__, "a SequenceMixer: init_state, step and forward")
    return made
