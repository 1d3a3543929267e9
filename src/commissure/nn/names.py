"""Mixers by name: what a configuration or a checkpoint may say instead of a factory."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from commissure.core.errors import InputError
from commissure.core.mixer import SequenceMixer
from commissure.nn.attention import Attention
from commissure.nn.delta import DeltaNet, GatedDeltaNet
from commissure.nn.gated_linear import GatedLinearAttention
from commissure.nn.gru import GRU
from commissure.nn.mamba import Mamba
from commissure.nn.mesa import MesaLayer
from commissure.nn.mlstm import MLSTM
from commissure.nn.rg_lru import RGLRU
from commissure.nn.s4d import S4D

__all__ = ["MIXERS", "MULTI_HEAD", "ROTARY", "MixerFactory", "mixer"]

MixerFactory = Callable[[int], SequenceMixer]

# Attention to the last 1024 elements: the baseline of arXiv 2506.05233, table 2.
ROTARY: dict[str, Callable[..., SequenceMixer]] = {
    "attention": Attention,
    "sliding_window": partial(Attention, window=1024),
}
MULTI_HEAD: dict[str, Callable[..., SequenceMixer]] = {
    **ROTARY,
    "deltanet": DeltaNet,
    "gated_deltanet": GatedDeltaNet,
    "gated_linear": GatedLinearAttention,
    "mesa": MesaLayer,
    "mlstm": MLSTM,
}
MIXERS: dict[str, Callable[..., SequenceMixer]] = {
    **MULTI_HEAD,
    "gru": GRU,
    "mamba": Mamba,
    "rg_lru": RGLRU,
    "s4d": S4D,
}


def mixer(
    name: str | MixerFactory, dim: int, *, heads: int | None = None, head_dim: int | None = None, rotary: bool = False
) -> SequenceMixer:
    """A mixer of width `dim`, from its name or from a factory `dim -> SequenceMixer`.

    `heads`, `head_dim` go to mixers with heads, `rotary` (positions) to attention; everything else is made in its
    default sizes.  An unknown name, or a factory whose result is not a `SequenceMixer`, raises `InputError`.

    >>> type(mixer("s4d", 8)).__name__, type(mixer(lambda dim: S4D(dim, d_state=16), 8)).__name__
    ('S4D', 'S4D')
    >>> mixer("deltanet", 8, heads=2).init_state(1).memory.shape
    torch.Size([1, 2, 4, 4])
    """
    if isinstance(name, str) and name not in MIXERS:
        raise InputError("mixer", name, f"one of {', '.join(sorted(MIXERS))}", "or pass a factory")
    options: dict[str, Any] = {"heads": heads, "head_dim": head_dim} if name in MULTI_HEAD else {}
    if name in ROTARY:
        options["rotary"] = rotary
    made = (MIXERS[name] if isinstance(name, str) else name)(dim, **options)
    if not isinstance(made, SequenceMixer):
        raise InputError("mixer", type(made).__name__, "a SequenceMixer: init_state, step and forward")
    return made
