"""POSSM's recurrent backbone: chunk latents (dim D) to hidden states (dim R), a sequence mixer made of mixers.

A GRU takes the latents as they are (its first layer has D inputs); every other mixer follows one Linear D -> R.
Layers follow each other without residuals or norms, with dropout between them, as published (arXiv 2506.05320).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from commissure.core.mixer import State
from commissure.nn import GRU, mixer
from commissure.nn.names import MixerFactory

__all__ = ["Backbone", "MixerFactory"]


class Backbone(nn.Module):
    """`layers` mixers of width `dim`, each the name of an `nn` mixer or made by a factory dim -> SequenceMixer."""

    def __init__(self, kind: str | MixerFactory, input_dim: int, *, dim: int, layers: int, dropout: float) -> None:
        super().__init__()
        if kind == "gru":
            self.project: nn.Module = nn.Identity()
            mixers = [GRU(dim, input_dim=input_dim if layer == 0 else dim) for layer in range(layers)]
        else:
            self.project = nn.Linear(input_dim, dim)
            mixers = [mixer(kind, dim) for _ in range(layers)]
        self.mixers = nn.ModuleList(mixers)
        self.dropout = nn.Dropout(dropout)

    def _layers(self) -> Iterable[Any]:
        return self.mixers

    def init_state(
        self, batch_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> State:
        """One State a layer."""
        return tuple(m.init_state(batch_size, device=device, dtype=dtype) for m in self._layers())

    def step(self, x_t: Float[Tensor, "batch input"], state: State) -> tuple[Float[Tensor, "batch dim"], State]:
        """One chunk."""
        y, states = self.project(x_t), []
        for layer, (m, s) in enumerate(zip(self._layers(), state, strict=True)):
            y, s = m.step(self.dropout(y) if layer else y, s)
            states.append(s)
        return y, tuple(states)

    def forward(
        self,
        x: Float[Tensor, "batch time input"],
        state: State | None = None,
        *,
        lengths: Int[Tensor, " batch"] | None = None,
    ) -> tuple[Float[Tensor, "batch time dim"], State]:
        """All chunks at once."""
        state = self.init_state(x.shape[0], device=x.device, dtype=x.dtype) if state is None else state
        y, states = self.project(x), []
        for layer, (m, s) in enumerate(zip(self._layers(), state, strict=True)):
            y, s = m(self.dropout(y) if layer else y, s, lengths=lengths)
            states.append(s)
        return y, tuple(states)
