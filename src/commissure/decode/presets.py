"""POSSM's configurations: the architecture, how it is fitted, and the named presets.

`possm-ss` is the published single-session layout (arXiv 2506.05320): softmax encoder, LayerNorm and feed-forward block
in the readout, embeddings N(0, 0.02).  `possm-direct` is the recipe for accuracy on small real recordings: additive
tokens of width 256, no LayerNorm on hidden states, unit-scale embeddings, position as a second target.
"""

from __future__ import annotations

from typing import NamedTuple

from pydantic import Field, model_validator

from commissure.core.config import Config
from commissure.core.errors import InputError
from commissure.decode.encoder import EncoderKind, NullToken
from commissure.decode.unit_dropout import UnitDropout, UnitDropoutRate
from commissure.train import TrainConfig

__all__ = ["FitConfig", "POSSMConfig", "Preset", "preset"]


class POSSMConfig(Config):
    """Architecture of a POSSM; times in seconds."""

    dim: int = Field(default=64, ge=32, description="width of tokens and latents")
    rnn_dim: int = Field(default=256, ge=1)
    rnn_layers: int = Field(default=1, ge=1)
    backbone: str = "gru"
    chunk_s: float = Field(default=0.05, ge=1e-6, le=10, description="seconds; 50 is no chunk of 50 ms")
    context: int = Field(default=3, ge=1, description="hidden states an output attends to")
    out_dim: int = Field(default=2, ge=1)
    auxiliary_dim: int = Field(default=0, ge=0, description="extra targets used in training only")
    encoder: EncoderKind = "softmax"
    null_token: NullToken = "empty"
    t_min: float = Field(default=1e-4, gt=0, description="shortest rotary period")
    t_max: float = Field(default=10.0, gt=0, allow_inf_nan=False, description="longest rotary period")
    readout_norm: bool = True
    readout_ffn: bool = True
    embedding_std: float = Field(default=0.02, gt=0)
    ffn_dropout: float = Field(default=0.2, ge=0, lt=1)
    latent_dropout: float = Field(default=0.0, ge=0, lt=1)
    rnn_dropout: float = Field(default=0.2, ge=0, lt=1, description="between backbone layers")
    hidden_dropout: float = Field(default=0.0, ge=0, lt=1)

    @model_validator(mode="after")
    def _ordered(self) -> POSSMConfig:
        if not self.t_min < self.t_max:
            raise ValueError("t_min < t_max")
        return self


class FitConfig(TrainConfig):
    """How a POSSM is fitted: the training loop's fields and what is drawn in each step."""

    window_s: float = Field(default=1.0, gt=0, description="random windows of continuous recordings")
    unit_dropout: UnitDropout | UnitDropoutRate | None = UnitDropout()
    auxiliary_weight: float = Field(default=0.3, ge=0)
    interval_weights: dict[str, float] = Field(default_factory=dict, description="loss weight by epoch name")


class Preset(NamedTuple):
    """An architecture with the fit that belongs to it."""

    model: POSSMConfig
    fit: FitConfig


_PRESETS: dict[str, Preset] = {
    # the paper's LAMB rate of 4e-3 is too high for AdamW at this size: inner R2 .83 at 4e-3, .86 at 1e-3
    "possm-ss": Preset(POSSMConfig(), FitConfig(lr=1e-3)),
    "possm-direct": Preset(
        POSSMConfig(
            dim=256,
            encoder="additive",
            t_min=5e-3,
            readout_norm=False,
            readout_ffn=False,
            embedding_std=1.0,
            auxiliary_dim=2,
            latent_dropout=0.3,
            hidden_dropout=0.3,
        ),
        FitConfig(unit_dropout=UnitDropoutRate()),
    ),
}


def preset(name: str) -> Preset:
    """The preset of this name; an unknown one raises `InputError` that lists the known ones."""
    if name not in _PRESETS:
        raise InputError("name", name, f"one of {', '.join(sorted(_PRESETS))}")
    return _PRESETS[name]
